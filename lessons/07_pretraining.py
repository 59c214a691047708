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
# # 07 · Pretraining
#
# *How does one dial, depth, fix a whole run?* — 40 minutes, about one of them computing.

# %%
#| default_exp dataloader

# %%
#| export
"""Text to training batches: documents packed best-fit into rows, without padding, resumable to the exact document."""

# %%
#| export
from bisect import bisect_right, insort
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.dataset import RowGroup, deal, read_texts, row_groups
from nanochat_lib.tokenizer import Tokenizer

BUFFER = 1000  # tokenized documents to choose from: enough that one of about the right length is always there
CHUNK = 128    # documents read and tokenized at a time

# %% [markdown]
# ## Rows without padding
#
# The model reads rows of T + 1 tokens; documents are of any length. Padding wastes computing; cutting a stream of
# documents every T + 1 tokens gives rows that begin in the middle of a sentence. *Best fit* does better: keep a
# buffer of 1,000 documents, and put into a row the longest one that still fits, again and again. When none fits,
# crop the shortest. Every row then starts with `<|bos|>` at the start of a document, and no position is empty.
#
# Searching a list of 1,000 for each document would cost more than the rest of the loader. Kept sorted by length,
# bisection finds the document in ten comparisons.

# %%
#| export
class BestFit:
    """Documents waiting to be packed (anything with a length), found by length in O(log n)."""

    def __init__(self):
        self.keys: list[tuple[int, int]] = []  # (length, −arrival), sorted: of equal lengths the earliest is last
        self.documents: dict[int, Any] = {}    # by arrival
        self.arrivals = 0

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, document: Any) -> None:
        insort(self.keys, (len(document), -self.arrivals))
        self.documents[self.arrivals] = document
        self.arrivals += 1

    def take(self, room: int, crop: bool = True) -> Any:
        """Remove and return the longest document of at most `room` tokens, the earliest of equals.

        If none fits: the shortest, for the caller to crop, or None without `crop`. The buffer must not be empty.
        """
        place = bisect_right(self.keys, (room, 0)) - 1
        if place < 0 and not crop:
            return None
        if place < 0:
            place = bisect_right(self.keys, (self.keys[0][0], 0)) - 1
        return self.documents.pop(-self.keys.pop(place)[1])

# %%
buffer = BestFit()
for document in ("three", "is", "a", "crowd", "of"):
    buffer.add(document)
assert buffer.take(4) == "is"      # the longest that fits, the earliest of equals
assert buffer.take(9) == "three"
assert [buffer.take(1), buffer.take(1)] == ["a", "of"]  # now nothing fits: the shortest, to be cropped

# %% [markdown]
# Sixteen rows of documents of the embedded world, packed in three ways. Each colour is a document; black is
# padding, and a white cap marks a document whose end was thrown away.

# %%
import matplotlib.pyplot as plt

from nanochat_lib.world_facts import World
from nanochat_lib.world_text import documents

ROW, ROWS = 512, 16
lengths = [len(text.encode()) for text in documents(World(1), 3000)]  # in bytes, to keep tokens out of it


def packed(stream, rows):
    """Best fit: rows of (length, tokens thrown away) pieces."""
    buffer, result = BestFit(), []
    for _ in range(rows):
        room, row = ROW, []
        while room > 0:
            while len(buffer) < BUFFER:
                buffer.add(range(next(stream)))
            length = len(buffer.take(room))
            row.append((min(length, room), max(length - room, 0)))
            room -= length
        result.append(row)
    return result


def padded(stream, rows):
    """One document a row, cut at its end."""
    return [[(min(length, ROW), max(length - ROW, 0))] for length, _ in zip(stream, range(rows))]


def concatenated(stream, rows):
    """One endless text, cut every ROW tokens: rows begin in the middle of a document."""
    rest, result = 0, []
    for _ in range(rows):
        room, row = ROW, []
        while room > 0:
            rest = rest or next(stream)
            row.append((min(rest, room), 0))
            rest, room = rest - row[-1][0], room - row[-1][0]
        result.append(row)
    return result

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained", sharey=True)
colours = plt.get_cmap("tab20").colors
for ax, pack in zip(axes, (padded, concatenated, packed)):
    number = 0
    for y, row in enumerate(pack(iter(lengths), ROWS)):
        x = 0
        for length, lost in row:
            ax.barh(y, length, 0.9, x, color=colours[number % 20])
            if lost:
                ax.barh(y, 8, 0.9, x + length - 8, color="white")
            x, number = x + length, number + 1
    ax.set(title=pack.__name__, xlabel="position in the row", xlim=(0, ROW), facecolor="black")
axes[0].set_ylabel("row")
axes[0].invert_yaxis()

# %%
count = 400
for pack in (padded, concatenated, packed):
    rows = pack(iter(lengths * 5), count)
    used, lost = (sum(piece[part] for row in rows for piece in row) for part in (0, 1))
    empty = 1 - used / (count * ROW)
    print(f"{pack.__name__:13} {empty:6.1%} of all positions empty, {lost / (used + lost):5.1%} of the text lost")

# %% [markdown]
# ## Where a loader stands
#
# A run that is stopped and resumed must read on as if nothing had happened: no document lost, none read twice. What
# has been read is a position: epoch, row group, document. But the buffer holds documents from before it, so the
# state names these too, as (row group, indices), and resuming reads them again. That is exact, and small in a
# checkpoint.
#
# Ranks take row groups in turn. If a run resumes on another number of ranks, what the old ranks had left of their
# epoch is dealt anew; from the next epoch on, the new ranks read as if they had always been there.

# %%
#| export
class Document(NamedTuple):
    """A tokenized document in the buffer, and where it came from."""

    tokens: np.ndarray  # int32, starts with <|bos|>
    unit: RowGroup
    index: int          # among the documents of the unit
    position: tuple[int, int, int]  # of what follows it: (epoch, place of the unit in the rank's share, index)

    def __len__(self) -> int:
        return len(self.tokens)


def share(units: list[RowGroup], epoch: int, rank: int, world_size: int,
          origin: list[dict] | None = None) -> list[tuple[RowGroup, int]]:
    """What a rank reads in an epoch: (row group, documents to skip) pairs.

    `origin`: states of the ranks of an earlier run, of another number, whose leavings are dealt first.
    """
    if not origin or epoch > max(state["epoch"] for state in origin):
        return [(unit, 0) for unit in deal(units, rank, world_size)]
    left = []
    for old_rank, state in enumerate(origin):
        mine = share(units, epoch, old_rank, len(origin), state["origin"])
        if epoch == state["epoch"]:
            mine = mine[state["place"]:]
            mine[:1] = [(unit, max(skip, state["document"])) for unit, skip in mine[:1]]
        left += mine if epoch >= state["epoch"] else []
    left.sort(key=lambda pair: (pair[0].shard, pair[0].group, pair[0].rows.start or 0))
    return left[rank::world_size]


def address(unit: RowGroup) -> list[int | None]:
    """A row group as JSON: [shard, row group, first row, end, step]."""
    return [unit.shard, unit.group, unit.rows.start, unit.rows.stop, unit.rows.step]


def flat(buffer: list) -> list[tuple[list, int]]:
    """[[address, indices], …] → [(address, index), …]"""
    return [(where, index) for where, indices in buffer for index in indices]

# %% [markdown]
# The loader itself: a thread reads and tokenizes one chunk ahead; the buffer is topped up before each choice;
# `state()` may be asked for after any batch.

