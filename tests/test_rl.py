"""rl and chat_rl (lesson 10): the gradient is that of the expected reward, and a run is one run however it is cut."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nanochat_lib.checkpoint import find_checkpoint, save_checkpoint, steps_in
from nanochat_lib.common import NanochatError, Runtime
from nanochat_lib.engine import Completion, Engine
from nanochat_lib.objectives import ALGORITHMS, Terms, policy_gradient_loss, reinforce
from nanochat_lib.practice import Policy
from nanochat_lib.rewards import Reward, parse_reward
from nanochat_lib.rl import (Question, Row, chosen, learn, micro_batches, questions_of_step, readable,
                             roll_out, row_logprobs, statistics, token_logprobs, token_weights, tries_of)
from nanochat_lib.scripts.chat_rl import ChatRL, chat_rl
from nanochat_lib.tasks import get_task
from nanochat_lib.tasks.common import conversation_of
from nanochat_lib.tasks.world import world_rows
from nanochat_lib.world import World
from nanochat_lib.world_tasks import write_tasks
from tests.rl_task import HasE

STOP = 301


def question(answers, rewards, prompt=(1,), number=0):
    """A question with these answers and rewards."""
    texts = [" ".join(map(str, answer.tokens)) for answer in answers]
    return Question(number, list(prompt), {}, answers, texts, [{"answer": reward} for reward in rewards], rewards)


def test_learn_agrees_with_plain_autograd(make_model):
    """One answer after the other, nothing merged, nothing padded."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 300, (5,), generator=generator).tolist()
    answers = [Completion(torch.randint(0, 300, (n,), generator=generator).tolist(), [1] * (n - 2) + [0, 1], [0.0] * n,
                          "stop", stop) for n, stop in ((4, 301), (9, 301), (6, None))]
    answers.append(answers[0])  # the same answer again
    asked = question(answers, [1.0, 0.0, 0.0, 1.0], prompt)
    total = sum(sum(chosen(answer)[1]) for answer in answers)
    loss = 0.0
    for answer, reward in zip(answers, asked.rewards):
        tokens, mask = chosen(answer)
        logp = model(torch.tensor([prompt + tokens[:-1]])).log_softmax(-1)[0, len(prompt) - 1:]
        loss = loss - sum(logp[i, token] * (reward - 0.5) for i, token in enumerate(tokens) if mask[i]) / total
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tries = tries_of([asked])
    assert len(tries.rows) == 3 and tries.place.tolist() == [[0, 1, 2, 0]]
    table = row_logprobs(model, tries.rows, most=24)
    weights = token_weights(reinforce, tries, Terms(tokens=total), table, table)
    assert learn(model, tries.rows, weights, most=24) == pytest.approx(loss.item(), abs=1e-6)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=2e-6, msg=name)


def test_prompt_and_tool_tokens_have_no_gradient():
    logp = torch.randn(2, 6, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]])
    policy_gradient_loss(logp, torch.tensor([0.5, -2.0]), mask).backward()
    assert torch.equal(logp.grad, -torch.tensor([[0.5], [-2.0]]) * mask / 5)
    answers = [Completion([7, 8, 9], [1, 0, 0], [-1.0, 0.0, 0.0], "length"), Completion([5], [1], [-1.0], "stop", 4)]
    tries = tries_of([question(answers, [1.0, 0.0], (1, 2))])
    assert tries.rows == [Row((1, 2, 7, 8, 9), (0, 0, 1, 0, 0)), Row((1, 2, 5, 4), (0, 0, 1, 1))]
    weights = token_weights(reinforce, tries, Terms(), *torch.zeros(2, 2, 4))
    assert weights.mul(6).tolist() == [[0, -1, 0, 0], [0, 1, 1, 0]]


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


