"""Decoding attention against float64: run by test_kernels.py in a process of its own, on a GPU or interpreted."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_lib.kernels import decoding as kernel

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE) if GPU else [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def strict():
    """Fresh memory is full of not-a-number, so an element that no kernel writes is found; so is 0 · ∞ in NumPy."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    torch.use_deterministic_algorithms(False)


def make(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def slow(q, keys, values, lengths, window):
    """Float64, one row, token and head at a time; keys and values are one list of (tokens, KVH, D) per row."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    B, T, H, D = q.shape
    for b in range(B):
        for t in range(T):
            last = int(lengths[b]) + t
            first = 0 if window is None else max(0, last - window)
            for h in range(H):
                own = h // (H // keys[b].size(1))
                k, v = (x[first:last + 1, own].double() for x in (keys[b], values[b]))
                out[b, t, h] = (k @ q[b, t, h].double() / D**0.5).softmax(0) @ v
    return out


def close(got, expected, dtype):
    assert got.dtype == dtype and got.is_contiguous() and got.isfinite().all()
    assert ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1)).item() <= TOLERANCE[dtype]


def check(lengths, T, KVH, group, D, window, seed=0, dtype=torch.float32, room=7, view=lambda x: x):
    """Rows of their own; what lies behind a row's end is not a number."""
    lengths = torch.tensor(lengths, device=DEVICE)
    B, capacity = len(lengths), int(lengths.max()) + T + room
    q = make(B, T, KVH * group, D, seed=seed, dtype=dtype)
    k, v = (make(B, capacity, KVH, D, seed=seed + n, dtype=dtype) for n in (1, 2))
    expected = slow(q, k, v, lengths, window)
    for b, length in enumerate(lengths):
        k[b, length + T:], v[b, length + T:] = torch.nan, torch.nan
    close(kernel.decode_attention(view(q), view(k), view(v), lengths, window), expected, dtype)


WINDOWS = st.none() | st.sampled_from([0, 1, 63, 64, 200]) | st.integers(0, 150)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 140), min_size=1, max_size=3), st.integers(1, 4), st.sampled_from([1, 2]),
       st.sampled_from([1, 2, 3]), st.sampled_from([32, 64]), WINDOWS, st.integers(0, 999), st.sampled_from(DTYPES))
def test_any_shape(lengths, T, KVH, group, D, window, seed, dtype):
    check(lengths, T, KVH, group, D, window, seed, dtype)


@pytest.mark.parametrize("D,T,KVH,group", [(128, 1, 1, 1), (128, 2, 1, 8), (256, 1, 2, 2)])
def test_head_dimensions_and_many_queries(D, T, KVH, group):
    check([0, 75], T, KVH, group, D, 70, dtype=torch.float16)


def test_bfloat16():
    q, k, v = (make(2, n, 2, 64, seed=n, dtype=torch.bfloat16) for n in (1, 50, 49))
    v = torch.cat([v, v[:, :1]], 1)
    lengths = torch.tensor([49, 20], device=DEVICE)
    close(kernel.decode_attention(q, k, v, lengths), slow(q, k, v, lengths, None), torch.bfloat16)


@pytest.mark.parametrize("parts", [1, 3, 32])
def test_any_number_of_parts(monkeypatch, parts):
    """Also more parts than tiles: the parts without keys count for nothing."""
    monkeypatch.setattr(kernel, "count_parts", lambda *args: parts)
    check([0, 1, 300], 2, 1, 2, 32, None)
    check([0, 131, 300], 1, 2, 1, 32, 100)


def test_parts_fill_the_chip(monkeypatch):
    monkeypatch.setattr(kernel, "processors", lambda device: 132)
    at = lambda programs, keys: kernel.count_parts(programs, keys, 64, None)  # noqa: E731
    assert 16 * at(16, 2048) >= 132 and at(16, 2048) <= 2048 // 64
    assert at(64 * 64, 2048) == 1 and at(16, 64) == 1 and at(1, 10**6) == 128