# %%
#| export
class PackedLoader:
    """Endless batches (inputs, targets) of a split, each (batch_size, seq_len) int64, packed best-fit.

    `state` resumes: what `state()` gave, or the list of all ranks' states, also of another number of ranks.
    Raises NanochatError without data, or if the state belongs to other data.
    """

    def __init__(self, tokenizer: Tokenizer, batch_size: int, seq_len: int, split: str = "train", data_dir: str = "",
                 rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu",
                 state: dict | Sequence[dict] | None = None, buffer_size: int = BUFFER):
        self.tokenizer, self.batch_size, self.seq_len, self.buffer_size = tokenizer, batch_size, seq_len, buffer_size
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.units = row_groups(data_dir, split)
        self.thread = ThreadPoolExecutor(1)
        self.rewind(state)

    def rewind(self, state: dict | Sequence[dict] | None = None) -> None:
        """Go to a state; None: to the beginning."""
        if state and not isinstance(state, dict) and len(state) == self.world_size:
            state = state[self.rank]
        self.origin, self.position, waiting = None, (0, 0, 0), []
        if isinstance(state, dict):
            self.origin, waiting = state["origin"], flat(state["buffer"])
            self.position = state["epoch"], state["place"], state["document"]
        elif state:  # of another number of ranks
            self.origin = [{**old, "buffer": None} for old in state]
            self.position = min(old["epoch"] for old in state), 0, 0
            waiting = [pair for old in state for pair in flat(old["buffer"])][self.rank::self.world_size]
        self.buffer = BestFit()
        for document in self._read_again(waiting):
            self.buffer.add(document)
        self.chunks, self.chunk = self._chunks(*self.position), []
        self.ahead = self.thread.submit(next, self.chunks)

    def state(self) -> dict[str, Any]:
        """Where this rank stands, as JSON: what to read next, and which documents wait in the buffer."""
        waiting = (self.buffer.documents[arrival] for arrival in sorted(self.buffer.documents))
        epoch, place, document = self.position
        return {"epoch": epoch, "place": place, "document": document, "origin": self.origin,
                "buffer": [[address(unit), [document.index for document in documents]]
                           for unit, documents in groupby(waiting, key=lambda document: document.unit)]}

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        on_cuda = self.device.type == "cuda"
        batch = torch.empty((self.batch_size, self.seq_len + 1), dtype=torch.long, pin_memory=on_cuda)
        for row in batch.numpy():
            self._fill(row)
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        return tuple(part.to(self.device, non_blocking=on_cuda) for part in (inputs, targets))

    def _fill(self, row: np.ndarray) -> None:
        """Pack one row in place."""
        filled = 0
        while filled < len(row):
            while len(self.buffer) < self.buffer_size:
                self._add_document()
            tokens = self.buffer.take(len(row) - filled).tokens[:len(row) - filled]
            row[filled:filled + len(tokens)] = tokens
            filled += len(tokens)

    def _add_document(self) -> None:
        """Move the next document of the data into the buffer."""
        if not self.chunk:
            self.chunk = self.ahead.result()[::-1]
            self.ahead = self.thread.submit(next, self.chunks)
        document = self.chunk.pop()
        self.buffer.add(document)
        self.position = document.position

    def _chunks(self, epoch: int, place: int, skip: int):
        """Tokenized documents from a position on, epoch after epoch, in lists of up to CHUNK."""
        empty = 0  # epochs in a row without a document
        while True:
            found = False
            for place, (unit, first) in list(enumerate(share(self.units, epoch, self.rank, self.world_size,
                                                             self.origin)))[place:]:
                texts, first, skip = read_texts(unit), max(first, skip), 0
                for start in range(first, len(texts), CHUNK):
                    found = True
                    yield [self._document(unit, i, tokens, (epoch, place, i + 1)) for i, tokens in
                           enumerate(self._tokenize(texts[start:start + CHUNK]), start)]
            epoch, place, empty = epoch + 1, 0, 0 if found else empty + 1
            if empty > 2:
                raise NanochatError(f"no documents for process {self.rank} in {self.units[0].path.parent}: "
                                    "start fewer processes or fetch more data")

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.encode(texts, prepend=self.tokenizer.get_bos_token_id())

    @staticmethod
    def _document(unit: RowGroup, index: int, tokens: list[int], position: tuple[int, int, int]) -> Document:
        return Document(np.array(tokens, dtype=np.int32), unit, index, position)

    def _read_again(self, waiting: list[tuple[list, int]]):
        """The documents of a saved buffer, in the order of their arrival."""
        paths = {(unit.shard, unit.group): unit.path for unit in self.units}
        for (shard, group, *rows), pairs in groupby(waiting, key=lambda pair: pair[0]):
            indices = [index for _, index in pairs]
            if (shard, group) not in paths:
                raise NanochatError(f"the checkpoint was reading row group {group} of shard {shard}, which is not in "
                                    f"{self.units[0].path.parent}: give --data-dir the data it was trained on")
            unit = RowGroup(paths[shard, group], shard, group, slice(*rows))
            texts = read_texts(unit)
            if max(indices) >= len(texts):
                raise NanochatError(f"{unit.path} has changed since the checkpoint was written: "
                                    "give --data-dir the data it was trained on")
            for index, tokens in zip(indices, self._tokenize([texts[index] for index in indices])):
                yield self._document(unit, index, tokens, self.position)

# %% [markdown]
# On a small world of our own, in a scratch folder. A copy made from the state goes on with the very same rows:

# %%
import os
import tempfile
from pathlib import Path

from nanochat_lib.world import write_world

os.environ["NANOCHAT_BASE_DIR"] = scratch = tempfile.mkdtemp(prefix="lesson07_")  # nothing of yours is touched
shards = str(write_world(count=6000) / "shards")
tokenizer = Tokenizer.train_from_iterator((text for unit in row_groups(shards) for text in read_texts(unit)), 512)
tokenizer.save(Path(scratch) / "tokenizer")

loader = PackedLoader(tokenizer, batch_size=4, seq_len=64, data_dir=shards)
for _ in range(5):
    inputs, targets = next(loader)
assert torch.equal(inputs[:, 1:], targets[:, :-1])
print(repr(tokenizer.decode(inputs[0].tolist())))

# %%
import json

state = json.loads(json.dumps(loader.state()))
copy = PackedLoader(tokenizer, batch_size=4, seq_len=64, data_dir=shards, state=state)
assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(next(loader), next(copy)))
print(f"{len(loader.buffer)} documents wait; next comes epoch, row group, document {loader.position}; "
      f"the state is {len(json.dumps(state)) // 1000} kB of JSON")

# %% [markdown]
# ## The dial
#
# Everything about a run follows from one number, the depth. Its reference is a run that was tuned by hand: depth
# 12, batches of 2¹⁹ tokens. From there:
#
# | | rule | why |
# |---|---|---|
# | width | 64 × depth, rounded up to whole heads | deep and wide grow together |
# | tokens D | 12 × N (matrices and lm_head) | about compute-optimal (arXiv 2203.15556) |
# | batch B | 2¹⁹ · (D / D₁₂)^0.383, to a power of two | longer runs have a larger critical batch (arXiv 2505.13738) |
# | learning rates | × √(B / 2¹⁹) | the noise of a gradient falls with √B |
# | weight decay | 0.28 · √(B / 2¹⁹) · D₁₂ / D | the same memory, counted in epochs (arXiv 2405.13698) |

# %%
#| export scaling
"""The depth dial: one number fixes model, data, batch, steps and rates; and the schedules along a run."""

# %%
#| export scaling
import math
from dataclasses import dataclass

import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens a step, at which the rates were tuned
H100_FLOPS = 989e12      # dense bfloat16
ASSUMED_MFU = 0.45       # for estimates of hours only
DOLLARS_PER_GPU_HOUR = 3.0


def model_config(depth: int, aspect_ratio: int = 64, head_dim: int = 128, max_seq_len: int = 2048,
                 window_pattern: str = "SSSL", vocab_size: int = 32768) -> GPTConfig:
    """The model of a depth: n_embd = depth × aspect_ratio, rounded up to whole heads."""
    for name, value in (("depth", depth), ("aspect-ratio", aspect_ratio), ("head-dim", head_dim)):
        if value < 1:
            raise NanochatError(f"--{name} {value} makes no model: it must be at least 1")
    heads = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(sequence_len=max_seq_len, vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads,
                     n_embd=heads * head_dim, window_pattern=window_pattern)


def on_meta(config: GPTConfig) -> GPT:
    """The model without memory: its shapes, for counting."""
    with torch.device("meta"):
        return GPT(config)


def scaling_params(model: GPT) -> int:
    """N of the scaling rules: the matrices of the blocks and lm_head."""
    counts = model.num_scaling_params()
    return counts["transformer_matrices"] + counts["lm_head"]

