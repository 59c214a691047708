"""Checks of the exercises of lesson 04."""

import math

import torch
import torch.nn.functional as F

from nanochat_lib.course.grading import exercise, expect, expect_close, expect_shape, expect_type


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise(difficulty=1, importance=5, minutes=10, hints=[
    "square().mean(dim=-1, keepdim=True) keeps a dimension of 1, so that the division broadcasts.",
    "The eps goes inside the root: 1 / √(mean square + eps), which is torch.rsqrt.",
    "x.float() first, .to(x.dtype) last.",
])
def norm(answer):
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    before = x.clone()
    got = answer(x)
    expect_shape(got, (2, 2), torch.float32)
    expect(torch.equal(x, before), "The input was changed: return a new tensor.")
    norms = F.normalize(x, dim=-1)
    expect(not torch.allclose(got, norms, atol=1e-4),
           "The vectors have length 1: divide by the root of the mean square, not of the sum; their length is then √C.")
    expect_close(got, norms * 2**0.5, "Divide by the root of the mean of the squares (no mean subtracted), vector by "
                 "vector over the last dimension.")
    expect_close(answer(x, scale=1.2), 1.2 * norms * 2**0.5, "Multiply the result by scale.")
    x = randn(2, 3, 5, 16)
    expect_close(answer(x), F.rms_norm(x, (16,), eps=1e-6),
                 "On a tensor of four dimensions it differs from F.rms_norm: the mean is over the last one only.")
    small = torch.tensor([[3e-3, 4e-3]])
    expect_close(answer(small, eps=1e-4), small / math.sqrt(12.5e-6 + 1e-4),
                 "The eps is in the wrong place: it is added to the mean square, inside the root.")
    expect_close(answer(torch.zeros(1, 4)), torch.zeros(1, 4), "A vector of zeros must stay zeros, not become NaN.")
    expect(answer(x.bfloat16()).dtype == torch.bfloat16,
           "The result must have the dtype of the input: .to(x.dtype) at the end.")
    big = torch.full((1, 8), 300.0, dtype=torch.float16)
    expect_close(answer(big), torch.ones(1, 8), "In float16 the squares of large numbers overflow: square in float32.",
                 atol=1e-2)
    x = randn(4, 512).bfloat16()
    exact = F.rms_norm(x.float(), (512,), eps=1e-6).bfloat16()
    expect(torch.equal(answer(x), exact), "In bfloat16 it differs: take the mean square, and divide, in float32.")


@exercise(difficulty=2, importance=5, minutes=15, hints=[
    "x.chunk(2, dim=-1) gives x1 and x2, each (B, T, H, D/2): cos and sin broadcast over B and H.",
    "torch.cat((y1, y2), dim=-1) puts the halves side by side again.",
    "By a quarter turn (cos 0, sin 1), (1, 0) becomes (0, −1).",
])
def apply_rotary_emb(answer):
    quarter = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    got = answer(torch.tensor([[[[1.0, 0.0]]]]), *quarter)
    expect_shape(got, (1, 1, 1, 2), torch.float32)
    expect(not torch.allclose(got, torch.tensor([[[[0.0, 1.0]]]])),
           "It turns the wrong way: y1 = x1·cos + x2·sin and y2 = −x1·sin + x2·cos, the minus stands before x1.")
    expect_close(got, torch.tensor([[[[0.0, -1.0]]]]), "A quarter turn takes (1, 0) to (0, −1).")
    x = torch.arange(4.0).view(1, 1, 1, 4)
    halves = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    expect_close(answer(x, *halves), torch.tensor([2.0, 1.0, 0.0, 3.0]).view(1, 1, 1, 4),
                 "Only the first pair is turned here, and pairs are channels i and i + D/2, not neighbours; first all "
                 "y1, then all y2.")
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1, 0.01]))
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    x = randn(2, 5, 3, 6)
    kept = x.clone()
    got = answer(x, cos, sin)
    expect_shape(got, (2, 5, 3, 6))
    expect(torch.equal(x, kept), "The input was changed: return a new tensor.")
    expect_close(got.norm(dim=-1), x.norm(dim=-1), "A rotation keeps the length of every vector; yours does not.")
    expect_close(got[:, 0], x[:, 0], "Position 0 has the angle 0: it stays as it is.")
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), -angles)[None, :, None]
    expect_close(got, torch.cat((turned.real, turned.imag), dim=-1), "It differs from the rotation of complex numbers "
                 "x1 + i·x2 by −angle.")
    q, k = (answer(randn(1, 1, 1, 6, seed=seed).expand(1, 5, 1, 6), cos, sin) for seed in (1, 2))
    expect_close((q[0, 3] * k[0, 1]).sum(), (q[0, 4] * k[0, 2]).sum(),
                 "q · k must depend on the distance of positions only.")


