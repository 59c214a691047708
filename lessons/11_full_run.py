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
# # 11 · The full run
#
# *How do I launch the real thing?* — 20 minutes to read; the run itself takes ten on a laptop, an evening on one GPU,
# an estimated two and a half to three hours on eight.

# %%
#| default_exp pipeline

# %%
#| export
"""The whole path as one command: every stage a process of its own, resumable, with a report at the end."""


import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from nanochat_lib.common import NanochatError, base_dir, pick_device, read_json, run_cli, write_json
from nanochat_lib.report import headline, write_report

# %% [markdown]
# ## A stage is a command
#
# Nothing happens in the pipeline that you could not type yourself. A stage is a name, a module and its flags; a preset
# is a handful of numbers for those flags. Depth decides the rest (lesson 07).

# %%
#| export
@dataclass(frozen=True)
class Stage:
    """One command of the pipeline: `python -m nanochat_lib.{module} {flags}`, on all processes if `parallel`."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    parallel: bool = True  # launched by torchrun
    resumes: bool = False  # takes --resume: goes on from its newest checkpoint

    def command(self, torchrun: str, resume: bool = False) -> list[str]:
        """The command line, as a list; `torchrun` holds torchrun's own flags."""
        launcher = ["-m", "torch.distributed.run", *shlex.split(torchrun)] if self.parallel else []
        divider = ["--"] if self.parallel else []  # or torchrun takes --run for an abbreviation of its --run-path
        flags = [*self.flags, "--resume"] if resume and self.resumes else self.flags
        return [sys.executable, *launcher, "-m", f"nanochat_lib.{self.module}", *divider, *flags]


def flags(**settings) -> tuple[str, ...]:
    """flags(max_seq_len=256) → ("--max-seq-len=256",); the names are those of the stage's settings."""
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())


@dataclass(frozen=True)
class Preset:
    """One size of the whole path. All else follows from these numbers, the depth first of all."""

    nproc: int  # processes (GPUs) on this machine
    tokenizer: dict
    base: dict
    sft: dict
    rl: dict
    evaluation: dict  # how many problems chat_eval asks, and how long an answer may get
    shards: int = 0  # training shards of the hub's corpus to fetch; 0 means the embedded world, nothing fetched
    world: dict | None = None

# %%
#| export
# Small models learn from many small steps at high rates. Heads of 64, not 32: attention logits of normed queries and
# keys cannot exceed 1.44·√head_dim, and looking something up takes sharp ones.
LAPTOP_MODEL = dict(depth=4, aspect_ratio=32, head_dim=64, max_seq_len=256, device_batch_size=8, total_batch_size=4096,
                    matrix_lr=0.12, embedding_lr=0.9, unembedding_lr=0.03, scalar_lr=1.0, core_metric_every=-1,
                    sample_every=-1)

PRESETS = {
    "tour": Preset(  # every stage, each a few seconds long
        nproc=1,
        tokenizer=dict(vocab_size=1024),
        base={**LAPTOP_MODEL, "num_iterations": 60, "eval_every": 30, "eval_tokens": 8192, "save_every": 30},
        sft=dict(num_iterations=20, eval_every=-1, chatcore_every=-1),
        rl=dict(num_iterations=2, examples_per_step=4, num_samples=4, eval_every=-1),
        evaluation=dict(max_problems=16, max_new_tokens=64),
    ),
    "laptop": Preset(
        nproc=2,  # the way that eight GPUs go; one process of two threads would be a tenth faster
        tokenizer=dict(vocab_size=1024),
        base={**LAPTOP_MODEL, "num_iterations": 780, "eval_every": 120, "eval_tokens": 65536, "save_every": 120},
        sft=dict(num_iterations=400, init_lr_frac=0.3, eval_every=200, chatcore_every=-1),
        rl=dict(task="word_problems_2|word_problems_2|word_problems_1",  # the harder ones twice as often
                num_iterations=85, init_lr_frac=0.055, max_new_tokens=96, eval_every=-1),  # at twice the rate, facts go
        evaluation=dict(max_problems=200, max_new_tokens=96),
    ),
    "gpu": Preset(
        nproc=1,
        shards=24,
        tokenizer=dict(vocab_size=32768),
        base=dict(depth=12, device_batch_size=32, save_every=500),
        sft={},
        rl={},
        evaluation={},
    ),
    "speedrun": Preset(
        nproc=8,
        shards=170,
        tokenizer=dict(vocab_size=32768),
        base=dict(depth=24, target_param_data_ratio=8, device_batch_size=16, save_every=1000),
        sft=dict(device_batch_size=16),
        rl={},
        evaluation={},
    ),
}

