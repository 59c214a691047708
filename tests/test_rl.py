"""rl and chat_rl (lesson 10): the gradient is that of the expected reward, and a run is one run however it is cut."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from nanochat_lib.checkpoint import find_checkpoint, save_checkpoint, steps_in
from nanochat_lib.common import NanochatError, Runtime
from nanochat_lib.engine import Completion, Engine
from nanochat_lib.gpt import GPT, GPTConfig
from nanochat_lib.rl import (Question, Row, chosen, group_advantages, learn, micro_batches, policy_gradient_loss,
                             questions_of_step, readable, roll_out, rows_of, statistics, tensors_of, token_logprobs)
from nanochat_lib.scripts.chat_rl import ChatRL, chat_rl
from nanochat_lib.tasks.common import conversation_of
from tests.rl_task import HasE


def tiny_policy(vocab=5) -> GPT:
    """A GPT of a few thousand parameters in float64, so that finite differences are sharp."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=vocab, n_layer=2, n_head=2, n_kv_head=1, n_embd=24))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.double().dtype = torch.float64
    return model


def all_answers(model, prompt, rewards, vocab=5):
    """Every two-token answer with its probability: (rows weighted by p · (reward − baseline), expected reward)."""
    answers = list(itertools.product(range(vocab), repeat=2))
    tokens = torch.tensor([prompt + list(answer) for answer in answers])
    with torch.no_grad():
        logp = model(tokens).double().log_softmax(-1)[:, len(prompt) - 1:-1]
    logp = logp.gather(-1, tokens[:, len(prompt):, None]).sum((1, 2))
    expected = float((logp.exp() * rewards).sum())
    rows = [Row(tuple(row.tolist()), (0,) * len(prompt) + (1, 1), float(p * (reward - 0.3)))
            for row, p, reward in zip(tokens, logp.exp(), rewards)]
    return rows, expected


def test_the_gradient_is_that_of_the_expected_reward():
    model, prompt = tiny_policy(), [4, 0, 2]
    rewards = torch.rand(25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, _ = all_answers(model, prompt, rewards)
    learn(model, rows, tokens=1, most=64)
    torch.manual_seed(5)
    for _ in range(3):
        direction = [torch.randn_like(p) for p in model.parameters()]
        slope = -sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction) if p.grad is not None)
        values = []
        for sign in (1, -1):
            for p, d in zip(model.parameters(), direction):
                p.data += sign * 1e-3 * d
            values.append(all_answers(model, prompt, rewards)[1])
            for p, d in zip(model.parameters(), direction):
                p.data -= sign * 1e-3 * d
        measured = (values[0] - values[1]) / 2e-3
        assert slope == pytest.approx(measured, rel=2e-3, abs=1e-5)


