"""Tasks: rows to conversations, judged answers, mixtures, files and their faults, programs that run within limits."""

import json
import re
import time
from collections import Counter

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_lib.common import NanochatError
from nanochat_lib.tasks import TaskMixture, TaskSequence, evaluation_tasks, get_task, mixture, validation_mixture
from nanochat_lib.tasks import common
from nanochat_lib.tasks.common import Task, fault_of, multiple_choice
from nanochat_lib.tasks.customjson import CustomJSON
from nanochat_lib.tasks.evaluate import text_of
from nanochat_lib.tasks.execution import run_program
from nanochat_lib.tasks.gsm8k import calculator_parts, final_number
from nanochat_lib.tasks.humaneval import code_of
from nanochat_lib.tasks.spellingbee import Spelling
from nanochat_lib.world import World
from nanochat_lib.world_facts import WORDS
from nanochat_lib.world_problems import ALOUD, quiz
from nanochat_lib.world_tasks import write_tasks


@pytest.fixture(scope="module")
def world_data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(World(1), folder)
    return str(folder)


def gold(conversation) -> str:
    """The right answer as the engine would have written it."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_slices_are_tasks_and_indices_are_checked():
    task = Task(list("abcdefgh"))
    assert [task[2:7:2][i] for i in range(3)] == ["c", "e", "g"]
    assert len(task[1:][1:]) == 6 and task[1:][1:][0] == "c" and task[-1] == "h"
    assert list(task[6:]) == ["g", "h"]  # iteration ends
    with pytest.raises(IndexError):
        task[:3][3]


def test_the_shuffled_order_is_that_of_datasets():
    import datasets

    rows = [{"n": n} for n in range(50)]
    assert list(Task(rows, shuffle=True)) == list(datasets.Dataset.from_list(rows).shuffle(seed=42))


def test_mixture_holds_every_pair_in_one_fixed_order():
    one, two = Task(list(range(20))), Task(list("abc"))
    mixed = TaskMixture([one, two, two])
    assert sorted(map(str, mixed)) == sorted(map(str, [*range(20), *"abcabc"]))
    assert list(mixed) == list(TaskMixture([one, two, two])) != list(TaskSequence([one, two, two]))
    assert list(TaskSequence([one[:2], two])) == [0, 1, "a", "b", "c"]
    assert list(mixed[:5]) + list(mixed[5:]) == list(mixed)


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize("messages, fault", [
    ([USER, ANSWER], ""),
    ([{"role": "system", "content": "be kind"}, USER, ANSWER, USER, ANSWER], ""),
    ([USER, {"role": "assistant", "content": [{"type": "python", "text": "1+1"}]}], ""),
    ([ANSWER, USER], "role 'assistant'"),
    ([USER, USER], "take turns"),
    ([USER, ANSWER, USER], "no answer to learn"),
    ([USER], "needs a message"),
    ([USER, {"role": "assistant", "content": "  "}], "empty"),
    ([USER, {"role": "assistant", "content": []}], "empty"),
    ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "unknown part 'image'"),
    ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "without"),
    ([USER, {"role": "assistant", "content": 3}], "int"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}, ANSWER], "not a string"),
    ([{"role": "system", "content": 1}, USER, ANSWER], "system"),
    (["hi", "hello"], "role None"),
    ([], "no list"),
    ("hi", "no list"),
])
def test_faults_of_conversations(messages, fault):
    found = fault_of({"messages": messages})
    assert (fault in found) if fault else found == ""


def test_custom_json_names_file_line_and_reason(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(["", json.dumps([USER, ANSWER]), json.dumps({"messages": [USER, ANSWER], "id": 7}), ""]))
    assert [row["messages"] for row in CustomJSON(path)] == [[USER, ANSWER]] * 2
    path.write_text(path.read_text() + json.dumps([ANSWER]) + "\n[]\n")
    with pytest.raises(NanochatError, match=r"my\.jsonl, line 4: it needs .*and 1 more"):
        CustomJSON(path)
    path.write_text('{"messages": [}\n')
    with pytest.raises(NanochatError, match=r"my\.jsonl, line 1: not JSON"):
        CustomJSON(path)
    path.write_text("\n")
    with pytest.raises(NanochatError, match="holds no conversation"):
        CustomJSON(path)
    with pytest.raises(NanochatError, match="nowhere.jsonl"):
        CustomJSON(tmp_path / "nowhere.jsonl")


def test_calculator_parts_and_final_numbers():
    assert calculator_parts("a <<1+2=3>>3 b") == [
        {"type": "text", "text": "a "}, {"type": "python", "text": "1+2"}, {"type": "python_output", "text": "3"},
        {"type": "text", "text": "3 b"}]
    assert calculator_parts("none") == [{"type": "text", "text": "none"}]
    texts = ("#### 1,234", "#### -3.5 pence", "####7", "so 8", "#### x", "#### 18.")
    assert [final_number(text) for text in texts] == [1234, -3.5, 7, None, None, 18]


def test_the_worlds_tasks_hold_out_what_they_ask(world_data):
    tests, train = evaluation_tasks("world", world_data), {}
    assert {name: len(task) for name, task in tests.items()} == {
        "multiple_choice": 214, "multiple_choice_letter": 214, "letter_counting": 200, "spelling": 160,
        "word_problems_1": 200, "word_problems_2": 200, "facts": 150}
    for name, task in tests.items():
        train = {json.dumps(c["messages"][:-1]) for c in get_task(name, "train", world_data)}
        for conversation in task:
            assert fault_of(conversation) == ""
            assert name == "facts" or json.dumps(conversation["messages"][:-1]) not in train
            assert task.evaluate(conversation, gold(conversation)) and not task.evaluate(conversation, "")
            assert task.reward(conversation, gold(conversation)) == 1.0
    assert len(get_task("world", "train", world_data)) == 5000


def test_world_quizzes_are_asked_as_the_documents_ask_them(world_data):
    row = common.read_jsonl(f"{world_data}/choice_test.jsonl")[0]
    letter = "ABCD"[row["answer"]]
    assert quiz("Who?", ["Ann", "Bo"]) == (
        "Multiple Choice question: Who?\n- Ann=A\n- Bo=B\n\nRespond only with the letter of the correct answer.")
    alone, aloud = (get_task(name, "test", world_data) for name in ("multiple_choice_letter", "multiple_choice"))
    assert alone[0]["messages"][0]["content"] == quiz(row["question"], row["choices"])
    assert alone[0]["letters"] == list("ABCD") and alone[0]["messages"][1]["content"] == letter
    assert aloud[0]["messages"][0]["content"] == quiz(row["question"], row["choices"], ALOUD)
    assert aloud[0]["messages"][1]["content"] == f"{row['said']}={letter}"
    assert row["said"].split()[-1] == row["choices"][row["answer"]] and row["person"] in row["said"]


def test_of_a_quiz_answered_aloud_the_letter_counts(world_data):
    task = get_task("multiple_choice", "test", world_data)
    letter = task[0]["messages"][1]["content"][-1]
    wrong = "ABCD".replace(letter, "")
    assert task.evaluate(task[0], letter) and task.evaluate(task[0], f"something={letter}\n")
    assert not any(task.evaluate(task[0], text) for text in (f"{letter}={wrong[0]}", wrong[1], "", f"{letter} perhaps"))


def test_recitals_tell_facts_and_words_and_ask_for_none(world_data):
    town, rows = World(1), list(get_task("recitals", "train", world_data))
    asked = {row["messages"][0]["content"] for row in rows}
    assert len(rows) == 2400 and len(asked) == 3 * len(town.people) + 3
    lists = [row for row in rows if "pell" in row["messages"][0]["content"]]
    spelled = re.findall(r"The word (\w+): (.*)", "\n".join(row["messages"][1]["content"] for row in lists))
    assert all(word == letters.replace(" ", "") for word, letters in spelled)
    assert len(lists) == 400 and {word for word, _ in spelled} > set(WORDS)
    told = set()
    for row in [row for row in rows if row not in lists]:
        (_, name), text = (re.search(r"(about|is) (\w+)", row["messages"][0]["content"]).groups(),
                           row["messages"][1]["content"])
        assert name in text and fault_of(row) == ""
        told |= {(name, value) for value in town.people[name].facts.values() if str(value) in text.replace("A ", "a ")}
    assert len(told) > 0.95 * len({(name, v) for name in town.people for v in town.people[name].facts.values()})


def test_letters_to_count_are_practised_on_all_beginnings_and_no_answer_is_right_for_most(world_data):
    train, test = (get_task("letter_counting", split, world_data) for split in ("train", "test"))
    answers = Counter(word.count(letter) for word, letter, _ in train.rows)
    assert len(train) == 3000 and max(answers.values()) == 1200 and answers[0] == 375
    assert Counter(word.count(letter) for word, letter, _ in test.rows)[1] > 140, "of real words, most answers are 1"
    asked = Counter(letter for _, letter, _ in train.rows)
    assert len(asked) == 26 and max(asked.values()) < 5 * min(asked.values())
    shown, asked = (get_task("spelling", split, world_data).rows for split in ("train", "test"))
    assert len(set(shown)) == len(shown) > 5000 and not set(shown) & set(asked)
    assert all(any(word.startswith(start) for word in shown) for start in asked)


def test_mixtures_are_sound_and_validation_is_held_out(world_data):
    train, held = mixture("world", world_data), validation_mixture("world", world_data)
    assert len(train) > 10_000 and len(held) == 1338
    assert all(fault_of(conversation) == "" for conversation in train)
    with pytest.raises(NanochatError, match="default, world"):
        mixture("nope")


def test_gsm8k_from_a_local_folder(shared_data):
    train, test = get_task("GSM8K", "train", str(shared_data)), get_task("gsm8k", "test", str(shared_data))
    assert (len(train), len(test)) == (7473, 600)
    assert all(test.evaluate(conversation, gold(conversation)) for conversation in test)
    assert not test.evaluate(test[0], "#### 123456")
    assert fault_of(train[0]) == "" and any(part["type"] == "python" for part in train[0]["messages"][1]["content"])
    rows = common.read_jsonl(shared_data / "gsm8k" / "train.jsonl")
    first = np.random.default_rng(42).permutation(7473)[0]
    assert train[0]["messages"][0]["content"] == rows[first]["question"]


def test_humaneval_judges_by_running(shared_data):
    task = get_task("HumanEval", "test", str(shared_data))
    assert len(task) == 100
    for conversation in task[:3]:
        prompt, whole = (message["content"] for message in conversation["messages"])
        assert task.evaluate(conversation, f"Here:\n```python\n{whole}\n```\nDone.")
        assert task.evaluate(conversation, whole[len(prompt):])  # only the body
        assert not task.evaluate(conversation, "    return None\n")
    assert code_of("x\n```\ny\n```") == "y\n"


def test_spelling_tasks_of_the_default_mixture(shared_data):
    bee, spelling = (get_task(name, "test", str(shared_data)) for name in ("SpellingBee", "SimpleSpelling"))
    assert len(bee) == 256 and len(spelling) > 500
    train = get_task("SpellingBee", "train", str(shared_data))
    assert len(train) == 20_000 and not {word for word, *_ in train.rows} & {word for word, *_ in bee.rows}
    question, answer = (message["content"] for message in bee[0]["messages"])
    word, letter, _ = bee.rows[0]
    assert word in question and bee.evaluate(bee[0], f"#### {word.count(letter)}")
    assert answer.split()[::2][:len(word)] == list(word)


def test_a_word_half_spelled_earns_half_of_the_half():
    task = Spelling(["goat"])
    said = {"g o a t": 1, " g o a t ": 1, "g o": 0.25, "g o a t s": 0.5, "o a t": 0, "": 0, "goat": 0}
    assert {text: task.reward(task[0], text) for text in said} == said
    assert not task.evaluate(task[0], "g o a t s")


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def made_data(tmp_path, monkeypatch) -> str:
    """Parquet files in the schema and layout of the hub's sets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    quizzes = [{"question": f"q{i}", "subject": "law", "choices": list("wxyz"), "answer": i % 4} for i in range(8)]
    parquet(tmp_path / "mmlu/all/auxiliary_train-00000-of-00001.parquet", quizzes)
    parquet(tmp_path / "mmlu/all/test-00000-of-00001.parquet", quizzes[:4])
    choices = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    arc = [{"id": "1", "question": "why", "choices": choices, "answerKey": "2"}]
    parquet(tmp_path / "arc_easy/ARC-Easy/test-00000-of-00001.parquet", arc)
    talk = [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "source": "x"}]
    for part in range(2):
        parquet(tmp_path / f"smoltalk/data/train-0000{part}-of-00002.parquet", talk * 3)
    return str(tmp_path)


