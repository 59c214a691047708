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
# *How good is a base model?* — 30 minutes, less than one of them computing.
#
# A base model only continues text. Two numbers say how well. **Bits per byte**: how surprised is it by text it has not
# seen? It is smooth, cheap, and the thing that training lowers. **CORE**: does it know and understand? Twenty-two
# kinds of questions, put so that continuing well is answering right.

# %%
#| default_exp evaluation

# %%
#| export
"""How good a base model is: bits per byte, and CORE (DCLM, arXiv 2406.11794) in batches and over several processes."""


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
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from nanochat_lib.common import NanochatError, all_reduce_sum, base_dir, print0, together, write_aside
from nanochat_lib.scoring import Row, rows_of, score_questions

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # the tasks of DCLM

# %% [markdown]
# ## A model to judge
#
# Whatever turns ids into logits can be judged, so we need not wait for a transformer: here is a model made by counting.
# Which token followed the last one, the last two, the last five? Longer contexts are trusted as far as they were seen,
# the rest is left to shorter ones. Order n looks at n − 1 tokens; order 0 knows nothing: every token is equally likely.

# %%
import torch.nn.functional as F

from nanochat_lib.tokenizer import Tokenizer
from nanochat_lib.world_facts import World
from nanochat_lib.world_tasks import write_bundle
from nanochat_lib.world_text import documents

everything = list(documents(World(1), 8000))
texts, held_out = everything[:-100], everything[-100:]
tokenizer = Tokenizer.train_from_iterator(texts, 1024)


def stream(tokenizer, texts):
    """All texts as one row of ids, each after <|bos|>."""
    return torch.tensor([token for ids in tokenizer.encode(texts, prepend="<|bos|>") for token in ids])


class Counting(torch.nn.Module):
    """Predicts a token from what followed the last 0 … order − 1 tokens in the training text."""

    def __init__(self, ids, vocab_size, order):
        super().__init__()
        self.vocab_size, self.tables = vocab_size, []
        counts = torch.bincount(ids, minlength=vocab_size) * (order > 0) + 0.5
        self.p = counts / counts.sum()  # without any context
        for length in range(1, order):
            pairs = self.contexts(ids[None, :-1], length)[0] * vocab_size + ids[1:]  # (context, token) as one number
            self.tables.append(torch.unique(pairs[pairs >= 0], return_counts=True))

    def contexts(self, ids, length):
        """A hash of the `length` tokens up to each place of ids (B, T), below 2^40 so that times vocab_size it fits int64.

        -1 where the row has fewer tokens.
        """
        code = torch.zeros_like(ids)
        for back in range(length):
            code = (code * 1_000_003 + ids.roll(back, 1) + 1) % 2**40
        code[:, :length - 1] = -1
        return code

    def forward(self, ids, targets=None, loss_reduction="mean"):
        p = self.p.expand(ids.numel(), -1)
        for length, (pairs, counts) in enumerate(self.tables, 1):
            code = self.contexts(ids, length).flatten() * self.vocab_size
            first, last = torch.searchsorted(pairs, code), torch.searchsorted(pairs, code + self.vocab_size)
            row = torch.repeat_interleave(last - first)  # one entry per token seen after this context
            place = torch.arange(len(row)) - ((last - first).cumsum(0) - last)[row]
            seen = torch.zeros_like(p)
            seen[row, pairs[place] % self.vocab_size] = counts[place].float()
            p = (seen + 0.5 * p) / (seen.sum(1, keepdim=True) + 0.5)  # half a sighting's worth of the shorter context
        logits = p.log().view(*ids.shape, -1)
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
        return losses.view_as(targets) if loss_reduction == "none" else losses


ids = stream(tokenizer, texts)
models = {order: Counting(ids, 1024, order) for order in (0, 1, 2, 3, 4, 6, 8)}
print(f"{len(ids):,} tokens counted")