def test_learn_agrees_with_plain_autograd(make_model):
    """One answer after the other, nothing merged, nothing padded."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 300, (5,), generator=generator).tolist()
    answers = [Completion(torch.randint(0, 300, (n,), generator=generator).tolist(), [1] * (n - 2) + [0, 1], [0.0] * n,
                          "stop", stop) for n, stop in ((4, 301), (9, 301), (6, None))]
    answers.append(answers[0])  # the same answer again
    question = Question(0, prompt, {}, answers, ["", "", "", ""], [1.0, 0.0, 0.0, 1.0])
    total = sum(sum(chosen(answer)[1]) for answer in answers)
    loss = 0.0
    for answer, reward in zip(answers, question.rewards):
        tokens, mask = chosen(answer)
        logp = model(torch.tensor([prompt + tokens[:-1]])).log_softmax(-1)[0, len(prompt) - 1:]
        loss = loss - sum(logp[i, token] * (reward - 0.5) for i, token in enumerate(tokens) if mask[i]) / total
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = rows_of([question])
    assert len(rows) == 3 and sorted(row.advantage for row in rows) == [-0.5, -0.5, 1.0]
    assert learn(model, rows, total, most=24) == pytest.approx(loss.item(), abs=1e-6)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=2e-6, msg=name)


def test_prompt_and_tool_tokens_have_no_gradient():
    logp = torch.randn(2, 6, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]])
    policy_gradient_loss(logp, torch.tensor([0.5, -2.0]), mask).backward()
    assert torch.equal(logp.grad, -torch.tensor([[0.5], [-2.0]]) * mask / 5)
    answer = Completion([7, 8, 9], [1, 0, 0], [-1.0, 0.0, 0.0], "length")
    question = Question(0, [1, 2], {}, [answer, Completion([5], [1], [-1.0], "stop", 4)], ["", ""], [1.0, 0.0])
    tokens, mask, advantages = tensors_of(rows_of([question]), "cpu")
    assert tokens.tolist() == [[1, 2, 7, 8, 9], [1, 2, 5, 4, 0]] and mask.tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert advantages.tolist() == [0.5, -0.5]


def test_logprobs_only_where_trained(make_model):
    model = make_model()
    tokens, mask = torch.randint(0, 309, (3, 12)), torch.randint(0, 2, (3, 12))
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    logp = token_logprobs(model, tokens, mask, temperature=0.7)
    hook.remove()
    assert seen == [int(mask[:, 1:].sum())]
    expected = (model(tokens) / 0.7).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-5)


def test_decided_questions_carry_no_rows_and_advantages_sum_to_zero():
    answers = [Completion([n], [1], [-1.0], "length") for n in range(3)]
    right, wrong, mixed = (Question(0, [1], {}, answers, ["a"] * 3, rewards)
                           for rewards in ([1.0] * 3, [0.0] * 3, [1.0, 0.0, 0.0]))
    assert rows_of([right, wrong]) == []
    assert sum(row.advantage for row in rows_of([mixed])) == pytest.approx(0)
    sums = statistics([right, wrong, mixed], tool=1)
    assert (sums["all_right"], sums["all_wrong"], sums["reward"], sums["tool_use"], sums["cut"]) == (1, 1, 4, 3, 9)
    assert group_advantages(torch.tensor([[1.0, 0.0], [3.0, 3.0]])).tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_micro_batches_hold_like_lengths_within_the_bound():
    rows = [Row((0,) * n, (1,) * n, 1.0) for n in (3, 9, 2, 8, 2, 30)]
    batches = micro_batches(rows, 20)
    assert [[len(row.tokens) for row in batch] for batch in batches] == [[2, 2, 3], [8, 9], [30]]


def test_every_question_once_a_pass_and_any_step_alone():
    seen = [number for step in range(5) for number in questions_of_step(step, 4, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert questions_of_step(3, 4, 10) == seen[12:16]


def test_rollouts_are_readable(make_model, tokenizer):
    [question] = roll_out(Engine(make_model(), tokenizer), HasE("train"), [3], num_samples=6, max_tokens=4, top_k=5)
    line = json.loads(json.dumps(readable(0, question)))
    assert line["question"] == "Question 3?" and sum(answer["count"] for answer in line["answers"]) == 6
    assert conversation_of("Question 3?", "e e") == question.conversation


@pytest.fixture
def sft_model(base_dir, tokenizer, make_model):
    """A random chat model under base_dir."""
    tokenizer.save(base_dir / "tokenizer")
    model = make_model()
    save_checkpoint(base_dir / "chatsft_checkpoints" / "d3", 7, model, None, {"tokenizer": tokenizer.fingerprint},
                    Runtime(torch.device("cpu")))
    return base_dir


SMALL = dict(task="tests.rl_task:HasE", num_iterations=4, examples_per_step=3, num_samples=4, max_new_tokens=6,
             save_every=2, eval_every=-1, init_lr_frac=0.2)


def events(base_dir, name="metrics.jsonl"):
    lines = (base_dir / "chatrl_checkpoints" / "d3" / name).read_text().splitlines()
    timing = ("time", "rollout_seconds", "train_seconds")
    return [{key: value for key, value in json.loads(line).items() if key not in timing} for line in lines]


def weights_of(base_dir, step=4):
    return load_file(base_dir / "chatrl_checkpoints" / "d3" / f"model_{step:06d}.safetensors")


def test_a_run_its_files_and_an_exact_resume(sft_model):
    settings = ChatRL(**{**SMALL, "eval_every": 2, "eval_examples": 5})
    chat_rl(settings)
    folder, step = find_checkpoint("rl")
    assert step == 4 and steps_in(folder) == [2, 4]
    meta = json.loads((folder / "meta_000004.json").read_text())
    assert meta["source"] == {"stage": "sft", "model_tag": "d3", "step": 7} and meta["model_config"]["n_layer"] == 3
    steps = [event for event in events(sft_model) if "reward" in event]
    assert [event["step"] for event in steps] == [0, 1, 2, 3]
    assert {"entropy", "length", "tool_use", "all_right", "all_wrong", "loss"} <= steps[0].keys()
    result = json.loads((sft_model / "report" / "result_rl.json").read_text())
    assert result["steps"] == 4 and result["curve"] == meta["loop"]["curve"] and 0 <= result["reward_start"] <= 1
    evaluations = [event for event in events(sft_model) if "pass_at_k" in event]
    assert [event["step"] for event in evaluations] == [0, 2, 4]
    curves = [event["pass_at_k"] for event in evaluations]
    assert all(curve == sorted(curve) and len(curve) == 8 for curve in curves)

    before, first_events = weights_of(sft_model), events(sft_model)
    rollouts = events(sft_model, "rollouts.jsonl")
    (folder / "meta_000004.json").unlink()  # killed while the last checkpoint was being written
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write('{"step": 3, "torn')
    chat_rl(ChatRL(**{**SMALL, "eval_every": 2, "eval_examples": 5, "resume": True}))
    after = weights_of(sft_model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert events(sft_model) == first_events and events(sft_model, "rollouts.jsonl") == rollouts


def test_reward_rises(sft_model):
    chat_rl(ChatRL(**{**SMALL, "num_iterations": 16, "examples_per_step": 8, "num_samples": 16, "init_lr_frac": 1.0,
                      "save_every": -1}))
    curve = json.loads((sft_model / "report" / "result_rl.json").read_text())["curve"]
    assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.2


def test_two_processes_try_the_same_answers_and_fewer_samples_than_a_device_batch_work(sft_model, run_module):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, "num_samples": 2}.items()]
    done = run_module("nanochat_lib.scripts.chat_rl", *flags, nproc=2)
    assert done.returncode == 0, done.stderr
    two, weights = events(sft_model, "rollouts.jsonl"), weights_of(sft_model)
    chat_rl(ChatRL(**{**SMALL, "num_samples": 2}))
    one = events(sft_model, "rollouts.jsonl")
    by_question = [sorted((line for line in lines if line["step"] == 0), key=lambda line: line["number"])
                   for lines in (one, two)]
    assert by_question[0] == by_question[1] and len(by_question[0]) == 3
    assert len(weights) == len(weights_of(sft_model)) and (sft_model / "chatrl_checkpoints" / "d3.old1").is_dir()


@pytest.mark.parametrize("changes, words", [
    ({"num_samples": 1}, "at least 2"), ({"temperature": 0.0}, "same answer every time"),
    ({"examples_per_step": 0}, "--examples-per-step 0"), ({"task": "nothing"}, "no task 'nothing'"),
])
def test_settings_that_cannot_work(sft_model, changes, words):
    with pytest.raises(NanochatError, match=words):
        chat_rl(ChatRL(**{**SMALL, **changes}))


def test_no_sft_model_is_one_line(base_dir):
    with pytest.raises(NanochatError, match="chat_sft"):
        chat_rl(ChatRL(**SMALL))
