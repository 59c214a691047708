"""Lesson 11: stages, what is skipped and what resumes, the report. Stages here are small Python programs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat_lib import launch, pipeline, report
from nanochat_lib.common import NanochatError, write_json

STAGE = """
import os, sys, time
from pathlib import Path
base = Path(os.environ["NANOCHAT_BASE_DIR"])
with open(base / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if "--fail" in sys.argv and not (base / "mended").exists():
    sys.exit("error: no luck: make mended\\nTraceback of the launcher")
if "--slow" in sys.argv and not (base / "mended").exists():
    time.sleep(60)
print("to the log")
"""


@pytest.fixture
def fake_stages(base_dir, tmp_path, monkeypatch):
    """Three stages; `fake_stages(*flags)` gives the second one these flags. Returns the list of calls made so far."""
    (tmp_path / "fake_stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def command(self, torchrun, resume=False):
        resume = ["--resume"] if resume and self.resumes else []
        return [sys.executable, "-m", "fake_stage", self.name, *self.flags, *resume]

    monkeypatch.setattr(pipeline.Stage, "command", command)

    def stages(*flags):
        monkeypatch.setattr(pipeline, "plan", lambda *_: [
            pipeline.Stage("world", "x"), pipeline.Stage("base_train", "x", flags, resumes=True),
            pipeline.Stage("chat_sft", "x", resumes=True)])

    stages.calls = lambda: (base_dir / "calls").read_text().split("\n")[:-1]
    stages()
    return stages


def test_finished_stages_are_skipped_and_changed_ones_run_again_with_all_after_them(fake_stages):
    settings = pipeline.Pipeline(preset="tour")
    pipeline.pipeline(settings)
    assert fake_stages.calls() == ["world", "base_train", "chat_sft"]
    pipeline.pipeline(settings)
    assert len(fake_stages.calls()) == 3
    fake_stages("--depth=5")
    pipeline.pipeline(settings)
    assert fake_stages.calls()[3:] == ["base_train --depth=5", "chat_sft"]


def test_a_failed_stage_names_its_log_and_resumes(fake_stages, base_dir, capfd):
    fake_stages("--fail")
    with pytest.raises(NanochatError, match="base_train failed.*base_train.log"):
        pipeline.pipeline(pipeline.Pipeline())
    shown = capfd.readouterr().err
    assert "error: no luck: make mended" in shown and "Traceback" not in shown
    assert "Traceback" in (base_dir / "logs" / "base_train.log").read_text()
    (base_dir / "mended").touch()
    pipeline.pipeline(pipeline.Pipeline())
    assert fake_stages.calls() == ["world", "base_train --fail", "base_train --fail --resume", "chat_sft"]


RUN = """
import sys, test_pipeline
from nanochat_lib import pipeline
pipeline.Stage.command = lambda self, torchrun, resume=False: [sys.executable, "-m", "fake_stage", self.name, "--slow"]
pipeline.plan = lambda *_: [pipeline.Stage("world", "x")]
pipeline.pipeline(pipeline.Pipeline())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_goes_on_and_never_works_twice_at_once(fake_stages, base_dir, how):
    environment = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"] + ":" + os.path.dirname(__file__)}
    process = subprocess.Popen([sys.executable, "-c", RUN], env=environment, stderr=subprocess.DEVNULL)
    while not (base_dir / "calls").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(20)
    assert json.loads((base_dir / "pipeline.json").read_text())["world"]["status"] == "begun"
    if how == signal.SIGKILL:  # the stage outlives its parent: a second run must not start beside it
        with pytest.raises(NanochatError, match=r"another run is at work in .* \(kill \d+ \d+\)") as error:
            pipeline.pipeline(pipeline.Pipeline())
        os.kill(int(str(error.value).split()[-1].rstrip(")")), signal.SIGKILL)
        time.sleep(0.2)
    (base_dir / "mended").touch()
    pipeline.pipeline(pipeline.Pipeline())
    assert json.loads((base_dir / "pipeline.json").read_text())["chat_sft"]["status"] == "finished"


def test_every_preset_plans_commands_that_its_stages_accept(base_dir, run_module):
    """Flags are parsed by the very settings of each stage."""
    import importlib
    from typing import get_type_hints

    import tyro

    for preset in pipeline.PRESETS.values():
        for stage in pipeline.plan(preset):
            module = importlib.import_module(f"nanochat_lib.{stage.module}")
            entry = next(line for line in open(module.__file__).read().splitlines() if line.startswith("    run_cli("))
            function = getattr(module, entry.strip()[len("run_cli("):-1])
            settings = next(iter(get_type_hints(function).values()))
            extra = ["--resume"] if stage.resumes else []
            tyro.cli(settings, args=[*stage.flags, *extra])


def test_bad_settings_end_in_one_line(base_dir, run_module):
    for flag, message in (("--data=/nowhere", "--data /nowhere is not a folder"), ("--until=x", "no stage: choose world")):
        done = run_module("nanochat_lib.pipeline", flag)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


RESULTS = {
    "tok": {"vocab_size": 1024, "bytes_per_token": 3.5},
    "base": {"bpb_start": 4.0, "bpb": 0.8, "bpb_curve": [[0, 4.0], [10, 0.8]], "tokens": 1000, "parameters": 10},
    "base_eval": {"core_metric": 0.5, "centred_results": {}, "centered_results": {"facts": 0.5}, "samples": ["a\nb"]},
    "chat_eval_sft": {"tasks": {"choice": 0.5, "letters": 0.25}},
    "chat_eval_rl": {"tasks": {"choice": 0.75, "letters": 0.5}},
}


def test_report_holds_what_was_measured(base_dir):
    for name, value in RESULTS.items():
        write_json(base_dir / "report" / f"result_{name}.json", value)
    report.write_report(base_dir, "tour", {"world": 1.0, "base_train": 2.5})
    written = json.loads((base_dir / "report.json").read_text())
    assert written["stages"] == {"world": 1.0, "base_train": 2.5} and written["total_seconds"] == 3.5
    assert (written["base"]["bpb_start"], written["base"]["bpb"], written["base"]["core"]) == (4.0, 0.8, 0.5)
    assert written["base"]["core_tasks"] == {"facts": 0.5}
    assert written["sft"]["tasks"]["letters"] == 0.25 and written["rl"]["tasks"]["letters"] == 0.5
    page = (base_dir / "report.md").read_text()
    assert "| choice | 0.500 | 0.750 |" in page and "> a b" in page
    assert (base_dir / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_run_that_measured_nothing(base_dir):
    report.write_report(base_dir, "tour", {})
    assert json.loads((base_dir / "report.json").read_text())["base"]["core"] is None


def test_launcher_starts_shows_and_stops(base_dir, monkeypatch):
    metrics = base_dir / "base_checkpoints" / "d4" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 0, "loss": 4.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert launch.read_curve(base_dir, "base_checkpoints") == [(0, 4.0), (1, 3.0)]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(
        [sys.executable, "-c", "import time; time.sleep(30)"], **options))
    launcher = launch.Launcher("tour", every=0.1)
    launcher.start()
    running = launcher.process
    launcher.start()
    assert launcher.process is running and launcher.start_button.disabled
    launcher.stop()
    assert running.wait(5) != 0
    for _ in range(100):
        if not launcher.start_button.disabled:
            break
        time.sleep(0.05)
    assert not launcher.start_button.disabled and "stopped" in launcher.text.value
    assert bytes(launcher.plot.value).startswith(b"\x89PNG")


def test_fewer_rows_at_a_time(capsys, base_dir):
    pipeline.pipeline(pipeline.Pipeline(preset="speedrun", device_batch_size=4, dry_run=True))
    commands = [line for line in capsys.readouterr().out.splitlines() if "--device-batch-size" in line]
    assert len(commands) == 2 and all(line.count("--device-batch-size=4") == 1 for line in commands)


def test_a_line_for_a_stage_that_could_not_be_evaluated(base_dir):
    write_json(base_dir / "report" / "result_base_eval.json", {"step": 3})
    write_json(base_dir / "report" / "result_base.json", {"bpb_start": None, "bpb": None, "tokens": 5000})
    assert report.headline("base_eval") == "CORE not evaluated"
    assert report.headline("base_train") == "5,000 tokens, not evaluated"


@pytest.mark.parametrize("cuda, mps, nproc", [(0, False, 8), (1, False, 1), (4, False, 4), (16, True, 8), (0, True, 1)])
def test_at_most_one_process_a_gpu(monkeypatch, capsys, base_dir, cuda, mps, nproc):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    pipeline.pipeline(pipeline.Pipeline(preset="speedrun", dry_run=True))
    assert f"--nproc-per-node={nproc} " in capsys.readouterr().out