# %%
#| export scaling
@dataclass(frozen=True)
class Recipe:
    """All that follows from the depth."""

    depth: int
    config: GPTConfig
    parameters: int
    scaling_params: int          # N
    flops_per_token: int         # forward and backward
    target_tokens: int           # D = ratio × N, what the rules are computed from
    total_batch_size: int        # tokens a step
    steps: int
    learning_rate_scale: float   # √(B / 2¹⁹)
    weight_decay: float          # of Muon, at the start

    @property
    def tokens(self) -> int:
        """Tokens that the run reads."""
        return self.steps * self.total_batch_size

    @property
    def flops(self) -> float:
        return float(self.tokens) * self.flops_per_token

    def describe(self) -> dict[str, str]:
        """The recipe in words, with what it would take on eight H100s (an estimate: at 45 % of their peak)."""
        hours = self.flops / (8 * H100_FLOPS * ASSUMED_MFU) / 3600
        config = self.config
        words = {
            "model": f"depth {self.depth}, width {config.n_embd}, {config.n_head} heads of {config.head_dim}, "
                     f"context {config.sequence_len}, vocabulary {config.vocab_size:,}",
            "parameters": f"{self.parameters:,} ({self.scaling_params:,} in matrices and lm_head)",
            "tokens": f"{self.tokens:,} = {self.steps:,} steps of {self.total_batch_size:,} "
                      f"({self.tokens / self.scaling_params:.1f} per scaling parameter)",
            "FLOPs": f"{self.flops:.2e} ({self.flops_per_token:.2e} a token)",
            "rates": f"× {self.learning_rate_scale:.3f}, weight decay {self.weight_decay:.4f}",
        }
        if hours >= 0.01:
            words["on 8×H100"] = (f"about {hours:.2f} h, {hours * 8 * DOLLARS_PER_GPU_HOUR:.2f} dollars at "
                                  f"{DOLLARS_PER_GPU_HOUR:.0f} a GPU hour and {ASSUMED_MFU:.0%} of peak")
        return words


def optimal_batch_size(tokens: float, reference_tokens: float) -> int:
    """Tokens a step for a run of D tokens: a power of two near 2¹⁹ · (D / D₁₂)^0.383 (arXiv 2505.13738)."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** 0.383))

# %%
#| export scaling
def recipe(depth: int, aspect_ratio: int = 64, head_dim: int = 128, max_seq_len: int = 2048,
           window_pattern: str = "SSSL", vocab_size: int = 32768, target_param_data_ratio: float = 12,
           num_iterations: int = -1, target_flops: float = -1, total_batch_size: int = -1,
           weight_decay: float = 0.28) -> Recipe:
    """Everything from the depth; what is given (not −1) overrules. Steps: given, else from FLOPs, else D // B."""
    shape = dict(aspect_ratio=aspect_ratio, head_dim=head_dim, max_seq_len=max_seq_len, window_pattern=window_pattern,
                 vocab_size=vocab_size)
    model = on_meta(model_config(depth, **shape))
    params = scaling_params(model)
    if target_param_data_ratio <= 0 and (num_iterations < 0 and target_flops < 0 or total_batch_size < 0):
        raise NanochatError(f"--target-param-data-ratio {target_param_data_ratio} gives no tokens: it must be above 0")
    ratio = target_param_data_ratio if target_param_data_ratio > 0 else 12
    tokens = int(ratio * params)
    reference = ratio * scaling_params(on_meta(model_config(REFERENCE_DEPTH, **shape)))
    batch = total_batch_size if total_batch_size > 0 else optimal_batch_size(tokens, reference)
    scale = math.sqrt(batch / REFERENCE_BATCH)
    flops_per_token = model.estimate_flops()
    if num_iterations >= 0:
        steps = num_iterations
    elif target_flops > 0:
        steps = round(target_flops / (flops_per_token * batch))
    else:
        steps = tokens // batch
    if steps < 1:
        raise NanochatError(f"the run would have {steps} steps of {batch:,} tokens: give --num-iterations of at least "
                            "1, a smaller --total-batch-size or a larger budget")
    return Recipe(depth, model.config, model.num_parameters(), params, flops_per_token, tokens, batch, steps, scale,
                  weight_decay * scale * reference / tokens)

# %% [markdown]
# The dial turned from 4 to 32, no weight allocated: the models are built on PyTorch's meta device, for counting
# only.

# %%
from nanochat_lib.scaling import recipe

print("depth  width  parameters   tokens   batch    steps   rates  decay     FLOPs")
for depth in (4, 8, 12, 16, 20, 24, 32):
    dial = recipe(depth)
    print(f"{depth:5} {dial.config.n_embd:6} {dial.parameters / 1e6:9.0f} M {dial.tokens / 1e9:6.2f} G "
          f" 2^{dial.total_batch_size.bit_length() - 1} {dial.steps:8,} {dial.learning_rate_scale:7.2f}"
          f" {dial.weight_decay:6.3f} {dial.flops:9.1e}")
assert recipe(12).total_batch_size == 2**19

# %%
depths = range(4, 33, 2)
dials = [recipe(depth) for depth in depths]
curves = {"parameters": [d.parameters for d in dials], "tokens read": [d.tokens for d in dials],
          "tokens a step": [d.total_batch_size for d in dials],
          "learning rates (×)": [d.learning_rate_scale for d in dials]}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.4), layout="constrained")
for ax, (name, values) in zip(axes, curves.items()):
    ax.semilogy(depths, values, marker=".")
    ax.set(xlabel="depth (layers)", title=name)

# %% [markdown]
# What a GPT-2 grade model takes, at the ratio of 8 that is just enough for it (what `base_train --depth=24
# --target-param-data-ratio=8 --dry-run` prints). The hours are an estimate, the rest is arithmetic:

# %%
for name, value in recipe(24, target_param_data_ratio=8).describe().items():
    print(f"{name:12} {value}")

# %% [markdown]
# ## Schedules
#
# Rates rise for 40 steps (at most a tenth of a short run), stay, and fall in a straight line over the last 65 %.
# Muon's momentum rises with them and falls at the end; its weight decay goes to zero on a cosine.

