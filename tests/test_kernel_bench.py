"""The race of kernels: medians in turns, what raises is a finding, promises as ratios, and a whole run on the CPU."""

import json
import math
import time

import pytest
import torch

from nanochat_lib.kernel_races import Bench, loss_rows, pairs
from nanochat_lib.scripts import kernel_bench as script
from nanochat_lib.timing import race


def test_race_takes_turns_and_keeps_who_failed():
    order = []

    def run(name, seconds=0.0):
        def once():
            order.append(name)
            time.sleep(seconds)
        return once

    times, failed = race({"slow": run("slow", 0.02), "quick": run("quick"), "none": lambda: 1 / 0}, "cpu", rounds=5)
    assert set(times) == {"slow", "quick"} and failed == {"none": "division by zero"}
    assert order == ["slow"] * 2 + ["quick"] * 2 + ["slow", "quick"] * 5 and times["slow"] >= 20 > times["quick"]
    order.clear()
    race({"slow": run("slow", 0.01)}, "cpu", rounds=50, seconds=0.0)
    assert len(order) == 2 + 3  # two to warm up, then three rounds at least
    assert race({"none": lambda: 1 / 0}, "cpu") == ({}, {"none": "division by zero"})


@pytest.mark.parametrize("T,window", [(1, None), (7, None), (7, 0), (7, 3), (7, 6), (7, 50)])
def test_pairs_by_counting(T, window):
    assert pairs(T, window) == sum(0 <= i - j <= (T if window is None else window) for i in range(T) for j in range(T))


def filled(ours, theirs, peak=0.2):
    """A bench in which everything of ours takes `ours` milliseconds and everything of others' `theirs`."""
    bench = Bench(torch.device("cpu"))
    both = "forward + backward"
    for part, case, ways in (("forward", "T 2,048", ["ours", "cuDNN"]), ("backward", "T 2,048", ["ours", "cuDNN"]),
                             (both, "T 2,048, window 768", ["ours", "FlexAttention", "cuDNN, full"]),
                             (both, "CPU, T 2,048", ["window 512", "full"]), ("roof", "1 GiB", ["copy"]),
                             ("decoding", "batch 64", ["ours"]),
                             ("loss", "16,384 × 32,768", ["ours", "PyTorch", "PyTorch, compiled"])):
        for way in ways:
            ms = ours if way in ("ours", "window 512") else theirs
            bench.rows.append({"part": part, "case": case, "way": way, "ms": ms, "rate": 1 / ms, "unit": "GB/s",
                               "peak_mib": peak if way == "ours" else 1.0})
    return bench


def test_promises_are_ratios():
    rows = {row["what"]: row for row in script.targets(filled(ours=1.0, theirs=2.0))}
    assert len(rows) == 12 and sum(math.isnan(row["measured"]) for row in rows.values()) == 4  # nothing at T = 8,192
    reached = {what: row["reached"] for what, row in rows.items() if not math.isnan(row["measured"])}
    assert all(reached.values()) and rows["decoding, batch 64: of copy bandwidth"]["measured"] == 2.0
    assert rows["both, T 2,048, window 768: speed over FlexAttention"]["measured"] == 2.0
    assert rows["CPU: window 512 over full, T 2,048"]["measured"] == 0.5
    assert not any(row["reached"] for row in script.targets(filled(ours=2.0, theirs=1.0, peak=0.5)))
    assert not any(row["reached"] for row in script.targets(Bench(torch.device("cpu"))))  # not measured is not reached


def test_no_race_begins_after_the_time(capsys):
    bench = Bench(torch.device("cpu"), seconds=-1.0)
    bench.measure("forward", "T 8", {"ours": lambda: pytest.fail("it ran")})
    assert bench.rows == [{"part": "forward", "case": "T 8", "way": "ours", "failed": "no time was left"}]


def test_a_run_without_time_still_writes(tmp_path, capsys):
    script.kernel_bench(script.Settings(out=tmp_path / "kernels", seconds=-1.0, compile_figures=False, device_type="cpu"))
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert rows and all(row["failed"] == "no time was left" for row in rows) and (tmp_path / "kernels.png").exists()


def test_whole_run_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "cpu_rows", lambda bench: loss_rows(bench, 64, 128, 16))
    script.kernel_bench(script.Settings(out=tmp_path / "deep" / "kernels", quick=True, compile_figures=False,
                                        device_type="cpu"))
    written = json.loads((tmp_path / "deep" / "kernels.json").read_text())
    assert [row["way"] for row in written["rows"]] == ["ours", "PyTorch"] and all(row["rate"] > 0 for row in written["rows"])
    assert written["torch"] == torch.__version__ and written["chip"] and len(written["targets"]) == 8
    assert all(row["measured"] is None for row in written["targets"])  # JSON has no nan
    assert (tmp_path / "deep" / "kernels.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "not measured here" in said and "python -m nanochat_lib.scripts.kernel_bench" in said.splitlines()[-1]
