"""Attention: every way against a float64 reference written here, the kernel under the interpreter, and for sm_90."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_lib import attention as module
from nanochat_lib.attention import BandAttention, attention, backend, blocked_attention, cached_attention
from nanochat_lib.common import NanochatError

ATTENTION = "NANOCHAT_ATTENTION"


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(ATTENTION, raising=False)


def slow(q, k, v, window=None, offset=0):
    """(output, logsumexp (B, H, T)) in float64, one query at a time."""
    q, k, v = (x.double() for x in (q, k, v))
    B, T, H, D = q.shape
    group, rows, sums = H // k.size(2), [], []
    for t in range(T):
        last = t + offset
        first = 0 if window is None else max(0, last - window)
        heads, lse = [], []
        for h in range(H):
            s = (k[:, first:last + 1, h // group] @ q[:, t, h, :, None])[..., 0] / D**0.5  # (B, keys)
            lse.append(s.logsumexp(1))
            p = (s - lse[-1][:, None]).exp()
            heads.append((p[..., None] * v[:, first:last + 1, h // group]).sum(1))
        rows.append(torch.stack(heads, 1))
        sums.append(torch.stack(lse, 1))
    return torch.stack(rows, 1), torch.stack(sums, 2)


def inputs(B, T, H, KVH, D, seed=0, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(B, T, heads, D, generator=generator).to(dtype).requires_grad_(grad)  # noqa: E731
    return make(H), make(KVH), make(KVH)


@st.composite
def cases(draw, max_T):
    """(B, T, H, KVH, D, window, seed); windows favour the edges."""
    T, KVH = draw(st.integers(1, max_T)), draw(st.sampled_from([1, 2]))
    window = draw(st.sampled_from([None, 0, 1, max(0, T - 2), T - 1, T, T + 50]) | st.integers(0, max_T))
    return draw(st.integers(1, 2)), T, KVH * draw(st.sampled_from([1, 2, 3])), KVH, draw(st.sampled_from([32, 64])), \
        window, draw(st.integers(0, 2**20))


def close(got, expected, tolerance):
    """The largest difference, relative to the largest value; what should be zero is held to the size of the inputs."""
    largest = expected.abs().max()
    assert got.isfinite().all()
    assert ((got.double() - expected).abs().max() / (largest if largest > 0.1 else 1.0)).item() <= tolerance


@settings(max_examples=25, deadline=None)
@given(cases(150))
def test_output_and_gradients(case):
    *shape, window, seed = case
    tensors = inputs(*shape, seed=seed, grad=True)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    result, (expected, _) = attention(*tensors, window), slow(*wide, window)
    close(result, expected, 1e-5)
    pull = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
    got = torch.autograd.grad(result, tensors, pull)
    for left, right in zip(got, torch.autograd.grad(expected, wide, pull.double())):
        close(left, right, 1e-5)


@pytest.mark.parametrize("way", ["blocks", "band"])
@pytest.mark.parametrize("T,window,KVH", [(1, 0, 2), (63, 62, 4), (64, 64, 2), (65, 0, 1), (193, 1, 2), (400, 130, 4)])
def test_windowed_ways_on_cpu(way, T, window, KVH):
    tensors = inputs(3, T, 4, KVH, 32, grad=True)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    run = BandAttention.apply if way == "band" else blocked_attention
    result, (expected, _) = run(*tensors, window), slow(*wide, window)
    close(result, expected, 1e-5)
    for left, right in zip(torch.autograd.grad(result.sin().sum(), tensors),
                           torch.autograd.grad(expected.sin().sum(), wide)):
        close(left, right, 1e-5)


@pytest.mark.parametrize("keep", [0, 1 << 20])
@pytest.mark.parametrize("H,KVH,together", [(4, 2, 1), (3, 3, 1), (3, 3, 2)])
def test_band_passes_gradcheck_in_several_chunks(monkeypatch, keep, H, KVH, together):
    monkeypatch.setattr(BandAttention, "KEEP", keep)  # weights kept, or computed again
    monkeypatch.setattr(BandAttention, "BLOCK", 4)
    monkeypatch.setattr(BandAttention, "CHUNK", together * 4 * (3 + 4))  # scores of so many heads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors = [x.double().detach().requires_grad_() for x in inputs(2, 10, H, KVH, 4)]
    assert torch.autograd.gradcheck(lambda q, k, v: BandAttention.apply(q, k, v, 3), tensors)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 20])
def test_two_byte_numbers_on_cpu(dtype, tolerance, window):
    tensors = inputs(1, 100, 4, 2, 32, dtype=dtype)
    result = attention(*tensors, window)
    assert result.dtype == dtype
    close(result, slow(*tensors, window)[0], tolerance)


def test_any_strides():
    q, k, v = inputs(2, 90, 4, 2, 32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for window in (None, 80, 10):
        torch.testing.assert_close(attention(*strided, window), attention(q, k, v, window))


def test_hidden_keys_are_never_touched():
    """Keys and values out of every window are not-a-number, and nothing of it shows."""
    q, k, v = inputs(1, 512, 2, 2, 32)
    k[:, :192], v[:, :192] = torch.nan, torch.nan
    for run in (blocked_attention, BandAttention.apply):
        assert run(q, k, v, 100)[:, 384:].isfinite().all()


def test_choice_and_override(monkeypatch, capsys):
    q, k, v = inputs(1, 40, 2, 1, 32)
    assert (backend(q), backend(q, 39), backend(q, 30), backend(q, 5)) == ("sdpa", "sdpa", "blocks", "band")
    assert backend(q.bfloat16(), 5) == "blocks"
    for name, window, expected in (("reference", 5, "reference"), ("sdpa", 5, "blocks"), ("sdpa", None, "sdpa")):
        monkeypatch.setenv(ATTENTION, name)
        assert backend(q, window) == expected
        close(attention(q, k, v, window), slow(q, k, v, window)[0], 1e-5)
    monkeypatch.setenv(ATTENTION, "fast")
    with pytest.raises(NanochatError, match="NANOCHAT_ATTENTION=fast.*reference, sdpa, flex, triton"):
        attention(q, k, v)


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, name):
    monkeypatch.setenv(ATTENTION, name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module.notice.cache_clear()
    q, k, v = inputs(1, 40, 2, 1, 32)
    for _ in range(3):
        close(attention(q, k, v, 5), slow(q, k, v, 5)[0], 1e-5)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_way_that_fails_is_left_for_good(monkeypatch, capsys):
    monkeypatch.setattr(module, "FAILED", set())
    monkeypatch.setattr(module, "backend", lambda q, window=None: "flex")
    monkeypatch.setattr(module, "flex", lambda *args: 1 / 0)
    module.notice.cache_clear()
    q, k, v = inputs(1, 40, 2, 1, 32)
    close(attention(q, k, v, 5), slow(q, k, v, 5)[0], 1e-5)
    close(attention(q, k, v), slow(q, k, v)[0], 1e-5)
    assert "flex" in module.FAILED and "division by zero" in capsys.readouterr().err


def test_a_shape_the_kernel_does_not_take_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(module, "FAILED", set())
    monkeypatch.setattr(module, "backend", lambda q, window=None: "triton")
    monkeypatch.setattr(module, "triton_attention", lambda *_: (_ for _ in ()).throw(ValueError("heads of 32")))
    module.notice.cache_clear()
    q, k, v = inputs(1, 40, 2, 1, 32)
    for _ in range(2):
        close(attention(q, k, v, 5), slow(q, k, v, 5)[0], 1e-5)
    assert not module.FAILED and capsys.readouterr().err == "attention: triton not used: heads of 32\n"


@pytest.mark.parametrize("window", [None, 5])
def test_torch_compile_takes_it_whole(window):
    q, k, v = inputs(1, 20, 2, 1, 32)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, window), backend="eager", fullgraph=True)
    close(compiled(q, k, v), slow(q, k, v, window)[0], 1e-5)


def test_torch_compile_takes_flex_whole(monkeypatch):
    monkeypatch.setattr(module, "backend", lambda q, window=None: "flex")
    monkeypatch.setattr(module, "FAILED", set())
    q, k, v = inputs(1, 200, 4, 2, 32)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, 50), backend="eager", fullgraph=True)
    close(compiled(q, k, v), slow(q, k, v, 50)[0], 1e-5)
    assert not module.FAILED


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("override,window,lines",
                         [("", 5, 0), ("triton", 5, 1), ("triton", None, 1), ("reference", 5, 0)])
def test_choice_while_compiling(monkeypatch, capsys, override, window, lines, dynamic):
    """The choice, and what it has to say, are no break in the graph."""
    monkeypatch.setenv(ATTENTION, override)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module.notice.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, window), backend="eager", fullgraph=True,
                             dynamic=dynamic)
    for T in (20, 24):
        q, k, v = inputs(1, T, 2, 1, 32)
        close(compiled(q, k, v), slow(q, k, v, window)[0], 1e-5)
    assert capsys.readouterr().err.count("attention: ") == lines


class NoWayBack(torch.autograd.Function):
    """A kernel whose backward pass does not run on this chip."""

    @staticmethod
    def forward(ctx, q):
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of shared memory\nand more")


@pytest.mark.parametrize("compiling", [False, True])
def test_backward_is_tried_before_it_is_needed(monkeypatch, capsys, compiling):
    """A kernel that cannot train is not taken where gradients are wanted, and one line says why."""
    monkeypatch.setenv(ATTENTION, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module, "HAVE_TRITON", True)
    monkeypatch.setattr(module, "triton_attention", lambda q, k, v, window: NoWayBack.apply(q))
    module.notice.cache_clear(), module.fault.cache_clear(), torch._dynamo.reset()
    tensors = inputs(1, 40, 2, 1, 32, grad=True)
    run = torch.compile(attention, backend="eager", fullgraph=True) if compiling else attention
    for _ in range(2):
        result = run(*tensors, 5)
        close(result, slow(*tensors, 5)[0], 1e-5)
        result.sum().backward()
    assert capsys.readouterr().err == "attention: triton not used: torch.float32 heads of 32: out of shared memory\n"
    with torch.no_grad():
        assert torch.equal(run(*tensors, 5), tensors[0]) and not module.FAILED  # forward runs
    module.fault.cache_clear()


CUDA = dict(device="cuda", dtype=torch.bfloat16, D=128, full=False, short=False, compiling=False, train=False)


@pytest.mark.parametrize("facts,lack,way,says", [
    ({}, "", "triton", ""), (dict(compiling=True), "", "triton", ""),
    (dict(dtype=torch.float32, D=64), "", "triton", ""),
    (dict(dtype=torch.float32), "", "flex", ""),
    (dict(full=True), "", "sdpa", ""), (dict(device="mps"), "", "sdpa", ""),
    (dict(D=0), "", "sdpa", "head dimension is none of 32, 64, 128, 256"),
    ({}, "triton", "sdpa", "Triton is not installed"), ({}, "ampere", "sdpa", "compute capability 8.0"),
    ({}, "failed triton", "flex", ""), ({}, "failed all", "sdpa", "it failed before"),
    ({}, "failed decoding", "triton", "")])
def test_choice_on_other_devices(monkeypatch, capsys, facts, lack, way, says):
    """A way that failed is not taken again, and says nothing of the other kernels."""
    failed = {"triton": {"triton"}, "decoding": {"decoding"}, "all": {"triton", "flex", "decoding"}}
    monkeypatch.setattr(module, "FAILED", failed[lack.split()[1]] if "failed" in lack else set())
    monkeypatch.setattr(module, "HAVE_TRITON", lack != "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5) if lack == "ampere" else (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module.notice.cache_clear()
    for _ in range(3):
        assert module.choose(**CUDA | facts) == way
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == bool(says)
    able = lack in ("", "failed triton") and "device" not in facts and facts.get("D") != 0
    assert module.decoding_backend((CUDA | facts)["device"], (CUDA | facts)["D"]) == ("triton" if able else "sdpa")


def test_decoding_kernel_that_cannot(monkeypatch, capsys):
    """A shape it does not take: this call goes another way; anything else: all do, and one line says why."""
    q, k, v = inputs(1, 40, 2, 1, 32)
    token, lengths = q[:, 30:31], torch.tensor([30])
    monkeypatch.setattr(module, "FAILED", set())
    monkeypatch.setattr(module, "decoding_backend", lambda *_: "triton")
    monkeypatch.setattr(module, "decode", lambda *_: (_ for _ in ()).throw(ValueError("heads of 32")))
    expected = slow(q, k, v, 9)[0][:, 30:31]
    module.notice.cache_clear()
    for _ in range(2):
        close(cached_attention(token, k, v, lengths, 9), expected, 1e-5)
    assert not module.FAILED
    assert capsys.readouterr().err == "attention: triton not used for decoding: heads of 32\n"
    monkeypatch.setattr(module, "decode", lambda *_: 1 / 0)
    module.notice.cache_clear()
    close(cached_attention(token, k, v, lengths, 9), expected, 1e-5)
    assert module.FAILED == {"decoding"} and "going on with sdpa: division by zero" in capsys.readouterr().err
    ways = {"sdpa": "sdpa", "flex": "sdpa", "reference": "reference", "triton": "triton", "": "triton"}
    for name, way in ways.items():
        monkeypatch.undo()
        monkeypatch.setenv(ATTENTION, name)
        monkeypatch.setattr(module, "lacks", lambda *_: "")
        assert module.decoding_backend("cuda", 128) == way


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cache_against_full_attention(data):
    """Ragged rows, any number of new tokens, garbage behind each row's end."""
    B, KVH, T = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 4))
    window = data.draw(st.none() | st.integers(0, 40))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 30), min_size=B, max_size=B)))
    q, k, v = inputs(B, 36, 2 * KVH, KVH, 32, seed=data.draw(st.integers(0, 99)))
    new = torch.stack([q[b, n:n + T] for b, n in enumerate(lengths)])
    expected = torch.cat([slow(new[b:b + 1], k[b:b + 1], v[b:b + 1], window, int(n))[0] for b, n in enumerate(lengths)])
    for b, n in enumerate(lengths):
        k[b, n + T:], v[b, n + T:] = 1e4, 1e4
    close(cached_attention(new, k, v, lengths, window), expected, 1e-5)
    os.environ[ATTENTION] = "reference"
    try:
        close(cached_attention(new, k, v, lengths, window), expected, 1e-5)
    finally:
        del os.environ[ATTENTION]


