"""What OpenAI's clients send beside the messages: stop strings, log-probabilities, keys; and other web sites."""

import asyncio
import json
import math
import socket

import httpx
import openai
import pytest
import torch
from scripted import scripted_model, serving, until

from nanochat_lib.batch import Token
from nanochat_lib.chat import Answer, AnswerReader, ChatModel, Sampling
from nanochat_lib.engine import Engine
from nanochat_lib.protocol import Reply, read_request
from nanochat_lib.scripts.chat_web import ChatWeb, chat_web, make_app
from nanochat_lib.serving import Pool


@pytest.fixture
def model(make_model, tokenizer):
    return scripted_model(make_model, tokenizer)


def ask(url, text, **more):
    body = {"messages": [{"role": "user", "content": text}], **more}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(url, text, **more):
    """(text, finish reason) of a streamed answer, and all its events."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True, **more}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=20) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    return "".join(choice["delta"].get("content") or "" for choice in choices), choices[-1]["finish_reason"], events


# --- stop strings ---------------------------------------------------------------------------------------------------

def by_hand(text, stops):
    """The text before the first stop string."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[:min(places, default=len(text))]


STOPS = [("w",), ("ord",), ("d w",), ("known",), ("né",), ("日本)",), ("xyz", "me: b"), ("aab", "aac"), ()]


@pytest.mark.parametrize("stop", STOPS)
def test_reader_ends_before_a_stop_string_however_its_tokens_fall(tokenizer, stop):
    for text in ("a word well known: né 日本)", "You name me: b", "aaaaab", "aaaab and aac", "wor", ""):
        for cut in (1, 2, 3, 100):  # tokens of one byte, or as the tokenizer has it
            chunks = [text[i:i + cut] for i in range(0, len(text), cut)]
            script = [id_ for chunk in chunks for id_ in tokenizer.encode(chunk)]
            reader, shown = AnswerReader(tokenizer, stop), ""
            for place, token in enumerate([*script, tokenizer.encode_special("<|assistant_end|>")]):
                piece = reader.read(token, last=place == len(script))
                shown += piece.text if piece else ""
                assert by_hand(text, stop).startswith(shown), "nothing is shown that must be taken back"
            assert shown == by_hand(text, stop) and reader.ended == any(s in text for s in stop)


def test_stop_strings_end_the_answer_and_free_its_row(model):
    with serving(model) as (url, pool):
        whole = ask(url, "long", stop=["word wor", "x"], max_tokens=900)
        assert whole["choices"][0]["message"]["content"] == "" and whole["choices"][0]["finish_reason"] == "stop"
        text, reason, _ = streamed(url, "hello", stop=" (n")
        assert (text, reason) == ("You said: hello", "stop")
        text, reason, _ = streamed(url, "hello", stop=["nowhere", "said: hellos"])
        assert (text, reason) == ("You said: hello (né 日本)", "stop")
        until(lambda: pool.stats()["running"] == 0)
        stats = pool.stats()
        assert stats["finished"] == 3 and stats["stopped"] == 0 and stats["completion_tokens"] < 100
    session_answer = Answer(model, [{"role": "user", "content": "hello"}], Sampling(stop=("said",)))
    assert "".join(piece.text for piece in session_answer) == "You " and session_answer.finish_reason == "stop"


# --- log-probabilities ----------------------------------------------------------------------------------------------

@pytest.fixture
def plain(make_model, tokenizer):
    """The real engine on random weights: it says what the weights say."""
    network = make_model(sequence_len=256)
    return ChatModel(Engine(network, tokenizer), tokenizer, "sft", "sft-d3", 256)


