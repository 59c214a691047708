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
# *How does one dial, depth, fix a whole run?* — 50 minutes, about one of them computing.
#
# A training run needs rows to read, numbers that follow from the depth, checkpoints, and a loop. They are built here in
# this order; then we ask by experiment where the numbers come from. Two parts can be skipped at first: checkpoints from
# elsewhere, and how fast.

# %%
#| default_exp dataloader

# %%
#| export
"""Text to training batches: documents packed best-fit into rows, without padding, resumable to the exact document."""


import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
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
AHEAD = 4      # such chunks wait, ready, while training computes

# %% [markdown]
# ## Rows without padding
#
# The model reads rows of T + 1 tokens; documents are of any length. Padding wastes computing; cutting a stream of
# documents every T + 1 tokens gives rows that begin in the middle of a sentence. *Best fit* does better: keep a
# buffer of 1,000 documents, and put into a row the longest one that still fits, again and again. When none fits,
# crop the shortest. Every row then starts with `<|bos|>` at the start of a document, and no position is empty. (A
# token still sees the documents before its own in the row; the model learns from `<|bos|>` to leave them alone.)
#
# Searching a list of 1,000 for each document would cost more than the rest of the loader. But only lengths matter, and
# Python has whole numbers of any size: let bit *n* of one number say whether a document of *n* tokens waits. Those
# that fit are its low bits, the longest of them the highest one, and a computer finds the highest bit at once.

# %%
#| export
class BestFit:
    """Documents waiting to be packed (anything with a length), found by length without a search."""

    def __init__(self):
        self.queues: dict[int, deque] = defaultdict(deque)  # by length: (arrival, document), the earliest first
        self.lengths = 0  # bit n is set if a document of length n waits
        self.arrivals = self.size = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        """The documents in the order of their arrival."""
        waiting = sorted((pair for queue in self.queues.values() for pair in queue), key=lambda pair: pair[0])
        return (document for _, document in waiting)

    def add(self, document: Any) -> None:
        length = len(document)
        self.queues[length].append((self.arrivals, document))
        self.lengths |= 1 << length
        self.arrivals += 1
        self.size += 1

    def take(self, room: int, crop: bool = True) -> Any:
        """Remove and return the longest document of at most `room` tokens, the earliest of equals.

        If none fits: the shortest, for the caller to crop, or None without `crop`. The buffer must not be empty.
        """
        fitting = self.lengths & ((2 << room) - 1)
        if not fitting and not crop:
            return None
        length = (fitting or self.lengths & -self.lengths).bit_length() - 1
        queue = self.queues[length]
        _, document = queue.popleft()
        if not queue:
            self.lengths ^= 1 << length
        self.size -= 1
        return document

# %%
buffer = BestFit()
for document in ("three", "is", "a", "crowd", "of"):
    buffer.add(document)
assert buffer.take(4) == "is"      # the longest that fits, the earliest of equals
assert buffer.take(9) == "three"
assert [buffer.take(1), buffer.take(1)] == ["a", "of"]  # now nothing fits: the shortest, to be cropped

# %% [markdown]
# Sixteen rows of documents of the embedded world, after a hundred others, packed in three ways. Each colour is a
# document; black is padding, and a white cap marks a document whose end was thrown away.

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
    for y, row in enumerate(pack(iter(lengths), 100 + ROWS)[100:]):
        x = 0
        for length, lost in row:
            ax.barh(y, length, 0.9, x, color=colours[number % 20])
            if lost:
                ax.barh(y, 8, 0.9, x + length - 8, color="white")
            x, number = x + length, number + 1
    ax.set(title=pack.__name__, xlabel="position in the row", xlim=(0, ROW), ylim=(ROWS - 0.5, -0.5), facecolor="black")
axes[0].set_ylabel("row")

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
# The loader itself: a thread reads and tokenizes some chunks ahead; the buffer is topped up before each choice;
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
        deal(self.units, rank, world_size)  # too few documents for so many processes: said now
        self.thread, self.ahead = ThreadPoolExecutor(1, "loader"), deque()
        self.data = self.files()
        self.rewind(state)

    def rewind(self, state: dict | Sequence[dict] | None = None) -> None:
        """Go to a state; None: to the beginning."""
        if state and not isinstance(state, dict) and len(state) == self.world_size:
            state = state[self.rank]
        self.origin, self.position, waiting = None, (0, 0, 0), []
        if state:
            self.check_files((state if isinstance(state, dict) else state[0]).get("data"))
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
        for job in self.ahead:
            job.cancel()
        self.chunks, self.chunk, self.ahead = self._chunks(*self.position), [], deque()
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Keep the thread busy: AHEAD chunks are read and tokenized, or will be."""
        while len(self.ahead) < AHEAD:
            self.ahead.append(self.thread.submit(next, self.chunks))

    def close(self) -> None:
        """Stop reading."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def files(self, first: int | None = None) -> dict[str, Any]:
        """How many files the split has and a digest of their names and sizes (of the `first` ones, if it is given)."""
        paths = list(dict.fromkeys(unit.path for unit in self.units))[:first]
        listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
        return {"files": len(paths), "digest": hashlib.sha256(listing.encode()).hexdigest()}

    def check_files(self, saved: dict | None) -> None:
        """NanochatError unless the files of a checkpoint are still the first ones here: more may have come."""
        if saved and saved != self.files(saved["files"]):
            raise NanochatError(f"{self.units[0].path.parent} is not the data of the checkpoint, which had {saved['files']} "
                                "files of other names or sizes: give --data-dir the data it was trained on")

    def state(self) -> dict[str, Any]:
        """Where this rank stands, as JSON: the data, what to read next, and which documents wait in the buffer."""
        epoch, place, document = self.position
        return {"data": self.data, "epoch": epoch, "place": place, "document": document, "origin": self.origin,
                "buffer": [[address(unit), [document.index for document in documents]]
                           for unit, documents in groupby(self.buffer, key=lambda document: document.unit)]}

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        on_cuda = self.device.type == "cuda"
        batch = torch.empty((self.batch_size, self.seq_len + 1), dtype=torch.long)
        for row in batch.numpy():
            self._fill(row)
        parts = [part.contiguous() for part in (batch[:, :-1], batch[:, 1:])]
        if on_cuda:  # only from pinned memory does a copy run beside the computation
            parts = [part.pin_memory() for part in parts]
        return tuple(part.to(self.device, non_blocking=on_cuda) for part in parts)

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
            self.chunk = self.ahead.popleft().result()[::-1]
            self._read_ahead()
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
# 12, batches of 2¹⁹ tokens, D₁₂ tokens in all. From there:
#
# | | rule | why |
# |---|---|---|
# | width | 64 × depth, rounded up to whole heads | deep and wide grow together |
# | tokens D | 12 × N (matrices and lm_head) | nanochat's optimum, N counted so; Chinchilla: about 20, all counted (arXiv 2203.15556) |
# | batch B | 2¹⁹ · (D / D₁₂)^0.383, to a power of two | longer runs have a larger critical batch (arXiv 2505.13738) |
# | learning rates | × √(B / 2¹⁹) | the noise of a gradient falls with √B |
# | weight decay | 0.28 · √(B / 2¹⁹) · D₁₂ / D | weights forget over the same share of the run (arXiv 2405.13698) |
# | steps | D / B | |

# %%
#| export scaling
"""The depth dial: one number fixes model, data, batch, steps and rates; and the schedules along a run."""


import math
from dataclasses import dataclass

import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens a step, at which the rates were tuned


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
        """The recipe in words."""
        config = self.config
        return {
            "model": f"depth {self.depth}, width {config.n_embd}, {config.n_head} heads of {config.head_dim}, "
                     f"context {config.sequence_len}, vocabulary {config.vocab_size:,}",
            "parameters": f"{self.parameters:,} ({self.scaling_params:,} in matrices and lm_head)",
            "tokens": f"{self.tokens:,} = {self.steps:,} steps of {self.total_batch_size:,} "
                      f"({self.tokens / self.scaling_params:.1f} per scaling parameter)",
            "FLOPs": f"{self.flops:.2e} ({self.flops_per_token:.2e} a token)",
            "rates": f"× {self.learning_rate_scale:.3f}, weight decay {self.weight_decay:.4f}",
        }


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
    if target_param_data_ratio <= 0 and ((num_iterations < 0 and target_flops < 0) or total_batch_size < 0):
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
# ## What it takes
#
# Before eight GPUs are rented one wants to know: does it fit, how long, how much? Memory of one GPU is counted from
# the shapes: weights and gradients are whole on each, the optimizer's state is dealt to all (lesson 05). Of
# activations a layer keeps about 17 numbers per token and channel for the backward pass (arXiv 2205.05198 counts
# the same for a layer in 16 bits, attention scores left out). Hours rest on an assumption, the part of the chip's peak
# that is used (MFU, model FLOPs utilization), and dollars on a price; both are flags. How good is
# the estimate? A compiled step of depth 12 with 32 rows on one H200 took 29.6 GB and reached an MFU of 0.46; the
# formula says 25.6 GB, and so a batch counts as fitting when it fills four fifths of the memory.

# %%
#| export budget
"""What a run takes: memory of each GPU, hours, dollars."""


import math
from dataclasses import dataclass

import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.gpt import GPT
from nanochat_lib.optim import parameter_groups
from nanochat_lib.scaling import Recipe, on_meta, recipe

# name in torch.cuda.get_device_name(): (dense bfloat16 FLOP/s, memory in GB), from the makers' data sheets
CHIPS = {"GB200": (2500e12, 186), "B200": (2250e12, 180), "H200": (989e12, 141), "H100 NVL": (835e12, 94),
         "H100 PCIe": (756e12, 80), "H100": (989e12, 80), "GH200": (989e12, 96), "A100": (312e12, 80),
         "L40S": (362e12, 48), "L4": (121e12, 24), "A10": (125e12, 24), "A6000": (155e12, 48),
         "RTX 5090": (209e12, 32), "RTX 4090": (165e12, 24), "RTX 3090": (71e12, 24), "MI300X": (1307e12, 192)}
LAYER_NUMBERS = 17  # kept for backward, per token, layer and channel
OUTER_NUMBERS = 5   # and per token and channel outside the layers
HEAD_ROWS = 4096    # tokens whose logits exist at a time
SAFE = 0.8          # part of a GPU's memory to plan with: peaks have been 16 % above the estimate, and CUDA takes some


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 FLOP/s of a device's chip; 0 where it is not known (any CPU)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = f" {name.replace('-', ' ')} "  # whole words: an L40 is not an L4
    chip = max((chip for chip in CHIPS if f" {chip} " in words), key=len, default="")  # "H100 PCIe" rather than "H100"
    return CHIPS[chip][0] if chip else 0.0


@dataclass
class Machine:
    """The machine that --dry-run reckons with."""

    gpus: int = 8
    chip: str = "H100"                # see CHIPS
    mfu: float = 0.45                 # part of the chip's peak that training reaches
    dollars_per_gpu_hour: float = 3.0

    def __post_init__(self):
        if self.chip not in CHIPS:
            raise NanochatError(f"--chip {self.chip} is unknown: choose {', '.join(CHIPS)}")
        if self.gpus < 1 or not 0 < self.mfu <= 1:
            raise NanochatError(f"--gpus {self.gpus} --mfu {self.mfu}: give at least one GPU, and an MFU within 0 … 1")