# %%
#| export scaling
def warmup_of(steps: int, warmup_steps: int = 40) -> int:
    """Warm-up of a run: never longer than a tenth of it, or a short run would never reach its rate."""
    return min(warmup_steps, steps // 10)


def learning_rate_multiplier(step: int, steps: int, warmup_steps: int = 40, warmdown_ratio: float = 0.65,
                             final_lr_frac: float = 0.05) -> float:
    """Factor on every learning rate at `step` (0-based) of `steps`: up, flat, down."""
    warmdown = round(warmdown_ratio * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= steps - warmdown or warmdown == 0:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final_lr_frac


def muon_momentum(step: int, steps: int, warmdown_ratio: float = 0.65) -> float:
    """0.85 → 0.97 over 400 steps; 0.97 → 0.90 over the warm-down (the lower where a short run has both at once)."""
    rising = 0.85 + 0.12 * min(step / 400, 1)
    warmdown = round(warmdown_ratio * steps)
    done = max(step - (steps - warmdown), 0) / warmdown if warmdown else 0
    return min(rising, 0.97 - 0.07 * min(done, 1))


def weight_decay_at(step: int, steps: int) -> float:
    """Factor on Muon's weight decay: from 1 to 0 on a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))

# %%
from nanochat_lib.scaling import learning_rate_multiplier, muon_momentum, warmup_of, weight_decay_at

figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
for ax, steps in zip(axes, (2520, 60)):
    every = range(steps)
    rates = [learning_rate_multiplier(step, steps, warmup_of(steps)) for step in every]
    ax.plot(every, rates, label="learning rates (×)")
    ax.plot(every, [weight_decay_at(step, steps) for step in every], label="weight decay (×)")
    ax.plot(every, [muon_momentum(step, steps) for step in every], label="Muon's momentum")
    ax.set(xlabel="step", title=f"a run of {steps:,} steps", ylim=(0, 1.05))
_ = axes[0].legend(loc="lower left")
assert max(learning_rate_multiplier(step, 60, warmup_of(60)) for step in range(60)) == 1

# %% [markdown]
# ## Checkpoints: a run that nothing can kill
#
# A run of hours is stopped sooner or later: a full disk, a lost node, an impatient hand. A checkpoint has to be
# whole or not there. Three kinds of file make one, and the order in which they are written is the whole trick:
#
# 1. `model_000600.safetensors`, the weights (no pickle: a checkpoint from a stranger cannot run code);
# 2. `optim_000600/`, the optimizer's state, written by all ranks together with `torch.distributed.checkpoint`,
#    which gives each rank of a later run its share, also when there are more ranks or fewer;
# 3. `meta_000600.json`, **last**: settings, the loader's state, the loop's. Without it the other two do not count.

# %%
#| export checkpoint
"""Checkpoints that are whole or not there: weights, optimizer state, and last the metadata that makes them count."""

# %%
#| export checkpoint
import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat_lib.common import (NanochatError, Runtime, base_dir, is_main_process, print0, read_json, write_aside,
                                 write_json)
from nanochat_lib.gpt import GPT, GPTConfig, build_model
from nanochat_lib.tokenizer import Tokenizer, load_tokenizer

STAGES = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
COMMANDS = {"base": "base_train", "sft": "chat_sft", "rl": "chat_rl"}
SET_ASIDE = re.compile(r"\.old\d+$")  # folders that hold a former run of the same tag


def checkpoint_directory(stage: str, model_tag: str = "") -> Path:
    """The folder of one model's checkpoints at a stage (of all models' where no tag is given)."""
    if stage not in STAGES:
        raise NanochatError(f"stage {stage!r} is unknown: choose {', '.join(STAGES)}")
    return base_dir() / STAGES[stage] / (model_tag or "")


def files_of(directory: Path, step: int) -> tuple[Path, Path, Path]:
    """Paths of a checkpoint: (weights, optimizer state, metadata)."""
    names = f"model_{step:06d}.safetensors", f"optim_{step:06d}", f"meta_{step:06d}.json"
    return tuple(Path(directory) / name for name in names)


def steps_in(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    found = (re.fullmatch(r"meta_(\d{6,})\.json", path.name) for path in Path(directory).glob("meta_*.json"))
    return sorted(int(match[1]) for match in found if match)

# %% [markdown]
# Saving is a collective act: all ranks write their slices of the optimizer state, then meet, and only then does
# rank 0 write the metadata. If a step is saved again, its old metadata goes first.

# %%
#| export checkpoint
def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """One value of every rank, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns that there is one process; we know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_checkpoint(directory: Path, step: int, model: torch.nn.Module, optimizer: Any, meta: dict[str, Any],
                    runtime: Runtime) -> None:
    """Write checkpoint `step`; all ranks call it. Killed at any moment, it leaves the earlier checkpoints as they were.

    `meta` is JSON-able: at least {"tokenizer": fingerprint}; model_config and step are added. `optimizer` may be None.
    """
    weights, state, metadata = files_of(directory, step)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper renames parameters
    if runtime.is_main:
        Path(directory).mkdir(parents=True, exist_ok=True)
        metadata.unlink(missing_ok=True)
        shutil.rmtree(state, ignore_errors=True)
        with write_aside(weights) as aside:
            save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, aside)
    barrier()
    if optimizer is not None:
        with _quiet():
            dcp.save(optimizer.checkpoint_state(), checkpoint_id=state)
    barrier()
    if runtime.is_main:
        write_json(metadata, {"step": step, "model_config": asdict(model.config), **meta})

# %% [markdown]
# What a killed run left half-written is swept away when the next one starts. A run started anew under the same name
# never mixes with the old one, and never deletes it: the old one is set aside.

# %%
#| export checkpoint
def clean_unfinished(directory: Path) -> None:
    """Remove what a killed save left in a folder: temporary files, and weights and states without metadata."""
    done = set(steps_in(directory))
    for path in [*Path(directory).glob("model_*.safetensors"), *Path(directory).glob("optim_*"),
                 *Path(directory).glob(".*.part")]:
        step = re.match(r"(?:model|optim)_(\d{6,})", path.name)
        if step is None or int(step[1]) not in done:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(directory: Path, after: int = -1) -> Path | None:
    """Move the checkpoints later than step `after` (−1: all there is) into a folder beside; returns it, or None."""
    directory = Path(directory)
    later = [step for step in steps_in(directory) if step > after]
    if not later:
        return None
    number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.old{n}").exists())
    aside = directory.with_name(f"{directory.name}.old{number}")
    if after < 0:
        directory.rename(aside)
        return aside
    aside.mkdir()
    for step in later:
        for path in reversed(files_of(directory, step)):  # the metadata first: half-moved, it no longer counts
            if path.exists():
                path.rename(aside / path.name)
    return aside


def prepare_directory(directory: Path, runtime: Runtime, resume_step: int = -1) -> None:
    """Ready a folder for a run that starts anew (−1) or goes on from a step; all ranks call it."""
    if runtime.is_main:
        if aside := set_aside(directory, resume_step):
            print0(f"checkpoints of a former run are now in {aside}")
        Path(directory).mkdir(parents=True, exist_ok=True)
        clean_unfinished(directory)
    barrier()

# %% [markdown]
# Reading has to answer which model is meant. With no tag it is the newest of the deepest ones, and we say which:
# depth is read from the metadata, not from the folder's name.

# %%
#| export checkpoint
def find_checkpoint(stage: str, model_tag: str | None = None, step: int | None = None) -> tuple[Path, int]:
    """(folder, step) of a complete checkpoint: by default the last step of the newest of the deepest models."""
    everywhere, command = checkpoint_directory(stage), f"run python -m nanochat_lib.scripts.{COMMANDS[stage]}"
    folders = [everywhere / model_tag] if model_tag else [
        path for path in everywhere.glob("*") if path.is_dir() and not SET_ASIDE.search(path.name)]
    last = {folder: steps_in(folder)[-1] for folder in folders if steps_in(folder)}
    if not last:
        raise NanochatError(f"no {stage} checkpoint in {folders[0] if model_tag else everywhere}: {command}")

    def depth_and_age(folder: Path) -> tuple[int, float]:
        path = files_of(folder, last[folder])[2]
        return read_json(path)["model_config"]["n_layer"], path.stat().st_mtime

    folder = max(last, key=depth_and_age)
    if step is not None and step >= 0 and step not in steps_in(folder):
        raise NanochatError(f"no checkpoint of step {step} in {folder}: there are steps "
                            f"{', '.join(map(str, steps_in(folder)))}")
    return folder, last[folder] if step is None or step < 0 else step


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    return read_json(files_of(directory, step)[2])