def test_logprobs_are_the_models_own_whole_and_streamed(plain, tokenizer):
    settings = dict(temperature=1.0, seed=3, max_tokens=24, logprobs=True, top_logprobs=3)
    with serving(plain) as (url, _):
        whole, (text, _, events) = ask(url, "hello", **settings), streamed(url, "hello", **settings)
        bare = ask(url, "hello", temperature=0, max_tokens=4)
    content = whole["choices"][0]["logprobs"]["content"]
    news = [event["choices"][0]["logprobs"] for event in events if event["choices"]]
    spoken = [entry for some in news if some for entry in some["content"]]
    assert spoken == content and bare["choices"][0]["logprobs"] is None and len(content) > 3
    answer = Answer(plain, [{"role": "user", "content": "hello"}], Sampling(1.0, max_tokens=24, seed=3))
    assert "".join(piece.text for piece in answer if piece.kind == "text") == text
    ids = answer.prompt + [token.id for _, token in answer.said]
    with torch.inference_mode():
        logits = plain.engine.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    words = [(place, token) for place, (kind, token) in enumerate(answer.said, len(answer.prompt))
             if kind == "text" and token.id < len(tokenizer.tokens)]
    assert len(words) == len(content)
    for (place, token), entry in zip(words, content):
        assert entry["token"] == tokenizer.id_to_token(token.id) and bytes(entry["bytes"]) == tokenizer.tokens[token.id]
        assert math.isclose(entry["logprob"], logits[place - 1, token.id], abs_tol=2e-3)
        best = logits[place - 1].topk(3).values.tolist()
        assert [round(top["logprob"] - expected, 2) for top, expected in zip(entry["top_logprobs"], best)] == [0, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_log_probabilities_of_temperature_one(plain, tokenizer, stream):
    """Whatever the answer is sampled with, they are those of a forward pass; a chunk has those of its own text."""
    request = dict(model="", messages=[{"role": "user", "content": "hello"}], seed=5, max_tokens=24, temperature=0.4,
                   top_p=0.9, logprobs=True, top_logprobs=5, stream=stream)
    with serving(plain) as (url, _):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        reply = client.chat.completions.create(**request)
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    answer = Answer(plain, request["messages"], Sampling(0.4, max_tokens=24, seed=5, top_p=0.9))
    for _ in answer:
        pass
    ids = answer.prompt + [token.id for _, token in answer.said]
    with torch.inference_mode():
        expected = plain.engine.model(torch.tensor([ids]))[0].double().log_softmax(-1)
    places = [place for place, (kind, token) in enumerate(answer.said, len(answer.prompt))
              if kind == "text" and token.id < len(tokenizer.tokens)]
    entries = [entry for choice in choices for entry in choice.logprobs.content]
    assert len(places) == len(entries) > 10
    for place, entry in zip(places, entries):
        assert bytes(entry.bytes) == tokenizer.tokens[ids[place]] and len(entry.top_logprobs) == 5
        assert entry.logprob == pytest.approx(float(expected[place - 1, ids[place]]), abs=2e-3)
        best = expected[place - 1].topk(5)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-3)
    for choice in choices:
        text = choice.delta.content if stream else choice.message.content
        spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace")
        assert stream is False or not text or spelled == text, "a chunk brings the tokens of its own characters"


def test_a_chunk_has_its_own_tokens_however_late_it_is_sent(model, tokenizer):
    """The model may be further than the client has read."""
    async def play():
        answer = Answer(model, [{"role": "user", "content": "hi"}], Sampling(0))
        reply = Reply([answer], False, with_logprobs=True)
        for token in tokenizer.encode("One, two, 日本."):
            if piece := answer.take(Token(token, False, -0.5, None, ())):
                reply.deliver(0, piece)
        reply.deliver(0, None)
        return [json.loads(line[6:])["choices"][0] async for line in reply.stream() if line.startswith("data: {")]

    choices = asyncio.run(play())
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "One, two, 日本."
    for choice in choices:
        spelled = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
        assert spelled.decode() == choice["delta"].get("content", "")


# --- several answers to one question --------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_those_of_the_engine_asked_for_as_many_samples(plain, tokenizer, stream, monkeypatch):
    messages = [{"role": "user", "content": "hello, and tell me something long enough to be shared"}]
    with serving(plain) as (url, pool):
        reply = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0).chat.completions.create(
            model="", messages=messages, n=3, seed=5, max_tokens=20, temperature=1.0, stream=stream, logprobs=True,
            **({"stream_options": {"include_usage": True}} if stream else {}))
        texts, ends, logprobs = [""] * 3, [None] * 3, [[], [], []]
        for event in reply if stream else [reply]:
            for choice in event.choices:
                texts[choice.index] += (choice.delta if stream else choice.message).content or ""
                ends[choice.index] = ends[choice.index] or choice.finish_reason
                logprobs[choice.index] += choice.logprobs.content
        usage = event.usage
        until(lambda: pool.stats()["finished"] == 3)
    [expected] = plain.engine.generate_many([plain.prompt(messages)], 3, 20, top_k=50, seed=5)
    assert len(set(texts)) == 3, "three different answers"
    for text, end, entries, completion in zip(texts, ends, logprobs, expected):
        reader = AnswerReader(tokenizer)
        pieces = [reader.read(token, place == len(completion.tokens)) for place, token in enumerate(completion.tokens, 1)]
        assert text == "".join(piece.text for piece in pieces if piece and piece.kind == "text")
        assert end == ("stop" if completion.finish_reason == "stop" else "length") and len(entries) > 5
        assert entries[0].logprob == pytest.approx(completion.logprobs[0], abs=1e-3)
    assert usage.prompt_tokens == len(plain.prompt(messages)), "the question is read, and counted, once"
    with monkeypatch.context() as patch:
        rendered, prompt = [], ChatModel.prompt
        patch.setattr(ChatModel, "prompt", lambda model, messages: rendered.append(0) or prompt(model, messages))
        answers = read_request({"messages": messages, "n": 16}, plain, Sampling())
        assert len(rendered) == 1 and [answer.number for answer in answers] == list(range(16))
    assert usage.completion_tokens == sum(len(c.tokens) + (c.stop_token is not None) for c in expected)