def test_decided_questions_carry_no_rows_and_are_counted():
    answers = [Completion([n], [1], [-1.0], "length") for n in range(3)]
    right, wrong, mixed = (question(answers, rewards) for rewards in ([1.0] * 3, [0.0] * 3, [1.0, 0.0, 0.0]))
    assert tries_of([right, wrong]) is None
    assert tries_of([right, mixed]).rewards.tolist() == [[1, 0, 0]]
    assert tries_of([right, wrong], keep_decided=True).place.tolist() == [[0, 1, 2]] * 2
    sums = statistics([right, wrong, mixed], tool=1)
    assert (sums["all_right"], sums["all_wrong"], sums["reward"], sums["tool_use"], sums["cut"]) == (1, 1, 4, 3, 9)
    assert sums["reward_answer"] == 4 and sums["tool_right"] == 0


def test_a_call_is_right_if_the_calculator_answered_it():
    answered = Completion([8, 5, 9, 7], [1, 1, 0, 0], [0.0] * 4, "stop", STOP)  # 8 opens a call, 9 its result
    pretended = Completion([8, 5, 9, 7], [1, 1, 1, 1], [0.0] * 4, "stop", STOP)
    sums = statistics([question([answered, pretended, Completion([5], [1], [0.0], "stop", STOP)], [1.0, 0, 0])], 8, 9)
    assert (sums["tool_use"], sums["tool_right"]) == (2, 1)


def test_micro_batches_hold_like_lengths_within_the_bound():
    rows = [Row((0,) * n, (1,) * n) for n in (3, 9, 2, 8, 2, 30)]
    assert micro_batches(rows, 20) == [[2, 4, 0], [3, 1], [5]]