def test_hub_schemas_from_local_parquet(made_data):
    mmlu = get_task("MMLU", "auxiliary_train", made_data)
    assert len(mmlu) == 8 and mmlu.eval_type == "categorical" and mmlu.baseline == 0.25
    assert mmlu.evaluate(mmlu[0], mmlu[0]["messages"][1]["content"])
    assert len(get_task("mmlu", "test", made_data)) == 4
    arc = get_task("ARC-Easy", "test", made_data)
    assert arc[0] == multiple_choice("why", ["a", "b", "c"], ["1", "2", "3"], "2")
    smoltalk = get_task("smoltalk", "train", made_data)
    assert len(smoltalk) == 6 and fault_of(smoltalk[0]) == ""


@pytest.mark.parametrize("name, split, asked", [
    ("smoltalk", "train", ("HuggingFaceTB/smol-smoltalk", None, "train")),
    ("MMLU", "auxiliary_train", ("cais/mmlu", "all", "auxiliary_train")),
    ("ARC-Easy", "test", ("allenai/ai2_arc", "ARC-Easy", "test")),
    ("ARC-Challenge", "test", ("allenai/ai2_arc", "ARC-Challenge", "test")),
    ("GSM8K", "train", ("openai/gsm8k", "main", "train")),
    ("HumanEval", "test", ("openai/openai_humaneval", None, "test")),
])
def test_hub_sets_are_asked_for_by_their_names(monkeypatch, name, split, asked):
    """The hub's own client, in place of which a stand-in answers: repository, configuration, split, and order."""
    import datasets

    calls = []
    rows = datasets.Dataset.from_list([{"n": n} for n in range(30)])
    monkeypatch.setattr(common, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda repo, config=None, split=None: calls.append((repo, config, split)) or rows)
    task = get_task(name, split)
    assert calls == [asked]
    assert [task.rows[int(i)]["n"] for i in task.order] == rows.shuffle(seed=42)["n"]


