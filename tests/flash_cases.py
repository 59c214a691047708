"""Flash attention against float64: run by test_kernels.py in a process of its own, on a GPU or interpreted."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import cases, close, inputs, slow

from nanochat_lib import attention as module
from nanochat_lib import loss
from nanochat_lib.kernels import decoding
from nanochat_lib.kernels import flash_attention as kernel

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SIZES = [dict(BLOCK_M=32, BLOCK_N=32), dict(BLOCK_M=16, BLOCK_N=64), dict(BLOCK_M=64, BLOCK_N=16)]


@pytest.fixture(autouse=True)
def strict():
    """Fresh memory is full of not-a-number, so an element that no kernel writes is found; warnings are errors."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.use_deterministic_algorithms(False)


def check(shape, window, seed=0, dtype=torch.float32, view=lambda x: x):
    """Output, logsumexp and all gradients of one case; returns them."""
    tensors = [view(x.to(DEVICE)).requires_grad_() for x in inputs(*shape, seed=seed, dtype=dtype)]
    out, lse = kernel.flash_attention(*tensors, window)
    assert out.dtype == dtype and lse.dtype == torch.float32 and not lse.requires_grad
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected, sums = slow(*wide, window)
    close(out, expected, TOLERANCE[dtype])
    close(lse, sums, 1e-5)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    gradients = torch.autograd.grad(out, tensors, pull)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, wide, pull.double())):
        assert got.dtype == dtype
        close(got, wanted, TOLERANCE[dtype])
    return out, lse, *gradients


