"""Grading: letters against one-by-one scoring, pass@k against counting, answers kept, ranks that share questions."""

import csv
import itertools
import json

import pytest
import torch
from sft_model import make_base

from nanochat_lib.checkpoint import checkpoint_directory, save_checkpoint
from nanochat_lib.common import NanochatError, Runtime, read_json
from nanochat_lib.engine import Completion, Engine
from nanochat_lib.scripts.chat_eval import ChatEval, chat_eval
from nanochat_lib.tasks import evaluation_tasks
from nanochat_lib.tasks.common import ChoiceTask, Task, multiple_choice
from nanochat_lib.tasks.evaluate import Answer, Asking, calls_in, choose_letters, evaluate_chat, grade, pass_at_k

ALONE = Runtime(torch.device("cpu"))


def quizzes(letters="ABCD", count=11):
    return [multiple_choice("what is it " * (i % 5 + 1), [f"thing {i}", "dog", "cat", "no"], letters, letters[i % 4])
            for i in range(count)]


@torch.inference_mode()
def likeliest(model, tokenizer, conversation) -> str:
    """The reference: the whole probability of each letter after the prompt, one at a time, from log-softmax."""
    prompt, scores = tokenizer.render_for_completion(conversation), []
    for letter in conversation["letters"]:
        ids = prompt + tokenizer.encode(letter)
        logprobs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        scores.append(sum(logprobs[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))))
    return conversation["letters"][scores.index(max(scores))]


@pytest.mark.parametrize("letters", ["ABCD", ["1", "2", "3", "4"], ["A", "(B)", "CCC", "10"]])
def test_letters_in_batches_equal_one_by_one(tokenizer, make_model, letters):
    model, asked = make_model(sequence_len=256), quizzes(letters)
    expected = [likeliest(model, tokenizer, conversation) for conversation in asked]
    for batch_size in (1, 4, 64):
        assert choose_letters(model, tokenizer, asked, batch_size) == expected


def test_pass_at_k_equals_counting_all_draws():
    for samples, right in itertools.product(range(1, 6), range(6)):
        if right <= samples:
            answers = [True] * right + [False] * (samples - right)
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(answers, k))
                assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


class Echo(Task):
    eval_type = "generative"

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]


def test_calls_that_the_calculator_answered_are_told_from_others(tokenizer, make_model):
    engine = Engine(make_model(), tokenizer)
    call = [engine.python_start, *tokenizer.encode("1+2"), engine.python_end]
    shown = [engine.output_start, *tokenizer.encode("3"), engine.output_end]
    own, forced = [1] * len(call), [0] * len(shown)
    assert calls_in(Completion(call + shown, own + forced, [], "stop"), engine) == "answered"
    assert calls_in(Completion(call + shown + call, own + forced + own, [], "stop"), engine) == "failed"
    assert calls_in(Completion(call + shown, own + [1] * len(shown), [], "stop"), engine) == "failed"  # made up
    assert calls_in(Completion([5], [1], [], "stop"), engine) == ""
    answers = [Answer("sums", i, "", "", ["a", "b"], [True, False], ["answered", made]) for i, made in
               enumerate(("answered", "failed"))]
    assert grade({"sums": Echo([])}, answers)["calculator"] == {"sums": 0.75}


