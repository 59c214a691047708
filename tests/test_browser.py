"""The web chat and the notebook's chat box in a real browser (Debian's chromium, driven by playwright)."""

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from scripted import MARKDOWN, scripted_model, serving, until

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SECONDS = 30_000  # how long playwright waits for anything, in milliseconds


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        reason = f"no {CHROMIUM}: apt-get install -y chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, **context settings) → a page; requests to other hosts and errors of its scripts fail the test."""
    contexts, wrong = [], []

    def open_page(url, **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or wrong.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.fixture
def server(make_model, tokenizer):
    with serving(scripted_model(make_model, tokenizer, pause=0.005), max_tokens=900) as (url, pool):
        yield url, pool


def say(page, text):
    page.fill("#entry", text)
    page.press("#entry", "Enter")


def answers(page):
    """What the model said, without notes, once it has ended."""
    page.wait_for_selector(".writing", state="detached")
    return [box.inner_text().split("\n")[0] for box in page.query_selector_all(".assistant")]


def test_page_streams_shows_tools_escapes_and_remembers(server, open_page):
    url, pool = server
    page = open_page(url)
    page.wait_for_selector("#model:has-text('sft-d3')")
    say(page, "sum")
    assert answers(page) == ["So 12/43 are 3 pies."]  # the signs of calls and results are not text
    assert page.inner_text(".tool.python") == "12/4" and page.inner_text(".tool.python_output") == "3"
    assert page.eval_on_selector(".tool.python", "node => getComputedStyle(node, '::before').content") == '"calc "'
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "markup")
    history = json.loads(sent.value.post_data)["messages"]
    assert [message["role"] for message in history] == ["user", "assistant", "user"]
    assert [part["type"] for part in history[1]["content"]] == ["text", "python", "python_output", "text"]
    assert "<script>" in answers(page)[1] and page.title() == "nanochat" and not page.query_selector("main b, main img")
    page.click("text=Answer again")
    assert len(answers(page)) == 2 and "tokens" in page.inner_text(".assistant:last-child .note")
    page.click("#clear")
    assert not page.query_selector(".message") and page.is_visible("#empty")


def test_page_stops_within_a_token_and_two_tabs_do_not_mix(server, open_page):
    url, pool = server
    one, two = open_page(url), open_page(url)
    say(one, "long")
    until(lambda: len(one.inner_text(".assistant")) > 40)
    say(two, "hello")
    assert answers(two) == ["You said: hello (né 日本)"]
    assert one.is_visible("#stop") and not one.is_visible("#send")
    one.click("#stop")
    one.wait_for_selector("text=stopped")
    said = answers(one)[0]
    until(lambda: pool.stats()["running"] == 0)
    assert pool.stats()["stopped"] == 1 and said.startswith("word word") and answers(one)[0] == said
    say(one, "again")
    assert answers(one)[1] == "You said: again (né 日本)"


def test_page_shows_errors_and_can_try_again(server, open_page):
    url, _ = server
    page = open_page(url)
    say(page, "fail")
    page.wait_for_selector(".error")
    assert "the model failed: RuntimeError" in page.inner_text(".error")
    say(page, "x" * 8001)
    page.wait_for_selector(".error:has-text('the message is longer than 8,000')")
    assert page.input_value("#entry") == "x" * 8001 and not page.query_selector(".user"), "given back, to be mended"
    assert not page.query_selector("text=Try again"), "it would be refused again"
    say(page, "é " * 3000)
    page.wait_for_selector(".error:has-text('the model reads 1,024')")
    assert page.input_value("#entry") == "é " * 2999 + "é"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {
        "message": "messages[7] is odd", "param": "messages[7].content"}}))
    say(page, "short")
    page.wait_for_selector(".error:has-text('messages[7] is odd')")
    assert page.input_value("#entry") == "" and page.inner_text(".user") == "short", "it is not this one's fault"
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "hello")
    page.wait_for_selector(".error:has-text('cannot be reached')")
    page.unroute("**/v1/chat/completions")
    page.click("text=Try again")
    assert answers(page) == ["You said: hello (né 日本)"] and not page.query_selector(".error")