@exercise(difficulty=3, importance=3, minutes=15, hints=[
    "The derivative of max(x, 0)² is 2 · max(x, 0).",
    "The chain rule: what backward gets is multiplied by the derivative.",
    "Keep max(x, 0): it is zero exactly where the gradient is.",
])
def SquaredRelu(answer):
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0], requires_grad=True)
    got = answer.apply(x)
    expect_shape(got, (4,), torch.float32)
    expect(not torch.equal(got.detach(), F.relu(x).detach()), "This is relu: the result is squared as well.")
    expect_close(got.detach(), torch.tensor([0.0, 0.0, 0.25, 9.0]),
                 "Expected max(x, 0)²: first cut at zero, then square.")
    expect_close(x.detach(), torch.tensor([-2.0, 0.0, 0.5, 3.0]),
                 "forward changed its input: it belongs to the caller.")
    got.backward(torch.ones(4))
    expect(x.grad is not None, "No gradient came back: backward returns the gradient by x.")
    expect_close(x.grad, torch.tensor([0.0, 0.0, 1.0, 6.0]),
                 "The derivative of max(x, 0)² is 2·max(x, 0), zero below zero.")
    x.grad = None
    upstream = torch.tensor([1.0, 1.0, 10.0, -1.0])
    kept = upstream.clone()
    answer.apply(x).backward(upstream)
    expect_close(x.grad, torch.tensor([0.0, 0.0, 10.0, -6.0]), "Multiply by the gradient that backward was given.")
    expect(torch.equal(upstream, kept), "backward changed the gradient it was given: it belongs to the caller.")
    wide = randn(3, 4, 5).double().requires_grad_()
    expect(torch.autograd.gradcheck(answer.apply, wide, raise_exception=False),
           "The gradient differs from finite differences in float64.")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        answer.apply(wide)
    expect(len(saved) <= 1, f"forward keeps {len(saved)} tensors; one is enough, and memory is what this is about.")


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "model_of_depth(depth).num_scaling_params() has all parts by name.",
    "min(depth for depth in range(2, 42, 2) if …) finds the crossing.",
])
def parameters_by_depth(answer):
    expect_type(answer, dict)
    expect(set(answer) == {"crossing", "growth"}, "Answer with dict(crossing=…, growth=…).")
    # by hand, width C = 64·depth: matrices 12·depth·C²; wte, lm_head and depth/2 value tables 32,768·C each
    crossing, growth = answer["crossing"], answer["growth"]
    expect_type(crossing, int)
    expect_type(growth, (int, float))
    expect(crossing != 22, "With lm_head among the matrices it would be 22: count transformer_matrices alone.")
    expect(crossing != 10,
           "Half of total is asked, value embeddings included: they are tables too, one for every other layer.")
    matrices = 12 * crossing * (64 * crossing)**2 / 1e6
    expect(crossing == 26, f"The matrices are {matrices:.0f} M at your depth: not the first even depth at which they "
           "are more than half of total.")
    expect(abs(growth - 8) > 0.05,
           "8 = 2³ is the growth of the matrices alone; N counts lm_head too, which only doubles.")
    expect(abs(growth - 4.8) > 0.06, "That is the growth of total: N leaves out wte and the value embeddings.")
    expect(abs(growth - 6.6) < 0.06, "N at depth 24 over N at depth 12: N = transformer_matrices + lm_head.")


@exercise(difficulty=2, importance=3, minutes=15, hints=[
    "scale = x.abs().max() / torch.finfo(dtype).max, as float32.",
    "Divide, do not multiply: the entry that equals the maximum becomes finfo.max.",
    "clamp(min=1e-12) on the maximum keeps zeros from dividing by zero; x.float() before the division.",
])
def to_fp8(answer):
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    got = answer(x, e4m3)
    expect(isinstance(got, tuple) and len(got) == 2, "Return two tensors: the 8-bit one and the scale.")
    scaled, scale = got
    expect_shape(scaled, (2, 2), e4m3)
    expect(isinstance(scale, torch.Tensor) and scale.shape == () and scale.dtype == torch.float32,
           "The scale is one float32 tensor without dimensions for the whole tensor.")
    expect(not torch.isclose(scale, torch.tensor(224.0)),
           "That is the inverse: the scale is the largest entry over the format's largest, and x is divided by it.")
    expect_close(scale, torch.tensor(2 / 448), "The scale is the largest entry, in absolute value, over finfo.max.",
                 atol=1e-6)
    expect_close(scaled.float(), torch.tensor([[224.0, -448.0], [112.0, 0.0]]),
                 "Divide x by the scale before the cast: its largest entry becomes ±448.")
    expect_close(answer(x, e5m2)[1] * 57344, torch.tensor(2.0),
                 "The largest number is another in each format: ask finfo(dtype).")
    zeros, scale = answer(torch.zeros(2, 2), e4m3)
    expect(bool(scale.isfinite()) and scale > 0 and torch.equal(zeros.float(), torch.zeros(2, 2)),
           "Zeros must stay zeros: keep their maximum from being a divisor of 0.")
    big = torch.full((2, 2), 60000.0, dtype=torch.float16)
    expect_close(answer(big, e4m3)[0].float(), torch.full((2, 2), 448.0),
                 "In float16 it went wrong: divide in float32.")
    for seed in range(20):
        x = 10.0 ** (seed - 10) * randn(64, seed=seed)
        scaled, scale = answer(x, e4m3)
        expect(bool(scaled.float().isfinite().all()), "An entry is not finite: the scale must bring the largest one to the format's largest.")
        error = (scaled.float() * scale - x).abs().max() / x.abs().max()
        expect(error < 0.05, "Times its scale the tensor is not near x again.")
