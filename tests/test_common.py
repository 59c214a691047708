"""Lesson 00: files written whole, errors of one line, dtypes, process groups."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from nanochat_lib import common


def test_base_dir_follows_the_environment(base_dir, monkeypatch):
    assert common.base_dir() == base_dir
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir / "new"))
    assert common.base_dir().is_dir()


def test_write_aside_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), common.write_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with common.write_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_json_stays_json(tmp_path):
    common.write_json(tmp_path / "a.json", {"a": float("inf"), "b": [torch.tensor([1.0, float("nan")])], 3: (1, "é")})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [[1.0, None]], "3": [1, "é"]}
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(common.NanochatError, match="torn.json"):
        common.read_json(tmp_path / "torn.json")
    with pytest.raises(common.NanochatError, match="missing.json"):
        common.read_json(tmp_path / "missing.json")


def test_unknown_dtype_and_device_name_what_is_allowed(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bf16")
    with pytest.raises(common.NanochatError, match="bf16.*bfloat16, float16, float32"):
        common.compute_dtype()
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert common.compute_dtype("cpu") is torch.float16
    monkeypatch.delenv("NANOCHAT_DTYPE")
    assert common.compute_dtype("cpu") is torch.float32
    with pytest.raises(common.NanochatError, match="tpu.*cpu"):
        common.pick_device("tpu")
    assert common.pick_device("cpu") == "cpu" and common.pick_device("") in ("cuda", "mps", "cpu")


def test_metrics_are_appended_as_json_lines(tmp_path):
    for step in range(2):
        log = common.MetricsLog(tmp_path / "m" / "metrics.jsonl")
        log.log(step=step, loss=torch.tensor(float("nan")))
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["loss"] is None


def test_a_named_run_without_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(common.NanochatError, match="pip install wandb"):
        common.MetricsLog(tmp_path / "metrics.jsonl", run="mine")


SCRIPT = """
import sys
from dataclasses import dataclass
import torch
from nanochat_lib.common import *

@dataclass
class Settings:
    depth: int = 3
    device_type: str = ""
    resume: bool = False

def main(settings: Settings) -> None:
    if settings.depth == 0:
        raise NanochatError("depth 0: give --depth 1 or more")
    if settings.depth == 8:
        raise KeyboardInterrupt
    if settings.depth == 9:
        raise OSError(28, "no space", "weights")
    runtime = start(settings.device_type)
    total = all_reduce_sum(torch.tensor(float(runtime.rank + 1)))
    print0("sum", total.item(), runtime.world_size, torch.rand(1).item())

if __name__ == "__main__":
    run_cli(main)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "some_script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "some_script"


def test_run_cli_turns_failures_into_one_line(script, run_module):
    for depth, message in ((0, "error: depth 0: give --depth 1 or more"),
                           (8, "stopped: run the same command with --resume to go on"),
                           (9, "error: the disk is full, writing weights: make room and run the same command with --resume")):
        done = run_module(script, "--depth", depth)
        assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert run_module(script, "--no-such-flag=1").returncode == 2


def test_torchrun_on_cpu_forms_one_group(script, run_module):
    alone, both = run_module(script, "--device-type="), run_module(script, nproc=2)
    assert alone.stdout.startswith("sum 1.0 1") and both.stdout.startswith("sum 3.0 2")
    assert both.stdout.count("sum") == 1


def test_environment_is_json():
    json.dumps(common.environment())
    assert common.peak_memory_bytes() > 50e6


def test_progress_is_silent_off_the_main_process():
    code = "from nanochat_lib.common import progress; list(progress(range(3), desc='work'))"
    runs = [subprocess.run([sys.executable, "-c", code], env={**os.environ, "RANK": rank}, capture_output=True, text=True)
            for rank in "01"]
    assert "work" in runs[0].stderr and runs[1].stderr == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_kept():
    """What a large tensor took stays with the process once `start` has run, for the next one."""
    code = """
import psutil, torch
from nanochat_lib.common import start
start("cpu")
torch.ones(2**20).sum()
before = psutil.Process().memory_info().rss
torch.ones(2**26)  # 256 MiB, freed at once
print(psutil.Process().memory_info().rss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 * 2**20


def test_more_processes_than_the_devices_can_hold(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(common.NanochatError, match="2 processes cannot share this machine's mps device"):
        common.start("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(common.NanochatError, match="there are 1 GPUs for process 2"):
        common.start("cuda")
