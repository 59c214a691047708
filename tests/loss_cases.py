"""The loss head against float64: run by test_loss_head.py as it is, and with the kernel on a GPU or interpreted."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_lib import loss as module
from nanochat_lib.common import NanochatError
from nanochat_lib.loss import head_loss

KERNEL = "TRITON_INTERPRET" in os.environ  # in a process of its own
DEVICE = "cuda" if KERNEL and torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}
SLOW = KERNEL and DEVICE == "cpu"  # every row is a program, and each of its operations a call of numpy
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda" or not KERNEL)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Fresh memory is full of not-a-number, so an element that nothing writes is found."""
    monkeypatch.setattr(module, "NO_KERNEL", [])
    if KERNEL and DEVICE == "cpu":
        from nanochat_lib.kernels.loss_head import softcap_loss_

        monkeypatch.setattr(module, "loss_", lambda logits, *rest: (
            softcap_loss_ if logits.dtype != torch.float64 else module.plain_loss_)(logits, *rest))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    assert not module.NO_KERNEL


def plain(x, weight, targets, V, reduction="mean", cap=15.0):
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = cap * torch.tanh(F.linear(x, weight[:V].to(x.dtype)).to(wide) / cap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def make(N, V, C, padding=0, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator).to(dtype)
    weight = scale * torch.randn(V + padding, C, generator=generator)
    return x.to(DEVICE), weight.to(DEVICE), torch.randint(-1, V, (N,), generator=generator).to(DEVICE)


def close(got, expected, tolerance, least=1.0):
    """Relative to the largest value, or to `least`: a loss near 0 is the difference of two numbers that are not."""
    assert got.shape == expected.shape and got.isfinite().all()
    assert ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=least)).item() <= tolerance


def check(x, weight, targets, V, reduction, cap=15.0):
    """The loss and both gradients, under any weights of the losses."""
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    wide = [x.double().requires_grad_(), weight.to(x.dtype).double().requires_grad_()]
    got, expected = head_loss(*ours, targets, V, cap, reduction), plain(*wide, targets, V, reduction, cap)
    tolerance = TOLERANCE[x.dtype]
    assert got.dtype == torch.promote_types(x.dtype, torch.float32)
    close(got, expected, tolerance)
    pull = torch.rand(got.shape, generator=torch.Generator().manual_seed(1)).to(got) + 0.5
    gradients = torch.autograd.grad(got, ours, pull), torch.autograd.grad(expected, wide, pull.double())
    for left, right, like in zip(*gradients, ours):
        assert left.dtype == like.dtype
        close(left, right, tolerance, 0.1 if reduction != "mean" else 0.1 / len(x))
    with torch.no_grad():
        close(head_loss(x, weight, targets, V, cap, reduction), expected, tolerance)


@settings(max_examples=8 if SLOW else 25, deadline=None)
@given(st.integers(2, 8 if SLOW else 60), st.integers(2, 300), st.sampled_from([4, 24]), st.sampled_from([0, 5]),
       st.sampled_from([0.1, 1, 6]), st.sampled_from(["mean", "sum", "none"]), st.sampled_from([200, 4000, 1 << 24]), st.integers(0, 999))
def test_any_shape_in_any_chunks(N, V, C, padding, scale, reduction, chunk, seed):
    before = module.CHUNK
    module.CHUNK = {"cpu": chunk, "cuda": chunk}
    try:
        x, weight, targets = make(N, V, C, padding, scale, seed)
        targets[0] = 0  # at least one counts
        check(x, weight, targets, V, reduction)
    finally:
        module.CHUNK = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_byte_numbers(monkeypatch, dtype, reduction):
    for chunk in (1 << 24, 128 * 5000):  # a vocabulary of more than a tile; one chunk, several
        monkeypatch.setattr(module, "CHUNK", {"cpu": chunk, "cuda": chunk})
        check(*make(9 if SLOW else 300, 5000, 24, 8, 0.5, dtype=dtype), 5000, reduction)


def test_large_logits_stay_finite():
    """Logits of ±thousands: the tanh is flat there, and nothing overflows."""
    x, weight, targets = make(9, 40, 8, scale=500)
    check(x, weight, targets, 40, "sum")
    check(x, weight, targets, 40, "none", cap=5.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_targets(reduction):
    """Nothing to learn: no loss, no gradient, and no division by zero."""
    x, weight, targets = make(7, 20, 4)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = head_loss(x, weight, targets.fill_(-1), reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not x.grad.any() and not weight.grad.any()


def test_ignored_rows_and_padding_get_exactly_nothing():
    x, weight, targets = make(20, 30, 8, padding=6)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    head_loss(x, weight, targets, 30).backward()
    assert not x.grad[targets < 0].any() and x.grad[targets >= 0].any(1).all()
    assert not weight.grad[30:].any() and weight.grad[:30].any(1).all()


def test_weights_that_need_no_gradient():
    x, weight, targets = make(9, 20, 4)
    loss = head_loss(x.requires_grad_(), weight, targets)
    loss.backward()
    assert x.grad.any() and not head_loss(x.detach(), weight, targets).requires_grad


def test_shapes_of_a_batch():
    x, weight, targets = make(12, 20, 4)
    losses = head_loss(x.view(3, 4, 4), weight, targets.view(3, 4), reduction="none")
    assert losses.shape == (3, 4)
    close(losses.flatten(), plain(x, weight, targets, 20, "none").double(), 1e-5)
    with pytest.raises(NanochatError, match="mean, sum or none"):
        head_loss(x, weight, targets, reduction="max")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_takes_it_whole(reduction):
    x, weight, targets = make(9, 18, 4, padding=2)
    results = []
    compiled = torch.compile(head_loss, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for run in (head_loss, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        loss = run(*leaves, targets, 18, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sin().sum(), leaves)))
    for left, right in zip(*results):
        torch.testing.assert_close(left, right)