def test_page_goes_on_however_long_the_chat_has_grown(server, open_page):
    url, _ = server
    page = open_page(url)
    page.evaluate("""for (let i = 0; i < 300; i++) messages.push({role: "user", content: "é".repeat(3000)},
                     {role: "assistant", content: [{type: "text", text: "é".repeat(9000)}]})""")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "hello")
    assert answers(page) == ["You said: hello (né 日本)"] and not page.query_selector(".error")
    assert len(sent.value.post_data_buffer) < 1 << 20
    assert page.evaluate("messages.length") == 602, "the page itself forgets nothing"
    say(page, "x" * 8001)
    page.wait_for_selector(".error:has-text('the message is longer than 8,000')")
    assert page.input_value("#entry") == "x" * 8001


def test_page_settings_phone_and_dark(server, open_page):
    url, _ = server
    page = open_page(url, viewport={"width": 375, "height": 667}, color_scheme="dark")
    page.click("#open")
    page.fill("#max_tokens", "3")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "hello")
    body = json.loads(sent.value.post_data)
    assert (body["max_tokens"], body["temperature"], body["top_k"]) == (3, 0.8, 50)
    page.wait_for_selector("text=cut at the longest length")
    say(page, "y" * 300)
    answers(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60, "dark"
    page.reload()
    page.click("#open")
    assert page.input_value("#max_tokens") == "3", "settings are kept"


def test_page_shows_markdown_as_elements_and_everything_else_as_text(server, open_page):
    url, _ = server
    page = open_page(url)
    say(page, "markdown")
    page.wait_for_selector(".writing", state="detached")
    box = page.query_selector(".assistant > span")
    assert [node.inner_text() for node in box.query_selector_all("strong")] == ["Plan", "bold"]
    assert [node.inner_text() for node in box.query_selector_all("code")] == ["code", "print('<i>')  # **no**"]
    tags = box.evaluate("node => [...node.querySelectorAll('*')].map(x => x.tagName)")
    assert sorted(tags) == ["CODE", "CODE", "PRE", "STRONG", "STRONG"]
    assert "not <b>tags</b>: 2**3**2" in box.inner_text() and "#### 40 [x](http://x.y)" in box.inner_text()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("text=Answer again")
        page.wait_for_selector(".writing", state="detached")
        say(page, "hello")
    assert json.loads(sent.value.post_data)["messages"][-1]["role"] == "user"
    page.wait_for_selector("text=You said: hello")
    with page.expect_download() as download:
        page.click("#open")
        page.click("#save")
    kept = json.loads(Path(download.value.path()).read_text())["messages"]
    assert [message["role"] for message in kept] == ["user", "assistant"] * 2
    assert kept[1]["content"] == [{"type": "text", "text": MARKDOWN}], "what was said, not how it is shown"


def spoken(body):
    """The log-probability entries of a streamed response, those of the words."""
    lines = [line[6:] for line in body.split("\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [entry for choice in choices for entry in choice["logprobs"]["content"]]


def test_page_shows_probabilities_only_when_asked(server, open_page):
    url, _ = server
    page = open_page(url)
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "hello")
    answers(page)
    assert "logprobs" not in json.loads(sent.value.post_data) and not page.query_selector(".token")
    page.click("#open")
    page.check("#chances")
    kept = []  # on the way through, since the browser need not keep what was streamed

    def pass_on(route):
        reply = route.fetch()
        kept.extend((json.loads(route.request.post_data), reply.text()))
        route.fulfill(response=reply)

    page.route("**/v1/chat/completions", pass_on)
    say(page, "hello")
    answers(page)
    asked, entries = kept[0], spoken(kept[1])
    assert asked["logprobs"] is True and asked["top_logprobs"] == 5
    tokens = page.query_selector_all(".token")
    assert len(tokens) == len(entries) > 10
    assert page.inner_text(".assistant:last-child > span") == "You said: hello (né 日本)"
    for token, entry in zip(tokens, entries):
        shade = token.evaluate("node => getComputedStyle(node).backgroundColor")
        opacity = float(re.findall(r"[\d.]+", shade)[-1])
        assert opacity == pytest.approx(0.75 * (1 - math.exp(entry["logprob"])), abs=0.01)
    assert page.is_hidden("#card")
    tokens[5].hover()
    card = page.inner_text("#card")
    for top in entries[5]["top_logprobs"]:
        assert f"{100 * math.exp(top['logprob']):.1f}%" in card
    assert len(page.query_selector_all("#card div")) in (5, 6) and len(page.query_selector_all("#card .said")) == 1
    page.hover("h1")
    assert page.is_hidden("#card")
    tokens[0].click()
    page.keyboard.press("ArrowRight")
    assert tokens[1].evaluate("node => node === document.activeElement") and page.is_visible("#card")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")
    page.uncheck("#chances")
    assert not page.query_selector(".token"), "what was said is shown as before"
    page.reload()
    assert not page.is_checked("#chances")


def test_page_shows_probabilities_beside_tools_escaped_and_on_a_phone(server, open_page):
    url, _ = server
    page = open_page(url, viewport={"width": 375, "height": 667}, has_touch=True, color_scheme="dark")
    page.click("#open")
    page.check("#chances")
    page.click("#open")
    say(page, "sum")
    assert answers(page) == ["So 12/43 are 3 pies."] and page.inner_text(".tool.python_output") == "3"
    assert not page.query_selector(".tool .token"), "what the calculator got and wrote is not coloured"
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "markup")
        said = answers(page)[1]
    assert set(json.loads(sent.value.post_data)["messages"][1]["content"][0]) == {"type", "text"}
    assert "<script>" in said and page.title() == "nanochat" and not page.query_selector("main b, main img, #card b")
    for token in page.query_selector_all(".assistant:last-child .token")[::7]:
        token.tap()
        box = page.query_selector("#card").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and box["y"] >= 0 and box["y"] + box["height"] <= 667
    page.tap("h1")
    page.wait_for_selector("#card", state="hidden")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_page_asks_for_the_key(make_model, tokenizer, open_page):
    with serving(scripted_model(make_model, tokenizer), api_key="open sesame") as (url, _):
        page = open_page(url)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        say(page, "hello")
        page.wait_for_selector(".error:has-text('wants its key')")
        page.fill("#key", "open sesame")
        page.press("#key", "Enter")
        page.wait_for_selector("#model:has-text('sft-d3')")
        assert not page.is_visible("#key")
        say(page, "hello")
        assert answers(page) == ["You said: hello (né 日本)"]
        page.reload()
        page.wait_for_selector("#model:has-text('sft-d3')")
        assert open_page(url).wait_for_selector("#key", state="visible"), "another visitor has no key"


NOTEBOOK = """
import sys
sys.path.insert(0, {tests!r})
from conftest import TEXTS
from scripted import ScriptedEngine, usual
from nanochat_lib.chat import ChatModel, ChatSession
from nanochat_lib.chat_box import ChatBox
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.tokenizer import Tokenizer
tokenizer = Tokenizer.train_from_iterator(iter(TEXTS), 309)
config = GPTConfig(sequence_len=1024, vocab_size=309, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
engine = ScriptedEngine(build_model(config, "cpu").eval(), tokenizer, usual(tokenizer), pause=0.02)
box = ChatBox(ChatSession(ChatModel(engine, tokenizer, "sft", "sft-d2", 1024)))
box
"""


class Lab(NamedTuple):
    url: str
    folder: Path


@pytest.fixture
def lab(tmp_path, base_dir):
    """JupyterLab on a folder with one notebook, chat.ipynb."""
    import nbformat

    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(tests=str(Path(__file__).parent)).strip())
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "chat.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
               "--IdentityProvider.token=", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(tmp_path / "lab.log", "wb") as log:
        environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_PREFER_ENV_PATH": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
    try:
        until(lambda: process.poll() is not None or not socket.socket().connect_ex(("127.0.0.1", port)), seconds=60)
        assert process.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
        yield Lab(f"http://127.0.0.1:{port}", tmp_path)
    finally:
        process.terminate()
        process.wait(20)


