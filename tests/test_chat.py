"""Lesson 12: the session, the notebook's chat box, the terminal, the server."""

import contextlib
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import httpx
import openai
import pytest
import uvicorn
from scripted import ScriptedBatch, scripted_model, serving, until

from nanochat_lib.chat import Answer, AnswerReader, ChatModel, ChatSession, Piece, Sampling, best_stage, list_models
from nanochat_lib.chat_box import ChatBox, bubble
from nanochat_lib.checkpoint import save_checkpoint
from nanochat_lib.common import NanochatError, Runtime
from nanochat_lib.protocol import MAX_CHARACTERS, MAX_MESSAGES
from nanochat_lib.scripts.chat_cli import ChatCli, Printer, chat_cli
from nanochat_lib.scripts.chat_web import ChatWeb, Server, chat_web
from nanochat_lib.serving import Broken, Full, Job, Pool

GREEDY = Sampling(temperature=0, max_tokens=200)
PAUSE = 0.01
SUM = [{"type": "text", "text": "So "}, {"type": "python", "text": "12/4"}, {"type": "python_output", "text": "3"},
       {"type": "text", "text": " are 3 pies."}]


@pytest.fixture
def model(make_model, tokenizer):
    return scripted_model(make_model, tokenizer)


@pytest.fixture
def slow(make_model, tokenizer):
    return scripted_model(make_model, tokenizer, PAUSE)


@pytest.fixture
def checkpoint(base_dir, make_model, tokenizer):
    """make(stage, tag, **config) → a checkpoint of random weights under the base directory."""
    tokenizer.save(base_dir / "tokenizer")

    def make(stage="sft", tag="d3", **changes):
        folder = base_dir / {"base": "base", "sft": "chatsft", "rl": "chatrl"}[stage]
        folder = folder.with_name(folder.name + "_checkpoints") / tag
        save_checkpoint(folder, 7, make_model(**changes), None, {"tokenizer": tokenizer.fingerprint}, Runtime("cpu"))

    return make


# --- reading, asking, remembering -----------------------------------------------------------------------------------

def test_reader_holds_half_characters_back_and_sets_tools_apart(tokenizer):
    special, reader = tokenizer.encode_special, AnswerReader(tokenizer)
    script = [*tokenizer.encode("日é"), special("<|python_start|>"), *tokenizer.encode("1+1"), special("<|python_end|>"),
              special("<|output_start|>"), *tokenizer.encode("2"), special("<|output_end|>"),
              special("<|python_start|>"), *tokenizer.encode("2"), special("<|python_end|>"), *tokenizer.encode("end")]
    pieces = [piece for piece in map(reader.read, script) if piece]
    assert reader.parts == [{"type": kind, "text": text} for kind, text in (
        ("text", "日é"), ("python", "1+1"), ("python_output", "2"), ("python", "2"), ("text", "end"))]
    assert "".join(piece.text for piece in pieces) == "日é1+122end" and pieces[0].text == "日"
    assert [reader.parts[piece.part]["type"] for piece in pieces] == [piece.kind for piece in pieces]


def test_session_streams_remembers_and_sends_tool_calls_back_as_history(model, tokenizer):
    session, pieces = ChatSession(model, GREEDY), []
    answer = session.send("sum", pieces.append)
    assert answer.finish_reason == "stop" and len(pieces) > 4
    assert "".join(piece.text for piece in pieces if piece.kind == "text") == "So  are 3 pies."
    assert session.messages == [{"role": "user", "content": "sum"}, {"role": "assistant", "content": SUM}]
    prompt = session.send("and?").prompt
    ids, _ = tokenizer.render_conversation({"messages": [*session.messages[:2], {"role": "user", "content": "and?"}]})
    assert prompt == [*ids, tokenizer.encode_special("<|assistant_start|>")]
    assert session.messages[-1]["content"] == "You said: and? (né 日本)"
    session.clear()
    assert session.messages == [] and session.send("hi").prompt == model.prompt([{"role": "user", "content": "hi"}])


def test_length_context_and_top_k_reach_the_engine(make_model, tokenizer):
    model = scripted_model(make_model, tokenizer, context=128)
    assert ChatSession(model, replace(GREEDY, max_tokens=3)).send("long").finish_reason == "length"
    answer = ChatSession(model, Sampling(max_tokens=5000)).send("long")
    assert answer.finish_reason == "context" and answer.tokens + len(answer.prompt) == model.context + 1
    assert Sampling(top_k=0).settings()["top_k"] is None and Sampling(seed=3).settings()["seed"] == 3


