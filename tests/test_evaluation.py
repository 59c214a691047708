"""Lesson 06: bits per byte and CORE against references written here, one question at a time."""

import csv
import http.server
import json
import math
import random
import threading
import time
import zipfile

import pytest
import torch
import yaml

from nanochat_lib import evaluation
from nanochat_lib.common import NanochatError
from nanochat_lib.evaluation import (bits_per_byte, evaluate_bpb, evaluate_core, examples_for, find_bundle, prompts_of,
                                     read_bundle, read_items)
from nanochat_lib.scoring import Row, crop, length_batches, rows_of, score_questions, score_rows
from nanochat_lib.world_facts import World
from nanochat_lib.world_tasks import write_bundle


@pytest.fixture(scope="module")
def world_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "eval_bundle"
    write_bundle(World(1), folder)
    return folder


class Scripted(torch.nn.Module):
    """Logits that depend on the last two tokens only: cheap, and different for each pair."""

    def __init__(self, vocab=309, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.now, self.before = (torch.randn(vocab, vocab, generator=generator) for _ in range(2))

    def forward(self, ids, targets=None, loss_reduction="mean"):
        logits = self.now[ids] + self.before[torch.nn.functional.pad(ids[:, :-1], (1, 0))]
        if targets is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction=loss_reduction,
                                                 ignore_index=-1)


# --- bits per byte ------------------------------------------------------------------------------------------------

def test_bits_per_byte_by_hand():
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    targets = torch.tensor([[0, 1, 2, -1]])
    token_bytes = torch.tensor([1, 3, 0])  # the last is a special
    assert bits_per_byte(losses, targets, token_bytes) == pytest.approx(3.0 / math.log(2) / 4)
    losses[0, 2:] = math.nan  # what does not count may be anything
    assert bits_per_byte(losses, targets, token_bytes) == pytest.approx(3.0 / math.log(2) / 4)
    with pytest.raises(NanochatError, match="no text"):
        bits_per_byte(losses, torch.full((1, 4), -1), token_bytes)


def test_a_model_that_knows_nothing_needs_its_vocabulary(tokenizer):
    class Uniform(Scripted):
        def __init__(self):
            super().__init__()
            self.now, self.before = torch.zeros(309, 309), torch.zeros(309, 309)

    text = "Anna keeps a cat."
    ids = torch.tensor([tokenizer.encode(text, prepend="<|bos|>")])
    got = evaluate_bpb(Uniform(), iter([(ids[:, :-1], ids[:, 1:])]), 1, tokenizer.token_bytes())
    assert got == pytest.approx((ids.size(1) - 1) * math.log2(309) / len(text))


def test_evaluate_bpb_weighs_bytes_not_batches_and_reads_no_batch_too_many(tokenizer):
    model, token_bytes = Scripted(), tokenizer.token_bytes()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 309, (2, length + 1), generator=generator) for length in (3, 9, 5)]
    source = iter([(ids[:, :-1], ids[:, 1:]) for ids in batches])
    got = evaluate_bpb(model, source, 2, token_bytes)
    nats = size = 0.0
    for ids in batches[:2]:
        for row in ids.tolist():
            for before, now, after in zip([0, *row], row, row[1:]):
                if token_bytes[after]:
                    logits = (model.now[now] + model.before[before]).double()
                    nats += (logits.logsumexp(0) - logits[after]).item()
                    size += token_bytes[after].item()
    assert got == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert next(source)[0].size(1) == 5
    with pytest.raises(NanochatError, match="0 batches"):
        evaluate_bpb(model, source, 0, token_bytes)
    with pytest.raises(NanochatError, match="no text"):
        evaluate_bpb(model, iter([]), 3, token_bytes)


# --- one question -------------------------------------------------------------------------------------------------

