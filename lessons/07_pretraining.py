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
