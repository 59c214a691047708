"""SFT: packed rows against a linear reference, nothing lost, resume, several ranks, own conversations."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from sft_model import make_base

from nanochat_lib.checkpoint import checkpoint_directory, load_optimizer, steps_in
from nanochat_lib.common import NanochatError, Runtime, read_json
from nanochat_lib.scripts import chat_sft as sft
from nanochat_lib.scripts.chat_sft import ChatSFT, accumulate, chat_sft, rate_at
from nanochat_lib.tasks.common import Task, conversation_of
from nanochat_lib.tasks.gsm8k import calculator_parts
from nanochat_lib.tasks.packing import ConversationLoader, one_pass
from nanochat_lib.training import LossScaler


def talk(count=150, longest=40):
    """Conversations of many lengths."""
    return Task([conversation_of(f"question {i}", f"{i} " + "ab " * (i * 7 % longest)) for i in range(count)])


def linear_rows(tokenizer, task, capacity, buffer_size):
    """The reference: look at every waiting conversation each time."""
    waiting, rest, rows = [], list(range(len(task))), []

    def fill():
        while rest and len(waiting) < buffer_size:
            ids, mask = tokenizer.render_conversation(task[rest.pop(0)])
            waiting.append((ids[:capacity], mask[:capacity]))

    fill()
    while waiting:
        ids, mask = [], []
        while True:
            fitting = [one for one in waiting if len(one[0]) <= capacity - len(ids)]
            if not fitting:
                break
            longest = max(fitting, key=lambda one: len(one[0]))  # max gives the first, the oldest
            waiting.remove(longest)
            ids, mask = ids + longest[0], mask + longest[1]
            fill()
        pad = capacity - len(ids)
        rows.append((ids + [tokenizer.get_bos_token_id()] * pad, mask + [0] * pad))
    return rows


def test_rows_equal_the_linear_reference(tokenizer):
    loader = ConversationLoader(tokenizer, talk(), 1, 99, buffer_size=10)
    rows = linear_rows(tokenizer, talk(), 100, 10)
    for (inputs, targets), (ids, mask) in zip(one_pass(loader), rows, strict=True):
        assert inputs[0].tolist() == ids[:-1]
        assert targets[0].tolist() == [token if learn else -1 for token, learn in zip(ids[1:], mask[1:])]
    assert loader.passes == 1


def starts(tokenizer, batches) -> list[str]:
    """The first user message of every conversation in some batches, sorted."""
    found = []
    for inputs, _ in batches:
        for row in inputs.tolist():
            text = tokenizer.decode(row)
            found += [piece.split("<|user_end|>")[0] for piece in text.split("<|user_start|>")[1:]]
    return sorted(found)


def test_each_conversation_once_a_pass_on_any_number_of_ranks(tokenizer):
    for ranks in (1, 3):
        batches = [batch for rank in range(ranks)
                   for batch in one_pass(ConversationLoader(tokenizer, talk(), 1, 127, rank, ranks, buffer_size=20))]
        assert starts(tokenizer, batches) == sorted(f"question {i}" for i in range(150))
        assert all((targets >= 0).any() for _, targets in batches)


def test_targets_are_the_assistants_words_and_no_others(tokenizer):
    task = Task([conversation_of("2 and 3?", calculator_parts("It is <<2+3=5>>5."))])
    inputs, targets = next(ConversationLoader(tokenizer, task, 1, 60))
    special, text = tokenizer.encode_special, tokenizer.encode
    ids = [special("<|bos|>"), special("<|user_start|>"), *text("2 and 3?"), special("<|user_end|>"),
           special("<|assistant_start|>")]
    said = [*text("It is "), special("<|python_start|>"), *text("2+3"), special("<|python_end|>")]
    output = [special("<|output_start|>"), *text("5"), special("<|output_end|>")]
    end = [*text("5."), special("<|assistant_end|>")]
    whole = ids + said + output + end
    expected = [-1] * (len(ids) - 1) + said + [-1] * len(output) + end
    assert inputs[0, :len(whole)].tolist() == whole
    assert targets[0].tolist() == expected + [-1] * (60 - len(expected))


def test_long_conversations_are_cut_and_those_without_an_answer_dropped(tokenizer):
    task = Task([conversation_of("hi", "x y " * 500), conversation_of("long " * 500, "ok"), conversation_of("a", "b")])
    loader = ConversationLoader(tokenizer, task, 1, 31)
    batches = list(one_pass(loader))
    assert (loader.cut, loader.dropped, loader.passes) == (2, 1, 1) and len(batches) == 2
    assert all((targets >= 0).any() for _, targets in batches)
    next(loader)
    assert (loader.cut, loader.dropped) == (2, 1)  # counted once, not once a pass
    with pytest.raises(NanochatError, match="no conversation has a word of the assistant within 32 tokens"):
        next(ConversationLoader(tokenizer, task[1:2], 1, 31))
    with pytest.raises(NanochatError, match="3 conversations for 4 processes"):
        ConversationLoader(tokenizer, task, 1, 31, 0, 4)


def test_a_loader_goes_on_exactly_where_another_stood(tokenizer):
    loader = ConversationLoader(tokenizer, talk(), 2, 99, buffer_size=10)
    for steps in range(40):  # over the end of the pass
        state = json.loads(json.dumps(loader.state()))
        if steps % 5 == 0:
            other = ConversationLoader(tokenizer, talk(), 2, 99, buffer_size=10, state=state)
            assert other.passes == loader.passes
            assert torch.equal(next(other)[0], next(loader)[0])
        assert torch.equal(next(ConversationLoader(tokenizer, talk(), 2, 99, buffer_size=10, state=state))[0],
                           next(ConversationLoader(tokenizer, talk(), 2, 99, buffer_size=10, state=state))[0])
        next(loader)


@pytest.mark.parametrize("before, after", [(1, 2), (3, 2), (2, 1)])
def test_a_pass_goes_on_with_another_number_of_ranks(tokenizer, before, after):
    loaders = [ConversationLoader(tokenizer, talk(), 1, 99, rank, before, buffer_size=10) for rank in range(before)]
    batches = [next(loader) for loader in loaders for _ in range(5)]
    states = [loader.state() for loader in loaders]
    for rank in range(after):
        batches += one_pass(ConversationLoader(tokenizer, talk(), 1, 99, rank, after, buffer_size=10, state=states))
    assert starts(tokenizer, batches) == sorted(f"question {i}" for i in range(150))


def test_micro_batches_give_the_gradient_of_the_mean_over_targets(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    inputs, targets = next(ConversationLoader(tokenizer, talk(longest=9), 4, 60))
    targets[0, :40] = -1  # rows of unlike numbers of targets
    loss = model(inputs, targets)
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    got = accumulate(model, list(zip(inputs.split(1), targets.split(1))), LossScaler(torch.float32), 1)
    assert got == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_rates_go_up_stay_and_fall():
    settings = ChatSFT(warmup_ratio=0.1, warmdown_ratio=0.5, final_lr_frac=0.2)
    rates = [rate_at(share, settings) for share in (0, 0.05, 0.1, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.6, 0.2])
    assert rate_at(0, ChatSFT()) == 1 and rate_at(1, ChatSFT(warmdown_ratio=0)) == 1


QUIET = dict(mixture="world", eval_every=-1, eval_tokens=1, chatcore_every=-1, device_type="cpu")


def weights_of(step, tag="d2"):
    return load_file(checkpoint_directory("sft", tag) / f"model_{step:06d}.safetensors")


def test_a_run_inherits_trains_and_resumes_exactly(tokenizer, base_dir, late_copies):
    make_base(tokenizer)
    chat_sft(ChatSFT(**QUIET, num_iterations=4, save_every=2))
    directory = checkpoint_directory("sft", "d2")
    assert steps_in(directory) == [2, 4]
    meta, straight = read_json(directory / "meta_000004.json"), weights_of(4)
    inherited = {name: meta["settings"][name] for name in sft.INHERITED}
    assert inherited == dict(max_seq_len=128, device_batch_size=8, total_batch_size=1024, embedding_lr=0.3,
                             unembedding_lr=0.008, matrix_lr=0.02)
    result = read_json(base_dir / "report" / "result_sft.json")
    assert result["steps"] == 4 and result["tokens"] == 4096 and result["bpb"] > 0
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if "loss" in event]
    assert len(losses) == 4 and losses[0] == pytest.approx(math.log(309), abs=1)  # not half of it
    (directory / "meta_000004.json").unlink()  # as if killed while it saved
    chat_sft(ChatSFT(**QUIET, num_iterations=4, save_every=2, resume=True))
    assert all(torch.equal(value, straight[name]) for name, value in weights_of(4).items())
    events = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [event["loss"] for event in events if "loss" in event] == losses


def test_momenta_are_carried_over_unless_declined(tokenizer, base_dir):
    make_base(tokenizer)
    settings = ChatSFT(**QUIET, num_iterations=1)
    runtime = Runtime(torch.device("cpu"))
    carried, fresh = (sft.Run(sft.replace(settings, load_optimizer=flag), runtime).optimizer for flag in (1, 0))
    model = make_base(tokenizer)
    base = model.setup_optimizer()
    load_optimizer(checkpoint_directory("base", "d2"), 7, base)
    for name, value in base.checkpoint_state().items():
        assert torch.equal(carried.checkpoint_state()[name], value)
        assert not fresh.checkpoint_state()[name].any()


def write_own(path, conversations):
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    return str(path)


def test_own_conversations_in_one_pass_with_long_ones_among_them(tokenizer, base_dir, tmp_path, capsys):
    make_base(tokenizer, sequence_len=32, total_batch_size=64)
    rows = [conversation_of("hello", "x y " * (100 if i % 5 == 0 else 2)) for i in range(39)]
    own = write_own(tmp_path / "my.jsonl", [*rows, conversation_of("long " * 90, "never seen")])
    chat_sft(ChatSFT(**{**QUIET, "mixture": "default"}, data=own))
    result = read_json(base_dir / "report" / "result_sft.json")
    assert result["conversations"] == 38 and result["cut"] in (7, 8, 9) and math.isfinite(result["loss"])
    assert "are longer than 32 tokens and were cut" in capsys.readouterr().out
    meta = read_json(checkpoint_directory("sft", "d2") / f"meta_{result['steps']:06d}.json")
    assert meta["loader"][0]["epoch"] == 0 or meta["loader"][0]["cursor"] > 0  # the pass was finished


def test_faults_are_reported_before_training(tokenizer, base_dir, tmp_path):
    with pytest.raises(NanochatError, match="base_train"):
        chat_sft(ChatSFT(**QUIET))
    make_base(tokenizer)
    bad = write_own(tmp_path / "bad.jsonl", [conversation_of("a", "b"), conversation_of("a", "")])
    with pytest.raises(NanochatError, match="bad.jsonl, line 2: message 2: it is empty"):
        chat_sft(ChatSFT(**QUIET, data=bad))
    with pytest.raises(NanochatError, match="--max-seq-len 256 is more than"):
        chat_sft(ChatSFT(**QUIET, max_seq_len=256))
    with pytest.raises(NanochatError, match="total-batch-size 1000"):
        chat_sft(ChatSFT(**QUIET, total_batch_size=1000))
    assert not checkpoint_directory("sft", "d2").exists()


def test_grading_that_cannot_run_is_reported_and_the_run_survives(tokenizer, base_dir, tmp_path, monkeypatch, capsys):
    make_base(tokenizer)
    monkeypatch.setattr("nanochat_lib.tasks.common.hub_is_reachable", lambda: False)
    own = write_own(tmp_path / "my.jsonl", [conversation_of("hello", "you")] * 3)
    chat_sft(ChatSFT(**{**QUIET, "mixture": "default", "chatcore_every": 1}, data=own, num_iterations=1))
    said = capsys.readouterr().out
    assert "not graded during the run: cannot load" in said and "too few to hold any out" in said
    assert steps_in(checkpoint_directory("sft", "d2")) == [1]


def test_bits_per_byte_and_chatcore_are_measured_on_the_way(tokenizer, base_dir):
    make_base(tokenizer, sequence_len=256)
    chat_sft(ChatSFT(**{**QUIET, "eval_every": 1, "chatcore_every": 1}, chatcore_max_cat=2, chatcore_max_sample=1,
                     num_iterations=2))
    lines = (checkpoint_directory("sft", "d2") / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["step"] for event in events if "bpb" in event] == [0, 1, 2]
    graded = [event for event in events if "chatcore" in event]
    assert [event["step"] for event in graded] == [1, 2]
    assert list(graded[0]["tasks"]) == ["multiple_choice", "multiple_choice_letter", "letter_counting", "spelling",
                                        "word_problems_1", "word_problems_2", "facts"]


def test_two_ranks_train_one_model_and_stop_together(tokenizer, base_dir, tmp_path, run_module):
    make_base(tokenizer, total_batch_size=512)
    rows = [conversation_of(f"question {i}", "x y " * (i % 2 * 30 + 1)) for i in range(60)]  # of very unlike lengths
    own = write_own(tmp_path / "my.jsonl", rows)
    done = run_module("nanochat_lib.scripts.chat_sft", "--data", own, "--chatcore-every=-1", "--eval-every=-1",
                      "--device-type=cpu", nproc=2)
    assert done.returncode == 0, done.stderr
    result = read_json(base_dir / "report" / "result_sft.json")
    meta = read_json(checkpoint_directory("sft", "d2") / f"meta_{result['steps']:06d}.json")
    assert len(meta["loader"]) == 2 and result["conversations"] == 57 and math.isfinite(result["bpb"])
    assert result["tokens"] == 512 * result["steps"]
