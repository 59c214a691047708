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
# # 00 · The tour
#
# *What is the whole path, and does it run on my machine?* — 10 minutes, about two of them computing.
#
# In this course you build the whole of a small ChatGPT: its data, its tokenizer, the model, the training, the chat.
# The code you read in the lessons *is* the library `nanochat_lib`: cells marked `#| export` are copied into it, and
# the same commands that run here in minutes are written to train a GPT-2 grade model on eight GPUs. Nothing is a toy
# version of something else; only the numbers differ.
#
# Text becomes tokens, tokens train a base model that continues any text, conversations turn it into a chat model, and
# practice on problems with a known answer makes it better than its examples:

# %%
import matplotlib.pyplot as plt

STAGES = [  # what is made, by which lesson, and the lessons it stands on
    ("text", "01", "documents,\nin shards", []),
    ("tokenizer", "02", "text to\nnumbers", []),
    ("base model", "07", "continues\nany text", ["03 attention", "04 GPT", "05 optimizer", "06 evaluation"]),
    ("chat model", "09", "answers\nquestions", []),
    ("better\nchat model", "10", "learns from\nits own tries", ["08 engine", "calculator"]),
    ("chat", "12", "notebook,\nterminal, web", ["08 engine"]),
]
figure, axes = plt.subplots(figsize=(10, 3.4))
for place, (name, lesson, what, parts) in enumerate(STAGES):
    axes.text(place, 0, name, ha="center", va="center", fontsize=10, weight="bold", color="white",
              bbox={"boxstyle": "round,pad=0.45", "facecolor": "#2f6f4f", "edgecolor": "none"})
    axes.text(place, 0.62, f"lesson {lesson}", ha="center", fontsize=10, color="#2f6f4f")
    axes.text(place, -0.62, what, ha="center", va="top", fontsize=9, color="#555")
    for row, part in enumerate(parts):
        axes.text(place, -1.55 - 0.42 * row, part, ha="center", va="center", fontsize=9,
                  bbox={"boxstyle": "round,pad=0.25", "facecolor": "#e8efe9", "edgecolor": "none"})
    if place:
        axes.annotate("", (place - 0.42, 0), (place - 0.58, 0), arrowprops={"arrowstyle": "-|>", "color": "#555"})
axes.annotate("", (5.4, 1.05), (-0.4, 1.05), arrowprops={"arrowstyle": "-|>", "color": "#2f6f4f"})
axes.text(2.5, 1.15, "lesson 11: one command runs it all", ha="center", fontsize=10, color="#2f6f4f")
axes.set(xlim=(-0.5, 5.5), ylim=(-3.1, 1.45))
_ = axes.axis("off")

# %% [markdown]
# ## The lessons
#
# Read them in order: each uses only what came before. A lesson runs from top to bottom in about a minute (00, 09, 10 and
# 12 first train a very small model if there is none); the time is for reading, changing cells and running them again.
# Later cells import the library: after a change of an exported cell, run `make lessons` and restart the kernel.
# Exercises (`../exercises`) go with lessons 02 to 10 and 12.

# %%
import re
from pathlib import Path

from IPython.display import Markdown

import nanochat_lib


def card(lesson):
    """One row of the map, from the lesson's first lines: its title, its question and its minutes."""
    title, question = re.findall(r"^# (# .*|.* — .*)", lesson.read_text(), re.M)[:2]
    question, _, time_ = question.partition(" — ")
    question = question.replace("*The question:*", "").strip("* ")
    return f"| [{title[2:]}]({lesson.stem}.ipynb) | {question} | {re.search('[0-9]+', time_)[0]} |"


lessons = sorted((Path(nanochat_lib.__file__).parents[1] / "lessons").glob("[01]*.py"))
Markdown("\n".join(["| lesson | the question it answers | minutes |", "|---|---|---|", *map(card, lessons)]))

# %% [markdown]
# ## The ground
#
# What follows in this lesson is the first module, `common`: the few things that every stage shares. Skim it now; the
# later lessons lean on it.

# %%
#| default_exp common

# %%
#| export
"""What every stage shares: where files live, which device computes, how to fail, save, measure and report."""


import contextlib
import ctypes
import errno
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import psutil
import torch
import torch.distributed as dist
import tyro
from tqdm.auto import tqdm

# %% [markdown]
# ## One way to fail
#
# A missing file should cost a reader one line, not forty: what is wrong, and the command that mends it. Every such
# failure is a `NanochatError`, and every command runs through `run_cli`, which turns a settings dataclass into flags
# (tyro) and the error into that line.

# %%
#| export
class NanochatError(Exception):
    """A failure the user can mend: one line that says what is wrong, where, and which command mends it."""