def test_stop_takes_effect_within_a_token_and_keeps_what_was_said(slow):
    session, seen, after = ChatSession(slow, Sampling(max_tokens=1000)), [], []

    def show(piece):
        seen.append(piece)
        if len(seen) == 5:
            session.stop()
        elif len(seen) > 5:
            after.append(piece)

    answer = session.send("long", show)
    assert answer.finish_reason == "stopped" and not after
    assert session.messages[-1] == {"role": "assistant", "content": "".join(piece.text for piece in seen)}
    assert not session.busy and session.send("hi").finish_reason == "stop"


def test_one_answer_at_a_time_and_clear_ends_it(slow):
    session = ChatSession(slow, Sampling(max_tokens=1000))
    thread = threading.Thread(target=session.send, args=("long",))
    thread.start()
    until(lambda: session.answer and session.answer.tokens)
    with pytest.raises(NanochatError, match="still answering"):
        session.send("me too")
    with pytest.raises(NanochatError, match="still answering"):
        session.regenerate()
    session.clear()
    thread.join(5)
    assert session.messages == [] and not session.busy


def test_regenerate_answers_the_same_question_anew(model):
    session = ChatSession(model, Sampling(max_tokens=50))
    with pytest.raises(NanochatError, match="nothing to answer"):
        session.regenerate()
    first = session.send("hi")
    again = session.regenerate()
    assert again.prompt == first.prompt and len(session.messages) == 2


def test_a_question_that_fails_leaves_no_trace(model):
    session = ChatSession(model, GREEDY)
    session.send("hi")
    before = list(session.messages)
    with pytest.raises(RuntimeError, match="out of luck"):
        session.send("fail")
    with pytest.raises(NanochatError, match="tokens, the model reads 1,024"):
        session.send("x " * 2000)
    assert session.messages == before and session.send("hi").finish_reason == "stop"


def test_what_does_not_fit_is_left_out_oldest_first(make_model, tokenizer):
    model = scripted_model(make_model, tokenizer, context=256)
    session = ChatSession(model, GREEDY)
    for number in range(4):
        session.send(f"{number} " + "word " * 4)
    answer = session.send("last")
    assert session.forgotten > 0 and session.forgotten % 2 == 0 and len(answer.prompt) <= model.context * 3 // 4
    assert len(session.messages) == 10, "the history itself stays whole"
    system = {"role": "system", "content": "be brief"}
    assert model.fit([system, *session.messages[:-1]])[0] == system


def test_what_is_left_out_is_as_little_as_possible_and_found_by_encoding_little(make_model, tokenizer, monkeypatch):
    model, dice = scripted_model(make_model, tokenizer, context=256), random.Random(5)
    for length in (1, 3, 21, 499):
        talk = [{"role": ("user", "assistant")[place % 2], "content": "word é " * dice.randrange(9)}
                for place in range(length)]
        due = next(talk[start:] for start in range(0, length, 2)
                   if start == length - 1 or len(model.prompt(talk[start:])) <= 192)
        encoded, encode = [], type(tokenizer).encode
        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "encode", lambda *args, **more: encoded.append(0) or encode(*args, **more))
            assert model.fit(talk) == due
        assert len(encoded) <= len(due) + 2, "each message that is kept, and the first exchange that is not"
    base = scripted_model(make_model, tokenizer, stage="base", context=256)
    assert base.fit(talk) == talk, "it reads the last message alone: there is nothing to leave out"


def test_a_base_model_continues_the_text_itself(make_model, tokenizer):
    base = scripted_model(make_model, tokenizer, stage="base")
    answer = ChatSession(base, GREEDY).send("Anna lives")
    assert answer.prompt == tokenizer.encode("Anna lives", prepend="<|bos|>")


