"""The exercises of lesson 03: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest
import torch

from nanochat_lib.course.checks import attention as check
from nanochat_lib.course.grading import solutions_of


@pytest.mark.parametrize("name", ["online_softmax", "tile_bounds", "attention"])
def test_solutions_pass(name, base_dir):
    verdict = getattr(check, name)(solutions_of("03_attention")[name])
    assert verdict.passed, verdict


def expect_wrong(exercise, answer, sentence):
    verdict = exercise(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def softmax(rescale_sum=True, rescale_acc=True, hidden=True, natural=True):
    def answer(tiles):
        top, total, acc = torch.tensor(-torch.inf), torch.tensor(0.0), 0.0
        for scores, values in tiles:
            new = torch.maximum(top, scores.max())
            if hidden and new == -torch.inf:
                continue
            factor, weights = torch.exp(top - new), torch.exp(scores - new)
            total = total * (factor if rescale_sum else 1) + weights.sum()
            acc = acc * (factor if rescale_acc else 1) + weights @ values
            top = new
        return acc / total, top + (total.log() if natural else total.log2())
    return answer


def no_maximum(tiles):
    total, acc = torch.tensor(0.0), 0.0
    for scores, values in tiles:
        total, acc = total + scores.exp().sum(), acc + scores.exp() @ values
    return acc / total, total.log()


def all_at_once(tiles):
    scores, values = zip(*tiles)
    scores, values = torch.cat(scores), torch.cat(values)
    return scores.softmax(0) @ values, scores.logsumexp(0)


@pytest.mark.parametrize("answer,sentence", [
    (softmax(rescale_sum=False, rescale_acc=False), "rescale the sum"),
    (softmax(rescale_acc=False), "rescale the sum"),
    (softmax(natural=False), "natural logarithm"),
    (softmax(hidden=False), "all −∞"),
    (no_maximum, "overflow"),
    (all_at_once, "Two equal scores"),
])
def test_wrong_softmax(answer, sentence, base_dir):
    expect_wrong(check.online_softmax, answer, sentence)


def bounds(reach=0, last=0, round_up=True, ends=False):
    def answer(start, block_q, block_k, window):
        end = (start + block_q - 1 + last) // block_k + 1
        first = max(0, start - window + reach) // block_k
        edge = max(0, start + block_q - 1 - window)
        whole = max(first, -(-edge // block_k) if round_up else edge // block_k)
        return first, whole, end if ends else max(whole, (start + 1) // block_k), end
    return answer


@pytest.mark.parametrize("answer,sentence", [
    (bounds(last=1), "wholly in the future"),
    (bounds(reach=1), "left out that the first query sees"),
    (bounds(reach=-64), "wholly before the window"),
    (bounds(round_up=False), "go without a mask"),
    (bounds(ends=True), "go without a mask"),
    (lambda start, block_q, block_k, window: (bounds()(start, block_q, block_k, window)[0],) * 3
     + (bounds()(start, block_q, block_k, window)[3],), "need no mask"),
])
def test_wrong_bounds(answer, sentence, base_dir):
    expect_wrong(check.tile_bounds, answer, sentence)


def attend(power=0.5, reach=0, causal=True, tiled=False):
    def answer(q, k, v, window=None):
        T, group = q.size(1), q.size(2) // k.size(2)
        k, v = (x.repeat(1, 1, group, 1) if tiled else x.repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** power
        distance = torch.arange(T)[:, None] - torch.arange(T)
        hidden = distance > (T if window is None else max(0, window + reach))
        hidden = hidden | (distance < 0) if causal else hidden
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return answer


@pytest.mark.parametrize("answer,sentence", [
    (attend(power=0.0), "not scaled"),
    (attend(power=1.0), "twice"),
    (attend(causal=False), "sees only itself"),
    (attend(reach=-1), "sees 0 keys before itself"),
    (attend(reach=1), "off by one"),
    (attend(tiled=True), "paired 0 1 0 1"),
    (lambda q, k, v, window=None: attend()(q, k, v, window).transpose(1, 2), "shape"),
])
def test_wrong_attention(answer, sentence, base_dir):
    expect_wrong(check.attention, answer, sentence)