# %%
#| export
def plan(preset: Preset, data: str = "", run: str = "dummy") -> list[Stage]:
    """The stages of a preset, in order. `data` is a folder of parquet shards read instead of the preset's own text."""
    world = base_dir() / "world"
    embedded = preset.shards == 0
    text = data or (str(world / "shards") if embedded else "")
    source = flags(data_dir=text) if text else ()
    bundle = flags(eval_bundle=world / "eval_bundle") if embedded else ()
    chat = flags(mixture="world") if embedded else ()
    practice = {"task": "world" if embedded else "gsm8k", **preset.rl}
    wandb = flags(run=run)
    fetch = [] if embedded or data else [Stage("dataset", "dataset", (f"-n={preset.shards}",), parallel=False)]
    return [
        *([Stage("world", "world", flags(**(preset.world or {})), parallel=False)] if embedded else fetch),
        Stage("tok_train", "scripts.tok_train", source + flags(**preset.tokenizer), parallel=False),
        Stage("base_train", "scripts.base_train", source + bundle + wandb + flags(**preset.base), resumes=True),
        Stage("base_eval", "scripts.base_eval", source + bundle),
        Stage("chat_sft", "scripts.chat_sft", chat + wandb + flags(**preset.sft), resumes=True),
        Stage("chat_eval_sft", "scripts.chat_eval", chat + flags(source="sft", **preset.evaluation)),
        Stage("chat_rl", "scripts.chat_rl", wandb + flags(**practice), resumes=True),
        Stage("chat_eval_rl", "scripts.chat_eval", chat + flags(source="rl", **preset.evaluation)),
    ]

# %% [markdown]
# Here they are, the commands of the laptop's run. (`python -m nanochat_lib.pipeline --preset laptop --dry-run` prints
# the same.) Copy any of them into a terminal, and you have run that stage.

# %%
def show(name):
    """The commands of a preset, as one would type them."""
    preset = PRESETS[name]
    for stage in plan(preset):
        command = shlex.join(["python", *stage.command(f"--nproc-per-node={preset.nproc} --standalone")[1:]])
        print(command.replace(str(base_dir()), "$NANOCHAT_BASE_DIR"), end="\n\n")


show("laptop")

# %% [markdown]
# The big one is the same list with other numbers: text from the hub instead of the little world, eight processes
# instead of two, depth 24 instead of 4.

# %%
show("speedrun")

# %% [markdown]
# ## Stopped anywhere, it goes on
#
# A stage's *key* is a hash of its own command and the keys of all stages before it. A stage whose key is recorded as
# finished is skipped; one that was begun under the same key resumes; one whose flags, or whose input, changed starts
# anew. Another number of processes is another run: it starts from the beginning.

# %%
#| export
class Progress:
    """What has been done under one base directory: `pipeline.json`, {stage: {key, status, seconds}}."""

    def __init__(self, path: Path):
        self.path = path
        self.stages = read_json(path) if path.exists() else {}

    def status(self, stage: Stage, key: str) -> str:
        """Either "finished", "begun" or "new", for exactly this command after exactly these earlier ones."""
        record = self.stages.get(stage.name, {})
        return record.get("status", "new") if record.get("key") == key else "new"

    def record(self, stage: Stage, key: str, status: str, seconds: float) -> None:
        self.stages[stage.name] = {"key": key, "status": status, "seconds": round(seconds, 1)}
        write_json(self.path, self.stages)

    def seconds(self, stage: Stage) -> float:
        return self.stages.get(stage.name, {}).get("seconds", 0.0)