def test_spans_of_the_three_forms():
    assert rows_of("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]]) == [Row([9, 1, 2, 3], 2, 4), Row([9, 1, 4], 2, 3)]
    assert rows_of("schema", [[9, 1, 5, 6], [9, 2, 2, 5, 6]]) == [Row([9, 1, 5, 6], 2, 4), Row([9, 2, 2, 5, 6], 3, 5)]
    assert rows_of("language_modeling", [[9, 1], [9, 1, 2, 3]]) == [Row([9, 1, 2, 3], 2, 4)]


def test_spans_are_never_empty_nor_begin_at_the_first_token():
    assert rows_of("multiple_choice", [[9, 1], [9, 1, 2]]) == [Row([9, 1], 1, 2), Row([9, 1, 2], 1, 3)]
    assert rows_of("schema", [[9, 1], [9, 1]]) == [Row([9, 1], 1, 2)] * 2
    assert rows_of("language_modeling", [[9, 7], [9, 8]]) == [Row([9, 8], 1, 2)]  # the answer fused with its context


def test_long_rows_lose_their_beginning():
    assert crop(Row([0, 1, 2, 3, 4], 3, 5), 3) == Row([2, 3, 4], 1, 3)
    assert crop(Row([0, 1, 2, 3, 4], 1, 5), 3) == Row([2, 3, 4], 1, 3)
    assert crop(Row([0, 1], 1, 2), None) == crop(Row([0, 1], 1, 2), 2) == Row([0, 1], 1, 2)


def test_examples_are_others_and_always_the_same():
    items = [{"n": n} for n in range(12)]
    for index in range(12):
        population = [item for place, item in enumerate(items) if place != index]
        assert examples_for(items, index, 4) == random.Random(1234 + index).sample(population, 4)
    assert len(examples_for(items[:3], 0, 10)) == 2
    assert examples_for(items[:1], 0, 10) == []


def test_batches_hold_all_rows_once_within_the_budget():
    lengths = [random.Random(0).randint(1, 40) for _ in range(100)]
    batches = list(length_batches(lengths, 80))
    assert sorted(sum(batches, [])) == list(range(100))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 80 for batch in batches)
    assert len(batches) < 1.2 * sum(lengths) / 80 + 1  # little is padding
    assert list(length_batches([500], 80)) == [[0]]  # a row over the budget goes alone


# --- whole tasks, one question at a time --------------------------------------------------------------------------

def reference_accuracies(model, tokenizer, folder, count):
    """CORE as its paper's code has it: question by question, row by row, in float64."""
    entries = {entry["label"]: entry for entry in yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]}
    accuracies = {}
    for label, entry in entries.items():
        kind, join = entry["icl_task_type"], entry.get("continuation_delimiter", " ")
        with open(folder / "eval_data" / entry["dataset_uri"], encoding="utf-8") as file:
            data = [json.loads(line) for line in file]
        random.Random(1337).shuffle(data)
        data = data[:count]
        correct = 0
        for index, item in enumerate(data):
            others = [other for place, other in enumerate(data) if place != index]
            shots = random.Random(1234 + index).sample(others, min(entry["num_fewshot"][0], len(others)))
            if kind == "multiple_choice":
                shown = [s["query"] + join + s["choices"][s["gold"]] + "\n\n" for s in shots]
                texts = [item["query"] + join + choice for choice in item["choices"]]
            elif kind == "schema":
                shown = [s["context_options"][s["gold"]] + join + s["continuation"] + "\n\n" for s in shots]
                texts = [context + join + item["continuation"] for context in item["context_options"]]
            else:
                shown = [s["context"].strip() + join + s["continuation"] + "\n\n" for s in shots]
                texts = [item["context"].strip() + join + item["continuation"]]
            rows = [tokenizer.encode("".join(shown) + text, prepend="<|bos|>") for text in texts]
            if kind == "language_modeling":
                asked = tokenizer.encode(("".join(shown) + item["context"].strip() + join).strip(), prepend="<|bos|>")
                assert rows[0][:len(asked)] == asked
                log_probabilities = model(torch.tensor(rows)).double().log_softmax(-1)[0]
                correct += all(log_probabilities[place - 1].argmax() == rows[0][place]
                               for place in range(len(asked), len(rows[0])))
                continue
            sign = 1 if kind == "multiple_choice" else -1
            shared = 0
            while len({tuple(row[::sign][:shared + 1]) for row in rows}) == 1:
                shared += 1
            losses = []
            for row in rows:
                log_probabilities = model(torch.tensor([row])).double().log_softmax(-1)[0]
                places = range(shared, len(row)) if sign == 1 else range(len(row) - shared, len(row))
                losses.append(-sum(log_probabilities[place - 1, row[place]].item() for place in places) / len(places))
            correct += losses.index(min(losses)) == item["gold"]
        accuracies[label] = correct / len(data)
    return accuracies