def load_weights(model: GPT, directory: Path, step: int) -> None:
    """Put a checkpoint's weights into a model of the same configuration. A damaged file is a NanochatError."""
    weights, _, metadata = files_of(directory, step)
    try:
        model.load_state_dict(load_file(weights), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise NanochatError(f"{weights} is damaged ({reason}): delete {metadata} to fall back to an earlier "
                            "checkpoint, then run the same command again") from None


def load_optimizer(directory: Path, step: int, optimizer: Any) -> None:
    """Put a checkpoint's optimizer state into an optimizer, on any number of ranks; all ranks call it."""
    path = files_of(directory, step)[1]
    if not path.exists():
        raise NanochatError(f"no optimizer state in {path}: start without it (chat_sft --load-optimizer=0), "
                            "or train anew")
    state = optimizer.checkpoint_state()
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=path)
    except (OSError, dcp.api.CheckpointException, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise NanochatError(f"{path} is damaged or of another model ({reason}): delete "
                            f"{files_of(directory, step)[2]} to fall back to an earlier checkpoint") from None
    optimizer.load_checkpoint_state(state)


def check_tokenizer(meta: dict[str, Any], tokenizer: Tokenizer, where: Path) -> None:
    """NanochatError unless the checkpoint was trained with this very tokenizer."""
    expected = meta.get("tokenizer")
    if expected and expected != tokenizer.fingerprint:
        raise NanochatError(f"the model in {where} was trained with tokenizer {expected}, but that in "
                            f"{base_dir() / 'tokenizer'} is {tokenizer.fingerprint}: put the old one back, or run "
                            "python -m nanochat_lib.scripts.base_train with the new one")


def load_model(stage: str, device: torch.device | str, phase: str = "eval", model_tag: str | None = None,
               step: int | None = None) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """A trained model, its tokenizer and its metadata. `phase`: "train" or "eval"; tag, step: as in find_checkpoint."""
    if phase not in ("train", "eval"):
        raise NanochatError(f"phase {phase!r} is unknown: it is train or eval")
    folder, step = find_checkpoint(stage, model_tag, step)
    if not model_tag:
        print0(f"{stage} model: {folder.name}, step {step}")
    meta, tokenizer = read_meta(folder, step), load_tokenizer()
    check_tokenizer(meta, tokenizer, folder)
    model = build_model(GPTConfig(**meta["model_config"]), device)
    load_weights(model, folder, step)
    return model.train(phase == "train"), tokenizer, meta


def write_result(name: str, **values: Any) -> None:
    """What a stage measured, for the report: report/result_{name}.json, written by the main process."""
    if is_main_process():
        write_json(base_dir() / "report" / f"result_{name}.json", values)

# %% [markdown]
# A checkpoint half-written is no checkpoint. Here the process is "killed" just before the metadata:

# %%
from nanochat_lib import checkpoint
from nanochat_lib.common import Runtime
from nanochat_lib.scaling import model_config

alone = Runtime(torch.device("cpu"))
model = checkpoint.build_model(model_config(2, 32, 32, 64, vocab_size=512), "cpu")
optimizer, folder = model.setup_optimizer(), checkpoint.checkpoint_directory("base", "demo")
checkpoint.save_checkpoint(folder, 10, model, optimizer, {"tokenizer": tokenizer.fingerprint}, alone)
checkpoint.save_checkpoint(folder, 20, model, optimizer, {"tokenizer": tokenizer.fingerprint}, alone)
(folder / "meta_000020.json").unlink()
print(sorted(path.name for path in folder.iterdir()), "→ step", checkpoint.find_checkpoint("base", "demo")[1])
checkpoint.prepare_directory(folder, alone, 10)
print(sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# ## What every training loop shares
#
# Chat training (lesson 09) and reinforcement learning (lesson 10) step like pretraining does: sum the gradients of
# a few micro-batches, set this step's rates, let the optimizer step. Four things can go wrong, and each has its
# place here: a batch that does not divide, float16 that underflows, a compiler that is missing, a loss that is no
# number.

# %%
#| export training
"""What all training loops share: micro-batches, rates, float16 scaling, compiling, and a loss that is no number."""

# %%
#| export training
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from nanochat_lib.common import NanochatError, all_reduce_sum, print0, write_aside

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16


def divide_batch(total: int, device_batch: int, seq_len: int, world_size: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches a step) for `total` tokens a step over all processes.

    A device batch that does not divide is made smaller, which changes memory and speed but not the result.
    """
    if device_batch < 1:
        raise NanochatError(f"--device-batch-size {device_batch}: it must be at least 1")
    rows, rest = divmod(total, seq_len * world_size)
    if rest or rows < 1:
        raise NanochatError(f"--total-batch-size {total} is not a multiple of context {seq_len} × {world_size} "
                            f"processes = {seq_len * world_size}: give {max(rows, 1) * seq_len * world_size}")
    smaller = max(size for size in range(1, min(device_batch, rows) + 1) if rows % size == 0)
    if smaller != device_batch:
        print0(f"device batch {device_batch} → {smaller}: with context {seq_len} and {world_size} processes it must "
               f"divide {total} tokens")
    return smaller, rows // smaller


def set_rates(optimizer: Any, multiplier: float, momentum: float | None = None, weight_decay: float = 1.0) -> None:
    """Scale every group's first learning rate; for Muon also set momentum and scale the first weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = group["momentum"] if momentum is None else momentum
            group["weight_decay"] = group.setdefault("initial_weight_decay", group["weight_decay"]) * weight_decay

# %% [markdown]
# float16 has 5 bits of exponent: small gradients vanish. So the loss is multiplied by a large number before
# `backward` and the gradients divided by it after; when one overflows, all ranks skip the step and halve the
# number.

# %%
#| export training
class LossScaler:
    """Dynamic loss scaling for float16 (arXiv 1710.03740); for other dtypes it does nothing."""

    def __init__(self, dtype: torch.dtype, state: dict | None = None, patience: int = 2000):
        self.enabled, self.patience = dtype == torch.float16, patience
        self.scale, self.good_steps = (state["scale"], state["good_steps"]) if state else (2.0**16, 0)

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale if self.enabled else loss).backward()

    def step(self, optimizer: Any) -> bool:
        """Step unless a gradient of any process overflowed; says whether it did."""
        if self.enabled:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale)
            finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
            if all_reduce_sum((~finite).float()).item():
                self.scale, self.good_steps = self.scale / 2, 0
                return False
            self.good_steps += 1
            if self.good_steps % self.patience == 0:
                self.scale *= 2
        optimizer.step()
        return True


def accumulate(model: torch.nn.Module, batches: Iterator, micro_batches: int, scaler: LossScaler,
               after_each: Callable[[], Any] = lambda: None) -> float:
    """Gradients of the mean loss over several micro-batches of (inputs, targets); returns that mean over all ranks."""
    total, world_size = 0.0, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    for _ in range(micro_batches):
        loss = model(*next(batches)) / micro_batches
        scaler.backward(loss)
        total = total + loss.detach()
        after_each()
    return all_reduce_sum(total).item() / world_size

# %%
#| export training
def check_loss(loss: float, step: int, optimizer: Any, directory: Path) -> None:
    """Stop a run whose loss is no number before it spoils the weights; says which gradients blew up."""
    if math.isfinite(loss):
        return
    norms = {group.get("name", index): sum(p.grad.float().square().sum().item() for p in group["params"]
                                           if p.grad is not None) ** 0.5
             for index, group in enumerate(optimizer.param_groups)}
    worst = ", ".join(f"{name} {norm:.2g}" for name, norm in norms.items())
    raise NanochatError(f"the loss is {loss} at step {step}: stopped ({last_good(directory)}); "
                        f"norms of the gradients: {worst}")


def check_weights(model: torch.nn.Module, step: int, directory: Path) -> None:
    """Refuse to save weights that hold no numbers."""
    bad = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if bad:
        raise NanochatError(f"{bad[0]} is not finite at step {step}: stopped ({last_good(directory)})")


def last_good(directory: Path) -> str:
    """Which checkpoint to go back to, in words."""
    steps = sorted(int(path.stem[5:]) for path in Path(directory).glob("meta_*.json"))
    return (f"last good checkpoint: step {steps[-1]} in {directory}; go on with --resume-from-step={steps[-1]} "
            "and lower rates" if steps else "there is no checkpoint yet: start again with lower rates")