def stage_keys(stages: list[Stage], nproc: int) -> list[str]:
    """One key per stage: a hash over its command and those of all before it."""
    digest, keys = hashlib.sha256(str(nproc).encode()), []
    for stage in stages:
        digest.update(json.dumps([stage.module, stage.flags]).encode())
        keys.append(digest.hexdigest()[:16])
    return keys

# %% [markdown]
# Train the base model longer, and it and all that grew from it is made anew; the world and the tokenizer stay:

# %%
before = plan(PRESETS["laptop"])
after = plan(replace(PRESETS["laptop"], base={**PRESETS["laptop"].base, "num_iterations": 1200}))
for stage, old, new in zip(after, stage_keys(before, 2), stage_keys(after, 2)):
    print(f"{stage.name:14} {'is kept' if old == new else 'runs again'}")

# %% [markdown]
# A stage's standard output goes to its log; what it says on standard error (progress bars, notices, the one-line
# error) is shown as it comes. After an `error:` line the launcher's own traceback is kept from the reader, but not
# from the log.

# %%
#| export
def sign(lock: int, *pids: int) -> None:
    """Write into the lock's file which processes to end, should the run have to stop."""
    os.ftruncate(lock, 0)
    os.write(lock, " ".join(map(str, pids)).encode())


def run_stage(command: list[str], log: Path, lock: int) -> int:
    """Run one command, its output into `log` and its progress onto our standard error; returns the exit code.

    The command inherits `lock`, so that the base directory stays taken while any process of the run lives.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | ({"NANOCHAT_LIVE": "1"} if sys.stderr.isatty() else {})
    with open(log, "ab", buffering=0) as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, env=environment, pass_fds=(lock,))
        failed = False
        try:
            sign(lock, os.getpid(), process.pid)
            while chunk := process.stderr.read1(4096):
                file.write(chunk)
                if failed:
                    continue
                shown, marker, rest = chunk.partition(b"error: ")
                failed = bool(marker)
                sys.stderr.write((shown + marker + rest.partition(b"\n")[0] + b"\n" * failed).decode(errors="replace")
                                 if failed else chunk.decode(errors="replace"))
                sys.stderr.flush()
            return process.wait()
        except BaseException:  # Ctrl-C, or a kill of this process: the stage must not run on alone
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            raise

# %% [markdown]
# A stage that fails, seen from outside: the exit code, and what the log keeps.

# %%
import tempfile

program = "print('reading the data'); import sys; sys.exit('error: no data here: run the command that makes it')"
with tempfile.TemporaryDirectory() as folder, open(Path(folder, "lock"), "w") as lock:
    log = Path(folder) / "stage.log"
    code = run_stage([sys.executable, "-c", program], log, lock.fileno())
    print(f"exit code {code}; the log says:", *log.read_text().splitlines()[1:], sep="\n  ")

# %%
#| export
@contextlib.contextmanager
def kills_interrupt() -> Iterator[None]:
    """Inside, a kill (SIGTERM) or a closed terminal (SIGHUP) ends this process as Ctrl-C does, its stage included."""
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    on_main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    before = {name: signal.signal(name, interrupt) for name in (signal.SIGTERM, signal.SIGHUP) if on_main}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def taken(folder: Path, node: str = "") -> Iterator[int]:
    """Claim a base directory for this run; yields the lock's file descriptor. NanochatError while another run has it.

    The nodes of one run share the directory: each claims it under its own name.
    """
    with open(folder / f"pipeline{node}.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise NanochatError(f"another run is at work in {folder}: wait, or end it (kill {lock.read()})") from None
        sign(lock.fileno(), os.getpid())
        yield lock.fileno()

# %%
#| export
def run_recorded(stage: Stage, key: str, command: list[str], done: Progress, lock: int) -> None:
    """Run a stage and record it: begun before, finished after; the time of interrupted tries counts too."""
    log = base_dir() / "logs" / f"{stage.name}.log"
    before = done.seconds(stage) if "--resume" in command else 0.0
    done.record(stage, key, "begun", before)
    started = time.monotonic()
    try:
        code = run_stage(command, log, lock)
    finally:
        done.record(stage, key, "begun", before + time.monotonic() - started)
    if code:
        raise NanochatError(f"stage {stage.name} failed (exit {code}): see {log}, then run the same command again")
    done.record(stage, key, "finished", before + time.monotonic() - started)

# %%
#| export
#| cli pipeline
@dataclass
class Pipeline:
    """Settings of a whole run."""

    preset: Literal["tour", "laptop", "gpu", "speedrun"] = "laptop"
    """the size: see PRESETS"""
    data: str = ""
    """a folder of parquet shards (column `text`) to read instead of the preset's own text"""
    run: str = "dummy"
    """name of the run at Weights & Biases; dummy: none"""
    nproc: int = -1
    """processes on this machine; -1: the preset's, at most one a GPU"""
    device_batch_size: int = -1
    """rows at a time in pretraining and SFT, fewer where memory runs out; -1: the preset's"""
    torchrun: str = ""
    """torchrun's own flags for several nodes, e.g. "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500" """
    until: str = ""
    """stop after this stage"""
    dry_run: bool = False
    """print the commands and stop"""