# %%
#| export budget
def optimizer_bytes(model: GPT, gpus: int) -> int:
    """Bytes of optimizer state on the GPU that holds most: AdamW's two moments; Muon's one, and its row variances."""
    total = 0
    for group in parameter_groups(model):
        shapes = [p.shape for p in group["params"]]
        if group["kind"] == "muon":
            rows, cols = shapes[0]
            total += 4 * math.ceil(len(shapes) / gpus) * (rows * cols + max(rows, cols))
        else:
            total += 8 * sum(shape.numel() if shape.numel() < 1024 else
                             math.ceil(shape[0] / gpus) * shape.numel() // shape[0] for shape in shapes)
    return total


def memory_of(dial: Recipe, device_batch: int, gpus: int) -> dict[str, int]:
    """Bytes on one GPU by part, with activations in bfloat16 and the embeddings stored so.

    Activations are gone when the optimizer steps, and its buffers before: the larger of the two counts in `total`.
    """
    config, model = dial.config, on_meta(dial.config)
    embeddings = sum(p.numel() for table in (model.transformer.wte, model.value_embeds) for p in table.parameters())
    weights = 2 * embeddings + 4 * (dial.parameters - embeddings)
    tokens = min(device_batch * config.sequence_len, dial.total_batch_size // gpus)
    activations = 2 * tokens * config.n_embd * (LAYER_NUMBERS * config.n_layer + OUTER_NUMBERS)
    logits = 2 * 4 * min(tokens, HEAD_ROWS) * config.padded_vocab_size
    matrices = 4 * sum(p.numel() for p in model.transformer.h.parameters())
    parts = {"weights": weights, "gradients": weights, "optimizer state": optimizer_bytes(model, gpus),
             "activations": activations + logits, "optimizer step": matrices + 6 * math.ceil(matrices / gpus / 4)}
    passing = max(parts["activations"], parts["optimizer step"])
    return {**parts, "total": 2 * weights + parts["optimizer state"] + passing}


def fitting_batch(dial: Recipe, device_batch: int, gpus: int, limit: float) -> int:
    """The largest half, quarter, … of a device batch that fits into `limit` bytes; 0 if none does."""
    while device_batch and memory_of(dial, device_batch, gpus)["total"] > limit:
        device_batch //= 2
    return device_batch

# %%
#| export budget
def describe_budget(dial: Recipe, device_batch: int, plan: Machine) -> dict[str, str]:
    """Memory, hours and dollars in words, with what was assumed."""
    peak, gigabytes = CHIPS[plan.chip]
    memory = memory_of(dial, device_batch, plan.gpus)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items() if name != "total")
    fits = fitting_batch(dial, device_batch, plan.gpus, SAFE * 1e9 * gigabytes)
    advice = ("" if fits == device_batch else
              f"; it fits with --device-batch-size {fits}" if fits else "; it does not fit")
    hours = dial.flops / (plan.gpus * peak * plan.mfu) / 3600
    return {
        "memory": f"about {memory['total'] / 1e9:.1f} of {gigabytes} GB on each of {plan.gpus} {plan.chip} with "
                  f"{device_batch} rows at a time{advice}",
        "of which": parts,
        "time": f"about {hours:.2f} h at {plan.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s (--mfu)",
        "price": f"about {hours * plan.gpus * plan.dollars_per_gpu_hour:.2f} dollars at {plan.dollars_per_gpu_hour:g} "
                 "a GPU hour (--dollars-per-gpu-hour)",
    }


def describe_dial(depth: int, gpus: int = 8, device_batch: int = 16) -> str:
    """All that follows from the depth, a line each: the recipe, and what it takes."""
    dial = recipe(depth)
    lines = {**dial.describe(), **describe_budget(dial, device_batch, Machine(gpus=gpus))}
    return "\n".join(f"{name:12} {value}" for name, value in lines.items())

# %% [markdown]
# A GPT-2 grade model at nanochat's ratio for it, 8 tokens per parameter. With a tokenizer of 32,768 tokens this is what
# `base_train --depth=24 --target-param-data-ratio=8 --device-batch-size=16 --dry-run` prints (we have not run it):

# %%
from nanochat_lib.budget import Machine, describe_budget, memory_of

gpt2_grade = recipe(24, target_param_data_ratio=8)
for name, value in {**gpt2_grade.describe(), **describe_budget(gpt2_grade, 16, Machine())}.items():
    print(f"{name:12} {value}")

# %%
figure, ax = plt.subplots(figsize=(8, 2.4), layout="constrained")
chosen = ("weights", "gradients", "optimizer state", "activations")
for y, (gpus, rows) in enumerate(((1, 16), (8, 16), (8, 32))):
    left = 0
    for name, colour in zip(chosen, plt.get_cmap("tab10").colors):
        size = memory_of(gpt2_grade, rows, gpus)[name] / 1e9
        ax.barh(y, size, left=left, color=colour, label=name if y == 0 else None)
        left += size
_ = ax.axvline(80, color="black", linestyle=":", label="one H100")
ax.set(xlabel="GB on each GPU, depth 24", yticks=range(3))
ax.set_yticklabels(["1 GPU, 16 rows", "8 GPUs, 16 rows", "8 GPUs, 32 rows"])
_ = ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

# %% [markdown]
# The dial itself. Turn it (in a running notebook): at which depth does a run on eight GPUs take a day? Where does it
# no longer fit?

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets

from nanochat_lib.budget import describe_dial

_ = ipywidgets.interact(lambda depth, gpus, rows: print(describe_dial(depth, gpus, rows)),
                        depth=ipywidgets.IntSlider(12, 2, 48, 2), gpus=[1, 2, 4, 8, 16, 64], rows=[4, 8, 16, 32])

# %% [markdown]
# ## Schedules
#
# Rates rise for 40 steps (at most a tenth of a short run), stay, and fall in a straight line over the last 65 %.
# Muon's momentum rises from 0.85 to 0.97 over 400 steps and falls to 0.90 with the rates; its weight decay goes to zero
# on a cosine.

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
# ## Checkpoints: a run that survives being killed
#
# A run of hours is stopped sooner or later: a full disk, a lost node, an impatient hand. A checkpoint has to be
# whole or not there. Three kinds of file make one, and the order in which they are written is the whole trick:
#
# 1. `model_000600.safetensors`, the weights (no pickle: a checkpoint from a stranger cannot run code);
# 2. `optim_000600/`, the optimizer's state, written by all ranks together with `torch.distributed.checkpoint`,
#    which gives each rank of a later run its share, also when there are more ranks or fewer;
# 3. `meta_000600.json`, **last**: settings, the loader's state, the loop's, and the checksums of the other files.
#    Without it the others do not count.

# %%
#| export checkpoint
"""Checkpoints that are whole or not there: weights, optimizer state, and last the metadata that makes them count."""


import contextlib
import errno
import hashlib
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

from nanochat_lib.common import (NanochatError, Runtime, base_dir, gather, is_main_process, print0, read_json, together,
                                 write_aside, write_json)
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


def remove_checkpoint(directory: Path, step: int) -> None:
    """Delete what there is of a checkpoint, the metadata first: half-deleted, it no longer counts."""
    weights, state, metadata = files_of(directory, step)
    metadata.unlink(missing_ok=True)
    weights.unlink(missing_ok=True)
    shutil.rmtree(state, ignore_errors=True)

# %% [markdown]
# Saving is a collective act: all ranks write their slices of the optimizer state, then meet, and only then does
# rank 0 write the metadata. A rank whose disk is full must not leave the others waiting, so each part ends with a
# meeting in which every rank tells whether it failed.

# %%
#| export checkpoint
def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def writing(group: dist.ProcessGroup | None, where: Path) -> Iterator[None]:
    """A part of saving that fails on all ranks if it fails on one; what went wrong is raised as an OSError."""
    with together(group):
        try:
            yield
        except (SafetensorError, dcp.api.CheckpointException) as failure:
            full = "No space left" in str(failure) or "StorageFull" in str(failure)
            reason = str(failure).strip().split("\n")[0][:300]
            raise OSError(errno.ENOSPC if full else errno.EIO, reason, str(where)) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns that there is one process; we know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

# %%
#| export checkpoint
def state_of(model: torch.nn.Module, optimizer: Any) -> tuple[dict, dict | None]:
    """(weights by name, optimizer state by name or None), sharing the memory in which training goes on."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper renames parameters
    return model.state_dict(), optimizer.checkpoint_state() if optimizer is not None else None


def write_checkpoint(directory: Path, step: int, weights: dict, state: dict | None, meta: dict[str, Any], rank: int = 0,
                     group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint from tensors; all ranks call it. If it fails on one, OSError on all, and nothing is left."""
    file, folder, metadata = files_of(directory, step)
    try:
        with writing(group, file):
            if rank == 0:
                remove_checkpoint(directory, step)  # one of the same step, of an earlier run
                with write_aside(file) as aside:
                    save_file({name: value.detach().contiguous() for name, value in weights.items()}, aside)
        if state is not None:
            with writing(group, folder), _quiet():
                dcp.save(state, checkpoint_id=folder, process_group=group)
        with writing(group, metadata):
            mine = sorted(folder.glob(f"__{rank}_*"))  # each rank reads again what it wrote
            mine += [file, *folder.glob(".metadata")] if rank == 0 else []
            sums = {f"{path.relative_to(directory)}": checksum(path) for path in mine}
        sums = {name: value for part in gather(sums, group) for name, value in part.items()}
        with writing(group, metadata):
            if rank == 0:
                write_json(metadata, {"step": step, **meta, "checksums": sums})
    except OSError:
        if rank == 0:
            remove_checkpoint(directory, step)  # makes room on a full disk
        raise


def save_checkpoint(directory: Path, step: int, model: torch.nn.Module, optimizer: Any, meta: dict[str, Any],
                    runtime: Runtime) -> None:
    """Write checkpoint `step`; all ranks call it. Killed at any moment, it leaves the earlier checkpoints as they were.

    `meta` is JSON-able: at least {"tokenizer": fingerprint}; model_config and step are added. `optimizer` may be None.
    """
    model = getattr(model, "_orig_mod", model)
    write_checkpoint(Path(directory), step, *state_of(model, optimizer),
                     {"model_config": asdict(model.config), **meta}, runtime.rank)

# %% [markdown]
# What a killed run left half-written is swept away when the next one starts. A run started anew under the same name
# never mixes with the old one, and never deletes it: the old one is set aside.

# %%
#| export checkpoint
def clean_unfinished(directory: Path) -> None:
    """Remove what a killed save left in a folder: temporary files, and weights and states without metadata."""
    done = set(steps_in(directory))
    for path in [*Path(directory).glob("model_*.safetensors"), *Path(directory).glob("optim_*"),
                 *Path(directory).glob(".*.part"), *Path(directory).glob(".tmp*")]:  # the last are safetensors' own
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
    with together():
        if not Path(directory).exists():
            raise NanochatError(f"{directory}, made by the main process, is not seen by process {runtime.rank}: "
                                "set NANOCHAT_BASE_DIR to a folder on a disk that all nodes share")

# %% [markdown]
# Reading has to answer which model is meant. With no tag it is the newest of the deepest ones, and we say which:
# depth is read from the metadata, not from the folder's name. And it has to notice a file that a disk, a copy or a
# hand has changed: a flipped bit in a weight gives no error, only a worse model.

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


def damaged(path: Path, reason: Any, directory: Path, step: int) -> NanochatError:
    """The error for a checkpoint that cannot be used: which file, and how to go on without it."""
    earlier = [other for other in steps_in(directory) if other < step]
    then = f"and the same command again, to go on from step {earlier[-1]}" if earlier else "and train anew"
    reason = str(reason).strip().split("\n")[0][:200]
    return NanochatError(f"{path} is damaged ({reason}): run rm {files_of(directory, step)[2]} {then}")


def verify(directory: Path, step: int, kind: str, rank: int = 0, world_size: int = 1) -> None:
    """NanochatError unless the files of a `kind`, "model" or "optim", are those that were written (a rank's share)."""
    sums = read_meta(directory, step).get("checksums", {})
    for name, expected in [pair for pair in sorted(sums.items()) if pair[0].startswith(kind)][rank::world_size]:
        path = Path(directory) / name
        if not path.exists():
            raise damaged(path, "it is missing", directory, step)
        if checksum(path) != expected:
            raise damaged(path, "it is not what was written: the checksum differs", directory, step)

# %%
#| export checkpoint
def load_weights(model: GPT, directory: Path, step: int) -> None:
    """Put a checkpoint's weights into a model of the same configuration. A damaged file is a NanochatError."""
    file, _, _ = files_of(directory, step)
    if not file.exists() and file.with_suffix(".pt").exists():
        raise NanochatError(f"{file.with_suffix('.pt')} is a checkpoint of nanochat: run "
                            f"python -m nanochat_lib.scripts.import_checkpoint {directory}")
    verify(directory, step, "model")
    try:
        model.load_state_dict(load_file(file), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise damaged(file, error, directory, step) from None


def load_optimizer(directory: Path, step: int, optimizer: Any) -> None:
    """Put a checkpoint's optimizer state into an optimizer, on any number of ranks; all ranks call it."""
    path = files_of(directory, step)[1]
    if not path.exists():
        raise NanochatError(f"no optimizer state in {path}: start without it (chat_sft --load-optimizer=0), "
                            "or train anew")
    with together():  # each rank checks some of the files, all hear of it
        verify(directory, step, "optim", *((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ()))
    state = optimizer.checkpoint_state()
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=path)
    except (OSError, dcp.api.CheckpointException, RuntimeError, ValueError, EOFError) as error:
        raise damaged(path, f"or of another model: {error}", directory, step) from None
    optimizer.load_checkpoint_state(state)


def check_tokenizer(meta: dict[str, Any], tokenizer: Tokenizer, where: Path) -> None:
    """NanochatError unless the checkpoint was trained with this very tokenizer."""
    expected = meta.get("tokenizer")
    if expected and expected != tokenizer.fingerprint:
        raise NanochatError(f"the model in {where} was trained with tokenizer {expected}, but that in "
                            f"{base_dir() / 'tokenizer'} is {tokenizer.fingerprint}: put the old one back, or run "
                            "python -m nanochat_lib.scripts.base_train with the new one")

# %%
#| export checkpoint
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
# A checkpoint half-written is no checkpoint. Here the process is "killed" just before the metadata; and then a
# single bit of the weights is flipped:

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

weights = bytearray((folder / "model_000010.safetensors").read_bytes())
weights[-1000] ^= 1
(folder / "model_000010.safetensors").write_bytes(weights)
try:
    checkpoint.load_weights(model, folder, 10)
except NanochatError as error:
    print(str(error).replace(scratch, "…"))

# %% [markdown]
# ## Saving while training goes on
#
# Writing takes long: model and optimizer of depth 24 are 12 GB. But the weights need only stay still while they are
# copied, and they change only when the optimizer steps. So a thread copies them into other memory
# while the next forward and backward pass compute with them, and then writes the copy while training goes on:
#
# | training | forward and backward | **wait** | optimizer | forward and backward | optimizer | … |
# |---|---|---|---|---|---|---|
# | thread | copy | | write weights | write state | checksums | metadata |
#
# Training waits only if the copy takes longer than the gradients. If the disk is full, the run goes on and says so;
# the older checkpoints stay. On several ranks the threads have a process group of their own, so that their meetings
# do not get between those of training.

# %%
#| export saver
"""Saving in the background: the state is copied while gradients are computed, and written while training goes on."""


import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat_lib.checkpoint import remove_checkpoint, state_of, steps_in, write_checkpoint
from nanochat_lib.common import Runtime, print0

# %%
#| export saver
class HostCopy:
    """A copy of tensors in host memory that is made in the background; its memory is kept for the next copy."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.buffers: dict[str, torch.Tensor] = {}
        self.stream = self.event = None
        self.mesh = None
        if group is not None:
            from torch.distributed.device_mesh import DeviceMesh
            self.mesh = DeviceMesh.from_group(group, "cpu")

    def start(self, tensors: dict[str, torch.Tensor]) -> None:
        """Look at the tensors, and on CUDA start to copy them, on a stream of its own."""
        self.tensors = tensors
        self.sources = {name: value.to_local() if hasattr(value, "to_local") else value.detach()
                        for name, value in tensors.items()}
        on_cuda = any(value.is_cuda for value in self.sources.values())
        if self.buffers.keys() != self.sources.keys():
            self.buffers = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=on_cuda)
                            for name, value in self.sources.items()}
        if on_cuda:
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._copy()
            self.event = self.stream.record_event()

    def _copy(self) -> None:
        for name, value in self.sources.items():
            self.buffers[name].copy_(value, non_blocking=True)

    def finish(self) -> dict[str, torch.Tensor]:
        """In the thread: the copies, when they are made; of a DTensor a DTensor in host memory."""
        if self.event:
            self.event.synchronize()
        else:
            self._copy()
        return {name: self._like(self.buffers[name], value) for name, value in self.tensors.items()}

    def _like(self, local: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not hasattr(value, "to_local"):
            return local
        from torch.distributed.tensor import DTensor
        return DTensor.from_local(local, self.mesh, value.placements, run_check=False, shape=value.shape,
                                  stride=value.stride())

# %%
#| export saver
class Saver:
    """Saves one model and optimizer in the background, the last `keep` checkpoints of them (−1: all).

    All ranks make one, and call `save` at the same steps. Use it as a context: on leaving, the last save is waited for.
    `stopped` and `saving` count the seconds that training waited, and that saving took.
    """

    def __init__(self, directory: Path, model: torch.nn.Module, optimizer: Any, runtime: Runtime, keep: int = -1):
        self.directory, self.model, self.optimizer = Path(directory), model, optimizer
        self.runtime, self.keep = runtime, keep
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.weights, self.state = HostCopy(), HostCopy(self.group)
        self.thread = ThreadPoolExecutor(1, "saver")
        self.copied, self.job, self.failure = Future(), None, None
        self.stopped = self.saving = 0.0

    def save(self, step: int, meta: dict[str, Any]) -> None:
        """Start to save the state of this moment. An earlier save is waited for."""
        with self.stopping():
            self.wait()
            weights, state = state_of(self.model, self.optimizer)
            if self.runtime.is_main:
                self.weights.start(weights)
            self.state.start(state)
            meta = {"model_config": asdict(self.model.config), **meta}
            self.copied = Future()
            self.job = self.thread.submit(self._save, step, meta, self.copied)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Counts what is done inside as time in which training stopped."""
        started = time.perf_counter()
        yield
        self.stopped += time.perf_counter() - started

    def _save(self, step: int, meta: dict[str, Any], copied: Future) -> float:
        """In the thread: copy, write, delete the oldest; returns the seconds it took."""
        started = time.perf_counter()
        try:
            weights, state = self.weights.finish() if self.runtime.is_main else {}, self.state.finish()
        finally:
            copied.set_result(None)
        write_checkpoint(self.directory, step, weights, state, meta, self.runtime.rank, self.group)
        if self.runtime.is_main and self.keep > 0:
            for old in steps_in(self.directory)[:-self.keep]:
                remove_checkpoint(self.directory, old)
        return time.perf_counter() - started

    def before_step(self) -> None:
        """Call it before weights change: waits until they are copied, and reports a save that has failed."""
        if self.job is None:
            return
        if self.state.event:  # on CUDA the device waits, not we
            for copy in (self.weights, self.state):
                if copy.event:
                    torch.cuda.current_stream().wait_event(copy.event)
        else:
            with self.stopping():
                self.copied.result()
        if self.job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. One that failed is reported; the checkpoints before it are as they were."""
        if self.job is None:
            return
        try:
            self.saving += self.job.result()
            self.failure = None
        except OSError as error:
            self.failure = error
            steps = steps_in(self.directory)
            print0(f"a checkpoint could not be saved ({error}): training goes on; make room in {self.directory}, "
                   f"where the last good one is {f'step {steps[-1]}' if steps else 'none'}")
        self.job = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.wait()
        self.thread.shutdown()
        if self.failure and kind is None:
            raise self.failure

# %% [markdown]
# The same model, saved with training going on. The weights are changed as soon as `before_step` allows it, and yet
# what was saved is the old state:

# %%
from nanochat_lib.saver import Saver

before = {name: value.clone() for name, value in model.state_dict().items()}
with Saver(folder, model, optimizer, alone, keep=2) as saver:
    for step in (30, 40, 50):
        saver.save(step, {"tokenizer": tokenizer.fingerprint})
        saver.before_step()
        with torch.no_grad():
            model.lm_head.weight += 1
print("steps kept:", checkpoint.steps_in(folder))
checkpoint.load_weights(model, folder, 50)
print("lm_head, against the first save:", (model.lm_head.weight - before["lm_head.weight"]).mean().round().item())
assert checkpoint.steps_in(folder) == [40, 50]

# %% [markdown]
# ## Checkpoints from elsewhere
#
# A model trained with nanochat is the same model in other files: `model_000600.pt`, a pickle of tensors;
# `optim_000600_rank0.pt` … of each rank; `meta_000600.json`; and a tokenizer in a pickle of its own. A pickle is a
# program, and runs when it is read. So nothing reads one in passing: there is a command for it, which lets PyTorch
# read tensors only (`weights_only`) and the tokenizer through a reader that knows one class (lesson 02), checks every
# name and shape, and writes our files.

# %%
#| export nanochat_files
"""nanochat's own checkpoint files, read without running what is in them: weights, all ranks' optimizer state, metadata."""


import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from nanochat_lib.common import NanochatError, read_json
from nanochat_lib.gpt import GPTConfig
from nanochat_lib.optim import parameter_groups
from nanochat_lib.scaling import on_meta


def nanochat_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder of nanochat's, ascending. NanochatError if there is none."""
    found = (re.fullmatch(r"model_(\d{6,})\.pt", path.name) for path in Path(directory).glob("model_*.pt"))
    steps = sorted(int(match[1]) for match in found if match)
    if not steps:
        raise NanochatError(f"no checkpoint of nanochat in {directory}: give the folder that holds model_NNNNNN.pt")
    return steps


def read_tensors(path: Path) -> Any:
    """What torch.save wrote, if it is tensors and plain data; anything else in it is refused, and not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        reason = str(error).strip().split("\n")[0][:200]
        raise NanochatError(f"{path} holds no readable tensors ({reason}): copy it from its source again") from None


def read_config(meta: dict, path: Path) -> GPTConfig:
    """The model's configuration in nanochat's metadata; its first models had full windows everywhere."""
    config, known = meta.get("model_config"), {field.name for field in fields(GPTConfig)}
    if not isinstance(config, dict) or set(config) - known:
        raise NanochatError(f"{path} describes no model of this kind (model_config is {config}): "
                            "import one of mid-2026")
    return GPTConfig(**{"window_pattern": "L", **config})

# %%
#| export nanochat_files
def read_weights(directory: Path, step: int, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Weights by name, every name and shape as the model has it."""
    path = Path(directory) / f"model_{step:06d}.pt"
    weights = read_tensors(path)
    if not isinstance(weights, dict):
        raise NanochatError(f"{path} holds a {type(weights).__name__}, not weights by name: give another --step")
    weights = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    expected = {name: tuple(value.shape) for name, value in on_meta(config).state_dict().items()}
    got = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    if got != expected:
        names = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
        raise NanochatError(f"{path} is of another kind of model: {names[0]} is {got.get(names[0], 'missing')}, "
                            f"not {expected.get(names[0], 'there')} ({len(names)} such); import a model of mid-2026")
    return weights

# %% [markdown]
# The optimizer's state is in slices, one file a rank: rows of the large tables, whole matrices of the Muon stacks. Put
# behind one another they are what one process would hold.

# %%
#| export nanochat_files
def read_optimizer(directory: Path, step: int, config: GPTConfig) -> dict[str, torch.Tensor] | None:
    """The optimizer's state under our names, from the files of all ranks; None if there are none.

    NanochatError if it does not fit: the weights can be used without.
    """
    paths = sorted(Path(directory).glob(f"optim_{step:06d}_rank*.pt"), key=lambda path: int(path.stem.split("rank")[1]))
    if not paths:
        return None
    ranks = [read_tensors(path) for path in paths]
    flat: dict[str, torch.Tensor] = {}
    try:
        groups = ranks[0]["param_groups"]
        ours = parameter_groups(on_meta(config))
        if [group["kind"] for group in groups] != [group["kind"] for group in ours]:
            raise ValueError("its groups are others")
        for group, theirs in zip(ours, groups):
            states = [[rank["state"][index] for rank in ranks] for index in theirs["params"]
                      if index in ranks[0]["state"]]
            read = read_stack if group["kind"] == "muon" else read_tables
            flat.update(read(group, states, step))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise NanochatError(f"{paths[0]} does not fit the model ({error})") from None
    return flat


def fitted(value: torch.Tensor, shape: torch.Size | tuple, name: str) -> torch.Tensor:
    """The tensor in float32, if it has this shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(shape)}")
    return value.float()


def read_tables(group: dict, states: list[list[dict]], step: int) -> dict[str, torch.Tensor]:
    """AdamW: each tensor's moments, small ones whole on every rank, large ones in rows."""
    flat = {f"{group['name']}.step": torch.tensor(int(states[0][0]["step"]))}
    for number, (param, ranks) in enumerate(zip(group["params"], states, strict=True)):
        for ours, theirs in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            parts = [rank[theirs] for rank in ranks]
            value = parts[0] if parts[0].shape == param.shape else torch.cat(parts)
            flat[f"{group['name']}.{number}.{ours}"] = fitted(value, param.shape, f"{group['name']}.{theirs}")
    return flat

# %%
#| export nanochat_files
def read_stack(group: dict, states: list[list[dict]], step: int) -> dict[str, torch.Tensor]:
    """Muon: the stack's momentum and variance, padded with matrices to a multiple of the ranks."""
    count, (rows, cols) = len(group["params"]), group["params"][0].shape
    second = (count, rows, 1) if rows >= cols else (count, 1, cols)
    flat = {f"{group['name']}.step": torch.tensor(step)}
    for ours, theirs, shape in (("first", "momentum_buffer", (count, rows, cols)),
                                ("second", "second_momentum_buffer", second)):
        value = torch.cat([rank[theirs] for rank in states[0]])[:count]
        flat[f"{group['name']}.0.{ours}"] = fitted(value, shape, f"{group['name']}.{theirs}")
    return flat


def read_checkpoint(directory: Path, step: int) -> tuple[dict, dict | None, dict[str, Any], str]:
    """A nanochat checkpoint: (weights, optimizer state or None, our metadata, why there is no optimizer state or "")."""
    path = Path(directory) / f"meta_{step:06d}.json"
    theirs = read_json(path)
    config = read_config(theirs, path)
    weights, state, why = read_weights(directory, step, config), None, "there is none"
    try:
        state = read_optimizer(directory, step, config)
    except NanochatError as error:
        why = str(error)
    settings = {"device_batch_size": 32, "embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02,
                **theirs.get("user_config", {})}
    meta = {"model_config": asdict(config), "settings": settings, "imported": theirs,
            "total_batch_size": theirs.get("total_batch_size") or settings.get("total_batch_size") or 2**19}
    return weights, state, meta, "" if state else why

# %%
#| export scripts/import_checkpoint
#| cli import_checkpoint
"""Import: a checkpoint of nanochat and its tokenizer become ours. The source is only read."""


from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat_lib.checkpoint import STAGES, checkpoint_directory, files_of, write_checkpoint
from nanochat_lib.common import NanochatError, base_dir, print0, run_cli
from nanochat_lib.nanochat_files import nanochat_steps, read_checkpoint
from nanochat_lib.tokenizer import Tokenizer


@dataclass
class ImportCheckpoint:
    """What to import."""

    source: tyro.conf.Positional[str]  # folder with model_NNNNNN.pt, such as ~/.cache/nanochat/base_checkpoints/d20
    stage: str = ""       # base, sft or rl; empty: as the folder above says, else base
    step: int = -1        # −1: the last
    model_tag: str = ""   # empty: the source's name, with _nanochat behind it if that is the source itself
    tokenizer: str = ""   # folder with tokenizer.pkl; empty: tokenizer/ beside the folder of checkpoints


def import_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder of nanochat's, written to our place unless it is there. Another there is an error."""
    tokenizer, place = Tokenizer.from_directory(folder), base_dir() / "tokenizer"
    if (place / "tokenizer.json").exists():
        ours = Tokenizer.from_directory(place)
        if ours.fingerprint != tokenizer.fingerprint:
            raise NanochatError(f"the tokenizer in {place} is {ours.fingerprint}, that in {folder} "
                                f"{tokenizer.fingerprint}: set NANOCHAT_BASE_DIR to a folder of its own")
        return tokenizer
    tokenizer.save(place)
    return tokenizer

# %%
#| export scripts/import_checkpoint
def import_checkpoint(settings: ImportCheckpoint) -> None:
    """Turn a checkpoint of nanochat (.pt files, tokenizer.pkl) into one that every command here loads."""
    source = Path(settings.source).expanduser().resolve()
    steps = nanochat_steps(source)
    step = steps[-1] if settings.step < 0 else settings.step
    if step not in steps:
        raise NanochatError(f"no checkpoint of step {step} in {source}: there are {', '.join(map(str, steps))}")
    above = [stage for stage, name in STAGES.items() if name == source.parent.name]
    stage = settings.stage or (above[0] if above else "base")
    directory = checkpoint_directory(stage, settings.model_tag or source.name).resolve()
    if directory == source:  # never write among the files we read
        directory = directory.with_name(f"{directory.name}_nanochat")
    if files_of(directory, step)[2].exists():
        raise NanochatError(f"{directory} has a checkpoint of step {step}: give another --model-tag")
    tokenizer = import_tokenizer(Path(settings.tokenizer or source.parents[1] / "tokenizer").expanduser())
    weights, state, meta, why = read_checkpoint(source, step)
    if meta["model_config"]["vocab_size"] != tokenizer.get_vocab_size():
        raise NanochatError(f"the model has {meta['model_config']['vocab_size']} tokens, the tokenizer "
                            f"{tokenizer.get_vocab_size()}: give the model's own with --tokenizer")
    if why:
        print0(f"without the optimizer's state: {why}")
    write_checkpoint(directory, step, weights, state, {**meta, "tokenizer": tokenizer.fingerprint})
    print0(f"imported {source}, step {step}, to {directory}")

# %% [markdown]
# ## What every training loop shares
#
# Chat training (lesson 09) and reinforcement learning (lesson 10) step like pretraining does: sum the gradients of
# a few micro-batches (*gradient accumulation*), set this step's rates, let the optimizer step. Four things can go wrong,
# and each has its place here: a batch that does not divide, float16 that underflows, a compiler that is missing, a loss
# that is NaN or infinite.

# %%
#| export training
"""What all training loops share: micro-batches, rates, float16 scaling, compiling, and a loss that is NaN."""


import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from nanochat_lib.common import NanochatError, all_reduce_sum, compute_dtype, print0, write_aside


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
                if self.scale < 2**-10:  # not too large for float16: no numbers at all
                    raise NanochatError("the gradients are not finite at any scale of the loss: stopped; go on from the "
                                        "last checkpoint (--resume) with lower rates, or NANOCHAT_DTYPE=float32")
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
    if not math.isfinite(loss):
        raise NanochatError(f"the loss is {loss} at step {step}: stopped ({last_good(directory)}); "
                            f"norms of the gradients: {gradient_norms(optimizer)}")


def gradient_norms(optimizer: Any) -> str:
    """The norm of each group's gradients (on this process), in words."""
    norms = {group.get("name", index): sum(p.grad.float().square().sum().item() for p in group["params"]
                                           if p.grad is not None) ** 0.5
             for index, group in enumerate(optimizer.param_groups)}
    return ", ".join(f"{name} {norm:.2g}" for name, norm in norms.items())


class LossWatch:
    """Stops a run whose loss has exploded: for `patience` steps 3 nats above its best, or 1 above ignorance."""

    def __init__(self, vocab_size: int, state: dict | None = None, patience: int = 20):
        self.ignorance, self.patience = math.log(vocab_size), patience  # all tokens alike: ln(vocab) nats
        self.best, self.recent, self.bad = (state["best"], state["recent"], state["bad"]) if state else (None, None, 0)

    def state(self) -> dict[str, float | None]:
        return {"best": self.best, "recent": self.recent, "bad": self.bad}

    def check(self, loss: float, step: int, optimizer: Any, directory: Path) -> None:
        """Take note of a step's loss; NanochatError if it is no number, or if the run has gone bad."""
        check_loss(loss, step, optimizer, directory)
        limit = 1 + (self.ignorance if self.best is None else min(self.ignorance, self.best + 2))
        self.bad = self.bad + 1 if loss > limit else 0
        if self.bad == self.patience:
            best = "" if self.best is None else f", after a best of {self.best:.2f}"
            raise NanochatError(f"the loss has exploded: above {limit:.2f} for {self.patience} steps{best}, {loss:.2f} "
                                f"at step {step}: stopped ({last_good(directory, step - self.patience + 1)}); "
                                f"norms of the gradients: {gradient_norms(optimizer)}")
        self.recent = loss if self.recent is None else 0.9 * self.recent + 0.1 * loss
        self.best = self.recent if self.best is None else min(self.best, self.recent)


def check_weights(model: torch.nn.Module, step: int, directory: Path) -> None:
    """Refuse to save weights that hold no numbers."""
    parameters = dict(model.named_parameters())
    if not torch.stack([norm.float() for norm in torch._foreach_norm(list(parameters.values()))]).isfinite().all():
        bad = next((name for name, value in parameters.items() if not value.isfinite().all()), "a weight")
        raise NanochatError(f"{bad} is not finite at step {step}: stopped ({last_good(directory)})")

# %%
#| export training
def last_good(directory: Path, before: float = math.inf) -> str:
    """Which checkpoint to go back to, in words: the last one, or the last of a step up to `before`."""
    steps = sorted(int(path.stem[5:]) for path in Path(directory).glob("meta_*.json"))
    steps = [step for step in steps if step <= before]
    return (f"last good checkpoint: step {steps[-1]} in {directory}; go on with --resume-from-step={steps[-1]} "
            "and lower rates" if steps else "there is no checkpoint yet: start again with lower rates")


def choose_dtype(device: torch.device, width: int) -> torch.dtype:
    """The dtype of a run's activations: $NANOCHAT_DTYPE, or, on a CPU that multiplies bfloat16, that for a wide model.

    Sets $NANOCHAT_DTYPE to it, so that all code of this process agrees. Narrow models gain next to nothing.
    """
    able = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    if device.type == "cpu" and "NANOCHAT_DTYPE" not in os.environ and width >= 256 and any(able):
        os.environ["NANOCHAT_DTYPE"] = "bfloat16"
        print0("computing in bfloat16, which this CPU multiplies faster (NANOCHAT_DTYPE=float32: do not)")
    return compute_dtype(device)


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

# %%
#| export training
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
# Settings first. The flags and their defaults are nanochat's; `--dry-run` prints the recipe with what it costs, and
# stops.

# %%
#| export pretraining
"""A pretraining run at some step: model, optimizer, loader and the loop's state, all of which a checkpoint keeps."""


import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from nanochat_lib.budget import Machine, peak_flops
from nanochat_lib.checkpoint import (check_tokenizer, checkpoint_directory, load_optimizer, load_weights,
                                     prepare_directory, read_meta, steps_in, write_result)
from nanochat_lib.common import (MetricsLog, NanochatError, Runtime, check_least, check_run_name, compute_dtype, gather,
                                 peak_memory_bytes, print0, progress)
from nanochat_lib.dataloader import PackedLoader
from nanochat_lib.fp8 import convert_to_fp8, lacks_fp8
from nanochat_lib.gpt import build_model
from nanochat_lib.saver import Saver
from nanochat_lib.scaling import Recipe, learning_rate_multiplier, muon_momentum, recipe, warmup_of, weight_decay_at
from nanochat_lib.tokenizer import Tokenizer
from nanochat_lib.training import (LossScaler, LossWatch, accumulate, check_weights, choose_dtype, compiled, divide_batch,
                                   set_rates, trim_metrics)

EVAL_TOKENS = 41943040     # 80 × 524,288
CPU_MICRO_TOKENS = 8192    # more at a time only costs memory there
Flag = tyro.conf.FlagCreatePairsOff

# %%
#| export pretraining
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
    keep_last: int = -1                # checkpoints to keep, the oldest are deleted; −1: all
    model_tag: str = ""                # name of the model; empty: d{depth}
    dry_run: Annotated[bool, Flag] = False     # print the recipe and what it costs, and stop
    plan: Annotated[Machine, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Machine)  # for --dry-run

# %%
#| export pretraining
def recipe_of(settings: BaseTrain, vocab_size: int) -> Recipe:
    """The recipe that these settings mean; each field of `recipe` is a flag of the same name."""
    names = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "target_param_data_ratio",
             "num_iterations", "target_flops", "total_batch_size", "weight_decay")
    return recipe(vocab_size=vocab_size, **{name: getattr(settings, name) for name in names})


def check_settings(settings: BaseTrain, device: torch.device | None = None) -> None:
    """What cannot work (on this device) is said before any work is done."""
    if settings.fp8_recipe != "tensorwise":
        raise NanochatError(f"--fp8-recipe {settings.fp8_recipe} is unknown: choose tensorwise")
    if device:
        compute_dtype(device)  # an unknown $NANOCHAT_DTYPE
    if settings.fp8 and device and (lacks := lacks_fp8(device)):
        raise NanochatError(f"--fp8 cannot run: {lacks}; leave it away")
    check_run_name(settings.run)
    if settings.compile and settings.no_compile:
        raise NanochatError("--compile and --no-compile exclude each other: give one, or none to let the length of the "
                            "run decide")
    check_least(settings, device_batch_size=1, max_seq_len=1, warmup_steps=0, eval_tokens=1)
    for name in ("num_iterations", "total_batch_size", "save_every", "keep_last"):
        if getattr(settings, name) != -1 and getattr(settings, name) < 1:
            raise NanochatError(f"--{name.replace('_', '-')} {getattr(settings, name)}: give at least 1, or -1 for the "
                                "default")
    for name in ("warmdown_ratio", "final_lr_frac"):
        if not 0 <= getattr(settings, name) <= 1:
            raise NanochatError(f"--{name.replace('_', '-')} {getattr(settings, name)} is not a part: give 0 … 1")

# %% [markdown]
# A run is its model, optimizer and loader, and a little state of the loop. All of it goes into a checkpoint, so all
# of it comes back.

# %%
#| export pretraining
class Run:
    """A pretraining run at some step: what the loop calls, in this order. A context: leaving it ends saving."""

    def __init__(self, settings: BaseTrain, runtime: Runtime, tokenizer: Tokenizer, dial: Recipe):
        self.settings, self.runtime, self.tokenizer, self.dial = settings, runtime, tokenizer, dial
        self.directory = checkpoint_directory("base", settings.model_tag or f"d{settings.depth}")
        device_batch, seq_len = settings.device_batch_size, dial.config.sequence_len
        if runtime.device.type == "cpu":
            device_batch = min(device_batch, max(CPU_MICRO_TOKENS // seq_len, 1))
        self.rows, self.micro_batches = divide_batch(dial.total_batch_size, device_batch, seq_len, runtime.world_size)
        self.step, self.seconds, self.bpb_curve, self.eval_batches = 0, 0.0, [], 0
        meta = self.find_resume()
        self.loader, self.validation = self.make_loader("train", meta.get("loader")), self.make_loader("val")
        self.build(meta)
        prepare_directory(self.directory, runtime, self.step if meta else -1)
        if runtime.is_main:
            trim_metrics(self.directory / "metrics.jsonl", self.step)
        self.metrics = MetricsLog(self.directory / "metrics.jsonl", settings.run, dataclasses.asdict(settings))
        self.saver = Saver(self.directory, self.orig_model, self.optimizer, runtime, settings.keep_last)

    def find_resume(self) -> dict:
        """The metadata of the checkpoint to go on from, its loop state taken over; {} for a run from the start."""
        step, steps = self.settings.resume_from_step, steps_in(self.directory)
        if any(others != steps for others in gather(steps)):
            raise NanochatError(f"the processes see different checkpoints in {self.directory}: set NANOCHAT_BASE_DIR to "
                                "a folder on a disk that all nodes share")
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
        if "loop" not in meta:
            raise NanochatError(f"step {self.step} in {self.directory} was imported, without the state of its loader: "
                                "go on with python -m nanochat_lib.scripts.chat_sft, or give another --model-tag")
        if self.step > self.dial.steps:
            raise NanochatError(f"step {self.step} in {self.directory} is past the end of this run of "
                                f"{self.dial.steps} steps: make it longer (--num-iterations), go on from an earlier step "
                                "(--resume-from-step), or give another --model-tag")
        for name, old in meta["settings"].items():
            now = getattr(self.settings, name, old)
            if now != old and not name.startswith("resume"):
                print0(f"--{name.replace('_', '-')}: {old} in the checkpoint, {now} from now on")
        loop = meta["loop"]
        self.seconds, self.bpb_curve, self.eval_batches = loop["seconds"], loop["bpb_curve"], loop["eval_batches"]
        print0(f"going on from step {self.step} in {self.directory}")
        return meta

    def make_loader(self, split: str, state: list | None = None) -> PackedLoader:
        return PackedLoader(self.tokenizer, self.rows, self.dial.config.sequence_len, split, self.settings.data_dir,
                            self.runtime.rank, self.runtime.world_size, self.runtime.device, state)

    def build(self, meta: dict) -> None:
        """Model and optimizer, fresh or (if `meta` is not empty) of the checkpoint it belongs to."""
        settings, scale, device = self.settings, self.dial.learning_rate_scale, self.runtime.device
        dtype = choose_dtype(device, self.dial.config.n_embd)
        self.orig_model = self.model = build_model(self.dial.config, device)
        if settings.fp8:
            print0(f"FP8: {len(convert_to_fp8(self.orig_model))} matrices, evaluations in {dtype}")
        self.optimizer = self.orig_model.setup_optimizer(
            unembedding_lr=settings.unembedding_lr * scale, embedding_lr=settings.embedding_lr * scale,
            matrix_lr=settings.matrix_lr * scale, scalar_lr=settings.scalar_lr * scale,
            weight_decay=self.dial.weight_decay)
        self.scaler = LossScaler(dtype, meta.get("scaler"))
        self.watch = LossWatch(self.tokenizer.get_vocab_size(), meta.get("loop", {}).get("watch"))
        if meta:
            load_weights(self.orig_model, self.directory, self.step)
            load_optimizer(self.directory, self.step, self.optimizer)
        self.may_compile = True

    def compile(self) -> None:
        """Compile the model, or not. The whole run's length decides, so a resumed run decides alike."""
        self.may_compile = False
        wanted = True if self.settings.compile else False if self.settings.no_compile else None
        inputs = torch.zeros(self.rows, self.dial.config.sequence_len, dtype=torch.long, device=self.runtime.device)
        self.model = compiled(self.orig_model, (inputs, inputs), wanted, self.dial.flops / self.runtime.world_size)

    def train_step(self, bar: Any) -> None:
        """One step of the optimizer: gradients of all micro-batches, rates of this step, update."""
        if self.may_compile:  # not before the first evaluation: a minute of silence would look like a fault
            self.compile()
        settings, steps, started = self.settings, self.dial.steps, time.perf_counter()
        tokens = self.rows * self.dial.config.sequence_len * self.runtime.world_size
        loss = accumulate(self.model, self.loader, self.micro_batches, self.scaler, lambda: bar.update(tokens))
        if not math.isfinite(loss):
            self.saver.wait()  # the save under way may be the last good one
        self.watch.check(loss, self.step, self.optimizer, self.directory)
        multiplier = learning_rate_multiplier(self.step, steps, warmup_of(steps, settings.warmup_steps),
                                              settings.warmdown_ratio, settings.final_lr_frac)
        set_rates(self.optimizer, multiplier, muon_momentum(self.step, steps, settings.warmdown_ratio),
                  weight_decay_at(self.step, steps))
        self.saver.before_step()
        self.scaler.step(self.optimizer)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.log_step(loss, multiplier, time.perf_counter() - started, bar)

    def log_step(self, loss: float, multiplier: float, seconds: float, bar: Any) -> None:
        """A line of metrics, and the words beside the progress bar."""
        self.seconds += seconds
        peak = peak_flops(self.runtime.device)
        flops = self.dial.flops_per_token * self.dial.total_batch_size / seconds / self.runtime.world_size
        mfu = {"mfu": round(flops / peak, 4)} if peak else {}  # left out where the chip's peak is not known
        self.metrics.log(step=self.step - 1, loss=loss,
                         lr=multiplier * self.settings.matrix_lr * self.dial.learning_rate_scale,
                         tok_per_sec=round(self.dial.total_batch_size / seconds), epoch=self.loader.position[0],
                         eta_seconds=round((self.dial.steps - self.step) * self.seconds / self.step), **mfu)
        bar.set_postfix_str(f"step {self.step}/{self.dial.steps}, loss {loss:.3f}"
                            + (f", MFU {mfu['mfu']:.0%}" if mfu else ""), refresh=False)

    def save(self) -> None:
        """Start to save this step, if that is due; training goes on meanwhile."""
        last, every = self.step == self.dial.steps, self.settings.save_every
        if not last and (every < 1 or self.step == 0 or self.step % every):
            return
        if self.step in steps_in(self.directory):
            return  # resumed here
        with self.saver.stopping():
            check_weights(self.orig_model, self.step, self.directory)
            loop = {"seconds": self.seconds, "bpb_curve": self.bpb_curve, "eval_batches": self.eval_batches,
                    "watch": self.watch.state()}
            meta = {"tokenizer": self.tokenizer.fingerprint, "settings": dataclasses.asdict(self.settings),
                    "total_batch_size": self.dial.total_batch_size, "device_batch_size": self.rows, "loop": loop,
                    "scaler": self.scaler.state(), "loader": gather(self.loader.state())}
        self.saver.save(self.step, meta)

    def progress(self) -> Any:
        """A bar over the tokens of the run, with speed and time left."""
        bar = progress(total=self.dial.tokens, desc="base_train", initial=self.step * self.dial.total_batch_size)
        bar.unit, bar.unit_scale = " tokens", True
        return bar

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        for loader in (self.loader, self.validation):
            loader.close()
        self.metrics.close()
        self.saver.__exit__(*error)

    def report(self) -> None:
        """What the run measured, for the report."""
        curve, saver = self.bpb_curve, self.saver
        if saver.saving:
            print0(f"checkpoints: {saver.saving:.1f} s of saving, for which training stopped "
                   f"{saver.stopped:.2f} s ({saver.stopped / saver.saving:.1%})")
        write_result("base", bpb_start=curve[0][1] if curve else None, bpb=curve[-1][1] if curve else None,
                     bpb_curve=curve, tokens=self.dial.tokens, parameters=self.dial.parameters, steps=self.dial.steps,
                     depth=self.dial.depth, flops=self.dial.flops, seconds=round(self.seconds, 2),
                     tok_per_sec=round(self.dial.tokens / self.seconds) if self.seconds else None,
                     saving_seconds=round(saver.saving, 2), stopped_seconds=round(saver.stopped, 3),
                     peak_memory_gib=round(peak_memory_bytes(self.runtime.device) / 2**30, 2))

# %% [markdown]
# On its way the run is looked at: bits per byte on the validation split, always the same rows; CORE; and what it
# writes. An evaluation needs files that may be missing and a network that may be down, and no evaluation is worth a
# run: one that fails is reported, and training goes on.

# %%
#| export checkup
"""How a run is doing while it trains: bits per byte, CORE, samples. What cannot be evaluated does not stop it."""


import time
from collections.abc import Iterator

import torch

from nanochat_lib.common import NanochatError, gather, is_main_process, print0, together
from nanochat_lib.evaluation import evaluate_bpb, evaluate_core, read_bundle, read_items
from nanochat_lib.gpt import GPT
from nanochat_lib.pretraining import EVAL_TOKENS, Run
from nanochat_lib.tokenizer import Tokenizer


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


def show_samples(model: GPT, tokenizer: Tokenizer, eval_bundle: str) -> list[str]:
    """Draw samples on the main process and print them; the others have none. All processes call it."""
    with together():
        samples = draw_samples(model, tokenizer, sample_prompts(eval_bundle)) if is_main_process() else []
    for text in samples:
        print0("  " + " ".join(text.split()))
    return samples

# %%
#| export checkup
class Checkup:
    """The evaluations of one run."""

    def __init__(self, run: Run):
        self.run, self.token_bytes = run, run.tokenizer.token_bytes().to(run.runtime.device)

    def due(self) -> Iterator:
        """The evaluations that are due at this step."""
        run, settings = self.run, self.run.settings

        def every(steps: int) -> bool:
            return steps > 0 and (run.step == run.dial.steps or run.step % steps == 0)

        if every(settings.eval_every):
            yield self.bits_per_byte
        if run.step > 0 and every(settings.core_metric_every):
            yield self.core
        if run.step > 0 and every(settings.sample_every):
            yield self.sample

    def look(self) -> None:
        """Do what is due; what cannot be done is reported."""
        for evaluation in self.due():
            self.run.orig_model.eval()
            try:
                evaluation()
            except (NanochatError, OSError) as error:
                print0(f"step {self.run.step}: an evaluation could not run, training is not affected: {error}")
            self.run.orig_model.train()

    def bits_per_byte(self) -> None:
        run = self.run
        run.eval_batches = run.eval_batches or self.batches()
        run.validation.rewind()
        bpb = evaluate_bpb(run.model, run.validation, run.eval_batches, self.token_bytes)
        run.bpb_curve.append([run.step, bpb])
        run.metrics.log(step=run.step, bpb=bpb)
        speed = ""
        if run.step and run.seconds:
            left = (run.dial.steps - run.step) * run.seconds / run.step
            speed = f", {run.step * run.dial.total_batch_size / run.seconds:,.0f} tokens/s"
            speed += f", {left / 60:.1f} minutes left" if left else ""
        print0(f"step {run.step:5}/{run.dial.steps}: validation bits per byte {bpb:.4f}{speed}")

    def batches(self) -> int:
        """Batches of an evaluation: --eval-tokens rounded up; the default is cut to fit the run and the machine."""
        run = self.run
        tokens = run.rows * run.dial.config.sequence_len * run.runtime.world_size
        if run.settings.eval_tokens < tokens:
            print0(f"--eval-tokens {run.settings.eval_tokens} is less than a batch: evaluating one batch, "
                   f"{tokens} tokens")
        wanted = max(-(-run.settings.eval_tokens // tokens), 1)
        if run.settings.eval_tokens != EVAL_TOKENS:
            return wanted
        wanted = min(wanted, max(run.dial.tokens // 10 // tokens, 1))
        if run.runtime.device.type != "cuda":  # at most about five seconds each
            started = time.perf_counter()
            evaluate_bpb(run.model, run.validation, 1, self.token_bytes)
            wanted = min(wanted, max(round(5 / (time.perf_counter() - started)), 1))
        wanted = gather(wanted)[0]  # the main process decides
        print0(f"evaluating on {wanted * tokens:,} tokens")
        return wanted

    def core(self) -> None:
        run = self.run
        core = evaluate_core(run.orig_model, run.tokenizer, run.runtime.device, run.settings.eval_bundle or None,
                             run.settings.core_metric_max_per_task)
        run.metrics.log(step=run.step, core_metric=core["core_metric"], centered_results=core["centered_results"])
        print0(f"step {run.step:5}: CORE {core['core_metric']:.4f}")

    def sample(self) -> None:
        show_samples(self.run.orig_model, self.run.tokenizer, self.run.settings.eval_bundle)

# %% [markdown]
# And the loop, which is the whole of pretraining. A checkpoint is begun *before* the evaluations of its step.

# %%
#| export scripts/base_train
#| cli base_train
"""Pretraining: the whole recipe follows from --depth. Alone, or under torchrun on any number of processes."""


from nanochat_lib.budget import describe_budget
from nanochat_lib.checkup import Checkup
from nanochat_lib.common import NanochatError, print0, run_cli, start
from nanochat_lib.pretraining import BaseTrain, Run, check_settings, recipe_of
from nanochat_lib.tokenizer import load_tokenizer
from nanochat_lib.training import divide_batch


def train(run: Run) -> None:
    """Save, evaluate, step; to the end."""
    checkup = Checkup(run)
    with run, run.progress() as bar:
        while True:
            run.save()
            checkup.look()
            if run.step == run.dial.steps:
                break
            run.train_step(bar)
    run.report()
    print0(f"trained {run.dial.parameters:,} parameters on {run.dial.tokens:,} tokens: {run.directory}")


def dry_run(settings: BaseTrain) -> None:
    """Print the recipe and what it would take, touching nothing."""
    try:
        vocab_size = load_tokenizer().get_vocab_size()
    except NanochatError:
        vocab_size = 32768
    dial = recipe_of(settings, vocab_size)
    divide_batch(dial.total_batch_size, settings.device_batch_size, dial.config.sequence_len, settings.plan.gpus)
    for name, value in {**dial.describe(), **describe_budget(dial, settings.device_batch_size, settings.plan)}.items():
        print(f"{name:12} {value}")


def base_train(settings: BaseTrain) -> None:
    """Pretrain a base model; its size, data, batch and rates follow from --depth."""
    check_settings(settings)
    if settings.dry_run:
        return dry_run(settings)
    runtime = start(settings.device_type)
    check_settings(settings, runtime.device)
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

flags = ("--depth=2 --aspect-ratio=32 --head-dim=32 --max-seq-len=64 --total-batch-size=2048 --num-iterations=120 "
         "--matrix-lr=0.1 --eval-every=40 --eval-tokens=8192 --core-metric-every=-1 --sample-every=120 --save-every=20")


def command(tag):
    return [sys.executable, "-m", "nanochat_lib.scripts.base_train", f"--model-tag={tag}", "--resume", "--keep-last=2",
            f"--data-dir={shards}", f"--eval-bundle={scratch}/world/eval_bundle", "--device-type=cpu", *flags.split()]


done = subprocess.run(command("lesson"), capture_output=True, text=True)
print(done.stdout.replace(scratch, "…") or done.stderr)

# %% [markdown]
# And once more, killed with SIGKILL as soon as step 60 has been saved, wherever it then is, and started again with
# the same command. The losses that follow are those of the run that was not killed, bit for bit:

# %%
# NBVAL_IGNORE_OUTPUT
import time

with subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
    while process.poll() is None and not Path(scratch, "base_checkpoints", "killed", "meta_000060.json").exists():
        time.sleep(0.01)
    process.kill()
again = subprocess.run(command("killed"), capture_output=True, text=True).stdout.replace(scratch, "…")
print(next(line for line in again.splitlines() if "going on" in line))


def metrics(tag):
    return [json.loads(line) for line in open(f"{scratch}/base_checkpoints/{tag}/metrics.jsonl")]


losses, resumed = ({line["step"]: line["loss"] for line in metrics(tag) if "loss" in line}
                   for tag in ("lesson", "killed"))
assert losses == resumed

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
left.plot(list(losses), list(losses.values()), linewidth=5, alpha=0.3, label="never killed")
left.plot(list(resumed), list(resumed.values()), label="killed and resumed")
left.set(xlabel="step (2,048 tokens each)", ylabel="training loss (nats per token)")
left.legend()
curve = [(line["step"], line["bpb"]) for line in metrics("lesson") if "bpb" in line]
right.plot(*zip(*curve), marker="o")
right.set(xlabel="step", ylabel="validation bits per byte", ylim=(0, None))
assert curve[-1][1] < 0.8 * curve[0][1]

# %% [markdown]
# On several processes, `python -m torch.distributed.run --nproc-per-node=2 -m nanochat_lib.scripts.base_train …` trains
# the same one model; on several machines each starts the same command with `--nnodes=2 --node-rank=0` (or 1)
# `--master-addr=HOST`, and the folder of checkpoints is one that all of them share. This course's tests kill runs of
# one and of two processes at random moments, also in the middle of saving (`tests/test_exact_resume.py`).

# %% [markdown]
# ## Where the rules come from
#
# That tokens should be some multiple of the parameters was found by experiment (Chinchilla, arXiv 2203.15556): for a
# budget of FLOPs train models of several sizes, the small ones on many tokens, the large ones on few. The losses lie on
# a parabola over log N, whose bottom is the best size N for this budget; and over several budgets, log N against log
# FLOPs is a straight line. Its slope is about one half: a larger budget is best shared between size and tokens. The
# same experiment, some hundred million times smaller and more, on the embedded world:

# %%
#| export study
"""A scaling study (the second of arXiv 2203.15556): models of several depths trained on several budgets of FLOPs."""


import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.dataloader import PackedLoader
from nanochat_lib.evaluation import evaluate_bpb
from nanochat_lib.gpt import build_model
from nanochat_lib.scaling import Recipe, learning_rate_multiplier, muon_momentum, recipe, warmup_of, weight_decay_at
from nanochat_lib.tokenizer import Tokenizer
from nanochat_lib.training import LossScaler, accumulate, set_rates

CONTEXT, ROWS = 64, 16  # 1,024 tokens a step
EVAL_BATCHES = 24
RATES = 0.004, 0.15, 0.04, 0.0, 0.25  # of setup_optimizer: the best of four tried at depth 2, for runs this short


@dataclass(frozen=True)
class Point:
    """One model of a study."""

    budget: float   # FLOPs that were asked for
    depth: int
    params: int     # N, matrices and lm_head
    tokens: int     # D
    bpb: float      # validation bits per byte at the end


def small_recipe(depth: int, budget: float, vocab_size: int) -> Recipe:
    """A model 24 × depth wide, trained for a budget of FLOPs; otherwise by the rules of any run."""
    return recipe(depth, aspect_ratio=24, head_dim=24, max_seq_len=CONTEXT, vocab_size=vocab_size, target_flops=budget,
                  total_batch_size=CONTEXT * ROWS)

# %%
#| export study
def train_point(tokenizer: Tokenizer, data_dir: str | Path, depth: int, budget: float, seed: int = 0) -> Point:
    """Train one model on the CPU, and evaluate it."""
    dial = small_recipe(depth, budget, tokenizer.get_vocab_size())
    torch.manual_seed(seed)
    loader, validation = (PackedLoader(tokenizer, ROWS, CONTEXT, split, data_dir) for split in ("train", "val"))
    model, scaler = build_model(dial.config, "cpu"), LossScaler(torch.float32)
    optimizer = model.setup_optimizer(*RATES)
    for step in range(dial.steps):
        accumulate(model, loader, 1, scaler)
        set_rates(optimizer, learning_rate_multiplier(step, dial.steps, warmup_of(dial.steps)),
                  muon_momentum(step, dial.steps), weight_decay_at(step, dial.steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)
    bpb = evaluate_bpb(model.eval(), validation, EVAL_BATCHES, tokenizer.token_bytes())
    for each in (loader, validation):
        each.close()
    return Point(budget, depth, dial.scaling_params, dial.tokens, bpb)

# %%
#| export study
@dataclass(frozen=True)
class Optimum:
    """The bottom of one budget's parabola over log N."""

    budget: float
    params: float
    tokens: float
    coefficients: tuple[float, float, float]  # of bpb as a quadratic in log N


def fit_parabola(points: list[Point]) -> Optimum:
    """The best N for one budget: the bottom of a parabola in log N through the three sizes of least loss.

    NanochatError if there are fewer than three, or if the best one is not among them but beyond their ends.
    """
    best = sorted(points, key=lambda point: point.bpb)[:3]  # farther off, the loss is no parabola
    points = sorted(best, key=lambda point: point.params)
    size, tokens = np.log([point.params for point in points]), np.log([point.tokens for point in points])
    budget = points[0].budget
    if len(points) < 3:
        raise NanochatError(f"{len(points)} sizes at {budget:.0e} FLOPs: a parabola needs three, give more --depths")
    a, b, c = np.polyfit(size, [point.bpb for point in points], 2)
    end = -math.inf if points[0].bpb < points[-1].bpb else math.inf  # downhill
    bottom = -b / (2 * a) if a > 0 else end
    if not size.min() <= bottom <= size.max():
        raise NanochatError(f"the best size at {budget:.0e} FLOPs lies beyond the depths tried: add "
                            f"{'larger' if bottom > size.max() else 'smaller'} --depths or other --budgets")
    return Optimum(budget, math.exp(bottom), math.exp(np.interp(bottom, size, tokens)), (float(a), float(b), float(c)))


def exponent(optima: list[Optimum], of: Callable[[Optimum], float]) -> float:
    """a in quantity ∝ FLOPs^a, by a straight line through the logarithms."""
    if len(optima) < 2:
        raise NanochatError("an exponent needs two budgets: give more --budgets")
    return float(np.polyfit(np.log([each.budget for each in optima]), np.log([of(each) for each in optima]), 1)[0])


# %%
#| export scripts/scaling_study
#| cli scaling_study
"""The scaling study as a command: a table, a figure, the exponents. About six minutes on one core."""


import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_lib.common import NanochatError, base_dir, run_cli, write_aside, write_json
from nanochat_lib.dataset import read_texts, row_groups
from nanochat_lib.study import Optimum, Point, exponent, fit_parabola, train_point
from nanochat_lib.tokenizer import Tokenizer
from nanochat_lib.world import write_world

VOCABULARY = 512


@dataclass
class ScalingStudy:
    """Which models, on which budgets."""

    depths: str = "1,2,3,4"
    budgets: str = "1e11,3e11,1e12"  # FLOPs of each run
    seed: int = 0
    data_dir: str = ""               # folder of shards; empty: a world, written for the study


def numbers(text: str, flag: str, kind: type) -> list:
    """"1,2" → [1, 2]"""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise NanochatError(f"{flag} {text!r} is no list of positive numbers: give some like 1,2,3")
    return found

# %%
#| export scripts/scaling_study
def draw(points: list[Point], optima: list[Optimum], path: Path | None = None):
    """Losses over N with their parabolas, one colour a budget; the figure, also written to `path`."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for budget, colour in zip(dict.fromkeys(point.budget for point in points), plt.get_cmap("tab10").colors):
        mine = [point for point in points if point.budget == budget]
        label = f"{budget:.0e} FLOPs"
        axes[0].semilogx([p.params for p in mine], [p.bpb for p in mine], "o", color=colour, label=label)
        for best in (each for each in optima if each.budget == budget):
            used = [point.params for point in sorted(mine, key=lambda point: point.bpb)[:3]]
            size = np.geomspace(min(used), max(used), 50)
            axes[0].semilogx(size, np.polyval(best.coefficients, np.log(size)), color=colour)
            bottom = np.polyval(best.coefficients, np.log(best.params))
            axes[0].plot(best.params, bottom, "*", color=colour, markersize=14)
    sizes = sorted({point.params for point in points})
    axes[0].set_xticks(sizes, [f"{size / 1000:.0f}k" for size in sizes])
    axes[0].set_xticks([], minor=True)
    axes[0].set(xlabel="N, parameters", ylabel="validation bits per byte")
    axes[0].legend(fontsize=8)
    axes[1].loglog([each.budget for each in optima], [each.params for each in optima], "*-", label="N, parameters")
    axes[1].loglog([each.budget for each in optima], [each.tokens for each in optima], "o-", label="D, tokens")
    axes[1].set(xlabel="FLOPs", title="the best share-out of a budget")
    axes[1].legend(fontsize=8)
    if path:
        with write_aside(path) as aside:
            figure.savefig(aside, format="png")
    return figure

# %%
#| export scripts/scaling_study
def scaling_study(settings: ScalingStudy) -> None:
    """Train models of several sizes on several budgets on the CPU, and find how the best size grows with the budget."""
    depths, budgets = numbers(settings.depths, "--depths", int), numbers(settings.budgets, "--budgets", float)
    with tempfile.TemporaryDirectory() as scratch:
        shards = settings.data_dir or write_world(Path(scratch), count=20_000) / "shards"
        texts = (text for unit in row_groups(shards) for text in read_texts(unit))
        tokenizer, points = Tokenizer.train_from_iterator(texts, VOCABULARY), []
        for budget in budgets:
            for depth in depths:
                points.append(train_point(tokenizer, shards, depth, budget, settings.seed))
                print(f"{budget:.0e} FLOPs, depth {depth}: N {points[-1].params:,}, D {points[-1].tokens:,}, "
                      f"{points[-1].bpb:.4f} bits per byte", flush=True)
    optima = []
    for budget in budgets:
        try:
            optima.append(fit_parabola([point for point in points if point.budget == budget]))
            print(f"best at {budget:.0e} FLOPs: N {optima[-1].params:,.0f}, D {optima[-1].tokens:,.0f}")
        except NanochatError as error:
            print(f"left out: {error}")
    place = base_dir() / "report" / "scaling_study"
    result = {"points": [asdict(point) for point in points], "optima": [asdict(best) for best in optima]}
    write_json(place.with_suffix(".json"), result)
    draw(points, optima, place.with_suffix(".png"))
    print(f"N ∝ FLOPs^{exponent(optima, lambda each: each.params):.2f}, "
          f"D ∝ FLOPs^{exponent(optima, lambda each: each.tokens):.2f}: {place}.png")

# %% [markdown]
# What `python -m nanochat_lib.scripts.scaling_study` measured in six minutes on one core: bits per byte of four
# sizes on three budgets. Read along a line: with too few parameters a model cannot hold what it reads, with too many it has read
# too little.

# %%
from nanochat_lib.scripts.scaling_study import draw
from nanochat_lib.study import Point, exponent, fit_parabola, small_recipe, train_point

measured = {1e11: (1.007, 1.125, 2.245, 2.662), 3e11: (0.869, 0.767, 0.973, 1.504), 1e12: (0.828, 0.583, 0.594, 0.742)}
points = []
for budget, losses_of_depths in measured.items():
    for depth, bpb in enumerate(losses_of_depths, 1):
        dial = small_recipe(depth, budget, 512)
        points.append(Point(budget, depth, dial.scaling_params, dial.tokens, bpb))
optima = [fit_parabola([point for point in points if point.budget == budget]) for budget in measured]
figure = draw(points, optima)
for best in optima:
    print(f"{best.budget:.0e} FLOPs: N {best.params:9,.0f}, D {best.tokens:11,.0f}, "
          f"{best.tokens / best.params:.0f} tokens per parameter")
print(f"N ∝ FLOPs^{exponent(optima, lambda best: best.params):.2f}, "
      f"D ∝ FLOPs^{exponent(optima, lambda best: best.tokens):.2f}")

# %% [markdown]
# Both exponents are near one half, as in the paper, and the best models read about a dozen tokens for each parameter:
# the ratio that the dial takes. Twelve runs of one seed, three points a parabola: few, and without error bars (`--seed`
# shows how much they move); the real thing takes hundreds.
#
# Here and now, a smaller budget: even the smallest of these models is too large for it, and there is no bottom to
# find.

# %%
# NBVAL_IGNORE_OUTPUT
tiny = [train_point(tokenizer, shards, depth, 2e10) for depth in (1, 2, 3)]
for point in tiny:
    print(f"depth {point.depth}: N {point.params:7,}, D {point.tokens:7,}, {point.bpb:.2f} bits per byte")
try:
    fit_parabola(tiny)
except NanochatError as error:
    print(error)

# %% [markdown]
# ## How good is it?
#
# `base_eval` asks the finished model everything lesson 06 can ask, and leaves a table as CSV beside a
# `result_base_eval.json`.

# %%
#| export scripts/base_eval
"""Evaluation of a base model: CORE, bits per byte of both splits, samples. Alone or under torchrun."""


from dataclasses import dataclass

from nanochat_lib.checkpoint import load_model, write_result
from nanochat_lib.common import NanochatError, Runtime, base_dir, check_least, print0, run_cli, start, together
from nanochat_lib.dataloader import PackedLoader
from nanochat_lib.evaluation import evaluate_bpb, evaluate_core, write_tables
from nanochat_lib.gpt import GPT
from nanochat_lib.checkup import show_samples
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
        with together():
            loader = PackedLoader(tokenizer, rows, context, split, settings.data_dir, runtime.rank, runtime.world_size,
                                  runtime.device)
        bpb[split] = evaluate_bpb(model, loader, max(-(-wanted // batch), 1),
                                  tokenizer.token_bytes().to(runtime.device))
        print0(f"bits per byte, {split}: {bpb[split]:.4f}")
    return bpb

# %%
#| export scripts/base_eval
#| cli base_eval
def base_eval(settings: BaseEval) -> None:
    """Evaluate a base model: CORE, bits per byte, samples. A part that cannot run is reported, the others are done."""
    parts = [part.strip() for part in settings.eval.split(",") if part.strip()]
    check_least(settings, device_batch_size=1, split_tokens=1)
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
            else:
                result["samples"] = show_samples(model, tokenizer, settings.eval_bundle)
        except (NanochatError, OSError) as error:
            failures.append(f"{part}: {error}")
            print0(f"left out: {failures[-1]}")
    if runtime.is_main and "core_metric" in result:
        write_tables(base_dir() / "base_eval" / f"base_model_{meta['step']:06d}", result)
    write_result("base_eval", **result)
    if len(failures) == len(parts):
        raise NanochatError(f"nothing could be evaluated ({failures[0]})")

# %% [markdown]
# ## How fast?
#
# Faster than what? Than the same model written down plainly: autograd's gradients, all logits at once in float32,
# windows as masks. One command measures us against it, each in processes of its own, in turns, medians:
#
# ```
# python -m nanochat_lib.scripts.train_bench
# ```
#
# | measured | ours against plain |
# |---|---|
# | CPU, depth 4, vocabulary 32,768: tokens a second of one core | 4.7 × (2.0 × in float32); of two cores 4.4 to 5.1 × |
# | the same: peak memory | 0.37 × (0.47 × in float32) |
# | the same: the optimizer's part of a step (we want 6 %) | 9 to 10 % (7.5 % in float32) |
# | rows packed a second, against a linear search | 14 × |
# | share of a save's time in which training stands still | 3 % |
# | CORE with ten examples: questions a second, against one by one | 18 × |
#
# That was a processor that multiplies bfloat16 itself (AVX512-BF16, AMX); for a model at least 256 wide `choose_dtype`
# then takes bfloat16. On one H200 (`docs/training.json`) a compiled model of depth 12 trains on 597,000 tokens a second,
# 46 % of what the chip's matrix units can do; with full windows in every layer on 582,000, where each token costs more
# arithmetic: 52 %.

# %%
#| export plain
"""The model of lesson 04 in plain eager PyTorch, float32: what the speed and memory of ours are measured against."""


import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_lib.gpt import GPT, VALUE_CHANNELS, has_value_embedding, window_sizes
from nanochat_lib.layers import SMEAR_CHANNELS


def plain_loss(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of a float32 model on idx and targets (B, T)."""
    config, (B, T) = model.config, idx.shape
    cos, sin = model.cos[None, :T, None], model.sin[None, :T, None]
    distance = torch.arange(T, device=idx.device)[:, None] - torch.arange(T, device=idx.device)

    def norm(x):
        return F.rms_norm(x, (x.size(-1),))

    def rotated(x):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

    x = norm(model.transformer.wte(idx))
    gate = torch.sigmoid(x[:, 1:, :SMEAR_CHANNELS] @ model.smear_gate.weight.T)
    x = x0 = torch.cat((x[:, :1], x[:, 1:] + model.smear_lambda * gate * x[:, :-1]), dim=1)
    for layer, (block, window) in enumerate(zip(model.transformer.h, window_sizes(config))):
        attn, mlp = block.attn, block.mlp
        x = model.resid_lambdas[layer] * x + model.x0_lambdas[layer] * x0
        y = norm(x)
        q, k, v = ((y @ part.weight.T).view(B, T, -1, config.head_dim) for part in (attn.c_q, attn.c_k, attn.c_v))
        if has_value_embedding(layer, config.n_layer):
            gate = 3 * torch.sigmoid(y[..., :VALUE_CHANNELS] @ attn.ve_gate.weight.T)
            v = v + gate.unsqueeze(-1) * model.value_embeds[str(layer)](idx).view_as(v)
        q, k, v = (part.transpose(1, 2) for part in (1.2 * norm(rotated(q)), 1.2 * norm(rotated(k)), v))
        seen = (distance >= 0) & (distance <= window)
        y = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        x = x + y.transpose(1, 2).flatten(2) @ attn.c_proj.weight.T
        x = x + F.relu(norm(x) @ mlp.c_fc.weight.T).square() @ mlp.c_proj.weight.T
        if layer == config.n_layer // 2:
            halfway = x
    x = norm(x - model.backout_lambda * halfway)
    logits = 15 * torch.tanh(x @ model.lm_head.weight[:config.vocab_size].T / 15)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

# %%
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.plain import plain_loss

_ = torch.manual_seed(0)
small = build_model(GPTConfig(sequence_len=256, vocab_size=512, n_layer=4, n_head=2, n_kv_head=1, n_embd=64), "cpu")
ids = torch.randint(0, 512, (2, 257))
assert abs(plain_loss(small, ids[:, :-1], ids[:, 1:]).item() - small(ids[:, :-1], ids[:, 1:]).item()) < 1e-4

# %%
#| export scripts/train_bench
"""How fast and lean training is, against plain code: step, memory, optimizer, loader, saving, CORE. Medians of turns.

    python -m nanochat_lib.scripts.train_bench                    # all parts, in some minutes
    python -m nanochat_lib.scripts.train_bench --parts step,loader --compile
"""


import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro

from nanochat_lib.budget import peak_flops
from nanochat_lib.common import (NanochatError, Runtime, base_dir, keep_freed_memory, peak_memory_bytes, pick_device,
                                 print0, run_cli, write_json)
from nanochat_lib.dataloader import BUFFER, BestFit
from nanochat_lib.evaluation import read_bundle, read_items, tokenize
from nanochat_lib.fp8 import convert_to_fp8, lacks_fp8
from nanochat_lib.gpt import GPT, GPTConfig, build_model
from nanochat_lib.plain import plain_loss
from nanochat_lib.scoring import Row, score_questions
from nanochat_lib.tokenizer import Tokenizer
from nanochat_lib.training import choose_dtype, compiled

PARTS = ("step", "loader", "saving", "core")
WAYS = ("plain", "ours", "compiled", "L", "fp8")  # L: full windows in every layer

# %%
#| export scripts/train_bench
@dataclass
class TrainBench:
    """What to measure; the model's sizes default to what suits the device."""

    parts: str = ",".join(PARTS)  # separated by commas
    depth: int = -1               # 4; on a GPU 12
    max_seq_len: int = -1         # 512; on a GPU 2,048
    device_batch_size: int = -1   # 8; on a GPU 32
    vocab_size: int = 32768
    steps: int = 4                # of a turn, the first not counted
    repeats: int = 3              # turns; each runs every contestant in a process of its own
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # on a CPU, too: a minute more for each turn
    device_type: str = ""
    way: str = ""                 # used by the command itself: be one contestant, answer in JSON


def sized(settings: TrainBench) -> tuple[torch.device, GPTConfig, int]:
    """(device, model, rows of a batch) that the settings mean."""
    device = torch.device(pick_device(settings.device_type))
    depth, context, rows = (12, 2048, 32) if device.type == "cuda" else (4, 512, 8)
    depth, context, rows = (given if given > 0 else usual for given, usual in zip(
        (settings.depth, settings.max_seq_len, settings.device_batch_size), (depth, context, rows)))
    heads = -(-depth * 64 // 128)
    pattern = "L" if settings.way == "L" else "SSSL"
    return device, GPTConfig(context, settings.vocab_size, depth, heads, heads, heads * 128, pattern), rows


# %%
#| export scripts/train_bench
def be_contestant(settings: TrainBench) -> dict:
    """Train for some steps, one way: seconds of each step and of its optimizer, peak memory, loss, dtype."""
    device, config, rows = sized(settings)
    if device.type == "cpu" and settings.way != "plain":
        keep_freed_memory()  # as `start` does
    dtype = torch.float32 if settings.way == "plain" else choose_dtype(device, config.n_embd)
    torch.manual_seed(0)
    model = build_model(config, device)
    optimizer = model.setup_optimizer(matrix_lr=0.002, embedding_lr=0.03, unembedding_lr=0.0008)
    ids = torch.randint(0, config.vocab_size, (rows, config.sequence_len + 1), device=device)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    if settings.way == "fp8":
        convert_to_fp8(model)
    run = compiled(model, batch, settings.way in ("compiled", "L", "fp8"), 0.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    whole, share = [], []
    for _ in range(settings.steps):
        wait()
        begin = time.perf_counter()
        loss = plain_loss(model, *batch) if settings.way == "plain" else run(*batch)
        loss.backward()
        wait()
        middle = time.perf_counter()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        wait()
        whole.append(time.perf_counter() - begin)
        share.append((time.perf_counter() - middle) / whole[-1])
    return {"seconds": whole[1:], "optimizer": share[1:], "peak": peak_memory_bytes(device), "loss": loss.item(),
            "dtype": str(dtype).removeprefix("torch."), "flops": model.estimate_flops(), "tokens": ids[:, 1:].numel()}


def ask_contestant(settings: TrainBench, way: str) -> dict:
    """The same in a fresh process, so that memory is its own."""
    flags = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in
             ("depth", "max_seq_len", "device_batch_size", "vocab_size", "steps", "device_type")]
    done = subprocess.run([sys.executable, "-m", "nanochat_lib.scripts.train_bench", f"--way={way}", *flags],
                          capture_output=True, text=True)
    if done.returncode:
        raise NanochatError(f"contestant {way} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])

# %%
#| export scripts/train_bench
def bench_step(settings: TrainBench) -> list[dict]:
    """Tokens per second, peak memory and the optimizer's share: ours against plain."""
    device, config, rows = sized(settings)
    ways = ["plain", "ours", *["compiled"] * (settings.compile or device.type == "cuda")]
    if device.type == "cuda":
        ways += ["L", *["fp8"] * (not lacks_fp8(device))]
    turns: dict[str, list[dict]] = {way: [] for way in ways}
    for _ in range(settings.repeats):
        for way in ways:
            turns[way].append(ask_contestant(settings, way))
    middle = {way: {name: statistics.median(value for turn in found for value in turn[name])
                    for name in ("seconds", "optimizer")} for way, found in turns.items()}
    for way, found in turns.items():
        speed = found[0]["tokens"] / middle[way]["seconds"]
        print0(f"  {way:9} {speed:9,.0f} tokens/s, optimizer {middle[way]['optimizer']:.1%}, peak "
               f"{found[0]['peak'] / 2**20:,.0f} MiB, {found[0]['dtype']}, loss {found[0]['loss']:.3f}"
               f"{mfu(device, found[0]['flops'] * speed)}")
    best = "compiled" if "compiled" in ways else "ours"
    gain = middle["plain"]["seconds"] / middle[best]["seconds"]
    rest = [row("full windows against SSSL, seconds", middle["L"]["seconds"] / middle[best]["seconds"], "≥ 1")] \
        if "L" in ways else []
    return [row("step: tokens/s against plain", gain, "≥ 1.6"),
            row("step: peak memory against plain", turns[best][0]["peak"] / turns["plain"][0]["peak"], "≤ 0.6"),
            row("step: the optimizer's share", middle[best]["optimizer"], "≤ 0.06"), *rest]


def mfu(device: torch.device, flops: float) -> str:
    """The part of the chip's peak that `flops` per second are, in words; "" where the peak is unknown."""
    peak = peak_flops(device)
    return f", MFU {flops / peak:.1%}" if peak else ""


def row(name: str, value: float, target: str) -> dict:
    return {"what": name, "value": round(value, 4), "target": target}

# %%
#| export scripts/train_bench
def turns_of(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Linear(list):
    """A buffer of documents that is searched from end to end."""

    add = list.append

    def take(self, room: int, crop: bool = True) -> range | None:
        best, longest = -1, 0
        for place, document in enumerate(self):
            if longest < len(document) <= room:
                best, longest = place, len(document)
        if best < 0:
            if not crop:
                return None
            best = min(range(len(self)), key=lambda place: len(self[place]))
        return self.pop(best)


def bench_loader(settings: TrainBench) -> list[dict]:
    """Rows packed per second, from a buffer of 1,000 documents, against a linear search."""
    dice = random.Random(0)
    lengths = [min(int(dice.lognormvariate(6, 1)) + 1, 10000) for _ in range(5000)]  # tokens; half are under 400

    def pack(buffer, rows: int = 100, row_length: int = 2049) -> None:
        stream = iter(lengths * 9)
        for _ in range(rows):
            room = row_length
            while room > 0:
                while len(buffer) < BUFFER:
                    buffer.add(range(next(stream)))
                room -= len(buffer.take(room))

    seconds = turns_of({"best fit": lambda: pack(BestFit()), "linear": lambda: pack(Linear())}, settings.repeats)
    print0(f"  loader    {100 / seconds['best fit']:9,.0f} rows/s, linear search {100 / seconds['linear']:,.0f}")
    return [row("loader: rows/s against a linear search", seconds["linear"] / seconds["best fit"], "≥ 5")]

# %%
#| export scripts/train_bench
def bench_saving(settings: TrainBench) -> list[dict]:
    """Seconds that training is stopped by a save, of the seconds that saving takes."""
    from nanochat_lib.saver import Saver

    device, config, rows = sized(settings)
    model = build_model(config, device)
    optimizer = model.setup_optimizer()
    ids = torch.zeros(rows, config.sequence_len + 1, dtype=torch.long, device=device)
    with (tempfile.TemporaryDirectory() as folder,
          Saver(Path(folder), model, optimizer, Runtime(device), keep=1) as saver):
        for step in range(2 * settings.repeats):
            if step % 2 == 0:
                saver.save(step, {})
            model(ids[:, :-1], ids[:, 1:]).backward()
            saver.before_step()
            optimizer.step()
            model.zero_grad(set_to_none=True)
        saver.wait()
        print0(f"  saving    {saver.saving / settings.repeats:9.2f} s each, training stopped for "
               f"{saver.stopped / settings.repeats:.3f} s")
        return [row("saving: training stopped, of its time", saver.stopped / saver.saving, "≤ 0.05")]


@torch.no_grad()
def one_by_one(model: GPT, question: list[Row], device: torch.device) -> list[float]:
    """The mean loss of each row of a question, plainly: its rows as a batch, logits of every token."""
    width = max(len(row.ids) for row in question)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in question], device=device)
    losses = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    return [losses[place, row.start - 1:row.end - 1].mean().item() for place, row in enumerate(question)]

# %%
#| export scripts/train_bench
def bench_core(settings: TrainBench) -> list[dict]:
    """Examples of CORE per second: in batches, what rows share read once, against one by one."""
    from nanochat_lib.world_facts import World
    from nanochat_lib.world_tasks import write_bundle
    from nanochat_lib.world_text import documents

    device, config, _ = sized(settings)
    torch.manual_seed(0)
    model, world, questions = build_model(config, device).eval(), World(1), []
    tokenizer = Tokenizer.train_from_iterator(documents(world, 1000), 1024)
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(world, Path(folder))
        for task in read_bundle(Path(folder)):
            items = read_items(task, 8)
            questions += tokenize(task._replace(shots=10), items, range(len(items)), tokenizer, model)
    found = {}
    budget = 2**12 if device.type == "cpu" else 2**16

    def batched() -> None:
        found["batched"] = [loss for scores in score_questions(model, questions, device, budget) for loss, _ in scores]

    def alone() -> None:
        found["alone"] = [loss for question in questions for loss in one_by_one(model, question, device)]

    seconds = turns_of({"batched": batched, "alone": alone}, settings.repeats)
    apart = max(abs(a - b) for a, b in zip(found["batched"], found["alone"]))
    print0(f"  CORE      {len(questions) / seconds['batched']:9,.1f} examples/s, one by one "
           f"{len(questions) / seconds['alone']:,.1f}; losses differ by at most {apart:.0e} nats")
    return [row("CORE: examples/s against one by one", seconds["alone"] / seconds["batched"], "≥ 3")]

# %%
#| export scripts/train_bench
#| cli train_bench
def train_bench(settings: TrainBench) -> None:
    """Measure training against plain code; prints a table and keeps it in report/train_bench.json."""
    if settings.way:
        with redirect_stdout(sys.stderr):
            result = be_contestant(settings)
        return print(json.dumps(result))
    parts = [part.strip() for part in settings.parts.split(",") if part.strip()]
    if not parts or set(parts) - set(PARTS):
        raise NanochatError(f"--parts {settings.parts!r} is unknown: choose from {', '.join(PARTS)}, with commas between")
    device, config, rows = sized(settings)
    print0(f"{device.type}, {torch.get_num_threads()} threads; depth {config.n_layer}, width {config.n_embd}, context "
           f"{config.sequence_len}, batch {rows}, vocabulary {config.vocab_size}")
    benches = {"step": bench_step, "loader": bench_loader, "saving": bench_saving, "core": bench_core}
    table = [found for part in parts for found in benches[part](settings)]
    for found in table:
        print0(f"{found['what']:42} {found['value']:8.3f}   target {found['target']}")
    write_json(base_dir() / "report" / "train_bench.json", table)

# %% [markdown]
# ## Exercises
#
# In [07_pretraining](../exercises/07_pretraining.ipynb):
# 1. `pack_row`: best fit, by a plain search.
# 2. `learning_rate_multiplier`: a rate for each step.
# 3. `optimal_batch_size`: how large a batch?
# 4. Measure: what does cropping cost, and why does the buffer hold 1,000 documents?
# 5. `save` and `load`: an order of writes that survives a kill at any moment.
# 6. `rows`: a loader that is stopped, and goes on as if nothing had happened.
#
# **Next:** [08 · The engine](08_engine.ipynb)
