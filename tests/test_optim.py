"""optim (lesson 05) against torch.optim.AdamW, a float64 Muon written from the papers, and itself on two processes."""

import types

import pytest
import torch

from nanochat_lib import compiling
from nanochat_lib.common import NanochatError
from nanochat_lib.muon import POLAR_EXPRESS, direction, equalize_rows, muon_step, polar_express, second_moment_like
from nanochat_lib.optim import (LARGE, MuonAdamW, Shard, adamw_formula, adamw_step, fast_adamw, owned_rows,
                                parameter_groups)
from tests.optim_worker import train


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adamw_group(params, **changes):
    return {**dict(kind="adamw", params=params, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1), **changes}


def muon_group(params, **changes):
    return {**dict(kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.9, weight_decay=0.1), **changes}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_agrees_with_torch(weight_decay):
    ours = [torch.nn.Parameter(randn(*shape)) for shape in ((50, 30), (7,), (1,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = MuonAdamW([adamw_group(ours, weight_decay=weight_decay)])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
    for step in range(7):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.01 / (step + 1)
        for number, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = randn(*a.shape, seed=10 * step + number)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_in_one_pass_as_by_the_formula(dtype):
    size = LARGE + 77
    ours, theirs = ([randn(size).to(dtype), torch.zeros(size), torch.zeros(size)] for _ in range(2))
    for step in range(1, 4):
        gradient = randn(size, seed=step).to(dtype)
        fast_adamw([ours[0]], [gradient], [ours[1]], [ours[2]], step, 0.1 / step, (0.8, 0.95), 1e-10, 0.1)
        adamw_step([theirs[0]], [gradient.float()], [theirs[1]], [theirs[2]], step, 0.1 / step, (0.8, 0.95), 1e-10, 0.1)
    for a, b in zip(ours, theirs):
        rounding = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def plain_muon(w, g, m, v, lr, momentum, beta2, weight_decay):
    """One matrix, float64, one formula after the other; returns (weights, momentum buffer, second moment per line)."""
    rows, cols = w.shape
    m = momentum * m + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * m
    norms = torch.tensor([row.norm() for row in u])
    u = torch.stack([row / norm * norms.mean() for row, norm in zip(u, norms)])
    u = u / (1.01 * (u * u).sum().sqrt())
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    u = left @ torch.diag(s) @ right
    u = u * (min(rows, cols) / (u * u).sum()).sqrt()
    lines = u if rows >= cols else u.T  # a line runs along the shorter side
    before = u.norm()
    v = beta2 * v + (1 - beta2) * (lines**2).mean(1)
    lines = lines / v.sqrt()[:, None]
    u = lines if rows >= cols else lines.T
    u = u * before / u.norm()
    decay = torch.where(u * w > 0, w, torch.zeros_like(w))
    return w - lr * max(1, rows / cols) ** 0.5 * (u + weight_decay * decay), m, v


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_muon_agrees_with_a_plain_float64_version(shape):
    params = [torch.nn.Parameter(randn(*shape, seed=n)) for n in range(3)]
    expected = [p.detach().double() for p in params]
    moments = [(torch.zeros(shape, dtype=torch.float64), torch.zeros(max(shape), dtype=torch.float64))] * 3
    optimizer = MuonAdamW([muon_group(params)])
    for step in range(4):
        optimizer.param_groups[0]["momentum"] = 0.85 + 0.03 * step
        for number, p in enumerate(params):
            p.grad = randn(*shape, seed=100 + 10 * step + number)
            expected[number], *moments[number] = plain_muon(expected[number], p.grad.double(), *moments[number], 0.02,
                                                            0.85 + 0.03 * step, 0.9, 0.1)
        optimizer.step()
    for p, w in zip(params, expected):
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 64, 16), (2, 16, 64)])
def test_polar_express_makes_singular_values_one_and_keeps_vectors(shape):
    matrices = randn(*shape)
    left, s, right = torch.linalg.svd(matrices, full_matrices=False)
    s[..., -1] = 2e-3 * s.norm(dim=-1)  # the smallest it promises for
    result = polar_express(left @ torch.diag_embed(s) @ right)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.8 and values.max() < 1.15
    inner = left.mT @ result @ right.mT  # diagonal: the same singular vectors
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 2e-3


def test_coefficients_are_the_published_ones_to_eight_digits():
    assert POLAR_EXPRESS[0] == pytest.approx((8.1565546, -22.483293, 15.878770), rel=1e-7)
    assert POLAR_EXPRESS[4] == pytest.approx((2.3465413, -1.7097828, 0.42323551), rel=1e-7)


def test_rows_are_equalized_to_their_mean_norm():
    matrices = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    torch.testing.assert_close(equalize_rows(matrices), torch.tensor([[[1.8, 2.4], [0.0, 3.0]]]))


def test_zero_and_missing_gradients_move_nothing_and_are_finite():
    matrices, table = [torch.nn.Parameter(randn(4, 4)) for _ in range(2)], torch.nn.Parameter(randn(9, 4))
    before = [p.detach().clone() for p in (*matrices, table)]
    optimizer = MuonAdamW([muon_group(matrices, weight_decay=0.0), adamw_group([table], weight_decay=0.0)])
    matrices[0].grad = torch.zeros(4, 4)
    optimizer.step()
    for p, w in zip((*matrices, table), before):
        assert torch.equal(p, w)


def test_cautious_decay_shrinks_only_where_the_step_agrees():
    weights, gradients = randn(1, 6, 6), randn(1, 6, 6, seed=1)
    results = []
    for weight_decay in (0.0, 0.5):
        w = weights.clone()
        muon_step(w, gradients, torch.zeros_like(w), second_moment_like(w), 0.1, 0.9, 0.9, weight_decay)
        results.append(w)
    plain, decayed = results
    agree = (weights - plain) * weights > 0
    torch.testing.assert_close(decayed, plain - 0.05 * weights * agree)
    assert 0 < agree.sum() < 36


