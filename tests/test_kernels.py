"""The kernels' own tests (…_cases.py) with Triton's interpreter here, and compiled where there is a GPU.

Whether a kernel is interpreted is settled when Triton is first imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = pytest.mark.parametrize("kernel", ["flash", "decoding", "loss", "step"])


def run_cases(kernel, interpret):
    options = ["-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "pytest", *options, f"{kernel}_cases.py"], cwd=HERE, text=True,
                          env={**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": path}, capture_output=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@KERNELS
def test_under_the_interpreter(kernel):
    run_cases(kernel, "1")


@pytest.mark.gpu
@KERNELS
def test_on_a_gpu(kernel):
    run_cases(kernel, "0")
