"""The usual mistakes of lesson 03's exercises, each computed, so that a check can tell a learner which one was made."""

import torch
import torch.nn.functional as F

LOG2E = 1.4426950408889634


def tiled(q, k, v, start, window, n, scale=1.0, reach=0, rescale_sum=True, rescale_acc=True):
    """(output, logsumexp) in float64, tile by tile, with mistakes: a factor on scores, a window too long, no rescaling."""
    q, k, v, low = q.double(), k.double(), v.double(), -1e300
    top, total, acc = q.new_full((len(q),), low), q.new_zeros(len(q)), torch.zeros_like(q)
    for number in range(max(0, start - window) // n, (start + len(q) - 1) // n + 1):
        keys = torch.arange(number * n, (number + 1) * n)
        distance = torch.arange(start, start + len(q))[:, None] - keys
        hidden = (distance < 0) | (distance > window + reach)
        scores = (q @ k[keys].T * scale / q.size(1) ** 0.5).masked_fill(hidden, low)
        new = torch.maximum(top, scores.amax(1))
        weights, factor = torch.exp(scores - new[:, None]) * ~hidden, torch.exp(top - new)
        total = total * (factor if rescale_sum else 1) + weights.sum(1)
        acc, top = acc * (factor[:, None] if rescale_acc else 1) + weights @ v[keys], new
    return acc / total[:, None], top + total.log()


FORWARD_MISTAKES = [
    (dict(scale=4.0), "Scores are not scaled: divide them by the root of the head dimension."),
    (dict(scale=0.25), "The scale is applied twice: divide by the root of the head dimension once."),
    (dict(scale=LOG2E), "The scores are in units of log 2, but a natural exponential is taken of them: use torch.exp2."),
    (dict(scale=1 / LOG2E), "exp2 of natural scores: multiply the scale by log2(e), so that 2^(s · log2 e) is e^s."),
    (dict(rescale_sum=False, rescale_acc=False), "With a new maximum nothing was rescaled: multiply the running sum and the "
     "output by 2^(old maximum − new maximum)."),
    (dict(rescale_acc=False), "The running sum is rescaled with a new maximum, the output is not: both must be."),
    (dict(rescale_sum=False), "The output is rescaled with a new maximum, the running sum is not: both must be."),
    (dict(reach=-1), "The mask is off by one: a query sees the key exactly `window` before it."),
    (dict(reach=1), "The mask is off by one: a query sees no key more than `window` before it."),
]


def key_gradients_with(q, k, v, out, grad, lse, seen, mistake=""):
    """(dk, dv) of one tile in float64, with one named mistake."""
    q, k, v, out, grad, lse = (x.double() for x in (q, k, v, out, grad, lse))
    scale = q.size(1) ** -0.5
    scores = q @ k.T * scale
    scores = scores if mistake == "mask" else scores.masked_fill(~seen, -torch.inf)
    p = scores.softmax(1).nan_to_num() if mistake == "softmax" else torch.exp(scores - lse[:, None])
    p = torch.exp2(scores - lse[:, None]) if mistake == "base" else p
    dp = grad @ v.T
    delta = (p * dp).sum(1, keepdim=True) if mistake == "tile" else (grad * out).sum(1, keepdim=True)
    ds = p * (dp if mistake == "delta" else dp - delta)
    return ds.T @ q * {"scale": 1.0, "twice": scale**2}.get(mistake, scale), p.T @ grad


BACKWARD_MISTAKES = [
    ("mask", "Pairs that are not seen have a weight: set p to zero where `seen` is False."),
    ("softmax", "A softmax over this tile alone: the row has other tiles too. p = exp(s − lse) needs no second softmax."),
    ("base", "lse is natural, but 2^(s − lse) is taken: use exp, or put both in units of log 2."),
    ("delta", "ds = p · (dp − δ): δ, the sum of grad · out over each row, is not subtracted."),
    ("tile", "δ is Σ p · dp over all keys of the row, not over this tile: take it as the sum of grad · out."),
    ("scale", "dk lacks the scale: s = q · k / √D, so its gradient has the factor 1/√D too."),
    ("twice", "dk has the scale twice: 1/√D once, since s has it once."),
]


def loss_gradient_with(logits, targets, cap, mistake=""):
    """The gradient in float64, with one named mistake."""
    logits, counts = logits.double(), (targets >= 0).double()[:, None]
    bent = torch.tanh(logits / cap)
    gradient = (logits if mistake == "raw" else cap * bent).softmax(1)
    if mistake != "target":
        gradient = gradient - F.one_hot(targets.clamp(min=0), logits.size(1))
    gradient = gradient * {"tanh": 1, "cap": (1 - bent**2) * cap, "inverse": (1 - bent**2) / cap}.get(mistake, 1 - bent**2)
    number = {"all": len(targets), "sum": 1.0}.get(mistake, counts.sum().clamp(min=1))
    return gradient * (1 if mistake == "ignored" else counts) / number


LOSS_MISTAKES = [
    ("target", "The target's 1 is not subtracted: the gradient by the bent logits is softmax − [is target]."),
    ("tanh", "The factor 1 − tanh² is missing: the softcap bends the logits, and its slope belongs to the gradient."),
    ("cap", "The slope of c · tanh(x / c) is 1 − tanh²(x / c): the c in front and the 1 / c inside cancel, yours is c times too "
     "large."),
    ("inverse", "The slope of c · tanh(x / c) is 1 − tanh²(x / c): the c in front and the 1 / c inside cancel, yours is c times "
     "too small."),
    ("raw", "The softmax is over the raw logits: it is over the bent ones, c · tanh(x / c)."),
    ("ignored", "Rows with target −1 have a gradient: they do not count, theirs is zero."),
    ("all", "Ignored targets are counted: divide by the number of targets that are not −1."),
    ("sum", "That is the gradient of the sum: divide by the number of targets that count."),
]