def test_bfloat16_weights_keep_float32_moments():
    table = torch.nn.Parameter(randn(40, 40).bfloat16())
    optimizer = MuonAdamW([adamw_group([table])])
    before = table.detach().clone()
    for step in range(3):
        table.grad = randn(40, 40, seed=step).bfloat16()
        optimizer.step()
    assert table.dtype == torch.bfloat16 and not torch.equal(table, before)
    assert optimizer.state_of(0)["first"][0].dtype == torch.float32


def test_muon_in_bfloat16_where_that_is_the_compute_dtype(monkeypatch):
    matrices = randn(2, 16, 16)
    exact = polar_express(matrices)
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    rough = polar_express(matrices)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


def test_a_compiler_takes_muons_direction_whole():
    for shape in ((2, 16, 16), (2, 24, 8), (1, 8, 24)):
        g, second = randn(*shape), second_moment_like(randn(*shape))
        again = second.clone()
        expected = direction(g, second, 0.9, torch.float32)
        got = torch.compile(direction, backend="aot_eager", fullgraph=True, dynamic=False)(g, again, 0.9, torch.float32)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(again, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_for_a_compiler_is_the_step(dtype):
    compiled = torch.compile(adamw_formula, backend="aot_eager", fullgraph=True, dynamic=False)
    ours, theirs = ([randn(30, 8).to(dtype), torch.zeros(30, 8), torch.zeros(30, 8)] for _ in range(2))
    for step in range(1, 5):
        g, lr = randn(30, 8, seed=step), 0.1 / step
        adamw_step([ours[0]], [g], [ours[1]], [ours[2]], step, lr, (0.8, 0.95), 1e-10, 0.1)
        numbers = torch.tensor((1 - lr * 0.1, lr / (1 - 0.8**step), 1 / (1 - 0.95**step)))
        compiled(theirs[0], g, theirs[1], theirs[2], numbers, 0.8, 0.95, 1e-10)
    for a, b in zip(ours, theirs):
        rounding = 2e-2 if a.dtype == torch.bfloat16 else 1e-5  # the step rounds twice, the formula once
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def test_without_a_compiler_formulas_run_as_they_are(monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise RuntimeError("no C compiler\nmuch more")

    monkeypatch.setattr(torch, "compile", missing)
    monkeypatch.setattr(compiling, "NO_COMPILER", [])
    on_a_gpu = types.SimpleNamespace(is_cuda=True)
    results = [compiling.on_gpu_compiled(lambda x, n: n + 1, on_a_gpu, n) for n in (1, 2)]
    assert results == [2, 3] and capsys.readouterr().out.count("no C compiler): going on without") == 1


def test_groups_hold_every_parameter_once(make_model):
    model = make_model()
    groups = {group["name"]: group for group in parameter_groups(model, weight_decay=0.28)}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    width = (768 / 64) ** 0.5
    assert groups["lm_head"]["lr"] == pytest.approx(0.008 * width) and groups["wte"]["lr"] == pytest.approx(0.3 * width)
    assert groups["value_embeds"]["lr"] == pytest.approx(0.15 * width)
    assert groups["resid_lambdas"]["lr"] == pytest.approx(0.005) and groups["x0_lambdas"]["betas"] == (0.96, 0.95)
    muon = [group for group in groups.values() if group["kind"] == "muon"]
    assert {id(p) for group in muon for p in group["params"]} == {id(p) for p in model.transformer.h.parameters()}
    assert all(group["lr"] == 0.02 and group["weight_decay"] == 0.28 for group in muon)


def test_wrong_groups_are_named():
    with pytest.raises(NanochatError, match="tables: kind 'sgd'"):
        MuonAdamW([dict(kind="sgd", name="tables", params=[torch.nn.Parameter(randn(2, 2))], lr=1)])
    with pytest.raises(NanochatError, match="one shape"):
        MuonAdamW([muon_group([torch.nn.Parameter(randn(2, 2)), torch.nn.Parameter(randn(3, 2))])])


@pytest.mark.parametrize("rows, world_size", [(1, 1), (7, 2), (3, 4), (64, 8), (5, 8)])
def test_every_row_has_one_owner(rows, world_size):
    owners = [row for rank in range(world_size) for row in range(*owned_rows(rows, rank, world_size))]
    assert owners == list(range(rows))


def test_a_state_that_does_not_fit_is_refused():
    small, large = (MuonAdamW([muon_group([torch.nn.Parameter(randn(n, n))], name="muon")]) for n in (4, 5))
    with pytest.raises(NanochatError, match="does not fit this model at muon"):
        large.load_checkpoint_state(small.checkpoint_state())
    assert Shard(small.param_groups[0]["params"], True).local_shape == (1, 4, 4)


def close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_are_one_and_checkpoints_reshard(tmp_path, run_module):
    """Same global batch, same weights; state saved by one process goes on in two, and the other way round."""
    folders = {name: tmp_path / name for name in ("one", "two", "one_to_two", "two_to_one", "one_to_one")}
    for folder in folders.values():
        folder.mkdir()
    expected = train(folders["one"])

    def two_processes(name, *load):
        done = run_module("tests.optim_worker", folders[name], *load, nproc=2)
        assert done.returncode == 0, done.stderr
        return torch.load(folders[name] / "weights.pt")

    close(two_processes("two"), expected)
    close(two_processes("one_to_two", folders["one"] / "half"), expected)
    close(train(folders["two_to_one"], folders["two"] / "half"), expected)
    again = train(folders["one_to_one"], folders["one"] / "half")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