# %% [markdown]
# ## Bits per byte
#
# Loss is counted in nats, units of the natural logarithm; one nat is 1 / ln 2 = 1.44 bits. Loss per token depends on
# the tokenizer: longer tokens are fewer, each is harder. Divide instead by what no tokenizer
# can change, the bytes of the text: Σ nats / (ln 2 · Σ bytes). It is also the size to which the model could compress
# the text, in bits for each byte. Specials are no text and do not count.

# %%
#| export
def bits_of(nats: float, length: float) -> float:
    """Bits per byte of `length` bytes that took `nats`."""
    if not length:
        raise NanochatError("bits per byte of no text: every target is a special token or ignored, or there is none")
    return nats / (math.log(2) * length)


def nats_and_bytes(losses: Tensor, targets: Tensor, token_bytes: Tensor) -> Tensor:
    """(2,): Σ nats and Σ bytes over the targets (B, T) that are text; losses (B, T); token_bytes (vocab,)."""
    length = torch.where(targets >= 0, token_bytes.to(targets.device)[targets.clamp(min=0)], 0)
    return torch.stack((torch.where(length > 0, losses.float(), 0).sum(), length.sum()))


def bits_per_byte(losses: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Bits a model needs per byte of text. Targets of -1 and specials (0 bytes) do not count."""
    return bits_of(*nats_and_bytes(losses, targets, token_bytes).tolist())

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
    return bits_of(*all_reduce_sum(torch.zeros(2, dtype=torch.float64) if total is None else total).tolist())

# %% [markdown]
# The same text, the same way of counting, two tokenizers. Judged by loss per token, the small vocabulary looks better;
# judged by bits per byte, it is the worse one.

# %%
def batches(tokenizer, texts, length=128):
    """The texts as batches of (inputs, targets), each (16, length)."""
    ids = stream(tokenizer, texts)
    rows = ids[:(len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(16)]


specials = 9
for size in (320, 1024):
    other = Tokenizer(tokenizer.tokens[:size - specials])
    model = Counting(stream(other, texts), size, 4)
    sample = batches(other, held_out)
    loss = sum(model(*batch).item() for batch in sample) / len(sample)
    bpb = evaluate_bpb(model, sample, len(sample), other.token_bytes())
    print(f"{size:4} ids: {loss:.1f} nats per token, {bpb:.1f} bits per byte")

# %% [markdown]
# Where are the bits? Red tokens surprised the model, most of all names and the sum of two numbers; white ones it could
# have said itself.

# %%
import matplotlib.pyplot as plt


def draw(axis, ids, losses, y=0.0, most=6.0):
    """Tokens in a line, each as red as its loss (nats) is high; grey where there is none. The axis counts letters."""
    x = 0.0
    for token, loss in zip(ids, losses):
        shown = tokenizer.id_to_token(token).replace("\n", "↵").replace(" ", "·")
        colour = "#eee" if loss is None else plt.cm.Reds(min(loss / most, 1) * 0.8)
        axis.text(x, y, shown, family="monospace", fontsize=10, va="center",
                  bbox=dict(facecolor=colour, edgecolor="none", pad=1.5))
        x += len(shown) + 0.6


def lines_of(ids, losses, width=100):
    """Cut a long line into several of at most `width` characters."""
    lines, room = [([], [])], width
    for token, loss in zip(ids, losses):
        size = len(tokenizer.id_to_token(token)) + 0.6
        if size > room:
            lines.append(([], []))
            room = width
        room -= size
        lines[-1][0].append(token)
        lines[-1][1].append(loss)
    return lines


text = "Question: What pet does Kate keep?\nAnswer: Kate keeps a parrot.\n\n17 + 25 = 42"
row = torch.tensor([tokenizer.encode(text, prepend="<|bos|>")])
losses = models[4](row[:, :-1], row[:, 1:], loss_reduction="none")[0].tolist()
lines = lines_of(row[0].tolist(), [None, *losses])
figure, axis = plt.subplots(figsize=(10, 0.4 * len(lines)), layout="constrained")
for y, line in enumerate(lines):
    draw(axis, *line, -y)
axis.set(xlim=(0, 118), ylim=(0.5 - len(lines), 0.5))
_ = axis.axis("off")

# %% [markdown]
# ## CORE: questions for a model that only continues
#
# DCLM (arXiv 2406.11794) chose tasks on which even small models rise steadily. Each is of one of three forms:
#
# - *multiple choice*: one context, several continuations; the model's choice is the one with the lowest mean loss;
# - *schema*: several contexts, one continuation; which context makes it most likely?
# - *language modeling*: one context, one continuation; every token must be the model's first guess.
#
# A bundle is a list of tasks (`core.yaml`), their baselines (`eval_meta_data.csv`) and a file of questions each.

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

# %% [markdown]
# The real bundle is fetched once, and takes its place only when it is whole. Without a network this is an error within
# seconds, and the run that asked goes on: training saves first and evaluates after.

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
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise NanochatError(f"cannot fetch {BUNDLE_URL} ({getattr(error, 'reason', error)}): go online and run the "
                            f"same command again, {instead}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)

# %% [markdown]
# Some tasks show solved examples first, so that the model sees what is wanted. They are drawn at random, but for
# question number *i* always the same, or two runs could not be compared.

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
bundle = Path(tempfile.mkdtemp()) / "eval_bundle"
write_bundle(World(1), bundle)
tasks = {task.label: task for task in read_bundle(bundle)}
for label in ("world_kin_mc", "world_schema", "world_sums_lm"):
    task, items = tasks[label], read_items(tasks[label])
    print(f"--- {label}, {task.kind}, {len(items)} questions, guessing gives {task.baseline:.2f}")
    print(*map(repr, prompts_of(task, items[3], examples_for(items, 3, task.shots))), sep="\n")

# %% [markdown]
# ## Which tokens are scored
#
# Text is cut into tokens as a whole, so the border between context and continuation is found in the tokens. For multiple
# choice, what the rows share at the front is context, the rest is scored; for a schema, what they share at the back is
# scored; for language modeling, what the answer adds.

# %%
#| export scoring
"""How likely does a model find parts of texts? Many questions at once, what their rows share computed once."""


from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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

# %% [markdown]
# One real item of each form, from COPA, Winograd and LAMBADA (its story shortened). In brackets is what is scored. Look
# at the schema: "feared violence" is the same text in both rows; what differs is what it is expected *from*.

# %%
real_items = [
    ("multiple_choice", {"query": "The man turned on the faucet, therefore", "gold": 1,
                         "choices": ["the toilet filled with water.", "water flowed from the spout."]}),
    ("schema", {"context_options": [f"The city councilmen refused the demonstrators a permit because the {who}"
                                    for who in ("city councilmen", "demonstrators")],
                "continuation": "feared violence.", "gold": 0}),
    ("language_modeling", {"context": "Irina gave Bob the address and he entered it into the GPS navigator. He barely "
                                      "made it to Palo Alto in time to check in, wash up and head out to pick up",
                           "continuation": "Irina"}),
]
for kind, item in real_items:
    task = CoreTask("", kind, Path(), 0, " ", 0.0)
    print(f"{kind}:")
    for row in rows_of(kind, tokenizer.encode(prompts_of(task, item, []), prepend="<|bos|>")):
        print(f"   {tokenizer.decode(row.ids[1:row.start])}[{tokenizer.decode(row.ids[row.start:row.end])}]")

# %% [markdown]
# ## In batches
#
# Rows of many questions go through the model together, sorted by length so that little is padding. The model is causal:
# padding on the right cannot change what stands before it, and the scores are the same as one by one. The last matrix,
# the largest of a small model, is needed for scored tokens only.

# %%
#| export scoring
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


def padded(lists: list[list[int]], width: int, fill: int, device: Any) -> Tensor:
    """Lists of ids as one (rows, width) tensor, `fill` on the right."""
    return torch.tensor([ids + [fill] * (width - len(ids)) for ids in lists]).to(device)


def score_batch(model: Any, rows: list[Row], skip: int | list[int], device: Any, kv_cache: Any = None) -> list:
    """(mean loss of the scored tokens, was each the first guess?) of rows whose first `skip` tokens are cached."""
    skips = [skip] * len(rows) if isinstance(skip, int) else skip
    width = max(len(row.ids) - 1 - first for row, first in zip(rows, skips))
    inputs = padded([row.ids[first:-1] for row, first in zip(rows, skips)], width, 0, device)
    targets = padded([[-1] * (row.start - 1 - first) + row.ids[row.start:row.end] for row, first in zip(rows, skips)],
                     width, -1, device)  # -1: not scored
    wanted = targets >= 0
    if hasattr(model, "hidden"):
        logits = model.logits(model.hidden(inputs, kv_cache)[wanted])  # (scored, vocab)
    else:
        logits = model(inputs)[wanted]
    losses = F.cross_entropy(logits.float(), targets[wanted], reduction="none").cpu()
    right = (logits.argmax(-1) == targets[wanted]).cpu()
    spans = [row.end - row.start for row in rows]
    return [(loss.mean().item(), bool(hits.all())) for loss, hits in zip(losses.split(spans), right.split(spans))]


@torch.no_grad()
def score_rows(model: Any, rows: list[Row], device: Any, budget: int) -> list[tuple[float, bool]]:
    """For each row the mean loss (nats) of its scored tokens, and whether each was the model's first guess."""
    scores: list[Any] = [None] * len(rows)
    for batch in length_batches([len(row.ids) for row in rows], budget):
        for index, score in zip(batch, score_batch(model, [rows[index] for index in batch], 0, device)):
            scores[index] = score
    return scores

# %% [markdown]
# The four rows of a multiple choice differ in their last few tokens: the question, and the solved examples before it,
# would be read four times. So what the rows of a question share is read once, its keys and values kept in a cache
# (lesson 08 explains it), copied for each choice, and the choices are read on from there.

# %%
#| export scoring
WORTH_SHARING = 32  # tokens: below that, a second pass costs more than it saves


@torch.no_grad()
def score_questions(model: Any, questions: list[list[Row]], device: Any, budget: int) -> list[list[tuple[float, bool]]]:
    """`score_rows` of each question's rows, what they have in common read once where the model can."""
    shared = [min(common_prefix([row.ids for row in rows]), min(row.start for row in rows) - 1)
              if len(rows) > 1 and hasattr(model, "hidden") else 0 for rows in questions]
    scores: list[Any] = [None] * len(questions)
    short = [index for index, length in enumerate(shared) if length < WORTH_SHARING]
    flat = iter(score_rows(model, [row for index in short for row in questions[index]], device, budget))
    for index in short:
        scores[index] = [next(flat) for _ in questions[index]]
    long = [index for index, length in enumerate(shared) if length >= WORTH_SHARING]
    for places in length_batches([shared[index] * len(questions[index]) for index in long], budget):
        batch = [long[place] for place in places]
        found = iter(score_shared(model, [questions[index] for index in batch], [shared[index] for index in batch],
                                  device))
        for index in batch:
            scores[index] = [next(found) for _ in questions[index]]
    return scores


def score_shared(model: Any, questions: list[list[Row]], shared: list[int], device: Any) -> list[tuple[float, bool]]:
    """Scores of all rows of some questions, whose first `shared` tokens go through the model once for each question."""
    from nanochat_lib.kv_cache import KVCache

    rows = [row for question in questions for row in question]
    owners = [index for index, question in enumerate(questions) for _ in question]
    once = KVCache(model.config, len(questions), max(shared))
    once.resize([0] * len(questions), device)
    once.counts = torch.tensor(shared, device=device)
    prefixes = [question[0].ids[:length] for question, length in zip(questions, shared)]
    model.hidden(padded(prefixes, max(shared), 0, device), once)
    longest = max(len(row.ids) - shared[owner] for row, owner in zip(rows, owners))
    each = KVCache(model.config, len(rows), max(shared) + longest)
    index = torch.tensor(owners, device=device)
    each.allocate(once.store[0, 0].transpose(1, 2))
    each.store[..., :max(shared), :] = once.store.index_select(2, index)
    each.lengths, each.previous, each.longest = once.lengths[index], once.previous[index], max(shared)
    return score_batch(model, rows, [shared[owner] for owner in owners], device, each)

# %%
def row_losses(model, row):
    """The loss of each scored token of a row, None elsewhere."""
    inputs, targets = torch.tensor([row.ids[:-1]]), torch.tensor([row.ids[1:]])
    losses = [None, *model(inputs, targets, loss_reduction="none")[0].tolist()]
    return [loss if row.start <= place < row.end else None for place, loss in enumerate(losses)]


figure, axes = plt.subplots(3, 1, figsize=(10, 4), layout="constrained", height_ratios=(4, 2, 2))
for axis, label, number in zip(axes, ("world_kin_mc", "world_schema", "world_facts_lm"), (3, 3, 6)):
    task, items = tasks[label], read_items(tasks[label])
    prompts = prompts_of(task, items[number], [])
    rows = rows_of(task.kind, tokenizer.encode(prompts, prepend="<|bos|>"))
    scores = score_rows(models[6], rows, "cpu", 4096)
    best = min(range(len(rows)), key=lambda place: scores[place][0])
    for y, (row, (loss, right)) in enumerate(zip(rows, scores)):
        draw(axis, row.ids, row_losses(models[6], row), -y)
        said = f"first guess: {right}" if len(rows) == 1 else f"{loss:.1f} nats" + " ← chosen" * (y == best)
        axis.text(99, -y, said, fontsize=10, va="center")
    right = "" if len(rows) == 1 else f", right is number {items[number]['gold'] + 1}"
    axis.set_title(f"{task.kind}{right}", loc="left", fontsize=10)
    axis.set(xlim=(0, 118), ylim=(0.5 - len(rows), 0.5))
    axis.axis("off")

# %% [markdown]
# ## The score
#
# With four choices, guessing gets a quarter right; with two, half. So each accuracy *a* is centred by its baseline
# *b*, (a − b) / (1 − b): guessing is 0, perfection 1, and tasks can be averaged. The mean is CORE. GPT-2 (1.6B) has
# 0.2565 on the real bundle's tasks. The world's tasks are scored alike but are far easier: the two must not be
# compared.

# %%
#| export
LOGITS = 2**28  # at most so many logits at once: 1 GiB in float32


def tokenize(task: CoreTask, items: list[dict], mine: Iterable[int], tokenizer: Any, model: Any) -> list[list[Row]]:
    """The rows of each question of `mine` (indices into items), none longer than the model can read."""
    prompts = [prompts_of(task, items[index], examples_for(items, index, task.shots)) for index in mine]
    encoded = iter(tokenizer.encode([text for texts in prompts for text in texts],
                                    prepend=tokenizer.get_bos_token_id()))
    rotary = getattr(model, "cos", None)  # its length is the longest input a model can take
    limit = None if rotary is None else len(rotary) + 1
    return [rows_of(task.kind, [next(encoded) for _ in texts], limit) for texts in prompts]


def evaluate_task(model: Any, tokenizer: Any, device: Any, task: CoreTask, max_per_task: int = -1) -> float:
    """Accuracy (0 … 1) on a task; several processes share its questions and all get the result."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    budget = 2**12 if torch.device(device).type == "cpu" else 2**16
    if not hasattr(model, "hidden"):  # it will give the logits of all tokens
        budget = min(budget, LOGITS // tokenizer.get_vocab_size())
    correct = 0
    with together():
        items = read_items(task, max_per_task)
        mine = range(rank, len(items), world_size)
        rows = tokenize(task, items, mine, tokenizer, model)
        for index, scores in zip(mine, score_questions(model, rows, device, budget)):
            losses, right = zip(*scores)
            best = losses.index(min(losses))
            correct += right[0] if task.kind == "language_modeling" else best == items[index]["gold"]
    total = torch.tensor(float(correct), device=device)
    return all_reduce_sum(total).item() / len(items)


def evaluate_core(model: Any, tokenizer: Any, device: Any, bundle_dir: str | Path | None = None, max_per_task: int = -1,
                  report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """CORE of a model: {"results": accuracy by task, "centered_results", "core_metric": their mean}.

    `report` is called with a line per task. Without bundle_dir the bundle of the base directory, fetched if need be.
    """
    results, centred = {}, {}
    with together():
        tasks = read_bundle(find_bundle(bundle_dir or ""))
    for task in tasks:
        accuracy = evaluate_task(model, tokenizer, device, task, max_per_task)
        results[task.label] = accuracy
        centred[task.label] = (accuracy - task.baseline) / (1 - task.baseline)
        if report:
            report(f"{task.label:32} accuracy {accuracy:.4f} · centred {centred[task.label]:+.4f}")
    return {"results": results, "centered_results": centred, "core_metric": sum(centred.values()) / len(centred)}

# %%
#| export
def write_tables(path: Path, core: dict[str, Any]) -> None:
    """CORE as a table, a line per task and the mean last: `path`.csv for programs, `path`.md for people."""
    rows = [("Task", "Accuracy", "Centered"), *((task, f"{accuracy:.6f}", f"{core['centered_results'][task]:.6f}")
                                                for task, accuracy in core["results"].items()),
            ("CORE", "", f"{core['core_metric']:.6f}")]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    with write_aside(path.with_suffix(".csv")) as aside, open(aside, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    with write_aside(path.with_suffix(".md")) as aside:
        aside.write_text("\n".join([lines[0], "|---|--:|--:|", *lines[1:]]) + "\n")

# %%
cores = {order: evaluate_core(models[order], tokenizer, "cpu", bundle, 60) for order in (1, 2, 4, 6)}
print(f"{'order':18}" + "".join(f"{order:>7}" for order in cores))
for label in tasks:
    print(f"{label:18}" + "".join(f"{core['results'][label]:7.2f}" for core in cores.values()))
print(f"{'world CORE':18}" + "".join(f"{core['core_metric']:7.2f}" for core in cores.values()))

# %% [markdown]
# Below, on the left, the plain mean credits a model that only knows how frequent each token is. On the right, the two
# numbers disagree: from order 4 on bits per byte get worse, since long contexts are rare and over-trusted, while CORE
# still rises: its questions ask for facts, and a fact is a long context. Look at both. And note what counting never
# learns: sums it has not seen, and schemas, whose answer is not in the words just before (the one above was luck).
# For these a model must compute.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
orders = list(cores)
plain = [sum(core["results"].values()) / len(tasks) for core in cores.values()]
left.bar([place - 0.2 for place in range(len(orders))], plain, 0.4, label="mean accuracy")
left.bar([place + 0.2 for place in range(len(orders))], [core["core_metric"] for core in cores.values()], 0.4,
         label="mean centred accuracy: world CORE")
left.set(xlabel="order of the model (tokens)", xticks=range(len(orders)), xticklabels=orders, ylim=(0, 1),
         ylabel="score")
left.legend()
sample = batches(tokenizer, held_out)
curve = [evaluate_bpb(model, sample, len(sample), tokenizer.token_bytes()) for model in models.values()]
right.plot(list(models), curve, marker="o", label="bits per byte")
right.plot(orders, [core["core_metric"] for core in cores.values()], marker="s", label="world CORE")
right.set(xlabel="order of the model (tokens)", ylabel="bits per byte · world CORE", ylim=(-0.1, None))
_ = right.legend()

# %% [markdown]
# ## Exercises
#
# In [06_evaluation](../exercises/06_evaluation.ipynb):
# - *bits_per_byte*: from losses, targets and the bytes of each token.
# - *rows_of*: find the scored tokens in each of the three forms.
# - *questions_needed*: how many questions before a difference means something?
# - *luck*: how often does 0.62 look like 0.68?
#
# **Next:** [07 · Pretraining](07_pretraining.ipynb)
