"""The whole path at a size of seconds: real stages, one after the other, and the report of what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUIET, ROOT

COMMAND = [sys.executable, "-m", "nanochat_lib.pipeline", "--preset=tour"]


def run(folder: Path) -> str:
    environment = {**os.environ, **QUIET, "NANOCHAT_BASE_DIR": str(folder)}
    done = subprocess.run(COMMAND, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> Path:
    """The folder of a `tour` run: the one that `make test` has just made, or a new one."""
    if made := os.environ.get("NANOCHAT_TOUR"):
        return Path(made)
    folder = tmp_path_factory.mktemp("tour")
    run(folder)
    return folder


@pytest.mark.timeout(900)
def test_report_of_a_real_run(tour):
    report = json.loads((tour / "report.json").read_text())
    assert list(report["stages"]) == ["world", "tok_train", "base_train", "base_eval", "chat_sft", "chat_eval_sft", "chat_rl",
                                      "chat_eval_rl"] and all(seconds > 0 for seconds in report["stages"].values())
    base = report["base"]
    assert 0 < base["bpb"] < 0.8 * base["bpb_start"] and base["bpb_curve"][0] == [0, base["bpb_start"]]
    assert {"world_facts_mc", "world_schema", "world_sums_lm"} <= set(base["core_tasks"]) and base["core"] is not None
    assert report["sft"]["tasks"].keys() == report["rl"]["tasks"].keys() >= {"multiple_choice", "letter_counting", "word_problems_2"}
    assert all(0 <= accuracy <= 1 for stage in ("sft", "rl") for accuracy in report[stage]["tasks"].values())
    assert report["samples"] and report["environment"]["torch"]
    page = (tour / "report.md").read_text()
    assert "report/report.png" in page and (tour / "report" / "report.png").stat().st_size > 10_000


def test_a_second_run_does_nothing_again(tour):
    before = json.loads((tour / "pipeline.json").read_text())
    said = run(tour)
    assert json.loads((tour / "pipeline.json").read_text()) == before
    assert all(stage in said for stage in before)
