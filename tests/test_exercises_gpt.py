"""The exercises of lesson 04: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest
import torch
from torch.autograd import Function

from nanochat_lib.course.checks import gpt as check
from nanochat_lib.course.grading import solutions_of


@pytest.fixture(autouse=True)
def kept_apart(base_dir):
    """Progress goes to a folder of the test's own."""


def test_solutions_pass():
    solutions = solutions_of("04_gpt")
    for name in ("norm", "apply_rotary_emb", "SquaredRelu", "to_fp8"):
        verdict = getattr(check, name)(solutions[name])
        assert verdict.passed, verdict
    assert check.parameters_by_depth(solutions["answer"]).passed
    assert check.parameters_by_depth(None).state == "not done yet"


def test_the_library_passes_too():
    from nanochat_lib import fp8, fused, gpt

    assert check.apply_rotary_emb(gpt.apply_rotary_emb).passed
    assert check.SquaredRelu(fused.SquaredRelu).passed
    assert check.to_fp8(fp8.to_fp8).passed


def rms(x, scale=1.0, eps=1e-6, wide=True, dim=-1):
    y = x.float() if wide else x
    return (scale * y * torch.rsqrt(y.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


def rms_in_place(x, scale=1.0, eps=1e-6):
    x /= x.square().mean(-1, keepdim=True).sqrt()
    return x


@pytest.mark.parametrize("answer, says", [
    (lambda x, scale=1.0, eps=1e-6: x / x.norm(dim=-1, keepdim=True), "not of the sum"),
    (lambda x, scale=1.0, eps=1e-6: rms(x, 1.0, eps), "by scale"),
    (lambda x, scale=1.0, eps=1e-6: scale * x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + eps),
     "inside the root"),
    (lambda x, scale=1.0, eps=1e-6: rms(x, scale, eps, dim=tuple(range(x.dim()))[-2:]), "root of the mean"),
    (lambda x, scale=1.0, eps=1e-6: rms(x - x.mean(-1, keepdim=True), scale, eps), "root of the mean"),
    (lambda x, scale=1.0, eps=1e-6: rms(x.float(), scale, eps), "dtype of the input"),
    (lambda x, scale=1.0, eps=1e-6: rms(x, scale, eps, wide=False), "overflow"),
    (rms_in_place, "was changed"),
])
def test_wrong_norms(answer, says):
    verdict = check.norm(answer)
    assert verdict.state == "wrong" and says in verdict.sentence


def rotary(turn=1, neighbours=False, interleaved=False, only_cos=False):
    def rotate(x, cos, sin):
        x1, x2 = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
        y1, y2 = x1 * cos + turn * x2 * sin, x2 * cos - turn * x1 * sin
        if only_cos:
            y2 = x2 * cos + x1 * sin
        return torch.stack((y1, y2), dim=-1).flatten(-2) if neighbours or interleaved else torch.cat((y1, y2), dim=-1)
    return rotate


@pytest.mark.parametrize("answer, says", [
    (rotary(turn=-1), "the wrong way"), (rotary(neighbours=True), "not neighbours"),
    (rotary(interleaved=True), "first all y1"), (rotary(only_cos=True), "wrong way"),
    (lambda x, cos, sin: x, "quarter turn"), (lambda x, cos, sin: x.chunk(2, dim=-1)[0], "has shape"),
])
def test_wrong_rotations(answer, says):
    verdict = check.apply_rotary_emb(answer)
    assert verdict.state == "wrong" and says in verdict.sentence


def function(forward, backward):
    return type("Answer", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def forward(ctx, x):
    ctx.save_for_backward(x.clamp(min=0))
    return x.clamp(min=0) ** 2


def backward(ctx, grad):
    return 2 * grad * ctx.saved_tensors[0]


def forward_keeping_two(ctx, x):
    ctx.save_for_backward(x.clamp(min=0), x)
    return x.clamp(min=0) ** 2


def backward_in_place(ctx, grad):
    return grad.mul_(2 * ctx.saved_tensors[0])


def forward_not_cut(ctx, x):
    ctx.save_for_backward(x)
    return x**2


@pytest.mark.parametrize("answer, says", [
    (function(lambda ctx, x: x.clamp(min=0), backward), "squared as well"),
    (function(forward_not_cut, backward), "first cut at zero"),
    (function(forward, lambda ctx, grad: grad * ctx.saved_tensors[0]), "2·max(x, 0)"),
    (function(forward, lambda ctx, grad: 2 * ctx.saved_tensors[0]), "was given"),
    (function(forward, backward_in_place), "changed the gradient"),
    (function(forward_keeping_two, backward), "one is enough"),
])
def test_wrong_gradients(answer, says):
    verdict = check.SquaredRelu(answer)
    assert verdict.state == "wrong" and says in verdict.sentence


@pytest.mark.parametrize("answer, says", [
    (dict(crossing=22, growth=6.6), "lm_head among the matrices"), (dict(crossing=10, growth=6.6), "value embeddings"),
    (dict(crossing=28, growth=6.6), "first even depth"), (dict(crossing=26, growth=8.0), "the matrices alone"),
    (dict(crossing=26, growth=4.8), "growth of total"), (dict(crossing=26, growth=3.0), "N = transformer_matrices"),
    (dict(crossing=26), "dict(crossing"), ((26, 6.6), "Return a dict"),
])
def test_wrong_counts(answer, says):
    verdict = check.parameters_by_depth(answer)
    assert verdict.state == "wrong" and says in verdict.sentence


def test_an_empty_exercise_is_not_done_yet():
    def unwritten(*arguments):
        raise NotImplementedError

    for name in ("norm", "apply_rotary_emb"):
        assert getattr(check, name)(unwritten).state == "not done yet"
    assert check.SquaredRelu(function(unwritten, unwritten)).state == "not done yet"
    assert check.SquaredRelu(function(forward, unwritten)).state == "not done yet"


def eight_bits(inverse=False, per_row=False, fixed=False, guard=1e-12, signed=False):
    def cast(x, dtype):
        largest = 448.0 if fixed else torch.finfo(dtype).max
        size = x if signed else x.abs()
        scale = (size.amax(-1, keepdim=True) if per_row else size.max()).float().clamp(min=guard) / largest
        return (x.float() / scale).to(dtype), (1 / scale if inverse else scale)
    return cast


@pytest.mark.parametrize("answer, says", [
    (lambda x, dtype: x.to(dtype), "Return two tensors"),
    (lambda x, dtype: (x.to(dtype), 2 / 448), "one float32 tensor"),
    (eight_bits(per_row=True), "one float32 tensor"),
    (eight_bits(inverse=True), "the inverse"),
    (eight_bits(signed=True), "in absolute value"),
    (lambda x, dtype: (x.to(dtype), eight_bits()(x, dtype)[1]), "before the cast"),
    (eight_bits(fixed=True), "ask finfo"),
    (eight_bits(guard=0), "must stay zeros"),
])
def test_wrong_eight_bits(answer, says):
    verdict = check.to_fp8(answer)
    assert verdict.state == "wrong" and says in verdict.sentence, verdict
