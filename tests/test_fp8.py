"""FP8 products against float64 products of the rounded factors, and the conversion of a model. On the CPU."""

import math

import pytest
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.fp8 import Fp8Linear, Fp8Product, convert_to_fp8, lacks_fp8, to_fp8
from nanochat_lib.gpt import GPTConfig, build_model


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x, bits, bias, largest):
    """x on the grid of a float format, by arithmetic in float64: `bits` of fraction, exponents from 1 − bias on."""
    x = x.double()
    scale = (x.abs().max() / largest).float().double()
    y = (x / scale).clamp(-largest, largest)
    exponent = y.abs().clamp(min=1e-300).log2().floor().clamp(min=1 - bias)
    step = 2 ** (exponent - bits)
    return (y / step).round() * step * scale  # to the nearest, ties to even: torch.round's way


def e4m3(x):
    return rounded(x, 3, 7, 448)


def e5m2(x):
    return rounded(x, 2, 15, 57344)


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e4])
def test_products_are_those_of_the_rounded_factors(spread):
    x, weight = (spread * randn(48, 160)).requires_grad_(), randn(128, 160, seed=1).requires_grad_()
    grad = 1e-3 * randn(48, 128, seed=2)
    y = Fp8Product.apply(x, weight)
    y.backward(grad)
    for got, left, right in ((y, e4m3(x), e4m3(weight).T), (x.grad, e5m2(grad), e4m3(weight)),
                             (weight.grad, e5m2(grad).T, e4m3(x))):
        expected = left @ right
        assert (got.double() - expected).norm() < 2e-3 * expected.norm()  # ties
    exact = x.double() @ weight.double().T
    assert 0.01 < (y - exact).norm() / exact.norm() < 0.05  # 8 bits, and no worse


def test_zeros_and_large_entries_stay_finite():
    for x in (torch.zeros(16, 16), torch.full((16, 16), 3e38), torch.tensor([[1e-30] * 16] * 16)):
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scaled, scale = to_fp8(x, dtype)
            assert (scaled.float() * scale).isfinite().all()
    assert not to_fp8(torch.zeros(4, 4), torch.float8_e5m2)[0].float().any()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=128, vocab_size=512, n_layer=2, n_head=2, n_kv_head=1, n_embd=256)
    model = build_model(config, "cpu")
    for name in ("attn.c_proj", "mlp.c_proj"):
        for layer in range(2):
            torch.nn.init.normal_(model.get_parameter(f"transformer.h.{layer}.{name}.weight"), std=0.02)
    return model


def test_wide_matrices_of_the_blocks_are_converted_and_nothing_else_changes(model):
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    names = convert_to_fp8(model)
    assert {name.split(".", 3)[3] for name in names} == {"attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc",
                                                         "mlp.c_proj"} and len(names) == 12
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not isinstance(model.lm_head, Fp8Linear) and not isinstance(model.transformer.h[1].attn.ve_gate, Fp8Linear)


def test_evaluation_is_that_of_the_model_as_it_was(model):
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    plain = model.eval()(ids)
    convert_to_fp8(model)
    assert torch.equal(model(ids), plain)
    model.train()
    assert torch.equal(model(ids), plain)  # 66 rows are no multiple of 16: products as before
    trained = model(ids[:, :32])
    assert 0 < (trained - plain[:, :32]).norm() < 0.1 * plain.norm()


def test_it_learns_as_bfloat16_does(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    ids = torch.arange(2 * 33).view(2, 33) * 7 % 97  # few: some CPUs multiply 8-bit floats one by one
    last = {}
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = build_model(GPTConfig(sequence_len=128, vocab_size=97, n_layer=1, n_head=2, n_kv_head=2, n_embd=128),
                            "cpu")
        if fp8:
            convert_to_fp8(model)
        optimizer = model.setup_optimizer(matrix_lr=0.01, embedding_lr=0.05)
        for _ in range(12):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            model.zero_grad()
        last[fp8] = loss.item()
    assert last[False] < 0.6 * math.log(97) and last[True] == pytest.approx(last[False], abs=0.15)


def test_a_compiler_takes_it_whole():
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=128, vocab_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=128)
    model = build_model(config, "cpu")
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_proj.weight, std=0.02)
    convert_to_fp8(model)
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.item(), model.transformer.h[0].mlp.c_fc.weight.grad.clone()))
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
    assert (results[0][1] - results[1][1]).norm() < 0.05 * results[0][1].norm()


def test_what_cannot_be_is_said(make_model):
    with pytest.raises(NanochatError, match="at least 128.*leave --fp8 away"):
        convert_to_fp8(make_model())
    assert "needs a CUDA device, and this is cpu" in lacks_fp8(torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    if lacks := lacks_fp8(torch.device("cuda")):
        pytest.skip(lacks)
    x, weight, grad = randn(64, 256).bfloat16(), randn(128, 256, seed=1), randn(64, 128, seed=2).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        a, b = (part.detach().to(device).requires_grad_() for part in (x, weight))
        y = Fp8Product.apply(a, b)
        y.backward(grad.to(device))
        results.append([part.float().cpu() for part in (y, a.grad, b.grad)])
    for cpu, gpu in zip(*results):
        assert (cpu - gpu).norm() < 0.01 * cpu.norm()