def test_fresh_prompt_takes_the_plain_way():
    q, k, v = inputs(2, 50, 4, 2, 32)
    room = [torch.cat([x, torch.full_like(x, torch.nan)], dim=1) for x in (k, v)]
    for window in (None, 7):
        fresh = cached_attention(q, *room, torch.zeros(2, dtype=torch.int64), window)
        assert torch.equal(fresh, attention(q, k, v, window))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 0, 100, 500])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_our_kernel_on_gpu(dtype, tolerance, window, D):
    """The kernel itself, whatever `attention` chooses: output, logsumexp and all gradients."""
    from nanochat_lib.kernels.flash_attention import flash_attention

    if D == 256 and dtype == torch.float32:
        pytest.skip("more registers than a GPU has")
    tensors = [x.cuda().requires_grad_() for x in inputs(1, 333, 4, 2, D, dtype=dtype)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    (out, lse), (expected, sums) = flash_attention(*tensors, window), slow(*wide, window)
    close(out, expected, tolerance)
    close(lse, sums, 1e-5)
    close(attention(*tensors, window), expected, tolerance)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    for left, right in zip(torch.autograd.grad(out, tensors, pull), torch.autograd.grad(expected, wide, pull.double())):
        close(left, right, tolerance)


@pytest.mark.gpu
def test_more_heads_than_a_grids_second_axis_has_room_for():
    from nanochat_lib.kernels.flash_attention import flash_attention

    q, k, v = (x.cuda().requires_grad_() for x in inputs(70_000, 1, 1, 1, 32))
    out = flash_attention(q, k, v)[0]  # one token each: its own value
    torch.testing.assert_close(out, v)
    assert torch.equal(torch.autograd.grad(out.sum(), v)[0], torch.ones_like(v))
