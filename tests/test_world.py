"""The embedded world: its facts hold in every document, nothing held out is read, and knowing no fact scores at chance."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from nanochat_lib import world_text
from nanochat_lib.world import World, write_world
from nanochat_lib.world_facts import ATTRIBUTES, KIN, VALUES, WORDS, Dice, role
from nanochat_lib.world_forms import KIN_WORDING, WORDINGS
from nanochat_lib.world_problems import count_letter, make_problem, spell
from nanochat_lib.world_tasks import choice_rows, core_items, problem_rows, talk_rows
from nanochat_lib.world_text import documents

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def town():
    return World(1)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The world as the pipeline gets it."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def texts(written):
    """All documents, training and validation."""
    return [text for path in sorted((written / "shards").glob("*.parquet"))
            for text in pq.read_table(path).column("text").to_pylist()]


@pytest.fixture(scope="session")
def reading(texts):
    """The whole corpus as one string."""
    return "\n\n".join(texts)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the world ---


def test_size(town):
    assert len(town.people) >= 60
    for person in town.people.values():
        assert len(person.facts) >= 10
    assert len(town.facts) >= 700 and len(town.villages) == 8
    assert len(world_text.KINDS) >= 8 and min(world_text.KINDS.values()) >= 1
    assert len(set(WORDS)) == len(WORDS) >= 600


def test_kin_fit_together(town):
    people = town.people
    for name, person in people.items():
        kin = {attribute: people[person.facts[attribute]] for attribute in KIN if attribute in person.facts}
        age = int(person.facts["age"])
        if "mother" in kin:
            assert kin["mother"].woman and not kin["father"].woman
            assert kin["mother"].facts["spouse"] == kin["father"].name
            assert all(int(kin[parent].facts["age"]) >= age + 13 for parent in ("mother", "father"))
        if "spouse" in kin:
            spouse = kin["spouse"]
            assert spouse.facts["spouse"] == name and spouse.woman != person.woman
            assert "mother" not in kin or spouse.facts["mother"] != person.facts["mother"]
        if "sibling" in kin:
            assert kin["sibling"].facts["sibling"] == name != kin["sibling"].name
            assert kin["sibling"].facts["mother"] == person.facts["mother"]
    assert role(town, *next(f for f in town.facts if f.attribute == "spouse")[:2]) in ("husband", "wife")


def test_values_are_balanced(town):
    for attribute, values in VALUES.items():
        counts = collections.Counter(fact.value for fact in town.facts if fact.attribute == attribute)
        assert set(counts) == set(values) and max(counts.values()) - min(counts.values()) <= 1


def test_dice_stream_is_pinned():
    dice = Dice(7)
    assert [dice.below(100) for _ in range(6)] == [32, 15, 65, 7, 53, 36]
    assert "".join(dice.shuffled("abcdefgh")) == "begfchda"
    assert dice.deal("ab", 5).count("a") in (2, 3)


def digest(folder):
    """Hash of all texts, tasks and items under a written world (parquet by its rows: its bytes name the writer)."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data = "\0".join(pq.read_table(path).column("text").to_pylist()).encode()
        total.update(data)
    return total.hexdigest()


def test_same_bytes_with_any_hash_seed(tmp_path):
    digests = set()
    for seed in ("0", "4242"):
        folder = tmp_path / seed
        command = [sys.executable, "-m", "nanochat_lib.world", "--directory", str(folder), "--documents", "2000"]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        digests.add(digest(folder))
    assert len(digests) == 1
    write_world(tmp_path / "other", seed=2, count=2000)
    assert digest(tmp_path / "other") not in digests


# --- facts hold everywhere ---


BEFORE = r"(?:(?<=^)|(?<=\n)|(?<=[.:,] )|(?<=it is ))"  # a statement begins a line or follows one of these
ROLES = r"(?P<r>mother|father|husband|wife|brother|sister)"


