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
# The model reads rows of T + 1 tokens; documents are of any length. Padding wastes computing; cutting a stream of documents
# every T + 1 tokens gives rows that begin in the middle of a sentence. *Best fit* does better: keep a buffer of 1,000
# documents, and put into a row the longest one that still fits, again and again. When none fits, crop the shortest.
# Every row then starts with `<|bos|>` at the start of a document, and no position is empty.
#
# Searching a list of 1,000 for each document would cost more than the rest of the loader. Kept sorted by length, bisection
# finds the document in ten comparisons.

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


# %% [markdown]
# ## Where a loader stands
#
# A run that is stopped and resumed must read on as if nothing had happened: no document lost, none read twice. What has been
# read is a position: epoch, row group, document. But the buffer holds documents from before it, so the state
# names these too, as (row group, indices), and resuming reads them again. That is exact, and small in a checkpoint.
#
# Ranks take row groups in turn. If a run resumes on another number of ranks, what the old ranks had left of their epoch is
# dealt anew; from the next epoch on, the new ranks read as if they had always been there.

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
# The loader itself: a thread reads and tokenizes one chunk ahead; the buffer is topped up before each choice; `state()` may
# be asked for after any batch.

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
# ## Checkpoints: a run that nothing can kill
#
# A run of hours is stopped sooner or later: a full disk, a lost node, an impatient hand. A checkpoint has to be whole or not
# there. Three kinds of file make one, and the order in which they are written is the whole trick:
#
# 1. `model_000600.safetensors`, the weights (no pickle: a checkpoint from a stranger cannot run code);
# 2. `optim_000600/`, the optimizer's state, written by all ranks together with `torch.distributed.checkpoint`, which gives
#    each rank of a later run its share, also when there are more ranks or fewer;
# 3. `meta_000600.json`, **last**: settings, the loader's state, the loop's. Without it the other two do not count.

# %%
#| export checkpoint
"""Checkpoints that are whole or not there: weights, optimizer state, and last of all the metadata that makes them count."""

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

from nanochat_lib.common import NanochatError, Runtime, base_dir, is_main_process, print0, read_json, write_aside, write_json
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
# Saving is a collective act: all ranks write their slices of the optimizer state, then meet, and only then does rank 0 write
# the metadata. If a step is saved again, its old metadata goes first.

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
# What a killed run left half-written is swept away when the next one starts. A run started anew under the same name never
# mixes with the old one, and never deletes it: the old one is set aside.

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
    """Move the checkpoints later than step `after` (−1: all there is) into a folder beside; returns it, None if unneeded."""
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
# Reading has to answer which model is meant. With no tag it is the newest of the deepest ones, and we say which: depth is read
# from the metadata, not from the folder's name.

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
        raise NanochatError(f"no optimizer state in {path}: start without it (chat_sft --load-optimizer=0) or train anew")
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
        raise NanochatError(f"the model in {where} was trained with tokenizer {expected}, but {base_dir() / 'tokenizer'} holds "
                            f"{tokenizer.fingerprint}: put the old one back, or run "
                            "python -m nanochat_lib.scripts.base_train with the new one")


def load_model(stage: str, device: torch.device | str, phase: str = "eval", model_tag: str | None = None,
               step: int | None = None) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """A trained model with its tokenizer and metadata. `phase` is "train" or "eval"; tag and step as in find_checkpoint."""
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