@settings(max_examples=10, deadline=None)
@given(cases(100), st.sampled_from([torch.float32, torch.float16]))
def test_any_shape(case, dtype):
    check(case[:5], *case[5:], dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("window", [None, 0, 15, 16, 33, 69])
def test_tiles_larger_and_smaller_than_blocks(monkeypatch, sizes, window):
    monkeypatch.setattr(kernel, "settings", lambda *_: sizes)
    check((1, 71, 2, 1, 32), window, dtype=torch.float16)


@pytest.mark.parametrize("shape", [(3, 40, 6, 3, 32), (1, 40, 17, 17, 32), (2, 33, 8, 4, 32)], ids=str)
def test_heads_that_fill_no_bunch(shape):
    check(shape, 20, dtype=torch.float16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("D", kernel.HEAD_DIMS)
def test_head_dimensions_and_dtypes(D, dtype):
    if GPU and D == 256 and dtype == torch.float32:
        with pytest.raises(ValueError, match="registers"):
            check((1, 70, 2, 1, D), 40, dtype=dtype)
    else:
        check((1, 70, 2, 1, D), 40, dtype=dtype)


@pytest.mark.parametrize("view", {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dims not last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "odd start": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "odd rows": lambda x: torch.cat([x, x[..., :1]], dim=3)[..., :-1],
}.items(), ids=lambda item: item[0])
def test_any_strides(view):
    for got, expected in zip(check((2, 40, 2, 1, 32), 9, view=view[1]), check((2, 40, 2, 1, 32), 9)):
        assert torch.equal(got, expected)


def test_same_bits_every_time():
    for left, right in zip(check((1, 90, 4, 2, 32), 30), check((1, 90, 4, 2, 32), 30)):
        assert torch.equal(left, right)


def test_expanded_gradient():
    """The gradient of a sum has stride zero everywhere."""
    tensors = [x.to(DEVICE).requires_grad_() for x in inputs(1, 40, 2, 1, 32)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    for got, wanted in zip(torch.autograd.grad(kernel.flash_attention(*tensors, 9)[0].sum(), tensors),
                           torch.autograd.grad(slow(*wide, 9)[0].sum(), wide)):
        close(got, wanted, 1e-5)


def test_tiles_out_of_the_window_are_never_visited():
    q, k, v = (x.to(DEVICE) for x in inputs(1, 600, 2, 1, 32, dtype=torch.float16))
    k[:, :256], v[:, :256] = torch.nan, torch.nan
    out, lse = kernel.flash_attention(q, k, v, 50)
    assert out[:, 512:].isfinite().all() and lse[:, :, 512:].isfinite().all()
    grad = torch.ones_like(out)
    out.nan_to_num_(), lse.nan_to_num_()
    dq, dk, dv = kernel.flash_backward(grad, q, k, v, out, lse, 50)
    assert dq[:, 512:].isfinite().all()
    grad[:, 512:], q[:, 512:] = torch.nan, torch.nan  # and late queries say nothing to early keys
    k.nan_to_num_(), v.nan_to_num_()
    for gradient in kernel.flash_backward(grad, q, k, v, out, lse, 50)[1:]:
        assert gradient[:, :256].isfinite().all()


def test_grids_have_one_axis(monkeypatch):
    """Of a grid's axes only the first may be longer than 65,535."""
    class Launched:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    grids = []
    for name in ("forward_kernel", "dq_kernel", "dkdv_kernel"):
        monkeypatch.setattr(kernel, name, Launched())
    q = torch.zeros(40_000, 1, 2, 32, device=DEVICE, requires_grad=True)
    torch.autograd.grad(kernel.flash_attention(q, q, q)[0].sum(), q)
    assert grids == [(80_000,)] * 3


def operator_calls():
    """Every operator that the kernels and the loss register, with arguments."""
    q, k, v = (x.to(DEVICE) for x in inputs(1, 33, 2, 1, 32))
    out, lse = kernel.flash_forward(q, k, v, 9)
    lengths, targets = torch.tensor([20], device=DEVICE), torch.tensor([2, -1, 6], device=DEVICE)
    x, weight = torch.randn(3, 4, device=DEVICE), torch.randn(8, 4, device=DEVICE)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, x, weight)]
    losses = (*leaves[3:], targets, 7, 15.0, True)
    kept, factors = loss.token_losses(*losses)[1].detach(), torch.ones(3, device=DEVICE)
    return {"flash_forward": (kernel.flash_forward, (*leaves[:3], 9)),
            "flash_backward": (kernel.flash_backward, (torch.randn_like(out), q, k, v, out, lse, 9)),
            "decode_attention": (decoding.decoding_op, (q[:, :1], k, v, lengths, 9, None, None, None, None)),
            "summed_loss": (loss.summed_loss, losses), "token_losses": (loss.token_losses, losses),
            "token_losses_backward": (loss.token_losses_backward, (x, weight, targets, 7, 15.0, kept, factors))}


@pytest.mark.parametrize("name", ["flash_forward", "flash_backward", "decode_attention", "summed_loss", "token_losses",
                                  "token_losses_backward"])
def test_registered_as_pytorch_wants_it(name):
    operator, arguments = operator_calls()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(operator, arguments,
                              test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_decoding_says_that_it_has_no_gradient():
    q, k, v = (x.to(DEVICE) for x in inputs(1, 33, 2, 1, 32, grad=True))
    lengths = torch.tensor([20], device=DEVICE)
    with pytest.raises(RuntimeError, match="no gradient"):
        decoding.decode_attention(q[:, :1], k, v, lengths)
    with torch.no_grad():
        decoding.decode_attention(q[:, :1], k, v, lengths)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_takes_it_whole(dynamic):
    def loss(q, k, v):
        return kernel.flash_attention(2 * q, k, v, 9)[0].square().sum()

    tensors = [x.to(DEVICE).requires_grad_() for x in inputs(1, 33, 2, 1, 32)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(loss, backend="inductor" if GPU else "aot_eager", fullgraph=True, dynamic=dynamic)
        got = torch.autograd.grad(compiled(*tensors), tensors)
    for left, right in zip(got, torch.autograd.grad(loss(*tensors), tensors)):
        close(left, right.double(), 1e-5)


@pytest.mark.parametrize("compiling", [False, True])
def test_attention_takes_it_when_told(monkeypatch, compiling):
    """The choice tries both passes first, while a compiler traces, too."""
    monkeypatch.setenv("NANOCHAT_ATTENTION", "triton")
    module.fault.cache_clear()
    run = module.attention
    if compiling:
        run = torch.compile(run, backend="inductor" if GPU else "aot_eager", fullgraph=True)
    tensors = [x.to(DEVICE).requires_grad_() for x in inputs(1, 70, 2, 1, 32)]
    assert module.backend(tensors[0], 9) == module.backend(tensors[0]) == "triton"
    wide = [x.detach().double().requires_grad_() for x in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients = torch.autograd.grad(run(*tensors, 9).sin().sum(), tensors)
    for got, wanted in zip(gradients, torch.autograd.grad(slow(*wide, 9)[0].sin().sum(), wide)):
        close(got, wanted, 1e-5)
    assert not module.FAILED and module.fault.cache_info().currsize  # tried, and without a fault
    assert not module.fault("cuda" if GPU else "cpu", torch.float32, 32, False)


@pytest.mark.parametrize("shape", [(1, 8, 3, 2, 32), (1, 8, 2, 2, 48)])
def test_what_it_does_not_take(shape):
    with pytest.raises(ValueError, match="shapes do not fit|head dimension 48"):
        kernel.flash_attention(*inputs(*shape))