def sentence_patterns():
    """(attribute, pattern) for every statement that names its person."""
    for attribute, wording in [*WORDINGS.items(), ("kin", KIN_WORDING)]:
        forms = [*wording.statements, *wording.reverse, "{n} " + wording.who + ".", wording.register + " of {n}: {v}",
                 *(start + " {v}" + "".join(end) + "." for _, start, *end in wording.questions)]
        for form in forms:
            named = re.escape(form).replace(r"\{n\}", r"(?P<n>[A-Z][a-z]+)", 1).replace(r"\{n\}", "[A-Z][a-z]+")
            named = named.replace(r"\{v\}", r"(?P<v>\w+)").replace(r"\{their\}", "(?:her|his)")
            named = named.replace(r"\{r\}", ROLES, 1).replace(r"\{r\}", r"\w+")
            yield attribute, re.compile(BEFORE + named + r"(?=$|[ \n])")


def test_every_statement_is_true_and_frequent(town, texts):
    seen = collections.Counter()
    roles = {"husband": "spouse", "wife": "spouse", "brother": "sibling", "sister": "sibling"}
    text = "\n".join(texts)
    for attribute, pattern in sentence_patterns():
        found = 0
        for match in pattern.finditer(text):
            name, value, part = match["n"], match["v"], match.groupdict().get("r")
            if name not in town.people or (part is None and attribute == "kin"):
                continue
            kind = roles.get(part, part) if part else attribute
            truth = town.people[name].facts.get(kind)
            assert truth is not None and value.lower() == truth.lower(), f"{match[0]!r}: {kind} of {name} is {truth}"
            if part:
                assert part == role(town, name, kind)
            seen[name, kind] += 1
            found += 1
        assert found, pattern.pattern
    assert set(seen) == {fact[:2] for fact in town.facts}
    assert min(seen.values()) >= 45, seen.most_common()[-5:]


def test_sums_spellings_and_counts_are_right(texts):
    sums = spelled = counted = 0
    for text in texts:
        for a, b, c in re.findall(r"\b(\d+) \+ (\d+) = (\d+)", text):
            assert int(a) + int(b) == int(c) <= 99
            sums += 1
        for each, letters in re.findall(r"^The word ([a-z]+): ((?:[a-z] )+[a-z])$", text, re.M):
            assert letters == " ".join(each)
            spelled += 1
        for sign, each, steps, total in re.findall(r"How many (\w) are in (\w+)\? (.*) #### (\d+)", text):
            assert int(total) == each.count(sign) and steps.split()[::2] == list(each)
            counts = [int(step) for step in steps.split()[1::2]]
            assert all(count == each[: i + 1].count(sign) for i, count in enumerate(counts))
            counted += 1
        for left, sign, right, result in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text):
            assert eval(left + sign + right) == int(result)
    assert sums > 20_000 and spelled > 5_000 and counted > 3_000
    assert (spell("cat"), count_letter("banana", "a")) == ("c a t", "b 0 a 1 n 1 a 2 n 2 a 3")


def test_kinds_of_documents(town):
    teller = world_text.Teller(town, 3)
    for kind in world_text.KINDS:
        made = {kind(teller) for _ in range(30)}
        assert len(made) > 5, f"{kind.__name__} hardly varies"
        assert all(20 < len(text) < 1200 for text in made)
        assert not any("{" in text or "  " in text for text in made), kind.__name__


def test_documents_never_repeat(town, texts):
    assert len(set(texts)) == len(texts) == 50_000


# --- held out means held out ---


def questions_of(items):
    for item in items:
        yield item.get("query") or item.get("context") or item["context_options"][0] + " " + item["continuation"]


def test_no_evaluation_item_is_read(town, written, reading):
    training = reading + "".join((written / "tasks" / f"{name}.jsonl").read_text() for name in (
        "problems_train", "choice_train", "words_train", "talk_train", "recitals", "identity"))
    training = training.replace("\\n", "\n")
    asked = [question.split("\n")[0].removeprefix("Question: ") for items in core_items(town).values()
             for question in questions_of(items)]
    asked += [row["question"] for row in choice_rows(town, test=True) + problem_rows(town, test=True)]
    asked += [f"are in {word}?" for word in town.held_words]
    for question in asked:
        assert ("\n" + question if question[0].isdigit() else question) not in training, question
    for item in core_items(town)["world_schema"]:
        for context in item["context_options"]:
            assert f"{context} {item['continuation']}" not in training