def test_the_world_in_batches_as_one_by_one(world_bundle, tokenizer):
    model = Scripted()
    got = evaluate_core(model, tokenizer, "cpu", world_bundle, max_per_task=40)
    assert got["results"] == pytest.approx(reference_accuracies(model, tokenizer, world_bundle, 40))
    assert len(set(got["results"].values())) > 1
    baselines = {"world_facts_mc": 0.25, "world_kin_mc": 0.25, "world_schema": 0.5, "world_facts_lm": 0,
                 "world_sums_lm": 0}
    for label, base in baselines.items():
        assert got["centered_results"][label] == pytest.approx((got["results"][label] - base) / (1 - base))
    assert got["core_metric"] == pytest.approx(sum(got["centered_results"].values()) / 5)


def test_real_tasks_in_batches_as_one_by_one(shared_data, tokenizer):
    model, folder = Scripted(), shared_data / "eval_bundle"
    lines = []
    got = evaluate_core(model, tokenizer, "cpu", folder, max_per_task=6, report=lines.append)
    assert got["results"] == pytest.approx(reference_accuracies(model, tokenizer, folder, 6))
    assert len(lines) == len(got["results"]) == 18 and {t.kind for t in read_bundle(folder)} == set(evaluation.KINDS)
    with open(folder / "eval_meta_data.csv") as file:
        centred = [(got["results"][row["Eval Task"]] - float(row["Random baseline"]) / 100)
                   / (1 - float(row["Random baseline"]) / 100) for row in csv.DictReader(file)]
    assert got["core_metric"] == pytest.approx(sum(centred) / 18)


def test_a_real_model_scores_rows_alike_in_any_batches(make_model, tokenizer, world_bundle):
    model = make_model()
    rows = []
    for task in read_bundle(world_bundle):
        items = read_items(task, 8)
        for index, item in enumerate(items):
            prompts = prompts_of(task, item, examples_for(items, index, task.shots))
            rows += rows_of(task.kind, [tokenizer.encode(text, prepend="<|bos|>") for text in prompts], 600)
    alone, together = (score_rows(model, rows, "cpu", budget) for budget in (1, 4000))
    assert [hit for _, hit in alone] == [hit for _, hit in together]
    torch.testing.assert_close(torch.tensor([a for a, _ in alone]), torch.tensor([b for b, _ in together]),
                               rtol=1e-4, atol=1e-4)


def test_what_a_questions_rows_share_is_read_once_and_scored_alike(make_model, tokenizer, world_bundle):
    model = make_model(sequence_len=300, window_pattern="SSL")
    questions = []
    for task in read_bundle(world_bundle):
        items = read_items(task, 6)
        for index, item in enumerate(items):
            prompts = prompts_of(task, item, examples_for(items, index, 2))
            questions.append(rows_of(task.kind, [tokenizer.encode(text, prepend="<|bos|>") for text in prompts], 250))
    seen = []
    real = model.hidden
    model.hidden = lambda ids, kv_cache=None: seen.append(ids.numel()) or real(ids, kv_cache)
    apart = [score_rows(model, rows, "cpu", 1) for rows in questions]
    read_apart, seen[:] = sum(seen), []
    together = score_questions(model, questions, "cpu", 2000)
    del model.hidden
    assert sum(seen) < 0.6 * read_apart
    for rows_apart, rows_together in zip(apart, together):
        assert [hit for _, hit in rows_apart] == [hit for _, hit in rows_together]
        assert [loss for loss, _ in rows_apart] == pytest.approx([loss for loss, _ in rows_together], abs=1e-4)


