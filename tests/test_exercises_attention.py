"""The exercises of lesson 03: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest
import torch

from nanochat_lib.course.checks import attention as check
from nanochat_lib.course.grading import solutions_of


@pytest.mark.parametrize("name", ["online_softmax", "tile_bounds", "forward_block", "key_gradients", "loss_gradient",
                                  "attention"])
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
    (all_at_once, "Tiles were kept"),
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


def block(scale=1.0, exp=torch.exp2, unit=1.4426950408889634, reach=0, rescale=(True, True), first=0, last=0, safe=True,
          log=torch.log2):
    """forward_block with one mistake: scores × scale × unit, the window too long by reach, tiles too many, …"""
    def answer(q, load, start, window, block_k):
        M, D = q.shape
        top, total, acc = torch.full((M,), -torch.inf), torch.zeros(M), torch.zeros(M, D)
        begin = max(0, start - window) // block_k + first
        for n in range(max(0, begin), (start + M - 1) // block_k + 1 + last):
            k, v = load(n)
            distance = start + torch.arange(M)[:, None] - (n * block_k + torch.arange(block_k))
            scores = (q @ k.T * (scale * unit / D**0.5)).masked_fill((distance < 0) | (distance > window + reach), -torch.inf)
            new = torch.maximum(top, scores.amax(1))
            reference = new.masked_fill(new == -torch.inf, 0.0) if safe else new
            weights, factor = exp(scores - reference[:, None]), exp(top - reference)
            total = total * (factor if rescale[0] else 1) + weights.sum(1)
            acc, top = acc * (factor[:, None] if rescale[1] else 1) + weights @ v, new
        return acc / total[:, None], (top + log(total)) / (1.0 if log is torch.log else 1.4426950408889634)
    return answer


def natural(q, load, start, window, block_k):
    return block(unit=1.0, exp=torch.exp, log=torch.log)(q, load, start, window, block_k)


def twice_loaded(q, load, start, window, block_k):
    load((start + len(q) - 1) // block_k)
    return natural(q, load, start, window, block_k)


def test_natural_exponentials_throughout_are_right_too(base_dir):
    assert check.forward_block(natural).passed


@pytest.mark.parametrize("answer,sentence", [
    (block(scale=4.0), "not scaled"),
    (block(scale=0.25), "twice"),
    (block(exp=torch.exp), "use torch.exp2"),
    (block(unit=1.0), "multiply the scale by log2(e)"),
    (block(rescale=(False, False)), "nothing was rescaled"),
    (block(rescale=(True, False)), "the output is not"),
    (block(rescale=(False, True)), "the running sum is not"),
    (block(reach=-1), "off by one: a query sees the key exactly"),
    (block(reach=1), "off by one: a query sees no key more"),
    (block(safe=False), "Not-a-number"),
    (block(first=1), "never loaded"),
    (block(first=-1), "is visited, but only tiles"),
    (block(last=1), "is visited, but only tiles"),
    (lambda *given: tuple(x * (1, 1.4426950408889634)[n] for n, x in enumerate(block()(*given))), "in units of log 2"),
    (twice_loaded, "loaded twice"),
    (lambda *given: block()(*given)[0], "Return a tuple"),
])
def test_wrong_forward_block(answer, sentence, base_dir):
    expect_wrong(check.forward_block, answer, sentence)


def pull(mistake=""):
    def answer(q, k, v, out, grad, lse, seen):
        scale = q.size(1) ** -0.5
        scores = q @ k.T * scale
        scores = scores if mistake == "mask" else scores.masked_fill(~seen, -torch.inf)
        p = {"softmax": lambda: scores.softmax(1).nan_to_num(), "base": lambda: torch.exp2(scores - lse[:, None])}.get(
            mistake, lambda: torch.exp(scores - lse[:, None]))()
        dp = grad @ v.T
        delta = {"delta": 0.0, "tile": (p * dp).sum(1, keepdim=True)}.get(mistake, (grad * out).sum(1, keepdim=True))
        dk, dv = (p * (dp - delta)).T @ q, p.T @ grad
        return dk * {"scale": 1.0, "twice": scale**2}.get(mistake, scale), dv
    return answer


@pytest.mark.parametrize("answer,sentence", [
    (pull("mask"), "Pairs that are not seen"),
    (pull("softmax"), "A softmax over this tile alone"),
    (pull("base"), "lse is natural"),
    (pull("delta"), "is not subtracted"),
    (pull("tile"), "not over this tile"),
    (pull("scale"), "dk lacks the scale"),
    (pull("twice"), "the scale twice"),
    (lambda *given: pull()(*given)[::-1], "dv disagrees"),
    (lambda q, k, *rest: (q, k), "dk has shape (6, 16)"),
])
def test_wrong_key_gradients(answer, sentence, base_dir):
    expect_wrong(check.key_gradients, answer, sentence)


def slope(mistake=""):
    def answer(logits, targets, cap=15.0):
        bent, counts = torch.tanh(logits / cap), (targets >= 0).float()
        p = (logits if mistake == "raw" else cap * bent).softmax(1)
        if mistake != "target":
            p[torch.arange(len(p)), targets.clamp(min=0)] -= 1
        p = p * {"tanh": 1.0, "cap": (1 - bent**2) * cap, "inverse": (1 - bent**2) / cap}.get(mistake, 1 - bent**2)
        count = {"all": len(p), "sum": 1, "zero": counts.sum()}.get(mistake, counts.sum().clamp(min=1))
        return p / count if mistake == "ignored" else p * counts[:, None] / count
    return answer


def by_autograd(logits, targets, cap=15.0):
    logits = logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(cap * torch.tanh(logits / cap), targets, ignore_index=-1)
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("answer,sentence", [
    (slope("target"), "1 is not subtracted"),
    (slope("tanh"), "1 − tanh² is missing"),
    (slope("cap"), "c times too large"),
    (slope("inverse"), "c times too small"),
    (slope("raw"), "over the raw logits"),
    (slope("ignored"), "target −1 have a gradient"),
    (slope("all"), "Ignored targets are counted"),
    (slope("sum"), "gradient of the sum"),
    (slope("zero"), "not a division by zero"),
    (lambda logits, targets, cap=15.0: slope()(logits, targets), "With cap 5"),
    (by_autograd, "It raised"),
])
def test_wrong_loss_gradient(answer, sentence, base_dir):
    expect_wrong(check.loss_gradient, answer, sentence)


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