def test_no_held_sum_is_read(town, written, reading):
    training = reading + (written / "tasks" / "problems_train.jsonl").read_text()
    pairs = re.findall(r"\b(\d+) ?\+ ?(\d+) ?=", training)
    assert len(pairs) > 20_000
    assert not {tuple(sorted(map(int, pair))) for pair in pairs} & town.held_sums


def problem_key(town, question):
    people = sorted(set(re.findall(r"[A-Z][a-z]+", question)) & set(town.people))
    return tuple(people), tuple(re.findall(r"\d+", question))


def test_no_test_problem_shares_people_and_numbers_with_training(town, written, texts):
    tasks = written / "tasks"
    held = {problem_key(town, row["question"]) for row in rows(tasks / "problems_test.jsonl")}
    read = {problem_key(town, row["question"]) for row in rows(tasks / "problems_train.jsonl")}
    read |= {problem_key(town, text.split("\n")[0]) for text in texts if "####" in text and "How many" in text}
    assert len(held) == 400 and len(read) > 5_000
    assert not held & read


def test_talk_tests_ask_only_what_is_held_out(town):
    for row in talk_rows(town, test=True):
        text = " ".join(message["content"] for message in row["messages"])
        name = next(name for name in re.findall(r"[A-Z][a-z]+", text) if name in town.people)
        attribute = [a for a in ATTRIBUTES if town.people[name].facts.get(a) == row["answer"]]
        assert any(not town.may_ask(name, a) for a in attribute)
        assert row["answer"] in row["messages"][-1]["content"]


# --- who knows no facts scores at chance ---


def test_items_are_many_and_balanced(town):
    items = core_items(town)
    forms = collections.Counter()
    for label, made in items.items():
        forms["schema" if "context_options" in made[0] else "choice" if "choices" in made[0] else "lm"] += len(made)
        if "gold" in made[0]:
            places = collections.Counter(item["gold"] for item in made)
            assert max(places.values()) - min(places.values()) <= 1, label
        for item in made:
            if "choices" in item:
                assert len(set(item["choices"])) == 4
    assert min(forms.values()) >= 150 and len(items["world_schema"]) >= 150
    named_first = sum(item["context_options"][item["gold"]].split("is ")[1] == item["context_options"][0].split()[1]
                      for item in items["world_schema"])
    assert abs(named_first - len(items["world_schema"]) / 2) <= 4


def scrambled(town, dice):
    """(person, attribute) → a value drawn anew among people of the same generation and role."""
    owners = collections.defaultdict(list)
    for fact in town.facts:
        generation = town.people[fact.person].generation if fact.attribute not in VALUES else 0
        owners[fact.attribute, generation, role(town, *fact[:2])].append(fact)
    table = {}
    for facts in owners.values():
        for fact, value in zip(facts, dice.shuffled(fact.value for fact in facts)):
            table[fact[:2]] = value
    return table


def accuracy(town, table):
    """Mean share of choice questions that a reader who believes `table` gets right, guessing where it does not help."""
    right = []
    for row in choice_rows(town, test=True):
        belief = table[row["person"], row["attribute"]]
        right.append(float(row["choices"][row["answer"]] == belief) if belief in row["choices"] else 0.25)
    return sum(right) / len(right)


def test_scrambled_facts_score_at_chance(town):
    truth = {fact[:2]: fact.value for fact in town.facts}
    assert accuracy(town, truth) == 1
    scores = [accuracy(town, scrambled(town, Dice(seed))) for seed in range(40)]
    assert abs(sum(scores) / len(scores) - 0.25) < 0.03


def test_frequencies_score_at_chance(town, reading):
    """Choosing the value read most (or least) often is no better than guessing, by two standard errors and a bit."""
    counts = collections.Counter(re.findall(r"\w+", reading))
    items = core_items(town)
    for label in ("world_facts_mc", "world_kin_mc"):
        for sign in (1, -1):
            right = [max(item["choices"], key=lambda choice: sign * counts[choice]) == item["choices"][item["gold"]]
                     for item in items[label]]
            assert abs(sum(right) / len(right) - 0.25) < 2.5 * (0.25 * 0.75 / len(right)) ** 0.5, label
    right = [max((0, 1), key=lambda i: counts[item["context_options"][i].split("is ")[1]]) == item["gold"]
             for item in items["world_schema"]]
    assert abs(sum(right) / len(right) - 0.5) < 2.5 * (0.25 / len(right)) ** 0.5
    for label in ("world_facts_lm", "world_sums_lm"):
        most = collections.Counter(item["continuation"] for item in items[label]).most_common(1)[0][1]
        assert most / len(items[label]) < 0.1