def test_a_model_that_knows_the_answers_scores_one(world_bundle, tokenizer):
    """Every right text, read as one long corpus of token triples, is a model that answers all but the ambiguous."""

    class Oracle(torch.nn.Module):
        def __init__(self, texts):
            super().__init__()
            self.next = {}
            for text in texts:
                ids = tokenizer.encode(text, prepend="<|bos|>")
                self.next.update({tuple(ids[:place]): ids[place] for place in range(1, len(ids))})

        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 309)
            for row, tokens in enumerate(ids.tolist()):
                for place in range(len(tokens)):
                    if tuple(tokens[:place + 1]) in self.next:
                        logits[row, place, self.next[tuple(tokens[:place + 1])]] = 30.0
            return logits

    texts = []
    for task in read_bundle(world_bundle):
        items = read_items(task, 5)
        for index, item in enumerate(items):
            examples = examples_for(items, index, task.shots)
            gold = item.get("gold", 1)
            texts.append(prompts_of(task, item, examples)[gold])
    got = evaluate_core(Oracle(texts), tokenizer, "cpu", world_bundle, max_per_task=5)
    assert got["core_metric"] == 1.0


def test_prompts_longer_than_the_model_are_cropped_on_the_left(shared_data, tokenizer, make_model):
    model = make_model(sequence_len=16, n_layer=1, window_pattern="L")
    task = next(task for task in read_bundle(shared_data / "eval_bundle") if task.label == "boolq")
    assert 0 <= evaluation.evaluate_task(model, tokenizer, "cpu", task, 2) <= 1


WORKER = """
import json, sys, torch
sys.path.insert(0, "tests")
from test_evaluation import Scripted
from nanochat_lib.common import start, stop
from nanochat_lib.evaluation import evaluate_bpb, evaluate_core
from nanochat_lib.tokenizer import load_tokenizer
runtime, tokenizer, model = start("cpu"), load_tokenizer(sys.argv[1]), Scripted()
core = evaluate_core(model, tokenizer, "cpu", sys.argv[2], 25)
ids = torch.randint(0, 309, (4, 13), generator=torch.Generator().manual_seed(3))[runtime.rank::runtime.world_size]
bpb = evaluate_bpb(model, iter([(ids[:, :-1], ids[:, 1:])]), 1, tokenizer.token_bytes())
open(f"{sys.argv[3]}/{runtime.world_size}-{runtime.rank}.json", "w").write(json.dumps([core, bpb]))
stop()
"""


def test_two_processes_share_the_questions_and_agree(world_bundle, tokenizer, tmp_path, base_dir):
    import os
    import subprocess
    import sys

    from conftest import ROOT

    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "worker.py").write_text(WORKER)
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        command = [sys.executable, *launch, tmp_path / "worker.py", tmp_path / "tokenizer", world_bundle, tmp_path]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert first[0] == alone[0] and first[1] == pytest.approx(alone[1])


# --- the bundle ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, said", [
    ("core.yaml", "icl_tasks: [", "not an evaluation bundle"),
    ("core.yaml", "icl_tasks:\n- label: x", "not an evaluation bundle"),
    ("core.yaml", None, "no core.yaml"),
    ("eval_meta_data.csv", "a,b\n1,2\n", "not an evaluation bundle"),
    ("eval_data/world/world_schema.jsonl", '{"context_options": [', "world_schema.jsonl"),
    ("eval_data/world/world_schema.jsonl", "", "no questions in .*world_schema.jsonl"),
])
def test_a_damaged_bundle_is_named(tmp_path, tokenizer, name, content, said):
    write_bundle(World(1), tmp_path)
    (tmp_path / name).write_text(content) if content is not None else (tmp_path / name).unlink()
    with pytest.raises(NanochatError, match=said):
        evaluate_core(Scripted(), tokenizer, "cpu", tmp_path, 2)