def test_models_on_disk_best_first_and_none_named_with_its_command(base_dir, checkpoint):
    with pytest.raises(NanochatError, match="no model to talk to.*nanochat_lib.pipeline --preset laptop"):
        ChatModel.load()
    checkpoint("base")
    assert best_stage() == "base"
    checkpoint("sft")
    checkpoint("rl", "d2", n_layer=2)
    (base_dir / "chatrl_checkpoints" / "d9").mkdir()  # nothing whole in it
    assert list_models() == [("rl", "d2"), ("sft", "d3"), ("base", "d3")]
    loaded = ChatModel.load(device="cpu")
    assert (loaded.name, loaded.context) == ("rl-d2", 64) and ChatModel.load("sft", device="cpu").stage == "sft"
    with pytest.raises(NanochatError, match="stage 'chat' is unknown"):
        ChatModel.load("chat")


# --- the notebook's box ---------------------------------------------------------------------------------------------

def test_box_streams_shows_tools_and_escapes(base_dir, model):
    box = ChatBox(ChatSession(model))
    for text in ("sum", "markup"):
        box.entry.value = text
        box.send()
        box.thread.join(10)
    page = box.view.value
    assert 'class="python"' in page and ">calc 12/4<" in page and ">= 3<" in page and "tokens/s, stop" in page
    assert "&lt;script&gt;" in page and "<script>" not in page and "<img" not in page and box.entry.value == ""
    box.regenerate()
    box.thread.join(10)
    assert len(box.session.messages) == 4
    box.clear()
    assert "markup" not in box.view.value


def test_box_refuses_a_second_send_stops_and_shows_errors(base_dir, slow):
    box = ChatBox(ChatSession(slow))
    box.sliders["max_tokens"].value = 1000
    box.entry.value = "long"
    box.send()
    first = box.thread
    until(lambda: "word word" in box.view.value)
    box.entry.value = "another"
    box.send()
    assert "still answering" in box.view.value and box.entry.value == "another" and box.thread is first
    box.session.stop()
    first.join(5)
    assert "stopped" in box.view.value and len(box.session.messages) == 2
    box.entry.value = "fail"
    box.send()
    box.thread.join(10)
    assert "chat-error" in box.view.value and "out of luck" in box.view.value and box.entry.value == "fail"


def test_box_changes_models_and_keeps_the_conversation(checkpoint):
    checkpoint("sft")
    checkpoint("base")
    box = ChatBox()
    box.sliders["max_tokens"].value = 4
    box.entry.value = "hi"
    box.send()
    box.thread.join(10)
    assert box.session.model.name == "sft-d3"
    box.picker.value = ("base", "d3")
    box.thread.join(10)
    assert box.session.model.name == "base-d3" and len(box.session.messages) == 2
    assert bubble("assistant", "") and not box.error


def test_box_shows_the_model_in_use_after_one_that_could_not_be_loaded(checkpoint, base_dir):
    checkpoint("sft")
    checkpoint("base")
    box = ChatBox()
    shutil.rmtree(base_dir / "base_checkpoints")
    box.picker.value = ("base", "d3")
    thread = box.thread
    thread.join(10)
    assert "no base checkpoint" in box.error and box.session.model.name == box.picker.label == "sft-d3"
    assert box.thread is thread, "the model in use is not loaded once more"


# --- the terminal ---------------------------------------------------------------------------------------------------

CLI = [sys.executable, "-m", "nanochat_lib.scripts.chat_cli", "--device-type=cpu"]


def test_cli_answers_one_prompt_and_without_a_model_says_what_to_run(base_dir, checkpoint, run_module, capsys):
    with pytest.raises(NanochatError, match="no model to talk to"):
        chat_cli(ChatCli(prompt="hi"))
    checkpoint()
    done = run_module("nanochat_lib.scripts.chat_cli", "-p", "hi", "-m", 8, "--seed=1")
    assert done.returncode == 0 and "[length]" in done.stdout, done.stderr
    chat_cli(ChatCli(prompt="hi", max_tokens=8, seed=1, device_type="cpu"))
    assert capsys.readouterr().out == done.stdout


def test_cli_prints_no_control_characters_of_the_models(capsys):
    printer = Printer()
    printer(Piece("text", "a\x1b[2J\x1b]0;owned\x07b\r\n\tc\x9b1m\x7f", 0))
    printer(Piece("python", "1\x08+1", 1))
    printer.end("")
    assert capsys.readouterr().out == "a[2J]0;ownedb\n\tc1m[1+1]\n"


