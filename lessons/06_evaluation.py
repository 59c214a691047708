# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Evaluation
#
# *How good is a base model?* — 30 minutes, about half a minute of them computing.

# %%
#| default_exp evaluation

# %%
#| export
"""How good a base model is: bits per byte, and CORE (DCLM, arXiv 2406.11794) in batches and over several processes."""

# %%
#| export
import csv
import fcntl
import json
import math
import os
import random
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor

from nanochat_lib.common import NanochatError, all_reduce_sum, base_dir, print0

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # DCLM's tasks, 160 MB unpacked

# %%
#| export
def nats_and_bytes(losses: Tensor, targets: Tensor, token_bytes: Tensor) -> Tensor:
    """(2,): Σ nats and Σ bytes over the targets (B, T) that are text; losses (B, T); token_bytes (vocab,)."""
    length = torch.where(targets >= 0, token_bytes.to(targets.device)[targets.clamp(min=0)], 0)
    return torch.stack((torch.where(length > 0, losses.float(), 0).sum(), length.sum()))


def bits_per_byte(losses: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Bits a model needs per byte of text. Targets of -1 and specials (0 bytes) do not count."""
    nats, length = nats_and_bytes(losses, targets, token_bytes).tolist()
    if not length:
        raise NanochatError("bits per byte of no text: every target is a special token or ignored")
    return nats / (math.log(2) * length)

# %%
#| export
@torch.no_grad()
def evaluate_bpb(model: Any, batches: Iterable[tuple[Tensor, Tensor]], steps: int, token_bytes: Tensor) -> float:
    """Bits per byte over `steps` batches of (inputs, targets), each (B, T), of every process."""
    if steps < 1:
        raise NanochatError(f"bits per byte over {steps} batches: ask for one or more")
    total = None
    for _, (inputs, targets) in zip(range(steps), batches):
        sums = nats_and_bytes(model(inputs, targets, loss_reduction="none"), targets, token_bytes)
        sums = (sums if sums.is_cuda else sums.cpu()).double()  # MPS has no float64
        total = sums if total is None else total + sums
    nats, length = all_reduce_sum(torch.zeros(2, dtype=torch.float64) if total is None else total).tolist()
    if not length:
        raise NanochatError("bits per byte of no text: the batches hold only special tokens, or there are none")
    return nats / (math.log(2) * length)

# %%
#| export
KINDS = ("multiple_choice", "schema", "language_modeling")


class CoreTask(NamedTuple):
    """One task of a bundle, as core.yaml and eval_meta_data.csv describe it."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str   # between context and continuation
    baseline: float  # accuracy of guessing, 0 … 1


def read_bundle(folder: Path) -> list[CoreTask]:
    """The tasks of a bundle. Raises NanochatError, naming the file, where it is not one."""
    path = Path(folder) / "core.yaml"
    try:
        with open(Path(folder) / "eval_meta_data.csv", newline="", encoding="utf-8") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
        tasks = [CoreTask(entry["label"], entry["icl_task_type"], Path(folder) / "eval_data" / entry["dataset_uri"],
                          entry["num_fewshot"][0], entry.get("continuation_delimiter", " "),
                          baselines[entry["label"]]) for entry in entries]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise NanochatError(f"{folder} is not an evaluation bundle ({error!r}): it needs core.yaml, eval_meta_data.csv "
                            "and eval_data/; delete it to fetch it anew, or give another --eval-bundle") from None
    for task in tasks:
        if task.kind not in KINDS:
            raise NanochatError(f"task {task.label} in {path} is of type {task.kind!r}: choose {', '.join(KINDS)}")
    return tasks


def read_items(task: CoreTask, max_per_task: int = -1) -> list[dict]:
    """The task's questions, shuffled as CORE has them, at most `max_per_task` (-1: all)."""
    try:
        items = [json.loads(line) for line in task.path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise NanochatError(f"cannot read {task.path} ({error}): delete the bundle to fetch it anew") from None
    if not items:
        raise NanochatError(f"no questions in {task.path}: delete the bundle to fetch it anew")
    random.Random(1337).shuffle(items)
    return items[:max_per_task] if max_per_task > 0 else items

# %%
#| export
def examples_for(items: list[dict], index: int, shots: int) -> list[dict]:
    """The solved examples put before question `index`: others of its task, the same ones each time."""
    places = random.Random(1234 + index).sample(range(len(items) - 1), min(shots, len(items) - 1))
    return [items[place + (place >= index)] for place in places]


def solved(task: CoreTask, item: dict) -> str:
    """A question with its right answer, as an example shows it."""
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][item["gold"]]
    if task.kind == "schema":
        return item["context_options"][item["gold"]] + task.delimiter + item["continuation"]
    return item["context"].strip() + task.delimiter + item["continuation"]


def prompts_of(task: CoreTask, item: dict, examples: list[dict]) -> list[str]:
    """The texts a model is asked to weigh: one per choice; for language modeling without and with the answer."""
    before = "".join(solved(task, example) + "\n\n" for example in examples)
    if task.kind == "multiple_choice":
        return [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [before + context + task.delimiter + item["continuation"] for context in item["context_options"]]
    asked = before + item["context"].strip() + task.delimiter
    return [asked.strip(), asked + item["continuation"]]  # a blank at the end would belong to the answer's first token

# %%
#| export
class Row(NamedTuple):
    """One sequence to score: how likely are tokens start … end − 1, given those before?"""

    ids: list[int]
    start: int
    end: int


def common_prefix(rows: list[list[int]]) -> int:
    """The number of tokens that all rows begin with."""
    length = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def rows_of(kind: str, rows: list[list[int]], limit: int | None = None) -> list[Row]:
    """What is scored in the tokens of a question's prompts; rows over `limit` tokens lose their beginning."""
    shortest = min(map(len, rows))
    if kind == "schema":  # contexts differ, the continuation is shared
        shared = min(common_prefix([ids[::-1] for ids in rows]), shortest - 1)
        scored = [Row(ids, len(ids) - shared, len(ids)) for ids in rows]
    elif kind == "multiple_choice":  # the context is shared, choices differ
        start = min(common_prefix(rows), shortest - 1)
        scored = [Row(ids, start, len(ids)) for ids in rows]
    else:
        scored = [Row(rows[1], min(common_prefix(rows), len(rows[1]) - 1), len(rows[1]))]
    return [crop(row, limit) for row in scored]


def crop(row: Row, limit: int | None) -> Row:
    """The row without its first tokens, so that it has at most `limit`."""
    over = len(row.ids) - limit if limit else 0
    return row if over <= 0 else Row(row.ids[over:], max(row.start - over, 1), limit)

# %%
#| export
def length_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows in batches of like length, the longest first, each of at most `budget` tokens with padding."""
    batch = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def score_rows(model: Any, rows: list[Row], device: Any, budget: int) -> list[tuple[float, bool]]:
    """For each row the mean loss (nats) of its scored tokens, and whether each was the model's first guess."""
    scores: list[Any] = [None] * len(rows)
    for batch in length_batches([len(row.ids) for row in rows], budget):
        width = max(len(rows[index].ids) for index in batch) - 1
        inputs = torch.zeros(len(batch), width, dtype=torch.long)
        targets = torch.full_like(inputs, -1)  # -1: not scored
        for place, index in enumerate(batch):
            ids, start, end = rows[index]
            inputs[place, :len(ids) - 1] = torch.tensor(ids[:-1])  # padded on the right, where no earlier token looks
            targets[place, start - 1:end - 1] = torch.tensor(ids[start:end])
        inputs, targets = inputs.to(device), targets.to(device)
        logits, wanted = model(inputs)[targets >= 0], targets[targets >= 0]  # (scored, vocab), (scored,)
        losses = F.cross_entropy(logits.float(), wanted, reduction="none").cpu()
        right = (logits.argmax(-1) == wanted).cpu()
        spans = [rows[index].end - rows[index].start for index in batch]
        for index, loss, hits in zip(batch, losses.split(spans), right.split(spans)):
            scores[index] = (loss.mean().item(), bool(hits.all()))
    return scores

# %%
#| export
LOGITS = 2**28  # at most so many logits at once: 1 GiB in float32


def evaluate_task(model: Any, tokenizer: Any, device: Any, task: CoreTask, max_per_task: int = -1) -> float:
    """Accuracy (0 … 1) on a task; several processes share its questions and all get the result."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    items = read_items(task, max_per_task)
    mine = range(rank, len(items), world_size)
    prompts = [prompts_of(task, items[index], examples_for(items, index, task.shots)) for index in mine]
    encoded = iter(tokenizer.encode([text for texts in prompts for text in texts],
                                    prepend=tokenizer.get_bos_token_id()))
    rotary = getattr(model, "cos", None)  # its length is the longest input a model can take
    limit = None if rotary is None else len(rotary) + 1
    rows = [rows_of(task.kind, [next(encoded) for _ in texts], limit) for texts in prompts]
    budget = min(2**14, LOGITS // tokenizer.get_vocab_size())
    scores = iter(score_rows(model, [row for group in rows for row in group], device, budget))
    correct = 0
    for index, group in zip(mine, rows):
        losses, right = zip(*(next(scores) for _ in group))
        correct += right[0] if task.kind == "language_modeling" else losses.index(min(losses)) == items[index]["gold"]
    total = torch.tensor(float(correct), device=device)
    return all_reduce_sum(total).item() / len(items)


def evaluate_core(model: Any, tokenizer: Any, device: Any, bundle_dir: str | Path | None = None, max_per_task: int = -1,
                  report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """CORE of a model: {"results": accuracy by task, "centered_results", "core_metric": their mean}.

    `report` is called with a line per task. Without bundle_dir the bundle of the base directory, fetched if need be.
    """
    results, centred = {}, {}
    for task in read_bundle(find_bundle(bundle_dir or "")):
        accuracy = evaluate_task(model, tokenizer, device, task, max_per_task)
        results[task.label] = accuracy
        centred[task.label] = (accuracy - task.baseline) / (1 - task.baseline)
        if report:
            report(f"{task.label:32} accuracy {accuracy:.4f} · centred {centred[task.label]:+.4f}")
    return {"results": results, "centered_results": centred, "core_metric": sum(centred.values()) / len(centred)}

# %%
#| export
def find_bundle(path: str | Path = "") -> Path:
    """The folder of the evaluation bundle: the one given, else base_dir()/eval_bundle, downloaded once."""
    folder = Path(path).expanduser() if path else base_dir() / "eval_bundle"
    if (folder / "core.yaml").exists():
        return folder
    if path:
        raise NanochatError(f"no core.yaml in {folder}: give the folder of an evaluation bundle, or leave "
                            "--eval-bundle away to fetch the real one")
    with open(base_dir() / "eval_bundle.lock", "w") as lock:  # one process of a machine fetches, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "core.yaml").exists():
            fetch_bundle(folder)
    return folder


def fetch_bundle(folder: Path, seconds: float = 10) -> None:
    """Download and unpack BUNDLE_URL; the folder takes its name only when it is whole."""
    world = base_dir() / "world" / "eval_bundle"
    instead = f"or give --eval-bundle {world}, the embedded world's (made by python -m nanochat_lib.world)"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise NanochatError(f"no evaluation bundle in {folder}, and HF_HUB_OFFLINE is set: unset it to fetch one, "
                            f"{instead}")
    print0(f"fetching {BUNDLE_URL}")
    staging = Path(tempfile.mkdtemp(prefix=".eval_bundle.", dir=folder.parent))
    try:
        with urllib.request.urlopen(BUNDLE_URL, timeout=seconds) as answer, open(staging / "bundle.zip", "wb") as file:
            shutil.copyfileobj(answer, file)
        with zipfile.ZipFile(staging / "bundle.zip") as bundle:
            bundle.extractall(staging / "unpacked")
        core = next((staging / "unpacked").rglob("core.yaml"), None)
        if core is None:
            raise zipfile.BadZipFile("it holds no core.yaml")
        shutil.rmtree(folder, ignore_errors=True)
        core.parent.rename(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise NanochatError(f"cannot fetch {BUNDLE_URL} ({getattr(error, 'reason', error)}): go online and run the "
                            f"same command again, {instead}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