def test_several_answers_find_room_all_or_none(model):
    with serving(model, rows=2, max_waiting=1) as (url, pool):
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        assert len(ask(url, "hello", n=3)["choices"]) == 3
        refused = httpx.post(url + "/v1/chat/completions", json={**body, "n": 4}, timeout=20)
        assert refused.status_code == 429 and pool.stats()["refused"] == 4
        for n in (0, 17, 1.5, True):
            wrong = httpx.post(url + "/v1/chat/completions", json={**body, "n": n}, timeout=20)
            assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "n"


def test_a_client_that_goes_frees_the_rows_of_all_its_answers(make_model, tokenizer):
    slow = scripted_model(make_model, tokenizer, 0.005)
    with serving(slow) as (url, pool):
        body = {"messages": [{"role": "user", "content": "long"}], "n": 4, "max_tokens": 900, "stream": True}
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=20) as answer:
            next(answer.iter_lines())
            until(lambda: pool.stats()["running"] == 4)
        until(lambda: pool.stats()["running"] == 0)
        assert pool.stats()["stopped"] == 4 and pool.stats()["completion_tokens"] < 3000


# --- requests that do not come to an end -----------------------------------------------------------------------------

def test_half_a_request_is_not_waited_for_for_ever(model, monkeypatch, capfd):
    monkeypatch.setattr("nanochat_lib.scripts.chat_web.SECONDS_TO_SEND", 0.2)
    head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                        "Content-Length: 99", "", "{"]).encode()
    with serving(model) as (url, pool):
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        with socket.create_connection(address, 10) as connection:
            connection.sendall(head)
            assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]
        with socket.create_connection(address, 10) as connection:
            connection.sendall(head)
        assert ask(url, "hello")["choices"][0]["finish_reason"] == "stop" and pool.stats()["failed"] == 0
    assert "Traceback" not in capfd.readouterr().err


# --- keys and other web sites ---------------------------------------------------------------------------------------

def test_a_key_opens_the_server_and_nothing_else_does(model, monkeypatch):
    with serving(model, api_key="secret-é") as (url, _):
        assert httpx.get(url + "/health").status_code == httpx.get(url + "/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/stats"):
                refused = httpx.get(url + path, headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
            assert httpx.post(url + "/v1/chat/completions", json={}, headers=headers).status_code == 401
        key = {"Authorization": "Bearer secret-é".encode()}
        assert httpx.get(url + "/v1/models", headers=key).status_code == 200
    monkeypatch.setenv("NANOCHAT_API_KEY", "from-outside")
    with serving(model) as (url, _):
        with pytest.raises(openai.AuthenticationError, match="wants its key"):
            openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0).models.list()
        assert openai.OpenAI(base_url=url + "/v1", api_key="from-outside").models.list().data[0].id == "sft-d3"


def test_other_web_sites_may_call_only_if_named(model):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization, content-type"}
    with serving(model) as (url, _):
        answer = httpx.options(url + "/v1/chat/completions", headers=asked)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    with serving(model, cors="https://example.org") as (url, _):
        answer = httpx.options(url + "/v1/chat/completions", headers=asked)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.options(url + "/v1/chat/completions", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_an_open_server_is_reachable_by_any_name_and_a_closed_one_is_not(model):
    pool = Pool([model])
    for host, status in (("127.0.0.1", 400), ("0.0.0.0", 200)):
        transport = httpx.ASGITransport(make_app(pool, ChatWeb(host=host)))

        async def get(transport=transport):
            async with httpx.AsyncClient(transport=transport, base_url="http://my-machine") as client:
                return (await client.get("/health")).status_code

        assert asyncio.run(get()) == status


def test_a_server_open_to_all_without_a_key_says_so(model, monkeypatch, capsys):
    monkeypatch.setattr("nanochat_lib.scripts.chat_web.Server.run", lambda *_: None)
    monkeypatch.setattr("nanochat_lib.scripts.chat_web.ChatModel.load", lambda *_: model)
    for host, key, warned in (("0.0.0.0", "", True), ("0.0.0.0", "k", False), ("127.0.0.1", "", False)):
        chat_web(ChatWeb(host=host, api_key=key, device_type="cpu"))
        assert ("NANOCHAT_API_KEY" in capsys.readouterr().out) == warned