def test_every_question_once_a_pass_and_any_step_alone():
    seen = [number for step in range(5) for number in questions_of_step(step, 4, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert questions_of_step(3, 4, 10) == seen[12:16]


def test_rollouts_are_readable(make_model, tokenizer):
    rewards = Reward({"answer": 1.0, "length": 0.5}, zero_cut=False)
    engine = Engine(make_model(), tokenizer)
    [asked] = roll_out(engine, HasE("train"), [3], rewards, num_samples=6, max_tokens=4, top_k=5)
    line = json.loads(json.dumps(readable(0, asked)))
    assert all(set(answer["parts"]) == {"answer", "length"} for answer in line["answers"])
    assert line["question"] == "Question 3?" and sum(answer["count"] for answer in line["answers"]) == 6
    assert conversation_of("Question 3?", "e e") == asked.conversation


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_weights_made_in_passing_are_those_of_tables_made_before(make_model, name, kl):
    """Piece by piece against all rows' log-probabilities at once: the same gradient, at the first update and later."""
    prompts, rng = ([1, 2, 3], [4, 5, 6, 7]), torch.Generator().manual_seed(1)
    asked = [question([Completion(torch.randint(0, 300, (n,), generator=rng).tolist(), [1] * n, [0.0] * n, "stop", 301)
                       for n in (2, 5, 9)], rewards, prompt) for prompt, rewards in zip(prompts, ([1, 0, 0], [0, 1, 0.5]))]
    tries, terms = tries_of(asked), Terms(0.2, 0.28, tokens=40.0, answers=6.0, longest=16)
    model, elsewhere, before = make_model(0), make_model(1), make_model(2)
    reference = row_logprobs(elsewhere, tries.rows, 1000) if kl else None
    settings = SimpleNamespace(algorithm=name, kl=kl, temperature=0.7)
    policy = SimpleNamespace(settings=settings, model=model, most=24, runtime=SimpleNamespace(world_size=1))
    now = row_logprobs(model, tries.rows, 1000, 0.7)
    for old in (None, row_logprobs(before, tries.rows, 1000, 0.7)):
        found = []
        _, said = Policy.descend(policy, tries, terms, old, reference)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        weights = token_weights(ALGORITHMS[name], tries, terms, now, now if old is None else old, reference, kl)
        learn(model, tries.rows, weights, most=1000, temperature=0.7)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        torch.testing.assert_close(said, now, rtol=0, atol=1e-4)
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.fixture
def sft_model(base_dir, tokenizer, make_model):
    """A random chat model under base_dir."""
    tokenizer.save(base_dir / "tokenizer")
    model = make_model()
    save_checkpoint(base_dir / "chatsft_checkpoints" / "d3", 7, model, None,
                    {"tokenizer": tokenizer.fingerprint, "loop": [[], 1.0, None], "source": "as chat_sft leaves them"},
                    Runtime(torch.device("cpu")))
    return base_dir


SMALL = dict(task="tests.rl_task:HasE", num_iterations=4, examples_per_step=3, num_samples=4, max_new_tokens=6,
             save_every=2, eval_every=-1, init_lr_frac=0.2, zero_cut=0, patience=-1)


def events(base_dir, name="metrics.jsonl"):
    lines = (base_dir / "chatrl_checkpoints" / "d3" / name).read_text().splitlines()
    timing = ("time", "rollout_seconds", "train_seconds")
    return [{key: value for key, value in json.loads(line).items() if key not in timing} for line in lines]


def weights_of(base_dir, step=4):
    return load_file(base_dir / "chatrl_checkpoints" / "d3" / f"model_{step:06d}.safetensors")


def test_a_run_its_files_and_an_exact_resume(sft_model, late_copies):
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
    assert result["steps"] == 4 and 0 <= result["reward_start"] <= 1
    assert result["curve"] == [step["reward"] for step in meta["loop"]["history"]]
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


def test_two_processes_are_one_run_and_fewer_samples_than_a_device_batch_work(sft_model, run_module):
    settings = {**SMALL, "num_samples": 2, "num_iterations": 2, "save_every": 1, "algorithm": "dapo", "kl": 0.1,
                "inner_epochs": 2}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    done = run_module("nanochat_lib.scripts.chat_rl", *flags, nproc=2)
    assert done.returncode == 0, done.stderr
    two, weights, logged = events(sft_model, "rollouts.jsonl"), weights_of(sft_model, 1), events(sft_model)
    chat_rl(ChatRL(**settings))
    one = events(sft_model, "rollouts.jsonl")
    by_question = [sorted((line for line in lines if line["step"] == 0), key=lambda line: line["number"])
                   for lines in (one, two)]
    assert by_question[0] == by_question[1] and len(by_question[0]) == 3
    assert (sft_model / "chatrl_checkpoints" / "d3.old1").is_dir()
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert logged[1]["kl"] == pytest.approx(events(sft_model)[1]["kl"], rel=0.05)
    for name, value in weights_of(sft_model, 1).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("changes, words", [
    ({"num_samples": 1}, "at least 2"), ({"temperature": 0.0}, "same answer every time"),
    ({"examples_per_step": 0}, "--examples-per-step 0"), ({"task": "nothing"}, "no task 'nothing'"),
    ({"inner_epochs": 2}, "reinforce is right for fresh answers only"), ({"kl": -1.0}, "--kl -1"),
    ({"reward": "answer=1,beauty=2"}, "no reward 'beauty': choose answer, format, length"),
    ({"reward": "answer=much"}, "the weight is a number"),
])
def test_settings_that_cannot_work(sft_model, changes, words):
    with pytest.raises(NanochatError, match=words):
        chat_rl(ChatRL(**{**SMALL, **changes}))


@pytest.mark.parametrize("name", ["rloo", "grpo", "dapo", "dr_grpo"])
def test_every_algorithm_runs_and_resumes_exactly(sft_model, name):
    changes = {"algorithm": name, "inner_epochs": 1 if name == "rloo" else 2, "kl": 0.1, "num_iterations": 3}
    chat_rl(ChatRL(**{**SMALL, **changes, "save_every": 1}))
    before = weights_of(sft_model, 3)
    (sft_model / "chatrl_checkpoints" / "d3" / "meta_000003.json").unlink()
    chat_rl(ChatRL(**{**SMALL, **changes, "save_every": 1, "resume": True}))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(sft_model, 3).items())


def test_a_strong_kl_term_holds_the_policy(sft_model):
    distances = []
    for kl in (1e-6, 5.0):
        chat_rl(ChatRL(**{**SMALL, "kl": kl, "num_iterations": 8, "examples_per_step": 8, "init_lr_frac": 0.5}))
        distances.append([event["kl"] for event in events(sft_model) if "kl" in event])
    assert distances[0][0] == pytest.approx(0, abs=1e-6) and distances[1][-1] < distances[0][-1] / 2, distances


def test_no_sft_model_is_one_line(base_dir):
    with pytest.raises(NanochatError, match="chat_sft"):
        chat_rl(ChatRL(**SMALL))


def test_a_reward_of_ones_own_is_named_as_module_and_function(sft_model):
    assert parse_reward("tests.rl_task:paid_for_a=3").total({"tests.rl_task:paid_for_a": 2.0}) == 6
    chat_rl(ChatRL(**{**SMALL, "num_iterations": 1, "reward": "answer=1,tests.rl_task:paid_for_a=0.5"}))
    [event] = [event for event in events(sft_model) if "reward" in event]
    assert event["reward"] == pytest.approx(event["reward_answer"] + 0.5 * event["reward_tests.rl_task:paid_for_a"])


def test_a_collapsed_run_stops_with_the_reason_and_keeps_its_checkpoints(sft_model):
    settings = ChatRL(**{**SMALL, "max_new_tokens": 1, "patience": 3, "num_iterations": 9})
    with pytest.raises(NanochatError, match="at step 3: in 3 steps no answer ended .* last checkpoint is step 2"):
        chat_rl(settings)


def test_several_tasks_are_practised_as_one(base_dir):
    write_tasks(World(1), base_dir / "world" / "tasks")
    both = get_task("letter_counting|spelling", "train")
    kinds = [both[i]["messages"][0]["content"].split()[0] for i in range(len(both))]
    assert 0.4 < kinds.count("Spell") / len(kinds) < 0.6  # the smaller task comes as often
    for item in both[:8]:
        gold = item["messages"][-1]["content"]
        assert both.reward(item, gold) == 1 and both.reward(item, "x") == 0 and both.eval_type == "generative"
    assert len(get_task("letter_counting|spelling", "test")) > 300


def test_spelling_is_practised_on_words_that_are_no_test(base_dir):
    write_tasks(World(1), base_dir / "world" / "tasks")
    held = {row["word"] for row in world_rows("words_test", "")}
    practice, test = (get_task("letter_counting|spelling", split) for split in ("train", "test"))
    asked = [re.findall(r"[a-z]+", item["messages"][0]["content"])[-1] for item in practice]
    assert not held & set(asked) and len(set(asked)) > 3000
    assert {re.findall(r"[a-z]+", item["messages"][0]["content"])[-1] for item in test} <= held


def test_an_evaluation_that_cannot_run_is_reported_and_the_run_survives(sft_model, monkeypatch, capsys):
    class TrainOnly(HasE):
        def __init__(self, split):
            if split == "test":
                raise NanochatError("no test questions here")
            super().__init__(split)

    monkeypatch.setattr("tests.rl_task.HasE", TrainOnly)
    chat_rl(ChatRL(**{**SMALL, "num_iterations": 1, "eval_every": 1}))
    assert "could not run, training is not affected: no test questions here" in capsys.readouterr().out
    assert steps_in(sft_model / "chatrl_checkpoints" / "d3") == [1]


def test_the_bench_finds_the_same_rows_and_prints_its_ratios(base_dir, capsys):
    from nanochat_lib.scripts.chat_bench import ChatBench, bench_packing, bench_rl

    settings = ChatBench(questions=2, samples=3, max_new_tokens=4, repeats=1)
    assert set(bench_packing(settings)) == {100, 1000} and bench_rl(settings) > 0
    assert "RL step of 2 × 3 answers" in capsys.readouterr().out
