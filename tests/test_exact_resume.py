"""Lesson 07: killed with SIGKILL again and again, also in the middle of saving, a run is the run that was not killed."""

import json
import os
import subprocess
import sys

import pytest
from conftest import QUIET, ROOT
from small_run import SMALL, data, losses, same, weights  # noqa: F401

from nanochat_lib.scripts.base_train import base_train
from nanochat_lib.pretraining import BaseTrain

STEPS = 100
RUN = {**SMALL, "num_iterations": STEPS, "save_every": 2, "eval_every": -1, "keep_last": 3, "resume": True}

# Forked from one process that has imported everything: a start takes a fraction of a second.
KILLER = """
import json, os, random, signal, socket, sys, time
from pathlib import Path
from nanochat_lib.checkpoint import checkpoint_directory, steps_in
from nanochat_lib.pretraining import BaseTrain
from nanochat_lib.scripts.base_train import base_train

settings, ranks, wanted = BaseTrain(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
folder = checkpoint_directory("base", settings.model_tag)
random.seed(int(sys.argv[4]))


def launch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            base_train(settings)
            os._exit(0)
    return children


def half_written():
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return any(name.startswith(".") or name.startswith(("model", "optim")) and
               f"meta_{name[6:12]}.json" not in names for name in names)


def end(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


kills = caught = 0
while kills < wanted:
    before, started = (steps_in(folder) or [0])[-1], time.monotonic()
    children = launch()
    while (steps_in(folder) or [0])[-1] == before and time.monotonic() < started + 60:
        time.sleep(0.002)
    if kills % 2:  # every other time, in the middle of saving for certain
        while not half_written() and time.monotonic() < started + 60:
            pass
    else:
        time.sleep(random.uniform(0, 0.05))
    for child in children:
        os.kill(child, signal.SIGKILL)
    codes = end(children)
    assert all(code == -signal.SIGKILL for code in codes), codes
    kills, caught = kills + 1, caught + half_written()
assert set(end(launch())) == {0}
print(json.dumps({"kills": kills, "caught": caught}))
"""


def killed(data, tag, ranks, kills, **changes):  # noqa: F811
    """Train with so many ranks, killed so many times; {"kills": …, "caught": kills in the middle of saving}."""
    settings = {**RUN, **changes, "data_dir": data, "model_tag": tag}
    run = subprocess.run([sys.executable, "-c", KILLER, json.dumps(settings), str(ranks), str(kills), "5"], text=True,
                         capture_output=True, cwd=ROOT, env={**os.environ, **QUIET}, timeout=800)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.timeout(900)  # waits for processes: slow on a busy machine
def test_one_process_killed_twelve_times_is_bit_for_bit_the_same(data):  # noqa: F811
    base_train(BaseTrain(**{**RUN, "save_every": -1}, data_dir=data, model_tag="whole"))
    seen = killed(data, "killed", 1, 12)
    assert seen["kills"] == 12 and seen["caught"] >= 4, seen
    assert losses("killed") == losses("whole") and sorted(losses("whole")) == list(range(STEPS))
    assert same(weights("killed", STEPS), weights("whole", STEPS))


@pytest.mark.timeout(900)
def test_two_processes_killed_resume_to_1e_6(data):  # noqa: F811
    steps = 40
    whole = killed(data, "whole", 2, 0, num_iterations=steps, save_every=-1)
    seen = killed(data, "killed", 2, 3, num_iterations=steps)
    assert whole["kills"] == 0 and seen["kills"] == 3
    assert losses("killed") == pytest.approx(losses("whole"), abs=1e-6) and len(losses("whole")) == steps
    assert same(weights("killed", steps), weights("whole", steps), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_on_a_gpu_a_run_killed_four_times_goes_on_as_if_it_had_not_been(data):  # noqa: F811
    changes = dict(device_type="cuda", no_compile=True, head_dim=32, aspect_ratio=32)
    base_train(BaseTrain(**{**RUN, **changes, "save_every": -1}, data_dir=data, model_tag="whole"))
    seen = killed(data, "killed", 1, 4, **changes)
    assert seen["kills"] == 4
    assert losses("killed") == pytest.approx(losses("whole"), abs=1e-3) and len(losses("whole")) == STEPS
