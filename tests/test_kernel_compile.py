"""Every kernel compiles for four generations of chips without a GPU, spills nothing and fits into shared memory."""

import importlib
import json
import os
import subprocess
import sys
from operator import itemgetter
from types import SimpleNamespace

import pytest
from conftest import ROOT

from nanochat_lib.kernels import compile_check

RECORD = "python -m nanochat_lib.kernels.compile_check --json docs/kernels_compiled.json"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compile anew, whatever this machine has compiled before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.timeout(900)  # about 200 s of one core; a busy machine takes longer
def test_every_kernel_on_every_chip():
    names = compile_check.modules()
    assert "flash_attention" in names
    rows = compile_check.check(names, list(compile_check.CHIPS), jobs=2)
    assert [row for row in rows if row["fault"]] == []
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["spilled_bytes"] == 0, row
        assert 0 <= row["shared_kib"] <= compile_check.CHIPS[row["sm"]], row
    for name in names:  # every @triton.jit function that is launched is among the cases
        module = importlib.import_module(f"nanochat_lib.kernels.{name}")
        cases = list(module.compile_cases(90))
        assert len({case[0] for case in cases}) == len(cases), "labels are unique"
        built = {getattr(case[1], "fn", case[1]).__name__ for case in cases}
        assert {word for word in vars(module) if word.endswith("_kernel")} <= built, built
    recorded = json.loads((ROOT / "docs" / "kernels_compiled.json").read_text())
    case = itemgetter("module", "case", "sm")
    assert list(map(case, recorded["rows"])) == list(map(case, rows)), f"other cases than recorded: {RECORD}"
    if recorded["triton"] == importlib.import_module("triton").__version__:
        assert recorded["rows"] == rows, f"other figures than recorded: {RECORD}"


def test_chips_with_little_shared_memory_are_checked():
    """8.6, 8.9 and 12.0 have 99 KiB a block; the former take the settings of 8.0."""
    assert compile_check.CHIPS[80] <= 99 and compile_check.CHIPS[120] <= 99


GREEDY = '''
"""A kernel that keeps too much."""

import triton
import triton.language as tl


@triton.jit
def square_kernel(x, out, stride, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * stride + tl.arange(0, N)[None, :]
    tile = tl.load(x + at)
    if N == 32:
        tile = tl.dot(tile, tile)  # through shared memory
    tl.store(out + at, tile - tl.sum(tile))  # every number must wait for the sum


def compile_cases(capability):
    types = {"x": "*fp32", "out": "*fp32", "stride": "i32:16"}
    for N, warps in ((32, 4), (128, 1)):
        yield f"N={N}", square_kernel, types, {"N": N}, {"num_warps": warps}
'''


def test_faults_are_named(tmp_path):
    """One kernel is fine, one spills, and on a chip with 1 KiB of shared memory the fine one does not fit."""
    package = tmp_path / "nanochat_lib"
    code = (f"import nanochat_lib.kernels as kernels; kernels.__path__.append({str(package)!r})\n"
            "from nanochat_lib.kernels.compile_check import CHIPS, report\n"
            "rows = [report('greedy', 0, 80), report('greedy', 1, 80)]\n"
            "CHIPS[80] = 1\n"
            "import json; print(json.dumps([*rows, report('greedy', 0, 80)]))")
    package.mkdir()
    (package / "greedy.py").write_text(GREEDY)
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=200,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    fine, spills, large = json.loads(done.stdout)
    assert fine["fault"] == "" and fine["sm"] == 80 and fine["warps"] == 4
    assert spills["fault"].startswith("spills") and spills["spilled_bytes"] > 0
    assert large["shared_kib"] == fine["shared_kib"] and "more shared memory than the 1 KiB of sm_80" in large["fault"]


def test_serialized_products_are_a_fault(monkeypatch):
    """What the assembler says of Hopper's asynchronous products: nothing, something harmless, the fault."""
    said = ""

    def build(*_):
        print(f"ptxas info : {said}")
        return SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=1024, num_warps=4))

    monkeypatch.setattr(compile_check, "build", build)
    monkeypatch.setattr(compile_check, "resources", lambda cubin: {"registers": 200, "spilled_bytes": 0})
    for said, fault in (("", ""), ("a wait is injected", ""), ("wgmma.mma_async instructions are serialized", "wait for")):
        row = compile_check.report("loss_head", 0, 90)
        assert fault in row["fault"] and bool(row["fault"]) == bool(fault), row


def test_command_line(run_module, tmp_path):
    done = run_module("nanochat_lib.kernels.compile_check", "--modules", "nothing")
    assert done.returncode == 1 and "no kernels for module nothing: choose from" in done.stderr
    done = run_module("nanochat_lib.kernels.compile_check", "--chips", "70")
    assert done.returncode == 1 and "choose from 80, 90, 100, 120" in done.stderr
    done = run_module("nanochat_lib.kernels.compile_check", "--modules", "loss_head", "--only", "D=7")
    assert done.returncode == 1 and "no kernel's name holds 'D=7'" in done.stderr