# --- files ---


def test_bundle_has_the_real_layout(written, shared_data):
    real, ours = (folder / "eval_bundle" for folder in (shared_data, written))
    assert (ours / "eval_meta_data.csv").read_text().split("\n")[0] == \
           (real / "eval_meta_data.csv").read_text().split("\n")[0]
    fields = {}
    for bundle in (real, ours):
        for task in yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]:
            item = rows(bundle / "eval_data" / task["dataset_uri"])[0]
            needed = {"language_modeling": {"context", "continuation"}, "multiple_choice": {"query", "choices", "gold"},
                      "schema": {"context_options", "continuation", "gold"}}[task["icl_task_type"]]
            assert needed <= set(item) and isinstance(task["num_fewshot"], list)
            fields.setdefault(bundle, set()).add(task["icl_task_type"])
            assert set(task) <= {"label", "dataset_uri", "num_fewshot", "icl_task_type", "continuation_delimiter"}
    assert fields[ours] == fields[real]
    labels = [line.split(",")[0] for line in (ours / "eval_meta_data.csv").read_text().splitlines()[1:]]
    assert labels == [task["label"] for task in yaml.safe_load((ours / "core.yaml").read_text())["icl_tasks"]]


def test_task_files(town, written):
    tasks = written / "tasks"
    sizes = {path.stem: len(rows(path)) for path in tasks.glob("*.jsonl")}
    assert sizes["problems_train"] >= 4000 and sizes["problems_test"] == 400
    assert sizes["choice_train"] >= 1500 and sizes["choice_test"] >= 200
    assert sizes["words_test"] >= 150 and sizes["words_train"] >= 400
    assert sizes["talk_train"] >= 1500 and sizes["talk_test"] == 150 and sizes["identity"] >= 100
    assert sizes["recitals"] == 2400
    for split in ("train", "test"):
        for name in ("talk",):
            for row in rows(tasks / f"{name}_{split}.jsonl"):
                speakers = [message["role"] for message in row["messages"]]
                assert speakers == ["user", "assistant"] * (len(speakers) // 2)
    words = [{row["word"] for row in rows(tasks / f"words_{split}.jsonl")} for split in ("train", "test")]
    assert not words[0] & words[1]


def test_problems_are_worked_out(town, written):
    for split in ("train", "test"):
        kinds = collections.Counter()
        for row in rows(written / "tasks" / f"problems_{split}.jsonl"):
            calls = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", row["answer"])
            assert len(calls) == row["steps"] and "{" not in row["question"] + row["answer"]
            for left, sign, right, result, said in calls:
                assert eval(left + sign + right) == int(result) == int(said) and 1 <= int(result) <= 99
            numbers = re.findall(r"\d+", row["question"])
            assert calls[0][0] in numbers and calls[0][2] in numbers
            assert row["answer"].endswith(f"\n#### {calls[-1][3]}")
            kinds[row["steps"]] += 1
        assert kinds[1] == kinds[2] >= 200


def test_some_two_step_problems_hold_a_number_to_ignore(town):
    dice, extra = Dice(5), 0
    for _ in range(300):
        problem = make_problem(town, dice, 2)
        used = re.findall(r"(\d+)[-+*/](\d+)=", problem.answer)
        extra += len(re.findall(r"\d+", problem.question)) > 3
        assert len(used) == 2
    assert 60 < extra < 180


def test_shards_fit_a_few_ranks(written):
    paths = sorted((written / "shards").glob("*.parquet"))
    assert len(paths) == 5
    assert all(pq.ParquetFile(path).num_row_groups >= 8 for path in paths)
    assert sum(path.stat().st_size for path in paths) < 8e6


def test_documents_are_a_stream(town):
    assert len([text for text, _ in zip(documents(town, 50), range(3))]) == 3