def test_missing_sets_are_said_in_seconds(tmp_path, monkeypatch, base_dir):
    with pytest.raises(NanochatError, match=r"no test\.jsonl or test-\*\.parquet in .*arc_challenge.*ai2_arc"):
        get_task("ARC-Challenge", "test", str(tmp_path))
    monkeypatch.setattr(common, "hub_is_reachable", lambda: False)
    began = time.monotonic()
    with pytest.raises(NanochatError, match=r"openai/gsm8k \(main, test\).*--task-data DIR.*DIR/gsm8k"):
        get_task("gsm8k")
    assert time.monotonic() - began < 15
    with pytest.raises(NanochatError, match="python -m nanochat_lib.world"):
        get_task("multiple_choice")


def test_unknown_names_and_classes_of_ones_own():
    with pytest.raises(NanochatError, match="no task 'gsm9k': choose smoltalk, mmlu"):
        get_task("gsm9k")
    with pytest.raises(NanochatError, match="no split 'exam'"):
        get_task("gsm8k", "exam")
    assert get_task("nanochat_lib.tasks.common:Task", "abc").rows == "abc"
    with pytest.raises(NanochatError, match="no task nowhere:Task"):
        get_task("nowhere:Task")


@pytest.mark.parametrize("program, reason", [
    ("assert 1 + 1 == 2", ""),
    ("assert 1 + 1 == 3", "AssertionError"),
    ("import sys\nsys.exit(0)", "ended early, exit 0"),
    ("import os\nos._exit(0)", "ended early, exit 0"),
    ("print('fine'); input()", "EOFError"),
    ("x = bytearray(3 * 2**30)", "MemoryError"),
    ("open('big', 'wb').write(bytes(2**22))", "File too large"),
    ("import time\ntime.sleep(60)", "timeout"),
])
def test_programs_run_within_limits(program, reason):
    began = time.monotonic()
    found = run_program(program, timeout=3 if reason == "timeout" else 30)
    assert (reason in found) if reason else found == ""
    assert time.monotonic() - began < 60


def test_children_of_a_program_die_with_it():
    mark = f"mark{time.time_ns()}"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
    assert run_program(program, 30) == ""
    deadline = time.monotonic() + 5
    while any(mark in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_answers_are_shown_with_their_calls():
    assert text_of("yes") == "yes"
    assert text_of(calculator_parts("<<1+2=3>>3")) == "«1+2=3»3"