def processes(wanted: int) -> int:
    """As many processes as a preset asks for, but on GPUs at most one for each."""
    device = pick_device()
    return min(wanted, {"cpu": wanted, "cuda": torch.cuda.device_count()}.get(device, 1))


def pipeline(settings: Pipeline) -> None:
    """Run the whole path: data, tokenizer, base model, chat model, reinforcement learning, report."""
    preset = PRESETS[settings.preset]
    if settings.device_batch_size > 0:
        rows = {"device_batch_size": settings.device_batch_size}
        preset = replace(preset, base={**preset.base, **rows}, sft={**preset.sft, **rows})
    nproc = processes(preset.nproc) if settings.nproc < 0 else settings.nproc
    if nproc == 0:
        raise NanochatError("--nproc 0 starts nothing: give at least 1, or leave it away for the preset's number")
    if settings.data and not Path(settings.data).is_dir():
        raise NanochatError(f"--data {settings.data} is not a folder: give one that holds parquet shards")
    data = str(Path(settings.data).resolve()) if settings.data else ""
    torchrun = f"--nproc-per-node={nproc} {settings.torchrun or '--standalone'}"
    stages = plan(preset, data, settings.run)
    names = [stage.name for stage in stages]
    if settings.until and settings.until not in names:
        raise NanochatError(f"--until {settings.until} is no stage: choose {', '.join(names)}")
    if settings.dry_run:
        print(*(shlex.join(stage.command(torchrun)) for stage in stages), sep="\n")
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))  # torchrun would say 1, aloud
    done = Progress(base_dir() / "pipeline.json")
    node = f".{platform.node()}" if settings.torchrun else ""
    with taken(base_dir(), node) as lock, kills_interrupt():
        for stage, key in zip(stages, stage_keys(stages, nproc)):
            status = done.status(stage, key)
            if status != "finished":
                run_recorded(stage, key, stage.command(torchrun, resume=status == "begun"), done, lock)
            print(f"{stage.name:14} {done.seconds(stage):7.1f} s   {headline(stage.name)}", flush=True)
            if stage.name == settings.until:
                return
        write_report(base_dir(), settings.preset, {stage.name: done.seconds(stage) for stage in stages})
    print(f"{'in all':14} {sum(map(done.seconds, stages)):7.1f} s   {base_dir() / 'report.md'}")

# %% [markdown]
# ## The report
#
# Each stage leaves a small `result_….json`; the report only gathers them. Numbers in it were measured in this run, or
# are left out.

# %%
#| export report
"""Gathers what the stages measured into report.json and report.md, with plots."""


from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nanochat_lib.common import base_dir, environment, read_json, write_aside, write_json