def run_cli(function: Callable[[Any], Any]) -> None:
    """Run `function(settings)` from the command line; flags come from its settings dataclass.

    Exits 1 with `error: …` on a NanochatError or a full disk; other exceptions are bugs and keep their traceback.
    """
    settings_type = next(iter(get_type_hints(function).values()))
    program = f"python -m {sys.modules['__main__'].__spec__.name}"
    again = "run the same command" + (" with --resume" if hasattr(settings_type, "resume") else " again")
    try:
        function(tyro.cli(settings_type, prog=program, description=function.__doc__))
    except NanochatError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: the disk is full, writing {error.filename or 'a file'}: make room and {again}")
    except KeyboardInterrupt:
        sys.exit(f"stopped: {again} to go on")
    finally:
        stop()

# %% [markdown]
# ## Where files live
#
# Everything the course makes goes under one folder. A file is first written beside its place and then renamed, so that
# a killed process leaves the old file or the new one, never half of one.

# %%
#| export
def base_dir() -> Path:
    """Folder of all artifacts: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat (made if missing)."""
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes the place of `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with open(aside, "rb+") as file:  # on disk before the rename, or a power cut could leave an empty file
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same value fit for JSON: tensors and numpy numbers as Python's, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinities become null, so that any reader takes the file."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or torn file is a NanochatError that names it."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise NanochatError(f"cannot read {path} ({error}): delete it and run the command that made it") from None

# %% [markdown]
# ## Which device, which number format, which process
#
# The same commands run on a laptop and, through `torchrun`, on eight GPUs: each process asks who it is. The number
# format follows the device: bfloat16 where the GPU multiplies it fast (Ampere and later), float32 elsewhere;
# `NANOCHAT_DTYPE` overrules.

# %%
#| export
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of activations: $NANOCHAT_DTYPE, else bfloat16 on CUDA sm80 and later, else float32."""
    if name := os.environ.get("NANOCHAT_DTYPE"):
        if name not in DTYPES:
            raise NanochatError(f"NANOCHAT_DTYPE={name} is not a dtype for training: choose {', '.join(DTYPES)}")
        return DTYPES[name]
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return torch.bfloat16 if on_cuda and torch.cuda.get_device_capability() >= (8, 0) else torch.float32


def pick_device(device_type: str = "") -> str:
    """The device type to use: the one asked for, if this machine has it; with "" the best one it has."""
    have = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if device_type and device_type not in have:
        raise NanochatError(f"--device-type {device_type} is not on this machine: it has {', '.join(have)}")
    return device_type or have[0]


@dataclass(frozen=True)
class Runtime:
    """Who this process is: its device, and its place among the processes that train together."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

# %%
#| export
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names in malloc.h


def keep_freed_memory() -> None:
    """Let Linux's C library (glibc) keep freed memory for the next tensor; with another one nothing changes.

    By default it hands large tensors back to the system at once, and each step pays for clearing the same pages again.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)  # no pages of its own for a large tensor: it lies on the heap
        library.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def start(device_type: str = "", seed: int = 42) -> Runtime:
    """Pick the device, join the process group under torchrun (nccl on CUDA, gloo elsewhere), seed every generator."""
    kind = pick_device(device_type)
    rank, local_rank, world_size = (int(os.environ.get(name, default))
                                    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise NanochatError(f"there are {torch.cuda.device_count()} GPUs for process {local_rank + 1} of this "
                                "machine: give torchrun --nproc_per_node as many as there are GPUs")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    elif kind == "cpu":
        keep_freed_memory()
    elif world_size > 1:  # gloo does not add up tensors of MPS
        raise NanochatError(f"{world_size} processes cannot share this machine's {kind} device: start one, or give "
                            "--device-type cpu")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return Runtime(device, rank, local_rank, world_size)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place; alone it is returned as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One value of every process, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A block that fails on every process if it fails on one: none is left waiting. It must not communicate itself.

    Raises the first process's NanochatError or OSError; a device out of memory is a NanochatError.
    """
    failure = None
    try:
        yield
    except (NanochatError, OSError) as error:
        failure = error
    except torch.OutOfMemoryError as error:
        failure = NanochatError(str(error).split("\n")[0])
    if failures := [failure for failure in gather(failure, group) if failure]:
        raise failures[0]


def is_main_process() -> bool:
    """True in the process that speaks for all (rank 0)."""
    return int(os.environ.get("RANK", 0)) == 0


def print0(*values: Any) -> None:
    """Print once, whatever the number of processes."""
    if is_main_process():
        print(*values, flush=True)

# %% [markdown]
# ## Seeing what happens
#
# Every run writes `metrics.jsonl`, one line per event, that any tool can read; Weights & Biases joins in only when a
# run is given a name.

# %%
#| export
def progress(iterable: Any = None, total: int | None = None, desc: str = "", initial: int = 0) -> tqdm:
    """A progress bar on the main process: live in terminal and notebook, a plain line every ten seconds in a log."""
    live = sys.stderr.isatty() or "ipykernel" in sys.modules or "NANOCHAT_LIVE" in os.environ
    return tqdm(iterable, total=total, desc=desc, initial=initial, disable=not is_main_process(),
                mininterval=0.2 if live else 10, dynamic_ncols=live, leave=not live)


def check_least(settings: Any, **least: int) -> None:
    """NanochatError for the first of these settings that is less than its least value."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise NanochatError(f"--{name.replace('_', '-')} {getattr(settings, name)}: it must be at least {value}")


def check_run_name(run: str) -> None:
    """A run with a name ("dummy" is none) goes to Weights & Biases: NanochatError where that is not installed."""
    if run != "dummy" and find_spec("wandb") is None:
        raise NanochatError("--run needs wandb: pip install wandb, or leave --run away")


class MetricsLog:
    """Appends one JSON line per `log` to `path` on the main process, and to Weights & Biases if `run` is named."""

    def __init__(self, path: Path, run: str = "dummy", config: dict | None = None):
        self.file = self.wandb = None
        if not is_main_process():
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", buffering=1)
        check_run_name(run)
        if run != "dummy":
            import wandb

            self.wandb = wandb.init(project="nanochat", name=run, config=config)

    def log(self, **values: Any) -> None:
        if self.file:
            self.file.write(json.dumps(finite({"time": round(time.time(), 3), **values})) + "\n")
        if self.wandb:
            self.wandb.log(values)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()

# %%
#| export
def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory this process has held: allocated on a CUDA device, resident elsewhere. In bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment() -> dict[str, Any]:
    """What a report must say about the machine: versions, processor, memory, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "compute_dtype": str(compute_dtype()).removeprefix("torch."),
    }

# %% [markdown]
# ## Does it run here?
#
# Everything in the course runs on two processor cores. This is your machine, and how fast it multiplies matrices,
# which is nearly all of the work of a language model.

# %%
# NBVAL_IGNORE_OUTPUT
machine = environment()
device, dtype = torch.device(pick_device()), compute_dtype()
a = torch.randn(1024, 1024, device=device, dtype=dtype)
seconds = []
for _ in range(10):
    begun = time.perf_counter()
    float((a @ a)[0, 0])  # reading a number waits for the device
    seconds.append(time.perf_counter() - begun)
machine["matmul"] = f"{2 * 1024**3 / min(seconds) / 1e9:,.0f} GFLOP/s in {dtype}, on {device}"
for name, value in machine.items():
    print(f"{name:14} {value}")
assert sys.version_info >= (3, 10), "the course needs Python 3.10 or later"

# %% [markdown]
# ## How exercises work
#
# An exercise is a function to write and, in the next cell, a check that looks at it. Here is one, to see how it feels.
#
# **A model that knows nothing** gives each of its V tokens the same probability, 1/V. The loss is the mean of
# −ln(probability of the token that came). What is it? Run the check as it stands: *not done yet* is no error, the
# notebook runs on.

# %%
def guessing_loss(vocab_size: int) -> float:
    """The loss, in nats per token, of a model that gives all `vocab_size` tokens the same probability."""
    raise NotImplementedError  # your code here

# %%
from nanochat_lib.course.checks import tour as check

check.guessing_loss(guessing_loss)

# %% [markdown]
# A wrong answer is told what is probably wrong with it, in words; hints open one by one:

# %%
check.guessing_loss(lambda vocab_size: math.log2(vocab_size))

# %% [markdown]
# And a right one is remembered: `python -m nanochat_lib.course progress` shows how far you are. Every untrained model
# of this course starts at this very loss: with the 1,024 tokens of the small one, near 6.93.

# %%
check.guessing_loss(lambda vocab_size: math.log(vocab_size))

# %% [markdown]
# ## The whole path, once
#
# Now the real thing, at its smallest: the `tour` preset makes a little world, a tokenizer, a base model, a chat model,
# and practises, all in a minute or two. (If this machine has a model already, its report is shown instead.) The curves
# are short and the answers poor; `make run` takes ten minutes and does better. Each number in it is a lesson's
# subject.

# %%
# NBVAL_IGNORE_OUTPUT
from IPython.display import display

from nanochat_lib.course.models import ready
from nanochat_lib.launch import describe
from nanochat_lib.report import draw, gather

ready("rl")
print(describe(base_dir()))
display(draw(gather(base_dir(), "tour", {})))

# %% [markdown]
# It was made by commands that you could have typed one by one; they are at the end of lesson 11. Say hello to it in a
# terminal (`python -m nanochat_lib.scripts.chat_cli`), or read on to see how it came to be.
#
# **Next:** [01 · Data](01_data.ipynb)
