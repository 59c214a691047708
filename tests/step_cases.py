"""A decode step in few kernels against the engine's plain one: run by test_kernels.py, on a GPU or interpreted."""

import numpy as np
import pytest
import torch

from nanochat_lib.decoder import Decoder
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.kernel_step import KernelStep
from nanochat_lib.kernels import step
from nanochat_lib.sampling import pick
from nanochat_lib.slots import Slots

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def make(dtype, monkeypatch, **changes):
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    torch.manual_seed(0)
    config = dict(sequence_len=300, vocab_size=309, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, window_pattern="SL")
    model = build_model(GPTConfig(**config | changes), DEVICE).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", ["float32"] + ["bfloat16"] * GPU)
@pytest.mark.parametrize("changes, lengths", [
    ({}, [0, 299]),
    ({}, [130, 1]),
    ({}, [64]),
    (dict(n_head=3, n_kv_head=3, n_embd=192, vocab_size=311), [127, 128]),
    (dict(n_head=1, n_kv_head=1, n_layer=1, sequence_len=1200), [1100, 7]),
])
def test_a_step_is_the_decoders(monkeypatch, dtype, changes, lengths):
    model, B = make(dtype, monkeypatch, **changes), len(lengths)
    both = [Slots(model, B + 1, model.config.sequence_len) for _ in range(2)]
    for tensor in ("tails", "previous"):
        drawn = torch.randn_like(getattr(both[0], tensor))
        for slots in both:
            getattr(slots, tensor).copy_(drawn)
    for row, length in enumerate(lengths):  # whoever reads behind a row's end finds no number
        both[1].tails[:, :, row, :, length + 1:] = torch.nan
    both[1].tails[:, :, B] = torch.nan
    decoder = Decoder(model)
    for slots in both:
        slots.feed(np.arange(B) + 300, np.array(lengths), np.zeros(B, int))
        slots.group(B)
    kernels = KernelStep(decoder)
    assert kernels.suits(both[1], B)
    with torch.inference_mode():
        expected, got = decoder(both[0], B), kernels(both[1], B)
    scale, tolerance = expected.abs().max(), TOLERANCE[dtype]
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * scale
    for row, length in enumerate(lengths):
        mine, theirs = (slots.tails[:, :, row, :, :length + 1].float() for slots in (both[1], both[0]))
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), "keys and values"
        assert both[1].tails[:, :, row, :, length + 1:].isnan().all(), "nothing is written behind"
    assert both[1].tails[:, :, B].isnan().all()
    assert (both[0].previous - both[1].previous).abs().max() <= tolerance * both[0].previous.abs().max()


@pytest.mark.parametrize("V", [309, 4096, 5000])
def test_a_choice_is_sampling_picks(V):
    generator = torch.Generator().manual_seed(V)
    logits = (15 * torch.tanh(torch.randn(5, V, generator=generator)) * torch.rand(5, V, generator=generator)).to(DEVICE)
    seeds = torch.randint(-2**31, 2**31 - 1, (5,), dtype=torch.int32, generator=generator).to(DEVICE)
    for temperature in (0.0, 0.7, 3.0):
        for top_k in (None, 0, 1, 5, 50, V, V + 1):
            got, expected = step.choose(logits, seeds, temperature, top_k), pick(logits, seeds, temperature, top_k)
            assert torch.equal(got[0], expected[0]), (temperature, top_k)
            assert (got[1] - expected[1]).abs().max() < 1e-5


def test_negative_logits_only():
    logits = -torch.arange(1, 301, device=DEVICE, dtype=torch.float32).div(30).repeat(3, 1).flip(1).contiguous()
    seeds = torch.tensor([1, -5, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    for top_k in (1, 2, 7):
        got = step.choose(logits, seeds, 2.0, top_k)
        assert torch.equal(got[0], pick(logits, seeds, 2.0, top_k)[0]) and (got[0] >= 300 - top_k).all()
