"""The load on the server: what it plays, what it would notice, and that the server stands it."""

import asyncio
import json
import random
import re
import threading

import pytest
from scripted import scripted_model, serving

from nanochat_lib.common import NanochatError
from nanochat_lib.load import RAW, WRONG, Load, Results, malformed
from nanochat_lib.protocol import ApiError
from nanochat_lib.scripts.chat_load import ChatLoad, alone, bodies, chat_load, served


def test_200_requests_of_32_clients_none_lost_none_crossed(capfd):
    chat_load(ChatLoad(requests=200))
    out, error = capfd.readouterr()
    assert "Traceback" not in error and "Traceback" not in out, "clients that leave are no fault of the server's"
    assert re.search(r"32 clients, 200 requests in", out)
    right, vanished = (int(re.search(rf"(\d+) {word}", out)[1]) for word in ("right", "vanished"))
    assert right + vanished == 100 and vanished > 0
    statuses = dict((int(status), int(count)) for count, status in re.findall(r"(\d+) × (\d+)", out))
    left = int(re.search(r"(\d+) broken off", out)[1])
    assert left and sum(statuses.values()) + left == 100 and all(400 <= status < 500 for status in statuses)
    assert "p99" in out
    first, *_, last = map(int, re.search(r"each quarter: ([\d, ]+) MB", out)[1].split(", "))
    assert last - first < 40, "memory grows"


def test_requests_are_reproducible_and_the_wrong_ones_many():
    assert bodies(ChatLoad()) == bodies(ChatLoad()) and len({json.dumps(body) for body in bodies(ChatLoad())}) == 48
    kinds = {malformed(random.Random(seed)) for seed in range(400)}
    assert len(kinds) > 30 and len(RAW) + len(WRONG) > 40
    model = served(ChatLoad())
    said = [alone(model, body) for body in bodies(ChatLoad(prompts=12))]
    assert said == [alone(served(ChatLoad()), body) for body in bodies(ChatLoad(prompts=12))]
    assert len(set(said)) > 8, "answers that differ, or a crossed one would not show"


@pytest.fixture
def model(make_model, tokenizer):
    return scripted_model(make_model, tokenizer)


def played(url, expected, requests=40, vanish=0.0):
    """Results of a small load, from a thread of its own as in a notebook."""
    load, found = Load(url.removeprefix("http://"), expected, vanish), []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(load.run(requests, 8))))
    thread.start()
    thread.join(60)
    return found[0]


def request(text):
    return json.dumps({"messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0})


def test_a_wrong_a_crossed_and_a_failed_answer_are_noticed(model):
    right = {request(text): f"You said: {text} (né 日本)" for text in ("one", "two", "three")}
    with serving(model) as (url, _):
        assert played(url, right).faults == []
        swapped = {**right, request("one"): right[request("two")], request("two"): right[request("one")]}
        assert re.fullmatch(r"\d+ answers were crossed", *played(url, swapped).faults)
        assert re.fullmatch(r"\d+ answers were wrong", *played(url, {request("one"): "You said: eno"}).faults)
        assert re.fullmatch(r"\d+ answers were lost", *played(url, {request("fail"): "?"}).faults)
        assert re.fullmatch(r"\d+ answers were failed", *played(url, {"{}": "?"}).faults)


def test_a_server_that_accepts_nonsense_or_breaks_on_it_is_noticed(model, monkeypatch):
    right = {request("one"): "You said: one (né 日本)"}
    monkeypatch.setattr("nanochat_lib.protocol.number", lambda body, name, default, *_: default)
    with serving(model) as (url, _):
        assert any("answered with status 200" in fault for fault in played(url, right, 200).faults)

    def careless(body, *_):
        raise ZeroDivisionError if body.get("temperature") == "hot" else ApiError(400, "no")

    monkeypatch.undo()
    monkeypatch.setattr("nanochat_lib.scripts.chat_web.read_request", careless)
    with serving(model) as (url, _):
        assert any("answered with status 500" in fault for fault in played(url, right, 400).faults)


def test_quantiles_and_a_server_that_is_not_there():
    assert Results(first_token=[0.3, 0.1, 0.2]).quantile(0.99) == 0.3
    assert Results(memory=[500_000_000, 900_000_000, 510_000_000, 590_000_000]).faults == []
    assert Results(memory=[500_000_000, 550_000_000, 600_000_000, 650_000_000]).faults == [
        "the server's memory grew by 150 MB after the first quarter"]
    assert Results(memory=[0, 0, 0, 0]).faults == Results().faults == []
    with pytest.raises((NanochatError, OSError)):
        chat_load(ChatLoad(address="127.0.0.1:9", requests=4))
    with pytest.raises(NanochatError, match="--rows 0: give a number from 1"):
        chat_load(ChatLoad(rows=0))