def run_all(page):
    """Run the notebook; a click that comes before JupyterLab is ready is lost, so look whether it did anything."""
    from playwright.sync_api import TimeoutError

    begun = ", ".join(f".jp-InputPrompt:has-text('[{sign}]')" for sign in "*1")
    for _ in range(10):
        page.click(".jp-CodeCell .cm-content")
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        with contextlib.suppress(TimeoutError):
            return page.wait_for_selector(begun, timeout=3000)


def test_notebook_chat_in_jupyterlab(lab, browser):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(90_000)
    page.goto(f"{lab.url}/lab/tree/chat.ipynb")
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')  # the kernel is there
    run_all(page)
    entry = page.wait_for_selector('input[placeholder="say something, then Enter"]')
    entry.fill("sum")
    entry.press("Enter")
    page.wait_for_selector(".chat-assistant .python_output")
    assert page.inner_text(".chat-assistant .python") == "calc 12/4"
    page.wait_for_selector("text=tokens/s, stop")
    entry.fill("long")
    entry.press("Enter")
    page.wait_for_selector(".chat-assistant >> nth=1 >> text=/word word word/")
    started = time.monotonic()
    page.click("button:has-text('stop')")
    page.wait_for_selector("text=tokens/s, stopped")
    assert time.monotonic() - started < 10, "500 words take longer than that"
    entry.fill("fail")
    entry.press("Enter")
    page.wait_for_selector(".chat-error:has-text('out of luck')")
    page.click("button:has-text('probabilities')")
    token = page.wait_for_selector(".chat-token >> nth=0")
    assert page.query_selector(".chat-forced .chat-mark") and not page.query_selector(".chat-card:visible")
    token.hover()
    card = page.wait_for_selector(".chat-card:visible")
    assert len(card.inner_text().splitlines()) >= 5 and "▸" in card.inner_text()
    token.click()
    page.hover(".chat-user")
    assert card.is_visible(), "a click holds it"
    assert card.bounding_box()["y"] > token.bounding_box()["y"] + 10, "under the answer, not over it"
    page.screenshot(path=lab.folder / "box.png")
    page.click("button:has-text('save')")
    page.wait_for_selector("text=/saved as chat-.*jsonl/")
    assert len(list(lab.folder.glob("chat-*.jsonl"))) == 1
    page.click("button:has-text('clear')")
    page.wait_for_selector(".chat-user", state="detached")
    # a second tab shows the same conversation, and there is still one answer at a time
    page.click(".jp-CodeCell .cm-content")
    page.keyboard.press("Control+s")
    page.wait_for_selector(".lm-TabBar-tab.lm-mod-current:not(.jp-mod-dirty):has-text('chat.ipynb')")
    other = browser.new_page()
    other.set_default_timeout(90_000)
    other.goto(f"{lab.url}/lab/tree/chat.ipynb")
    second = other.wait_for_selector('input[placeholder="say something, then Enter"]')
    second.fill("long")
    second.press("Enter")
    page.wait_for_selector("text=/word word word/")
    entry.fill("me too")
    entry.press("Enter")
    other.wait_for_selector("text=still answering")
    page.click("button:has-text('stop')")
    other.wait_for_selector("text=tokens/s, stopped")
    other.close()
    page.close()