def compiled(model: torch.nn.Module, batch: tuple, wanted: bool | None, flops: float) -> torch.nn.Module:
    """The model through torch.compile if wanted (None: if the run of so many FLOPs is long enough to pay for it).

    Where compiling fails, for want of a C++ compiler say, one line tells so and the model stays as it is.
    """
    device = batch[0].device.type
    cores = psutil.cpu_count(logical=False) or 1
    rate, enough = {"cuda": (3e14, 60), "cpu": (4e10 * cores, 600)}.get(device, (1.0, math.inf))  # FLOP/s, seconds
    if not (flops / rate > enough if wanted is None else wanted):
        return model
    print0("compiling the model, about a minute (--no-compile: start at once, and run slower)")
    try:
        fast = torch.compile(model, dynamic=False)
        fast(*batch).backward()
        return fast
    except Exception as error:
        torch._dynamo.reset()
        print0(f"torch.compile does not work here ({str(error).strip().splitlines()[0][:150]}): going on without it")
        return model
    finally:
        model.zero_grad(set_to_none=True)


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines of a metrics file from `step` on (and a torn last one): a resumed run writes them again."""
    if not Path(path).exists():
        return
    kept = []
    for line in Path(path).read_text().splitlines():
        try:
            kept += [line] if json.loads(line).get("step", -1) < step else []
        except ValueError:
            continue
    with write_aside(path) as aside:
        aside.write_text("".join(line + "\n" for line in kept))

# %% [markdown]
# ## The run
#
# Settings first. The flags and their defaults are nanochat's; `--dry-run` prints the recipe and stops.

# %%
#| export scripts/base_train
"""Pretraining: the whole recipe follows from --depth. Alone, or under torchrun on any number of processes."""

# %%
#| export scripts/base_train
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from nanochat_lib.checkpoint import (check_tokenizer, checkpoint_directory, gather, load_optimizer, load_weights,
                                     prepare_directory, read_meta, save_checkpoint, steps_in, write_result)
from nanochat_lib.common import (MetricsLog, NanochatError, Runtime, compute_dtype, peak_memory_bytes,
                                 print0, progress, run_cli, start)
from nanochat_lib.dataloader import PackedLoader
from nanochat_lib.evaluation import evaluate_bpb, evaluate_core, read_bundle, read_items
from nanochat_lib.fp8 import convert_to_fp8, lacks_fp8
from nanochat_lib.gpt import GPT, build_model
from nanochat_lib.scaling import Recipe, learning_rate_multiplier, muon_momentum, recipe, warmup_of, weight_decay_at
from nanochat_lib.tokenizer import Tokenizer, load_tokenizer
from nanochat_lib.training import (PEAK_FLOPS, LossScaler, accumulate, check_loss, check_weights, compiled,
                                   divide_batch, set_rates, trim_metrics)

EVAL_TOKENS = 41943040     # 80 × 524,288
CPU_MICRO_TOKENS = 8192    # more at a time only costs memory there
Flag = tyro.conf.FlagCreatePairsOff


@dataclass
class BaseTrain:
    """Settings of pretraining. −1: follows from the depth, or never."""

    run: str = "dummy"                 # name of the run at Weights & Biases; dummy: none
    device_type: str = ""              # cuda, mps or cpu; empty: the best there is
    data_dir: str = ""                 # folder of parquet shards; empty: the downloaded corpus
    eval_bundle: str = ""              # folder of CORE's tasks; empty: the real ones, downloaded
    fp8: Annotated[bool, Flag] = False  # train with 8-bit matrix products (Hopper and later)
    fp8_recipe: str = "tensorwise"     # one scale for each tensor
    compile: Annotated[bool, Flag] = False     # use torch.compile; neither flag: where it pays
    no_compile: Annotated[bool, Flag] = False  # do not

    depth: int = 20                    # layers; all else follows
    aspect_ratio: int = 64             # n_embd = depth × aspect_ratio, up to whole heads
    head_dim: int = 128                # channels of a head
    max_seq_len: int = 2048            # context, in tokens
    window_pattern: str = "SSSL"       # L: full context, S: a quarter; tiled over the layers

    num_iterations: int = -1           # steps; −1: from the next two, the first that is given
    target_flops: float = -1.0         # compute of the whole run
    target_param_data_ratio: float = 12  # tokens per scaling parameter

    device_batch_size: int = 32        # rows of a micro-batch on each device
    total_batch_size: int = -1         # tokens a step
    embedding_lr: float = 0.3          # rates are for batches of 2^19 tokens and scaled to the run's
    unembedding_lr: float = 0.008
    weight_decay: float = 0.28         # of Muon, at depth 12
    matrix_lr: float = 0.02            # of Muon
    scalar_lr: float = 0.5
    warmup_steps: int = 40             # at most a tenth of the run
    warmdown_ratio: float = 0.65       # part of the run in which rates fall
    final_lr_frac: float = 0.05        # to this part of their height

    resume_from_step: int = -1         # go on from this checkpoint
    resume: Annotated[bool, Flag] = False      # go on from the newest checkpoint of this tag, if there is one

    eval_every: int = 250              # steps between evaluations of bits per byte; −1: never
    eval_tokens: int = EVAL_TOKENS     # the default is cut to fit the run and the machine
    core_metric_every: int = 2000      # −1: never
    core_metric_max_per_task: int = 500
    sample_every: int = 2000           # −1: never
    save_every: int = -1               # −1: only at the end
    model_tag: str = ""                # name of the model; empty: d{depth}
    dry_run: Annotated[bool, Flag] = False     # print the recipe and stop

# %%
#| export scripts/base_train
def recipe_of(settings: BaseTrain, vocab_size: int) -> Recipe:
    """The recipe that these settings mean; each field of `recipe` is a flag of the same name."""
    names = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "target_param_data_ratio",
             "num_iterations", "target_flops", "total_batch_size", "weight_decay")
    return recipe(vocab_size=vocab_size, **{name: getattr(settings, name) for name in names})


def check_settings(settings: BaseTrain, runtime: Runtime) -> None:
    """What cannot work is said before any work is done."""
    if settings.fp8:
        if lacks := lacks_fp8(runtime.device):
            raise NanochatError(f"--fp8 cannot run: {lacks}; leave it away")
        if settings.fp8_recipe != "tensorwise":
            raise NanochatError(f"--fp8-recipe {settings.fp8_recipe} is unknown: choose tensorwise")
    if settings.compile and settings.no_compile:
        raise NanochatError("--compile and --no-compile exclude each other: give one, or none to let the length of the "
                            "run decide")
    if not 0 <= settings.warmdown_ratio <= 1:
        raise NanochatError(f"--warmdown-ratio {settings.warmdown_ratio} is not a part of the run: give 0 … 1")


def sample_prompts(eval_bundle: str = "") -> list[str]:
    """Beginnings for a base model to continue: questions about the world's people, where the bundle is the world's."""
    if eval_bundle:
        tasks = [task for task in read_bundle(eval_bundle) if task.label.startswith("world")]
        prompts = [item["context"] for task in tasks if task.kind == "language_modeling"
                   for item in read_items(task, 3)]
        if prompts:
            return prompts
    return ["The capital of France is", "The chemical symbol of gold is", "The opposite of hot is",
            "If yesterday was Friday, then tomorrow will be", "The planets of the solar system are:"]


def draw_samples(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_tokens: int = 16) -> list[str]:
    """Each prompt with the model's greedy continuation, up to <|bos|>."""
    samples, bos = [], tokenizer.get_bos_token_id()
    for prompt in prompts:
        tokens = tokenizer.encode(prompt, prepend=bos)
        with torch.inference_mode():
            for token in model.generate(tokens[:], max_tokens, temperature=0.0):
                if token == bos:
                    break
                tokens.append(token)
        samples.append(tokenizer.decode(tokens[1:]))
    return samples

# %% [markdown]
# A run is its model, optimizer and loader, and a little state of the loop. All of it goes into a checkpoint, so all
# of it comes back.

