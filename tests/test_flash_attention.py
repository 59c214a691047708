"""Flash attention's own tests (flash_cases.py) with Triton's interpreter here, and compiled where there is a GPU.

Whether a kernel is interpreted is settled when Triton is first imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_cases(interpret):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", "flash_cases.py"]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=HERE, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_under_the_interpreter():
    run_cases("1")


@pytest.mark.gpu
def test_on_a_gpu():
    run_cases("0")