@pytest.mark.parametrize("view", [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
                                  lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
                                  lambda x: torch.cat([x, x], -1)[..., :x.size(-1)],
                                  lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)],
                         ids=["as the engine's cache", "tokens first", "part of a wider tensor", "channels apart"])
def test_any_strides(view):
    check([5, 90], 2, 2, 2, 32, None, view=view)
    check([5, 90], 1, 2, 2, 32, 40, view=view)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=2), st.data(), st.integers(1, 3), st.sampled_from([1, 2]), WINDOWS)
def test_rows_that_share_prompts(prompt_lengths, data, T, KVH, window):
    """A row's keys are its prompt's, then its own: as if both lay in one cache."""
    B, D = 3, 32
    owners = [data.draw(st.integers(0, len(prompt_lengths) - 1)) for _ in range(B)]
    own = [data.draw(st.integers(0, 70)) for _ in range(B)]
    lengths = torch.tensor([prompt_lengths[owner] + n for owner, n in zip(owners, own)], device=DEVICE)
    q = make(B, T, 2 * KVH, D, seed=3)
    prompts = [make(len(prompt_lengths), 95, KVH, D, seed=n) for n in (4, 5)]
    caches = [make(B, 80, KVH, D, seed=n) for n in (6, 7)]
    whole = [[torch.cat([prompt[owner, :prompt_lengths[owner]], cache[b, :own[b] + T]]) for b, owner in enumerate(owners)]
             for prompt, cache in zip(prompts, caches)]
    for prompt, cache in zip(prompts, caches):
        for p, length in enumerate(prompt_lengths):
            prompt[p, length:] = torch.nan
        for b in range(B):
            cache[b, own[b] + T:] = torch.nan
    shared = (*prompts, torch.tensor(prompt_lengths, device=DEVICE), torch.tensor(owners, device=DEVICE))
    close(kernel.decode_attention(q, *caches, lengths, window, shared), slow(q, *whole, lengths, window), torch.float32)


def test_keys_out_of_the_window_are_never_read():
    q, k, v = make(1, 1, 2, 32, seed=0), make(1, 200, 1, 32, seed=1), make(1, 200, 1, 32, seed=2)
    k[:, :120], v[:, :120] = torch.nan, torch.nan
    assert kernel.decode_attention(q, k, v, torch.tensor([170], device=DEVICE), 50).isfinite().all()


@pytest.mark.parametrize("shape,keys", [((1, 1, 3, 32), (1, 9, 2, 32)), ((1, 1, 2, 48), (1, 9, 2, 48)),
                                        ((2, 1, 2, 32), (1, 9, 2, 32)), ((1, 40, 2, 32), (1, 99, 1, 32)),
                                        ((1, 1, 2, 256), (1, 9, 2, 256))])
def test_what_it_cannot_do_is_a_value_error(shape, keys):
    k = torch.zeros(keys, device=DEVICE)
    with pytest.raises(ValueError):
        kernel.decode_attention(torch.zeros(shape, device=DEVICE), k, k, torch.zeros(shape[0], dtype=torch.int64, device=DEVICE))


def test_torch_compile_takes_it_whole():
    q, k = make(2, 1, 4, 32, seed=0), make(2, 40, 2, 32, seed=1)
    lengths = torch.tensor([3, 30], device=DEVICE)
    run = torch.compile(lambda q, k, lengths: 2 * kernel.decode_attention(q, k, k, lengths, 9), fullgraph=True,
                        backend="inductor" if GPU else "aot_eager")
    close(run(q, k, lengths) / 2, slow(q, k, k, lengths, 9), torch.float32)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_graph_replays_with_other_lengths():
    q, k, lengths = make(2, 1, 4, 64, seed=0), make(2, 90, 2, 64, seed=1), torch.tensor([5, 80], device=DEVICE)
    kernel.decode_attention(q, k, k, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.decode_attention(q, k, k, lengths)
    lengths.copy_(torch.tensor([60, 7]))
    graph.replay()
    close(out, slow(q, k, k, lengths, None), torch.float32)