def test_grades_are_centred_on_chance(tokenizer, make_model, monkeypatch):
    echo = Echo([{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": word}]}
                 for word in ("one", "two", "one", "one")])
    said = [["one", "x"], ["one", "one"], ["x", "one"], ["one", "one"]]
    monkeypatch.setattr(Engine, "generate_many", lambda *args, **kwargs: [
        [Completion(tokenizer.encode(text), [], [], "stop") for text in texts] for texts in said])
    model = make_model(sequence_len=256)
    quiz = ChoiceTask(quizzes())
    tasks = {"quiz": quiz, "echo": echo}
    grades, answers = evaluate_chat(model, tokenizer, tasks, Asking(num_samples=2), ALONE)
    hits = sum(likeliest(model, tokenizer, c) == c["messages"][1]["content"] for c in quiz)
    assert grades["tasks"] == {"quiz": hits / 11, "echo": 0.75} and grades["counts"] == {"quiz": 11, "echo": 4}
    assert grades["centered"]["quiz"] == pytest.approx((hits / 11 - 0.25) / 0.75) and grades["centered"]["echo"] == 0.75
    assert grades["chatcore"] == pytest.approx((grades["centered"]["quiz"] + 0.75) / 2)
    assert grades["pass_at_k"] == {"echo": [pytest.approx(0.5), pytest.approx(0.75)]}
    assert [answer["answers"] for answer in answers if answer["task"] == "echo"] == said
    assert not model.training and grade({}, [])["chatcore"] == 0
    with pytest.raises(NanochatError, match="task talk cannot be graded"):
        evaluate_chat(model, tokenizer, {"talk": Task([])}, Asking(), ALONE)


@pytest.fixture
def sft_model(tokenizer, base_dir):
    """A checkpoint of stage sft whose context is long enough for the world's questions."""
    model = make_base(tokenizer, sequence_len=256)
    meta = {"tokenizer": tokenizer.fingerprint}
    save_checkpoint(checkpoint_directory("sft", "d2"), 3, model, None, meta, ALONE)
    return base_dir


def test_a_perfect_model_has_perfect_grades(sft_model, tokenizer, make_model, monkeypatch):
    tasks = {name: task[:5] for name, task in evaluation_tasks("world").items()}
    gold = {tuple(tokenizer.render_for_completion(conversation)): tokenizer.render_conversation(conversation)[0]
            for task in tasks.values() for conversation in task}

    def generate_many(self, prompts, *args, **kwargs):
        return [[Completion(gold[tuple(p)][len(p):-1], [], [], "stop")] for p in prompts]

    monkeypatch.setattr(Engine, "generate_many", generate_many)
    monkeypatch.setattr("nanochat_lib.tasks.evaluate.choose_letters",
                        lambda model, tokenizer, asked, batch: [c["messages"][-1]["content"] for c in asked])
    grades, _ = evaluate_chat(make_model(), tokenizer, tasks, Asking(), ALONE)
    assert set(grades["tasks"].values()) == {1.0} and grades["chatcore"] == 1


def test_the_command_keeps_grades_and_every_answer(sft_model, run_module, capsys):
    chat_eval(ChatEval(source="sft", mixture="world", max_problems=3, max_new_tokens=8, num_samples=2, temperature=1.0))
    report = sft_model / "report"
    result, first = read_json(report / "result_chat_eval_sft.json"), (report / "answers_sft.jsonl").read_text()
    assert list(result["tasks"]) == ["multiple_choice", "multiple_choice_letter", "letter_counting", "spelling",
                                     "word_problems_1", "word_problems_2", "facts"]
    assert set(result["counts"].values()) == {3} and result["step"] == 3
    answers = [json.loads(line) for line in first.splitlines()]
    assert len(answers) == 21
    assert {len(answer["answers"]) for answer in answers if answer["task"] != "multiple_choice_letter"} == {2}
    with open(report / "chat_eval_sft.csv", newline="") as file:
        assert [row["task"] for row in csv.DictReader(file)] == list(result["tasks"])
    assert "ChatCORE" in capsys.readouterr().out
    done = run_module("nanochat_lib.scripts.chat_eval", "-i", "sft", "--mixture=world", "-x", 3, "-m", 8, "-n", 2,
                      "-t", 1.0, "-k", 50, nproc=2)
    assert done.returncode == 0, done.stderr
    assert (report / "answers_sft.jsonl").read_text() == first  # two ranks ask the same questions in the same way
    assert read_json(report / "result_chat_eval_sft.json")["tasks"] == result["tasks"]


def test_tasks_by_name_and_names_that_are_none(sft_model, shared_data):
    chat_eval(ChatEval(task_name="GSM8K|HumanEval", task_data=str(shared_data), max_problems=2, max_new_tokens=4))
    result = read_json(sft_model / "report" / "result_chat_eval_sft.json")
    assert result["counts"] == {"GSM8K": 2, "HumanEval": 2}
    for settings, message in ((ChatEval(task_name="gsm9k"), "no task 'gsm9k'"), (ChatEval(num_samples=0), "at least 1"),
                              (ChatEval(source="rl", mixture="world"), "chat_rl")):
        with pytest.raises(NanochatError, match=message):
            chat_eval(settings)