def result(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What a stage measured: `report/result_{name}.json` of the run under `folder`; {} if it has not run."""
    path = (folder or base_dir()) / "report" / f"result_{name}.json"
    return read_json(path) if path.exists() else {}


def accuracies(tasks: dict[str, float]) -> str:
    return " · ".join(f"{name} {value:.2f}" for name, value in tasks.items())


HEADLINES = {  # stage → (its result, one line made of it)
    "tok_train": ("tok", lambda r: f"{r['vocab_size']:,} tokens, {r['bytes_per_token']:.2f} bytes each"),
    "base_train": ("base", lambda r: f"bits per byte {r['bpb_start']:.2f} → {r['bpb']:.2f}, {r['tokens']:,} tokens"
                   if r.get("bpb") else f"{r['tokens']:,} tokens, not evaluated"),
    "base_eval": ("base_eval", lambda r: f"CORE {r['core_metric']:.3f}" if "core_metric" in r else "CORE not evaluated"),
    "chat_sft": ("sft", lambda r: f"validation bits per byte {r['bpb']:.3f}"),
    "chat_eval_sft": ("chat_eval_sft", lambda r: accuracies(r["tasks"])),
    "chat_rl": ("rl", lambda r: f"reward {r['reward_start']:.2f} → {r['reward']:.2f} in {r['steps']} steps"),
    "chat_eval_rl": ("chat_eval_rl", lambda r: accuracies(r["tasks"])),
}


def headline(stage: str) -> str:
    """One line on what a finished stage measured; "" where a stage measures nothing."""
    name, line = HEADLINES.get(stage, ("", str))
    measured = result(name) if name else {}
    return line(measured) if measured else ""

# %%
#| export report
def gather(folder: Path, preset: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything measured by the run under `folder`, as one dict for report.json. `seconds` is by stage."""
    base, base_eval = result("base", folder), result("base_eval", folder)
    return {
        "preset": preset,
        "stages": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "tokenizer": result("tok", folder),
        "base": {**base, "core": base_eval.get("core_metric"), "core_tasks": base_eval.get("centered_results", {})},
        "sft": {**result("sft", folder), **result("chat_eval_sft", folder)},
        "rl": {**result("rl", folder), **result("chat_eval_rl", folder)},
        "samples": base_eval.get("samples", []),
        "environment": environment(),
    }


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A markdown table; floats with three digits."""
    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "\\|")

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)

# %%
#| export report
def draw(report: dict[str, Any]) -> Figure:
    """The run in three panels: bits per byte while pretraining, CORE by task, chat tasks before and after RL."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, core, chat = figure.subplots(1, 3)
    if curve := report["base"].get("bpb_curve"):
        loss.plot(*zip(*curve), marker="o", markersize=3)
    loss.set(title="pretraining", xlabel="step", ylabel="validation bits per byte")
    tasks = report["base"]["core_tasks"]
    core.barh(list(tasks), list(tasks.values()))
    core.invert_yaxis()
    core.set(title="base model: CORE", xlabel="centred accuracy", xlim=(min([0, *tasks.values()]), 1))
    before, after = report["sft"].get("tasks", {}), report["rl"].get("tasks", {})
    rows = range(len(after))
    chat.barh([row - 0.2 for row in rows], [before.get(name, 0) for name in after], 0.4, label="after SFT")
    chat.barh([row + 0.2 for row in rows], list(after.values()), 0.4, label="after RL")
    chat.set_yticks(list(rows), list(after))
    chat.invert_yaxis()
    chat.set(title="chat model", xlabel="accuracy", xlim=(0, 1))
    figure.legend(loc="outside lower right", ncols=2)
    return figure

# %%
#| export report
def markdown(report: dict[str, Any]) -> str:
    """The report as a page: where the time went, what each model can do, what it says."""
    base, before, after = report["base"], report["sft"].get("tasks", {}), report["rl"].get("tasks", {})
    samples = "\n\n".join(f"> {' '.join(str(sample).split())}" for sample in report["samples"])
    chat_rows = [[name, before.get(name), value] for name, value in after.items()]
    stages = [[name, seconds, headline(name)] for name, seconds in report["stages"].items()]
    facts = [["bits per byte at the start", base.get("bpb_start")], ["bits per byte at the end", base.get("bpb")],
             ["CORE", base.get("core")], ["tokens read", base.get("tokens")], ["parameters", base.get("parameters")]]
    return "\n\n".join([
        f"# Report of a `{report['preset']}` run",
        f"{report['total_seconds'] / 60:.1f} minutes in all.\n\n![the run](report/report.png)",
        "## Where the time went\n\n" + table(["stage", "seconds", ""], stages),
        "## Base model\n\n" + table(["", ""], facts),
        table(["CORE task", "centred accuracy"], [list(item) for item in base["core_tasks"].items()]),
        "## Chat model: the same questions before and after reinforcement learning\n\n"
        + table(["task", "after SFT", "after RL"], chat_rows),
        f"## Samples of the base model\n\n{samples}",
        "## Machine\n\n" + table(["", ""], [list(item) for item in report["environment"].items()]),
    ]) + "\n"


def write_report(folder: Path, preset: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Write report.json, report.md and report/report.png under `folder`; returns the report."""
    report = gather(folder, preset, seconds)
    write_json(folder / "report.json", report)
    with write_aside(folder / "report" / "report.png") as aside:
        draw(report).savefig(aside, format="png", dpi=110)
    with write_aside(folder / "report.md") as aside:
        aside.write_text(markdown(report))
    return report

# %% [markdown]
# The report of the run on this machine (the tour's, if there was none). Left: how well the base model predicts unseen
# text. Middle: what it can do. Right: the chat model on the same questions before and after reinforcement learning.

# %%
# NBVAL_IGNORE_OUTPUT
import io

from IPython.display import Image

from nanochat_lib.course.models import ready

ready("rl")
picture = io.BytesIO()
draw(gather(base_dir(), "", {})).savefig(picture, dpi=80)
Image(picture.getvalue())

# %% [markdown]
# ## Launching from the notebook
#
# The widget is a thin view: **start** runs the very command you would type, in a process of its own (closing the
# notebook does not end it, **stop** does), and a thread redraws what the files under the base directory say.

# %%
#| export launch
"""The pipeline's launch widget: start, stop, stages done, and the loss as it falls."""


import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ipywidgets as widgets
from matplotlib.figure import Figure

from nanochat_lib.common import base_dir
from nanochat_lib.pipeline import PRESETS, Progress
from nanochat_lib.report import headline

METRICS = {  # stage directory → the curves its metrics.jsonl holds
    "base_checkpoints": ("loss", "training loss (nats per token)"),
    "chatsft_checkpoints": ("loss", "chat loss (nats per token)"),
    "chatrl_checkpoints": ("reward", "mean reward"),
}


def read_curve(folder: Path, stage: str) -> list[tuple[int, float]]:
    """(step, value) of the newest run of a stage; a torn last line (a run being written) is left out."""
    files = sorted((folder / stage).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    points = []
    for line in files[-1].read_text().splitlines() if files else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get(METRICS[stage][0]) is not None:
            points.append((event["step"], event[METRICS[stage][0]]))
    return points


def draw_curves(folder: Path) -> Figure:
    """The three training stages of the run under `folder`, each as far as it has come."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axes, (stage, (_, label)) in zip(figure.subplots(1, 3), METRICS.items()):
        if points := read_curve(folder, stage):
            axes.plot(*zip(*points), linewidth=1)
        axes.set(xlabel="step", ylabel=label)
    return figure


def describe(folder: Path) -> str:
    """One line per stage of the run under `folder`, as text."""
    stages = Progress(folder / "pipeline.json").stages
    return "\n".join(f"{name:14} {record['status']:9} {record['seconds']:7.1f} s  {headline(name)}"
                     for name, record in stages.items()) or "nothing has run yet"

# %%
#| export launch
class Launcher:
    """A widget that runs the pipeline in its own process and shows it: `Launcher("laptop")` as a cell's last line."""

    def __init__(self, preset: str = "laptop", every: float = 2.0):
        self.process: subprocess.Popen | None = None
        self.every = every
        self.preset = widgets.Dropdown(options=list(PRESETS), value=preset, description="preset")
        self.start_button = widgets.Button(description="start", button_style="success", icon="play")
        self.stop_button = widgets.Button(description="stop", icon="stop", disabled=True)
        self.text, self.plot = widgets.HTML(), widgets.Image(format="png")
        self.start_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        row = widgets.HBox([self.preset, self.start_button, self.stop_button])
        self.widget = widgets.VBox([row, self.text, self.plot])
        self.refresh()

    def start(self) -> None:
        """Start or go on with the run; does nothing while it is running."""
        if self.process and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "nanochat_lib.pipeline", f"--preset={self.preset.value}"]
        log = base_dir() / "logs" / "pipeline.log"
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        self.start_button.disabled, self.stop_button.disabled = True, False
        threading.Thread(target=self.watch, daemon=True).start()

    def stop(self) -> None:
        """Stop the run and every process of it; what it saved stays, and start goes on from there."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def watch(self) -> None:
        """Redraw until the run ends (in a thread: a blocked notebook could not be stopped)."""
        while self.process.poll() is None:
            self.refresh()
            try:
                self.process.wait(self.every)
            except subprocess.TimeoutExpired:
                pass
        ended = "stopped: start goes on; logs/pipeline.log says why"
        self.refresh(ended if self.process.returncode else "finished")
        self.start_button.disabled, self.stop_button.disabled = False, True

    def refresh(self, state: str = "") -> None:
        self.text.value = f"<pre>{describe(base_dir())}\n{state}</pre>"
        picture = io.BytesIO()
        draw_curves(base_dir()).savefig(picture, format="png", dpi=90)
        self.plot.value = picture.getvalue()

    def _repr_mimebundle_(self, **kwargs):
        return self.widget._repr_mimebundle_(**kwargs)

# %% [markdown]
# Press **start** for the run of ten minutes; the curves grow as it goes. Close the notebook, and it runs on; open it
# again and run the cell, and the box shows how far it has come by then.

# %%
# NBVAL_IGNORE_OUTPUT
Launcher("laptop")

# %% [markdown]
# ## One GPU, eight, several nodes
#
# Install as on the laptop; on Linux with an NVIDIA driver, pip fetches a PyTorch that uses it. Every command below can
# be stopped and given again.
#
# **Your own text**, at any size: a folder of parquet files with a string column `text`; the last file is for
# validation.
# ```
# python -m nanochat_lib.pipeline --preset laptop --data DIR
# ```
#
# **One GPU**: depth 12, for 40 GB. Where memory runs out, take fewer rows at a time; gradient accumulation (lesson 07)
# makes up for it.
# ```
# python -m nanochat_lib.pipeline --preset gpu
# python -m nanochat_lib.pipeline --preset gpu --device-batch-size 16
# ```
#
# **Eight GPUs**: depth 24, the GPT-2 grade run. Fewer are fine, the total batch stays the same:
# ```
# python -m nanochat_lib.pipeline --preset speedrun
# python -m nanochat_lib.pipeline --preset speedrun --nproc 4
# ```
#
# What we have seen: several processes on CPUs, and one GPU. The same code on several GPUs is still to be seen, so spend
# minutes before you spend hours. Once there is text and a tokenizer (`--until tok_train`), give this twice; stop the
# first one (Ctrl-C) when step 100 is saved, and the second should go on from there:
# ```
# torchrun --standalone --nproc-per-node=8 -m nanochat_lib.scripts.base_train -- --depth=4 --num-iterations=400 \
#     --save-every=100 --core-metric-every=-1 --model-tag=check --resume
# ```
#
# **Several nodes** that share a disk: first the stages of a single process, on one node; then the same command on
# every node, with torchrun's own flags. `HOST` is any one of the nodes, by a name that all can reach.
# ```
# export NANOCHAT_BASE_DIR=/shared/nanochat
# python -m nanochat_lib.pipeline --preset speedrun --until tok_train
# python -m nanochat_lib.pipeline --preset speedrun \
#     --torchrun "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=1"
# ```
#
# **A single stage** with settings of your own is one of the commands above, edited. `--help` lists what can be set:
# ```
# torchrun --standalone --nproc-per-node=8 -m nanochat_lib.scripts.base_train -- --depth=16 --run=my-d16
# python -m nanochat_lib.scripts.chat_sft --help
# ```
#
# **Next:** [12 · Chat](12_chat.ipynb)