def test_an_unknown_form_names_the_allowed_ones(tmp_path):
    write_bundle(World(1), tmp_path)
    text = (tmp_path / "core.yaml").read_text().replace(": schema", ": riddle")
    (tmp_path / "core.yaml").write_text(text)
    with pytest.raises(NanochatError, match="'riddle'.*multiple_choice, schema, language_modeling"):
        read_bundle(tmp_path)


@pytest.fixture
def server(tmp_path, world_bundle):
    """A local server of a bundle as a zip with one top folder; yields (url of a file by name, requests so far)."""
    folder, seen = tmp_path / "served", []
    folder.mkdir()
    with zipfile.ZipFile(folder / "eval_bundle.zip", "w") as bundle:
        for path in world_bundle.rglob("*"):
            bundle.write(path, f"eval_bundle/{path.relative_to(world_bundle)}")
    (folder / "torn.zip").write_bytes((folder / "eval_bundle.zip").read_bytes()[:2000])
    with zipfile.ZipFile(folder / "empty.zip", "w") as bundle:
        bundle.writestr("readme.txt", "nothing")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            seen.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield lambda name: f"http://127.0.0.1:{running.server_port}/{name}", seen
        running.shutdown()


def test_the_bundle_is_downloaded_once(base_dir, server, world_bundle, monkeypatch):
    url, seen = server
    monkeypatch.setattr(evaluation, "BUNDLE_URL", url("eval_bundle.zip"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    threads = [threading.Thread(target=find_bundle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = find_bundle()
    assert folder == base_dir / "eval_bundle" and len(seen) == 1
    assert (folder / "core.yaml").read_text() == (world_bundle / "core.yaml").read_text()
    assert {task.label for task in read_bundle(folder)} == {task.label for task in read_bundle(world_bundle)}
    assert not list(base_dir.glob(".eval_bundle.*"))


@pytest.mark.parametrize("name", ["torn.zip", "empty.zip", "missing.zip"])
def test_a_bad_download_leaves_nothing_behind(base_dir, server, monkeypatch, name):
    url, _ = server
    monkeypatch.setattr(evaluation, "BUNDLE_URL", url(name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(NanochatError, match=f"cannot fetch .*{name}.*--eval-bundle"):
        find_bundle()
    assert [path.name for path in base_dir.iterdir()] == ["eval_bundle.lock"]


def test_without_network_it_says_so_in_seconds(base_dir, monkeypatch):
    monkeypatch.setattr(evaluation, "BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")
    started = time.monotonic()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(NanochatError, match="go online"):
        find_bundle()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NanochatError, match="HF_HUB_OFFLINE"):
        find_bundle()
    assert time.monotonic() - started < 5
    with pytest.raises(NanochatError, match="no core.yaml in .*nowhere"):
        find_bundle(base_dir / "nowhere")


def test_tables_for_programs_and_for_people(tmp_path):
    core = {"results": {"a": 0.5, "b": 1 / 3}, "centered_results": {"a": 0.0, "b": 1 / 9}, "core_metric": 1 / 18}
    evaluation.write_tables(tmp_path / "base_model_000002", core)
    with open(tmp_path / "base_model_000002.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Task"] for row in rows] == ["a", "b", "CORE"] and float(rows[1]["Accuracy"]) == pytest.approx(1 / 3, abs=1e-6)
    text = (tmp_path / "base_model_000002.md").read_text().splitlines()
    assert text[0] == "| Task | Accuracy | Centered |" and text[3] == "| b | 0.333333 | 0.111111 |" and len(text) == 5
