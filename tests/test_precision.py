"""Which dtype a run computes in, float16's scale on several ranks, and what speed is held against."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import QUIET, ROOT

from nanochat_lib.common import NanochatError, read_json
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.plain import plain_loss
from nanochat_lib.scripts import train_bench as script
from nanochat_lib.scripts.train_bench import Linear, TrainBench, train_bench
from nanochat_lib.training import choose_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_dtype_left(monkeypatch):
    """choose_dtype sets the variable: put it back."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "")
    monkeypatch.delenv("NANOCHAT_DTYPE")


def able(monkeypatch, *names):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda found=name in names: found, raising=False)


@pytest.mark.parametrize("names, width, expected", [((), 2048, "float32"), (("avx512_bf16",), 256, "bfloat16"),
                                                    (("amx_tile",), 768, "bfloat16"), (("amx_tile",), 128, "float32")])
def test_wide_models_compute_in_bfloat16_where_the_cpu_can(monkeypatch, capsys, names, width, expected):
    able(monkeypatch, *names)
    assert choose_dtype(CPU, width) == getattr(torch, expected)
    assert ("NANOCHAT_DTYPE=float32" in capsys.readouterr().out) == (expected == "bfloat16")
    model = build_model(GPTConfig(128, 320, 1, 1, 1, 64), "cpu")  # all code of the process agrees
    assert model.dtype == getattr(torch, expected) and model.lm_head.weight.dtype == torch.float32


def test_the_users_dtype_stands(monkeypatch, capsys):
    able(monkeypatch, "avx512_bf16", "amx_tile")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert choose_dtype(CPU, 2048) == torch.float32 and not capsys.readouterr().out


def test_bfloat16_learns_as_float32_does(monkeypatch):
    last = {}
    ids = torch.arange(4 * 65).view(4, 65) * 5 % 101
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        torch.manual_seed(0)
        model = build_model(GPTConfig(128, 101, 2, 2, 2, 64), "cpu")
        optimizer = model.setup_optimizer(matrix_lr=0.01, embedding_lr=0.05)
        for _ in range(15):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            model.zero_grad()
        last[name] = loss.item()
    assert last["float32"] < 3 and last["bfloat16"] == pytest.approx(last["float32"], abs=0.1)


WORKER = """
import json, sys, torch
from nanochat_lib.common import start, stop
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.training import LossScaler, accumulate
runtime = start("cpu")
torch.manual_seed(0)
model = build_model(GPTConfig(128, 101, 1, 2, 2, 64), "cpu")
optimizer, scaler = model.setup_optimizer(), LossScaler(torch.float16, patience=2)
ids = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(runtime.rank))
batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
seen = []
for step in range(4):
    accumulate(model, iter([batch]), 1, scaler)
    if step == 1 and runtime.rank == 1:  # one gradient of one rank
        model.lm_head.weight.grad[3, 3] = float("inf")
    before = model.lm_head.weight.clone()
    stepped = scaler.step(optimizer)
    model.zero_grad(set_to_none=True)
    weight = model.lm_head.weight
    seen.append([stepped, scaler.scale, not torch.equal(before, weight), weight.sum().item()])
open(f"{sys.argv[1]}/{runtime.rank}.json", "w").write(json.dumps(seen))
stop()
"""


def test_an_overflow_on_one_rank_skips_the_step_of_all(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200,
                          env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "NANOCHAT_DTYPE": "float16"})
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # weights too
    assert [step[0] for step in first] == [step[2] for step in first] == [True, False, True, True]
    assert [step[1] for step in first] == [2.0**16, 2.0**15, 2.0**15, 2.0**16]  # doubled again after two


@pytest.mark.parametrize("changes", [{}, {"n_layer": 1, "n_kv_head": 4}, {"window_pattern": "L"},
                                     {"sequence_len": 200, "n_layer": 4, "window_pattern": "SSSL"}])
def test_the_plain_model_is_the_model(make_model, changes):
    model = make_model(**changes)
    ids = torch.randint(0, 309, (2, model.config.sequence_len + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -1
    gradients = []
    for loss in (model(inputs, targets), plain_loss(model, inputs, targets)):
        loss.backward()
        gradients.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    (ours, by_hand), (plain, by_autograd) = gradients
    assert ours == pytest.approx(plain, abs=1e-5)
    for a, b in zip(by_hand, by_autograd):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_both_buffers_of_the_bench_choose_alike():
    from nanochat_lib.dataloader import BestFit

    slow, fast = Linear(), BestFit()
    for length in (9, 3, 7, 3, 12):
        slow.add(range(length)), fast.add(range(length))
    for room in (8, 8, 2, 100, 1):
        assert len(slow.take(room)) == len(fast.take(room))


def test_the_bench_prints_and_keeps_a_table(base_dir, monkeypatch, capsys):
    small = dict(depth=2, max_seq_len=64, device_batch_size=2, vocab_size=320, steps=2, repeats=1, device_type="cpu")
    monkeypatch.setattr(script, "ask_contestant",  # in this process: starting others is most of the time
                        lambda settings, way: script.be_contestant(TrainBench(**{**small, "way": way})))
    train_bench(TrainBench(parts="step,loader,saving", **small))
    table = {row["what"]: row["value"] for row in read_json(base_dir / "report" / "train_bench.json")}
    assert len(table) == 5 and all(value > 0 for value in table.values())
    assert table["loader: rows/s against a linear search"] > 1
    assert "target ≥ 1.6" in capsys.readouterr().out
    with pytest.raises(NanochatError, match="step, loader, saving, core"):
        train_bench(TrainBench(parts="speed", **small))


def test_a_contestant_answers_in_json(run_module):
    done = run_module("nanochat_lib.scripts.train_bench", "--way=plain", "--depth=1", "--max-seq-len=32",
                      "--device-batch-size=1", "--vocab-size=320", "--steps=2", "--device-type=cpu")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["dtype"] == "float32" and len(answer["seconds"]) == 1 and answer["peak"] > 2**26