def test_cli_goes_on_where_the_terminal_lacks_a_character(model, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", plain)
    monkeypatch.setattr("nanochat_lib.scripts.chat_cli.ChatModel.load", lambda *_: model)
    chat_cli(ChatCli(prompt="hi", device_type="cpu", seed=1))
    plain.flush()
    assert plain.buffer.getvalue() == b"You said: hi (n? ??)\n"


class Terminal:
    """A command in a terminal of its own: what is typed reaches it as from a keyboard, Ctrl-C included."""

    def __init__(self, *command):
        self.pid, self.handle = pty.fork()
        if not self.pid:
            os.environ.update(TERM="dumb", OMP_NUM_THREADS="1")
            os.chdir(os.path.dirname(os.path.dirname(__file__)))
            os.execv(command[0], command)
        self.seen, self.read = "", 0

    def type(self, text):
        os.write(self.handle, text.encode())

    def expect(self, pattern, seconds=120):
        """Wait for a pattern in what was printed since the last match."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.seen, self.read)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[self.read:]!r}"
            if select.select([self.handle], [], [], 1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    self.seen += os.read(self.handle, 4096).decode(errors="replace")
        self.read = found.end()
        return found

    def wait(self):
        """The exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_cli_in_a_terminal_ctrl_c_ends_the_answer_not_the_chat(base_dir, checkpoint):
    checkpoint(sequence_len=100_000)
    terminal = Terminal(*CLI, "-m", "90000", "--seed", "1")
    try:
        terminal.expect(r"sft-d3: /clear [^>]*> ")
        terminal.type("hello\r")
        terminal.expect(r"hello[^>]{40}")  # the echo, and an answer that has begun
        terminal.type("\x03")
        terminal.expect(r"\[stopped\][^>]*> ")
        time.sleep(0.5)  # Python's readline loses a Ctrl-C that comes while it prints the prompt
        terminal.type("\x03")  # at the prompt: help, not the end
        terminal.expect(r"/quit leaves[^>]*> ")
        terminal.type("/retry\r")
        terminal.expect(r"/retry[^>]{40}")
        terminal.type("\x03")
        terminal.expect(r"\[stopped\][^>]*> ")
        terminal.type("\x1b[A")  # arrow up: the earlier line
        terminal.expect("/retry")
        terminal.type("\x15/clear\r")
        terminal.expect("cleared[^>]*> ")
        terminal.type("/retry\r")
        terminal.expect("error: nothing to answer yet[^>]*> ")
        terminal.type("/quit\r")
        terminal.expect("quit")
        assert terminal.wait() == 0 and "Traceback" not in terminal.seen
    finally:
        with contextlib.suppress(OSError):
            os.kill(terminal.pid, signal.SIGKILL)


def test_cli_saves_clears_and_leaves_at_the_end_of_its_input(base_dir, checkpoint, tmp_path, monkeypatch, capsys):
    checkpoint()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    lines = iter(["/save", "hi", "/save", "clear", "/retry", None])
    chat_cli(ChatCli(device_type="cpu", max_tokens=8, seed=1))
    out = capsys.readouterr().out
    assert out.count("error: nothing to save yet") == 1 and "cleared" in out and "error: nothing to answer yet" in out
    assert len(list(tmp_path.glob("chat-*.md"))) == 1 and f"saved as {next(tmp_path.glob('chat-*.jsonl')).name}" in out


# --- the server -----------------------------------------------------------------------------------------------------

@pytest.fixture
def client(model):
    """An HTTP client of a quick scripted server."""
    with serving(model) as (url, pool), httpx.Client(base_url=url, timeout=20) as client:
        client.pool = pool
        yield client


def say(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def test_the_official_client_whole_and_streamed(model):
    with serving(model) as (url, _), openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as official:
        [card] = official.models.list().data
        assert card.id == "sft-d3"

        def ask(text, **more):
            return official.chat.completions.create(model="sft-d3", **say(text, **more))

        whole = ask("sum")
        assert whole.choices[0].message.content == "So  are 3 pies." and whole.choices[0].finish_reason == "stop"
        assert whole.choices[0].message.parts == SUM
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 10
        *chunks, last = ask("sum", stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "So  are 3 pies."
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert last.usage == whole.usage and last.choices == []
        tools = [chunk.choices[0].delta.part for chunk in chunks if hasattr(chunk.choices[0].delta, "part")]
        assert tools[-1] == {"type": "python_output", "text": "3"}
        assert ask("hi", max_tokens=2).choices[0].finish_reason == "length"
        told = ask("hi", stop=["(n", "x"], logprobs=True, top_logprobs=2, max_completion_tokens=50).choices[0]
        assert told.message.content == "You said: hi " and told.finish_reason == "stop"
        assert all(len(entry.top_logprobs) == 2 for entry in told.logprobs.content)
        with official.chat.completions.create(model="sft-d3", stream=True, **say("long")) as stream:
            assert next(iter(stream)).choices[0].delta.role == "assistant"  # and away
        with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
            ask("hi", logit_bias={"5": 1})
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            official.chat.completions.create(model="gpt-4o", **say("hi"))
        with pytest.raises(openai.BadRequestError, match="temperature must be a number from 0 to 2"):
            ask("hi", temperature=3)
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            ask("fail")
        with pytest.raises(openai.APIError, match="the model failed"):
            list(ask("fail", stream=True))
        assert ask("hi").choices[0].finish_reason == "stop"


TOO_MANY = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * (MAX_MESSAGES // 2)
def talk(*pairs):
    """A request of messages (role, content)."""
    return {"messages": [{"role": pair[0], "content": pair[1]} if isinstance(pair, tuple) else pair for pair in pairs]}


BAD = [
    ({}, "messages must be a list"), ({"messages": []}, "messages must be a list"),
    ({"messages": "hi"}, "messages must be"), ({"messages": [*TOO_MANY, TOO_MANY[0]]}, "1 to 500 messages"),
    (say("x" * (MAX_CHARACTERS + 1)), "longer than 8,000 characters"),
    (talk(("user", "x" * (MAX_CHARACTERS + 1)), ("assistant", "x"), ("user", "x")), "[0] is longer than 8,000"),
    (talk(("user", "x"), ("assistant", "x" * 32_000), ("user", "x")), "32,000 characters"),
    (talk(*[(role, "x" * 7000) for role in ("user", "assistant", "user", "assistant", "user")]), "32,000 characters"),
    ({"messages": [{"role": "user"}]}, "content must be"),
    (talk(("user", "x"), ("assistant", None), "hi"), "needs a role"), (talk(("tool", "x")), "needs a role"),
    (talk((["user"], "x")), "needs a role"), (talk(("assistant", "x")), "where system or user should speak"),
    (talk(("user", "x"), ("system", "x")), "where assistant should speak"),
    (talk(("user", "x"), ("assistant", "x")), "last message must be by user"),
    (say(5), "content must be a string"), (say([{"type": "image_url"}]), "content must be a string"),
    (say([{"type": "python", "text": "1"}]), "content must be a string"),
    (say("x", temperature=-0.1), "temperature"), (say("x", temperature="1"), "temperature"),
    (say("x", temperature=True), "temperature"), (say("x", temperature=float("nan")), "temperature"),
    (say("x", top_k=201), "top_k must be an integer from 0 to 200"), (say("x", top_k=1.5), "top_k"),
    (say("x", max_tokens=0), "max_tokens"), (say("x", max_completion_tokens=4097), "max_completion_tokens"),
    (say("x", seed=1e300), "seed"), (say("x", top_p=0), "top_p"), (say("x", n=17), "n must be an integer from 1 to 16"),
    (say("x", tools=[{"type": "function"}]), "tools is not supported"), (say("x", model=["a"]), "there is no model"),
    (say("word " * 1500), "the model reads 1,024"), (say("x", stream="yes"), "stream must be true or false"),
    (say("x", stream_options=3), "stream_options"), (say("x", stop=5), "stop must be"),
    (say("x", stop=[""]), "stop must be"),
    (say("x", stop=["a"] * 5), "up to 4"), (say("x", stop="x" * 201), "1 to 200 characters"),
    (say("x", logprobs=1), "logprobs must be true or false"), (say("x", top_logprobs=2), "together with logprobs"),
    (say("x", logprobs=True, top_logprobs=21), "top_logprobs"),
    (say("x", modalities=["audio"]), "modalities is not supported"),
    (say("x", response_format={"type": "json_object"}), "response_format is not supported"),
]


def test_bad_requests_are_refused_in_openais_format(client):
    for path in ("/v1/chat/completions", "/chat/completions"):
        for body, message in BAD:
            answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            error = answer.json()["error"]
            assert answer.status_code in (400, 404) and message in error["message"], (str(body)[:200], error)
            assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    headers = {"Content-Type": "application/json"}
    raw = [(b"", 400, headers), (b"{", 400, headers), (b"[1]", 400, headers), (b"[" * 100_000, 400, headers),
           (b"\xff\xfe", 400, headers), (b" " * (1 << 21), 413, headers), (b"{}", 415, {"Content-Type": "text/plain"})]
    for content, status, headers in raw:
        answer = client.post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == status and answer.json()["error"]["message"], content[:20]
    assert client.get("/nowhere").json()["error"]["message"] == "Not Found"
    assert client.get("/v1/chat/completions").status_code == 405
    for path in ("/", "/health", "/v1/models"):
        other = client.get(path, headers={"Host": "evil.example:80"})
        assert other.status_code == 400 and other.json()["error"]["type"] == "invalid_request_error"
        assert "127.0.0.1" in other.json()["error"]["message"]
    assert client.get("/stats").json()["failed"] == 0
    answer = client.post("/v1/chat/completions", json=say("hi"))
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_good_requests_of_other_clients(client):
    """System messages, parts, two messages in a row, nulls, half a surrogate pair, the alias, a chat too long."""
    def content(body, path="/v1/chat/completions"):
        answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    assert content(say("hi", temperature=None, stop=None, n=1, top_p=0.9, user="me", seed=-5)) == "You said: hi (né 日本)"
    assert content(say([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).startswith("You said: ab")
    assert content(talk(("user", "a"), ("user", "b")), "/chat/completions") == "You said: a\n\nb (né 日本)"
    assert "yes\n\nhi" in content(talk(("developer", "yes"), ("user", "hi")))
    assert content(talk(("user", "sum"), ("assistant", SUM), ("user", "ok"))).startswith("You said: ok")
    assert content(say("\ud800 x")).startswith("You said: ")
    long = talk(*[(role, "word " * 60) for role in ("user", "assistant") * 8], ("user", "hi"))
    assert content({**long, "truncation": "auto"}).startswith("You said: hi")


def test_a_chat_beyond_every_limit_goes_on_with_its_newest_messages(client):
    """With truncation "auto" the limits are those of what is left; what an answer said is never too long by itself."""
    auto, word = {"truncation": "auto"}, [("user", "a"), ("assistant", "b")]

    def ask(*pairs, **more):
        answer = client.post("/v1/chat/completions", json={**talk(*pairs), **more})
        return answer.json().get("error", {}).get("message") or answer.json()["choices"][0]["message"]["content"]

    kept = [("user", "hello"), ("assistant", "é" * 8001), ("user", "hi")]
    assert "the model reads 1,024" in ask(*kept), "no limit of characters"
    for pairs in (kept, [("user", "x"), ("assistant", "x" * 40_000), ("user", "hi")], [*word * 3000, ("user", "hi")],
                  [("user", "x" * 9000), ("assistant", "x"), ("user", "hi")],
                  [*[("user", "a")] * 600, *word, ("user", "hi")],
                  [("user", "x" * 7000), ("assistant", "x" * 7000)] * 9 + [("user", "hi")]):
        assert ask(("system", "be brief"), *pairs, **auto).endswith("hi (né 日本)"), str(pairs)[:80]
    assert ask(*word, ("user", "x" * 8001), **auto) == "messages[2] is longer than 8,000 characters"
    assert ask(*word, *[("user", "x" * 7000)] * 5, **auto) == "the messages are longer than 32,000 characters in all"
    assert "1 to 500 messages" in ask(*word, *[("user", "x")] * 501, **auto)
    assert "the model reads 1,024" in ask(*word, ("user", "é " * 3000), **auto)


def test_health_models_stats_and_page(client):
    assert client.get("/health").json() == {"status": "ok", "model": "sft-d3"}
    card = client.get("/v1/models").json()["data"][0]
    assert card["context"] == 1024 and card["defaults"]["max_tokens"] == 200
    client.post("/v1/chat/completions", json=say("hi"))
    stats = client.get("/stats").json()
    assert stats["finished"] == 1 and stats["running"] == stats["waiting"] == 0 and stats["completion_tokens"] > 0
    page = client.get("/")
    policy = page.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'",
            "form-action 'none'"} < set(policy)
    [script] = [rule for rule in policy if rule.startswith("script-src")]
    assert "unsafe" not in script, "the browser's tests show that the page's own script may run"
    assert "http://" not in page.text and "https://" not in page.text and "innerHTML" not in page.text


def test_answers_are_written_side_by_side_and_never_crossed(slow):
    with serving(slow, rows=4) as (url, pool):
        seen = []

        def ask(number):
            answer = httpx.post(url + "/v1/chat/completions", json=say(f"number {number}"), timeout=60).json()
            seen.append((number, answer["choices"][0]["message"]["content"]))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: pool.stats()["running"] == 4 and pool.stats()["waiting"] == 4)
        for thread in threads:
            thread.join(30)
        assert sorted(seen) == [(n, f"You said: number {n} (né 日本)") for n in range(8)]


def test_a_full_line_answers_429_and_clients_that_leave_free_their_rows(slow):
    with (serving(slow, rows=1, max_waiting=1, max_tokens=900) as (url, pool),
          httpx.Client(base_url=url, timeout=20) as client):
        with client.stream("POST", "/v1/chat/completions", json=say("long", stream=True)) as first:
            lines = first.iter_lines()
            assert json.loads(next(lines)[6:])["choices"][0]["delta"]["role"] == "assistant"
            leaving = httpx.Client(timeout=0.5)
            with pytest.raises(httpx.ReadTimeout):  # waits in line, then goes away
                leaving.post(url + "/v1/chat/completions", json=say("long"))
            until(lambda: pool.waiting[0].answer.stopped.is_set())
            told, left = [], pool.waiting[0]
            left.deliver = lambda event, deliver=left.deliver: (told.append(event), deliver(event))
            waiting = threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs={"json": say("hi")})
            waiting.start()
            until(lambda: pool.stats()["waiting"] == 1 and not pool.waiting[0].answer.stopped.is_set())
            assert told == [None], "whoever waits for the one that left is told"
            refused = client.post("/v1/chat/completions", json=say("hi"))
            assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.headers["retry-after"] == "1"
            with pytest.raises(openai.RateLimitError):
                official = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
                official.chat.completions.create(model="sft-d3", **say("hi"))
        waiting.join(10)  # the streaming client has gone: the one in line is served
        until(lambda: pool.stats()["running"] == 0)
        stats = pool.stats()
        assert stats["finished"] == 1 and stats["stopped"] == 2 and stats["refused"] == 2
        assert stats["completion_tokens"] < 800, "the long answer did not run to its end"


def test_replicas_share_the_work_and_outlive_an_error(make_model, tokenizer):
    models = [scripted_model(make_model, tokenizer, PAUSE) for _ in range(2)]
    pool, done = Pool(models, max_waiting=2, rows=2), []

    def job(text):
        return Job(Answer(models[0], [{"role": "user", "content": text}], Sampling(max_tokens=900)),
                   lambda event: done.append((text, event)) if event is None or isinstance(event, Exception) else None)

    long = [job("long") for _ in range(4)]
    for question in long:
        pool.submit(question)
    until(lambda: [len(replica.jobs) for replica in pool.replicas] == [2, 2])
    waiting = [job("hi"), job("fail")]
    for question in waiting:
        pool.submit(question)
    with pytest.raises(Full):
        pool.submit(job("hi"))
    for question in long:
        question.answer.stop()
    until(lambda: {("long", None), ("hi", None), ("fail", None)} <= set(done))
    assert any(isinstance(event, RuntimeError) for text, event in done if text == "fail")
    again = job("again")
    pool.submit(again)
    until(lambda: ("again", None) in done)
    assert again.answer.content == "You said: again (né 日本)"


def test_a_replica_that_breaks_leaves_the_others_and_the_last_one_says_so(make_model, tokenizer):
    models = [scripted_model(make_model, tokenizer, PAUSE) for _ in range(2)]
    with serving(*models, rows=1) as (url, pool), httpx.Client(base_url=url, timeout=20) as client:
        def gone(*_, **__):
            raise RuntimeError("device lost")

        for left in (1, 0):
            pool.replicas[0].model.engine.batch = gone  # its next batch cannot be made
            pool.replicas[0].batch.step = gone
            broken, seen = pool.replicas[0], []
            until(lambda: seen.append(client.post("/v1/chat/completions", json=say("hi")).status_code) or broken.broken)
            until(lambda: len(pool.replicas) == left)
            assert seen[-1] == 500 and client.get("/health").status_code == (200 if left else 503)
        refused = client.post("/v1/chat/completions", json=say("hi"))
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_whose_thread_dies_is_gone_and_its_talkers_are_told(model):
    with serving(model) as (url, pool):
        def die(*_):
            raise SystemExit  # no Exception, which it would survive

        pool.replicas[0].step = die
        answer = httpx.post(url + "/v1/chat/completions", json=say("hi"), timeout=20)
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
        assert httpx.get(url + "/health").status_code == 503 and pool.stats()["failed"] == 1


def test_a_replica_has_answered_before_the_first_question_comes(model, monkeypatch):
    sizes, choose = [], ScriptedBatch.choose
    monkeypatch.setattr(ScriptedBatch, "choose", lambda batch: sizes.append(len(batch.running)) or choose(batch))
    pool = Pool([model])
    [batch] = model.engine.batches
    assert batch is pool.replicas[0].batch and not pool.replicas[0].jobs, "the very batch that will serve"
    assert sizes == [1, 1, 2, 2] and pool.stats()["finished"] == pool.stats()["completion_tokens"] == 0
    model.engine.script = lambda question: RuntimeError("out of luck")
    with pytest.raises(RuntimeError, match="out of luck"):
        Pool([model])


@pytest.mark.parametrize("wrong, said", [
    ({"rows": 0}, "--rows 0: .* 1 to"), ({"max_waiting": -1}, "--max-waiting -1: .* 0 to"),
    ({"temperature": -1}, "--temperature -1: .* 0 to 2"), ({"temperature": float("nan")}, "--temperature nan"),
    ({"top_k": -1}, "--top-k -1: .* 0 to 200"), ({"max_tokens": 0}, "--max-tokens 0: .* 1 to 4,096")])
def test_settings_that_no_request_could_have_are_refused_at_the_start(wrong, said, model, monkeypatch):
    monkeypatch.setattr("nanochat_lib.scripts.chat_web.Server.run", lambda *_: None)
    monkeypatch.setattr("nanochat_lib.scripts.chat_web.ChatModel.load", lambda *_: model)
    with pytest.raises(NanochatError, match=said):
        chat_web(ChatWeb(device_type="cpu", **wrong))


def test_questions_in_line_are_told_when_the_last_replica_breaks(slow):
    pool, done = Pool([slow], rows=1), []
    jobs = [Job(Answer(slow, [{"role": "user", "content": text}], Sampling(max_tokens=900)),
                lambda event, text=text: done.append((text, type(event).__name__))) for text in ("long", "hi")]
    for job in jobs:
        pool.submit(job)
    until(lambda: done and pool.stats()["waiting"] == 1)

    def gone(*_, **__):
        raise RuntimeError("device lost")

    slow.engine.batch = gone
    pool.replicas[0].batch.step = gone
    until(lambda: ("hi", "NoneType") in done and ("long", "NoneType") in done)
    assert ("hi", "Broken") in done and ("long", "RuntimeError") in done and pool.stats()["failed"] == 2
    with pytest.raises(Broken):
        pool.submit(jobs[1])


def test_a_server_that_is_stopped_tells_its_talkers(slow):
    with serving(slow, rows=1) as (url, pool):
        with httpx.stream("POST", url + "/v1/chat/completions", json={**say("long", max_tokens=900), "stream": True},
                          timeout=20) as answer:
            lines = answer.iter_lines()
            until(lambda: next(lines).startswith("data: {"))
            Server(uvicorn.Config(lambda: None), pool).handle_exit(signal.SIGINT, None)
            errors = [json.loads(line[6:])["error"] for line in lines if line.startswith("data: {") and '"error"' in line]
        assert [error["message"] for error in errors] == ["the server was stopped"], errors
        until(lambda: pool.stats()["running"] == 0)


def test_the_command_serves_on_loopback_and_says_where(base_dir, checkpoint):
    with pytest.raises(NanochatError, match="1 to 1 replicas"):
        chat_web(ChatWeb(num_gpus=3, device_type="cpu"))
    with pytest.raises(NanochatError, match="no model to talk to"):
        chat_web(ChatWeb())
    checkpoint()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nanochat_lib.scripts.chat_web", f"--port={port}", "--device-type=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == f"sft-d3 on cpu: http://127.0.0.1:{port}"
        until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert json.load(answer)["status"] == "ok"
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=say("hi", max_tokens=5), timeout=20)
        assert 1 <= answer.json()["usage"]["completion_tokens"] <= 5
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(15) is not None