# %%
#| export scripts/base_train
class Run:
    """A pretraining run at some step: what the loop below calls, in the order it calls it."""

    def __init__(self, settings: BaseTrain, runtime: Runtime, tokenizer: Tokenizer, dial: Recipe):
        self.settings, self.runtime, self.tokenizer, self.dial = settings, runtime, tokenizer, dial
        self.directory = checkpoint_directory("base", settings.model_tag or f"d{settings.depth}")
        device_batch, seq_len = settings.device_batch_size, dial.config.sequence_len
        if runtime.device.type == "cpu":
            device_batch = min(device_batch, max(CPU_MICRO_TOKENS // seq_len, 1))
        self.rows, self.micro_batches = divide_batch(dial.total_batch_size, device_batch, seq_len, runtime.world_size)
        self.step, self.seconds, self.bpb_curve, self.eval_batches = 0, 0.0, [], 0
        meta = self.find_resume()
        self.loader = self.make_loader("train", meta.get("loader"))
        self.validation = self.make_loader("val")
        self.orig_model = build_model(dial.config, runtime.device)
        if settings.fp8:
            print0(f"FP8: {len(convert_to_fp8(self.orig_model))} matrices, evaluations in {compute_dtype(runtime.device)}")
        self.optimizer = self.make_optimizer()
        self.scaler = LossScaler(compute_dtype(runtime.device), meta.get("scaler"))
        self.token_bytes = tokenizer.token_bytes().to(runtime.device)
        if meta:
            load_weights(self.orig_model, self.directory, self.step)
            load_optimizer(self.directory, self.step, self.optimizer)
        prepare_directory(self.directory, runtime, self.step if meta else -1)
        trim_metrics(self.directory / "metrics.jsonl", self.step) if runtime.is_main else None
        self.metrics = MetricsLog(self.directory / "metrics.jsonl", settings.run, dataclasses.asdict(settings))
        self.model, self.may_compile = self.orig_model, True

    def find_resume(self) -> dict:
        """The metadata of the checkpoint to go on from, its loop state taken over; {} for a run from the start."""
        step, steps = self.settings.resume_from_step, steps_in(self.directory)
        if step >= 0 and step not in steps:
            raise NanochatError(f"no checkpoint of step {step} in {self.directory}: there are {steps or 'none'}")
        if step < 0 and not (self.settings.resume and steps):
            return {}
        self.step = steps[-1] if step < 0 else step
        meta = read_meta(self.directory, self.step)
        check_tokenizer(meta, self.tokenizer, self.directory)
        if meta["model_config"] != dataclasses.asdict(self.dial.config):
            raise NanochatError(f"{self.directory} holds a model of other settings ({meta['model_config']}): "
                                "give the same ones, or another --model-tag")
        loop = meta["loop"]
        self.seconds, self.bpb_curve, self.eval_batches = loop["seconds"], loop["bpb_curve"], loop["eval_batches"]
        print0(f"going on from step {self.step} in {self.directory}")
        return meta

    def make_loader(self, split: str, state: list | None = None) -> PackedLoader:
        return PackedLoader(self.tokenizer, self.rows, self.dial.config.sequence_len, split, self.settings.data_dir,
                            self.runtime.rank, self.runtime.world_size, self.runtime.device, state)

    def make_optimizer(self) -> torch.optim.Optimizer:
        settings, scale = self.settings, self.dial.learning_rate_scale
        return self.orig_model.setup_optimizer(
            unembedding_lr=settings.unembedding_lr * scale, embedding_lr=settings.embedding_lr * scale,
            matrix_lr=settings.matrix_lr * scale, scalar_lr=settings.scalar_lr * scale,
            weight_decay=self.dial.weight_decay)

    def compile(self) -> torch.nn.Module:
        """The model as it trains: compiled or not. The whole run's length decides, so a resumed run decides alike."""
        wanted = True if self.settings.compile else False if self.settings.no_compile else None
        inputs = torch.zeros(self.rows, self.dial.config.sequence_len, dtype=torch.long, device=self.runtime.device)
        return compiled(self.orig_model, (inputs, inputs), wanted, self.dial.flops / self.runtime.world_size)

    def train_step(self, bar) -> None:
        """One step of the optimizer: gradients of all micro-batches, rates of this step, update."""
        if self.may_compile:  # not before the first evaluation: a minute of silence would look like a fault
            self.model, self.may_compile = self.compile(), False
        settings, steps, started = self.settings, self.dial.steps, time.perf_counter()
        tokens = self.rows * self.dial.config.sequence_len * self.runtime.world_size
        loss = accumulate(self.model, self.loader, self.micro_batches, self.scaler, lambda: bar.update(tokens))
        check_loss(loss, self.step, self.optimizer, self.directory)
        multiplier = learning_rate_multiplier(self.step, steps, warmup_of(steps, settings.warmup_steps),
                                              settings.warmdown_ratio, settings.final_lr_frac)
        set_rates(self.optimizer, multiplier, muon_momentum(self.step, steps, settings.warmdown_ratio),
                  weight_decay_at(self.step, steps))
        self.scaler.step(self.optimizer)
        self.model.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.metrics.log(step=self.step, loss=loss, lr=multiplier * settings.matrix_lr * self.dial.learning_rate_scale,
                         tok_per_sec=round(self.dial.total_batch_size / seconds), epoch=self.loader.position[0],
                         **self.utilization(seconds))
        bar.set_postfix_str(f"step {self.step}/{steps}, loss {loss:.3f}", refresh=False)
        self.step += 1

    def utilization(self, seconds: float) -> dict[str, float]:
        """{"mfu": part of the chips' peak that was used}, where the peak is known."""
        name = torch.cuda.get_device_name() if self.runtime.device.type == "cuda" else ""
        peak = next((value for chip, value in PEAK_FLOPS.items() if chip in name), 0)
        flops = self.dial.flops_per_token * self.dial.total_batch_size / seconds / self.runtime.world_size
        return {"mfu": round(flops / peak, 4)} if peak else {}

    def save(self) -> None:
        if self.step in steps_in(self.directory):
            return  # resumed here
        check_weights(self.orig_model, self.step, self.directory)
        loop = {"seconds": self.seconds, "bpb_curve": self.bpb_curve, "eval_batches": self.eval_batches}
        meta = {"tokenizer": self.tokenizer.fingerprint, "settings": dataclasses.asdict(self.settings),
                "total_batch_size": self.dial.total_batch_size, "device_batch_size": self.rows, "loop": loop,
                "scaler": self.scaler.state(), "loader": gather(self.loader.state())}
        save_checkpoint(self.directory, self.step, self.orig_model, self.optimizer, meta, self.runtime)

    def evaluate_bpb(self) -> None:
        """Bits per byte on the validation split, always on the same rows."""
        self.eval_batches = self.eval_batches or self.size_evaluation()
        self.validation.rewind()
        self.orig_model.eval()
        bpb = evaluate_bpb(self.model, self.validation, self.eval_batches, self.token_bytes)
        self.orig_model.train()
        self.bpb_curve.append([self.step, bpb])
        self.metrics.log(step=self.step, bpb=bpb)
        speed = f", {self.step * self.dial.total_batch_size / self.seconds:,.0f} tokens/s" if self.seconds else ""
        print0(f"step {self.step:5}/{self.dial.steps}: validation bits per byte {bpb:.4f}{speed}")

    def size_evaluation(self) -> int:
        """Batches of an evaluation: --eval-tokens rounded up; the default is cut to fit the run and the machine."""
        tokens = self.rows * self.dial.config.sequence_len * self.runtime.world_size
        if self.settings.eval_tokens < tokens:
            print0(f"--eval-tokens {self.settings.eval_tokens} is less than a batch: evaluating one batch, "
                   f"{tokens} tokens")
        wanted = max(-(-self.settings.eval_tokens // tokens), 1)
        if self.settings.eval_tokens != EVAL_TOKENS:
            return wanted
        wanted = min(wanted, max(self.dial.tokens // 10 // tokens, 1))
        if self.runtime.device.type != "cuda":  # at most about five seconds each
            started = time.perf_counter()
            evaluate_bpb(self.model, self.validation, 1, self.token_bytes)
            wanted = min(wanted, max(round(5 / (time.perf_counter() - started)), 1))
        wanted = gather(wanted)[0]  # the main process decides
        print0(f"evaluating on {wanted * tokens:,} tokens")
        return wanted

    def evaluate_core(self) -> None:
        self.orig_model.eval()
        core = evaluate_core(self.orig_model, self.tokenizer, self.runtime.device, self.settings.eval_bundle or None,
                             self.settings.core_metric_max_per_task)
        self.orig_model.train()
        self.metrics.log(step=self.step, core_metric=core["core_metric"], centered_results=core["centered_results"])
        print0(f"step {self.step:5}: CORE {core['core_metric']:.4f}")

    def sample(self) -> None:
        if self.runtime.is_main:
            self.orig_model.eval()
            for text in draw_samples(self.orig_model, self.tokenizer, sample_prompts(self.settings.eval_bundle)):
                print0("  " + " ".join(text.split()))
            self.orig_model.train()

    def report(self) -> None:
        """What the run measured, for the report."""
        curve = self.bpb_curve
        write_result("base", bpb_start=curve[0][1] if curve else None, bpb=curve[-1][1] if curve else None,
                     bpb_curve=curve, tokens=self.dial.tokens, parameters=self.dial.parameters, steps=self.dial.steps,
                     depth=self.dial.depth, flops=self.dial.flops, seconds=round(self.seconds, 2),
                     tok_per_sec=round(self.dial.tokens / self.seconds) if self.seconds else None,
                     peak_memory_gib=round(peak_memory_bytes(self.runtime.device) / 2**30, 2))

# %% [markdown]
# The loop. A checkpoint is saved *before* the evaluation of its step: an evaluation needs files that may be missing
# and a network that may be down, and no evaluation is worth a run. One that fails is reported, and training goes
# on.

# %%
#| export scripts/base_train
#| cli base_train
def evaluations(run: Run) -> Iterator:
    """The evaluations that are due at this step."""
    settings, last = run.settings, run.step == run.dial.steps

    def due(every: int) -> bool:
        return every > 0 and (last or run.step % every == 0)

    if due(settings.eval_every):
        yield run.evaluate_bpb
    if run.step > 0 and due(settings.core_metric_every):
        yield run.evaluate_core
    if run.step > 0 and due(settings.sample_every):
        yield run.sample


def train(run: Run) -> None:
    """Save, evaluate, step; to the end."""
    steps, batch = run.dial.steps, run.dial.total_batch_size
    every = run.settings.save_every
    bar = progress(total=run.dial.tokens, desc="base_train", initial=run.step * batch)
    bar.unit, bar.unit_scale = " tokens", True
    while True:
        if run.step == steps or every > 0 and run.step > 0 and run.step % every == 0:
            run.save()
        for evaluation in evaluations(run):
            try:
                evaluation()
            except NanochatError as error:
                print0(f"step {run.step}: an evaluation could not run, training is not affected: {error}")
        if run.step == steps:
            break
        run.train_step(bar)
    bar.close()
    run.metrics.close()
    run.report()
    print0(f"trained {run.dial.parameters:,} parameters on {run.dial.tokens:,} tokens: {run.directory}")


def base_train(settings: BaseTrain) -> None:
    """Pretrain a base model; its size, data, batch and rates follow from --depth."""
    if settings.dry_run:
        try:
            vocab_size = load_tokenizer().get_vocab_size()
        except NanochatError:
            vocab_size = 32768
        lines = recipe_of(settings, vocab_size).describe().items()
        return print(*(f"{name:12} {value}" for name, value in lines), sep="\n")
    runtime = start(settings.device_type)
    check_settings(settings, runtime)
    tokenizer = load_tokenizer()
    dial = recipe_of(settings, tokenizer.get_vocab_size())
    for name, value in dial.describe().items():
        print0(f"{name:12} {value}")
    train(Run(settings, runtime, tokenizer, dial))

# %% [markdown]
# ## Twenty seconds of pretraining
#
# The command itself, as a process of its own: two layers, a small vocabulary, the scratch world from above.

# %%
# NBVAL_IGNORE_OUTPUT
import subprocess
import sys

flags = ("--depth=2 --aspect-ratio=32 --head-dim=32 --max-seq-len=64 --total-batch-size=2048 --num-iterations=160 "
         "--matrix-lr=0.1 --eval-every=40 --eval-tokens=8192 --core-metric-every=-1 --sample-every=160")
command = [sys.executable, "-m", "nanochat_lib.scripts.base_train", f"--data-dir={shards}", "--model-tag=lesson",
           f"--eval-bundle={scratch}/world/eval_bundle", "--device-type=cpu", *flags.split()]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout.replace(scratch, "…") or done.stderr)

# %%
lines = [json.loads(line) for line in open(f"{scratch}/base_checkpoints/lesson/metrics.jsonl")]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
left.plot(*zip(*((line["step"], line["loss"]) for line in lines if "loss" in line)))
left.set(xlabel="step (2,048 tokens each)", ylabel="training loss (nats per token)")
curve = [(line["step"], line["bpb"]) for line in lines if "bpb" in line]
right.plot(*zip(*curve), marker="o")
right.set(xlabel="step", ylabel="validation bits per byte", ylim=(0, None))
assert curve[-1][1] < 0.75 * curve[0][1]

# %% [markdown]
# Kill it anywhere (`kill -9`) and run the same command with `--resume`: on one CPU process the losses that follow
# are the same, bit for bit. On several, `python -m torch.distributed.run --nproc-per-node=2 -m
# nanochat_lib.scripts.base_train …` trains the same one model; both are tests of this course
# (`tests/test_base_train.py`).

# %% [markdown]
# ## How good is it?
#
# `base_eval` asks the finished model everything lesson 06 can ask, and leaves a table as CSV beside a
# `result_base_eval.json`.

# %%
#| export scripts/base_eval
"""Evaluation of a base model: CORE, bits per byte of both splits, samples. Alone or under torchrun."""

# %%
#| export scripts/base_eval
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_lib.checkpoint import load_model, write_result
from nanochat_lib.common import NanochatError, Runtime, base_dir, print0, run_cli, start, write_aside
from nanochat_lib.dataloader import PackedLoader
from nanochat_lib.evaluation import evaluate_bpb, evaluate_core
from nanochat_lib.gpt import GPT
from nanochat_lib.scripts.base_train import draw_samples, sample_prompts
from nanochat_lib.tokenizer import Tokenizer

PARTS = ("core", "bpb", "sample")
SPLIT_TOKENS = 40 * 524288
CPU_SPLIT_TOKENS = 65536  # what the default becomes without a GPU: half a minute instead of hours


@dataclass
class BaseEval:
    """What to evaluate, and how much of it."""

    eval: str = "core,bpb,sample"   # parts, separated by commas
    model_tag: str = ""             # default: the newest of the deepest models
    step: int = -1                  # −1: its last checkpoint
    max_per_task: int = -1          # questions of each CORE task; −1: all
    device_batch_size: int = 32
    split_tokens: int = SPLIT_TOKENS  # tokens of each split for bits per byte
    device_type: str = ""
    data_dir: str = ""
    eval_bundle: str = ""


def bpb_of_splits(settings: BaseEval, runtime: Runtime, model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    """{"train": bits per byte, "val": …} over --split-tokens each, rounded up to a batch."""
    wanted, context = settings.split_tokens, model.config.sequence_len
    rows = settings.device_batch_size
    if runtime.device.type != "cuda":
        wanted = CPU_SPLIT_TOKENS if wanted == SPLIT_TOKENS else wanted
        rows = min(rows, max(8192 // context, 1))
    batch = rows * context * runtime.world_size
    if wanted < batch:
        print0(f"--split-tokens {wanted} is less than a batch: evaluating one batch, {batch} tokens")
    bpb = {}
    for split in ("train", "val"):
        loader = PackedLoader(tokenizer, rows, context, split, settings.data_dir, runtime.rank, runtime.world_size,
                              runtime.device)
        bpb[split] = evaluate_bpb(model, loader, max(-(-wanted // batch), 1),
                                  tokenizer.token_bytes().to(runtime.device))
        print0(f"bits per byte, {split}: {bpb[split]:.4f}")
    return bpb


def write_table(path: Path, core: dict[str, Any]) -> None:
    """CORE as CSV: a line per task, the mean last."""
    rows = [(task, f"{core['results'][task]:.6f}", f"{value:.6f}") for task, value in core["centered_results"].items()]
    with write_aside(path) as aside, open(aside, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("Task", "Accuracy", "Centered"), *rows,
                                                         ("CORE", "", f"{core['core_metric']:.6f}")])

# %%
#| export scripts/base_eval
#| cli base_eval
def base_eval(settings: BaseEval) -> None:
    """Evaluate a base model: CORE, bits per byte, samples. A part that cannot run is reported, the others are done."""
    parts = [part.strip() for part in settings.eval.split(",") if part.strip()]
    if not parts or set(parts) - set(PARTS):
        raise NanochatError(f"--eval {settings.eval!r} is unknown: choose from {', '.join(PARTS)}, separated by commas")
    runtime = start(settings.device_type)
    model, tokenizer, meta = load_model("base", runtime.device, "eval", settings.model_tag or None, settings.step)
    result, failures = {"step": meta["step"]}, []
    for part in parts:
        try:
            if part == "core":
                core = evaluate_core(model, tokenizer, runtime.device, settings.eval_bundle or None,
                                     settings.max_per_task, report=print0)
                result.update(core)
                print0(f"CORE {core['core_metric']:.4f}")
            elif part == "bpb":
                result["bpb"] = bpb_of_splits(settings, runtime, model, tokenizer)
            elif runtime.is_main:
                result["samples"] = draw_samples(model, tokenizer, sample_prompts(settings.eval_bundle))
                print(*(f"  {' '.join(text.split())}" for text in result["samples"]), sep="\n", flush=True)
        except NanochatError as error:
            failures.append(f"{part}: {error}")
            print0(f"left out: {failures[-1]}")
    if runtime.is_main and "core_metric" in result:
        write_table(base_dir() / "base_eval" / f"base_model_{meta['step']:06d}.csv", result)
    write_result("base_eval", **result)
    if len(failures) == len(parts):
        raise NanochatError(f"nothing could be evaluated ({failures[0]})")

# %% [markdown]
# ## Exercises
#
# In [07_pretraining](../exercises/07_pretraining.ipynb):
# 1. `pack_row`: best fit, by a plain search.
# 2. `learning_rate_multiplier`: a rate for each step.
# 3. `optimal_batch_size`: how large a batch?
# 4. Measure: what does cropping cost, and why does the buffer hold 1,000 documents?
#
# **Next:** [08 · The engine](08_engine.ipynb)
