"""Checks of lesson 03: softmax in one pass, tiles of a window, a forward and a backward tile, the loss, attention."""

import torch
import torch.nn.functional as F

from nanochat_lib.course.attention_mistakes import (BACKWARD_MISTAKES, FORWARD_MISTAKES, LOG2E, LOSS_MISTAKES,
                                                    key_gradients_with, loss_gradient_with, tiled)
from nanochat_lib.course.grading import Wrong, exercise, expect, expect_close, expect_shape, expect_type


def one_at_a_time(scores, values, n):
    """Tiles of n keys, each in the same memory; what was there before is overwritten."""
    score_tile, value_tile = torch.empty(n), torch.empty(n, values.size(1))
    for start in range(0, len(scores), n):
        score_tile.copy_(scores[start:start + n])
        value_tile.copy_(values[start:start + n])
        yield score_tile, value_tile
    score_tile.fill_(torch.nan)
    value_tile.fill_(torch.nan)


@exercise(difficulty=3, importance=5, minutes=20, hints=[
    "With a new maximum, what you gathered so far was counted relative to the old one: which factor mends that?",
    "new = max(top, scores.max()); multiply both the sum and the weighted sum by exp(top − new).",
    "While every score so far is −∞, exp(−∞ − (−∞)) is not a number: skip such a tile."])
def online_softmax(answer):
    def run(scores, values, n):
        scores, values = torch.tensor(scores), torch.tensor(values)
        got = answer(one_at_a_time(scores, values, n))
        expect_type(got, tuple)
        expect(len(got) == 2, "Return two things: the average and the logsumexp.")
        expect_shape(got[0], (values.size(1),), torch.float32)
        expect_shape(got[1], (), torch.float32)
        if not got[0].isfinite().all():
            copies = answer((s.clone(), v.clone()) for s, v in one_at_a_time(scores, values, n))
            expect(not copies[0].isfinite().all(), "Tiles were kept until the end, but each takes the memory of the one "
                   "before: use a tile when it comes, and keep only the maximum, the sum and the weighted sum.")
        return got, (scores.double().softmax(0) @ values.double(), scores.double().logsumexp(0))

    def compare(case, average, logsumexp):
        got, expected = run(*case)
        expect_close(got[0], expected[0], average)
        expect_close(got[1], expected[1], logsumexp)

    compare(([0.0, 0.0], [[1.0], [3.0]], 1), "Two equal scores: the average of 1 and 3 is 2.",
            "The logsumexp of two zeros is ln 2: the natural logarithm of the running sum, plus the maximum.")
    compare(([0.0, 1.0], [[1.0], [3.0]], 1),
            "When the maximum rises, rescale the sum and the weighted sum alike by exp(old maximum − new maximum).",
            "The logsumexp is the running maximum plus the logarithm of the running sum.")
    compare(([1.0, 0.0, 3.0, 2.0], [[1.0], [2.0], [3.0], [4.0]], 2),
            "Tiles of two keys, the maximum in the second: nothing of the first may be lost or counted too much.",
            "The logsumexp is the running maximum plus the logarithm of the running sum.")
    generator = torch.Generator().manual_seed(3)
    scores, values = 3 * torch.randn(96, generator=generator), torch.randn(96, 5, generator=generator)
    compare((scores.tolist(), values.tolist(), 8), "Ninety-six random scores in twelve tiles disagree with the softmax.",
            "Ninety-six random scores in twelve tiles: the logsumexp is wrong.")
    compare((((scores * 300).tolist()), values.tolist(), 8),
            "Scores in the hundreds overflow: take the exponential of score − running maximum only.",
            "Scores in the hundreds: the logsumexp is not finite or wrong.")
    hidden = scores.clone()
    hidden[:16], hidden[40:48] = -torch.inf, -torch.inf
    compare((hidden.tolist(), values.tolist(), 8),
            "A tile of hidden keys (all −∞) gives not-a-number: −∞ − (−∞) is undefined, so skip it or subtract 0.",
            "With hidden tiles the logsumexp is wrong.")


def seen_by(start, block_q, window, keys):
    """bool (block_q, keys): brute force over pairs."""
    distance = torch.arange(start, start + block_q)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance <= window)


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "The first query sees furthest back, the last one furthest forward.",
    "A tile is whole when its first key is seen by the last query, and its last key by the first query.",
    "Round first down, whole up: −(−a // b) is a / b rounded up."])
def tile_bounds(answer):
    cases = [(0, 64, 64, 1000), (128, 64, 64, 1000), (128, 64, 64, 65), (128, 64, 64, 64), (256, 64, 32, 100),
             (192, 64, 64, 0), (256, 128, 64, 10), (256, 32, 64, 130), (288, 32, 64, 200), (0, 128, 32, 5), (63, 1, 64, 63)]
    for case in cases:
        start, block_q, block_k, window = case
        got = answer(*case)
        expect_type(got, (tuple, list))
        expect(len(got) == 4 and all(isinstance(n, int) for n in got), "Return four integers: first, whole, diagonal, end.")
        first, whole, diagonal, end = got
        tiles = (start + block_q) // block_k + 2
        pairs = seen_by(start, block_q, window, tiles * block_k).view(block_q, tiles, block_k)
        visible, complete = (set(torch.where(x)[0].tolist()) for x in (pairs.any(2).any(0), pairs.all(2).all(0)))
        where = f"queries {start} … {start + block_q - 1}, tiles of {block_k} keys, window {window}"
        for name, wrong, sentence in (
            ("end", end < max(visible) + 1, "tiles are left out in which a query sees keys: the last query sees itself"),
            ("end", end > max(visible) + 1, "tiles are visited that lie wholly in the future"),
            ("first", first > min(visible), "tiles are left out that the first query sees: it sees `window` keys before itself"),
            ("first", first < min(visible), "tiles are visited that lie wholly before the window"),
        ):
            if wrong:
                raise Wrong(f"For {where}, {name} is wrong: {sentence}.\nexpected {min(visible), max(visible) + 1}\n"
                            f"got      {first, end}")
        unmasked = set(range(whole, diagonal))
        expect(unmasked <= complete, f"For {where}, tiles {sorted(unmasked - complete)} go without a mask, "
               "but some query does not see some key of them: the last query sees the least of the past, the first the "
               "least of what comes.")
        expect(unmasked >= complete, f"For {where}, tiles {sorted(complete - unmasked)} need no mask, but get one.")
        expect(first <= whole <= diagonal <= end, f"For {where}, the numbers must not fall: got {tuple(got)}.")


@exercise(difficulty=2, importance=5, minutes=20, hints=[
    "Scores: einsum('bthd,bshd->bhts'), after giving each query head its key head.",
    "repeat_interleave gives heads 0 0 1 1; repeat gives 0 1 0 1.",
    "distance = query position − key position; hide what is below 0 or above the window, with −∞, before the softmax."])
def attention(answer):
    def reference(q, k, v, window=None):
        seen = seen_by(0, q.size(1), q.size(1) if window is None else window, q.size(1))
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)

    one = torch.ones(1, 2, 1, 4)
    v = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    got = answer(one, one, v)
    expect_shape(got, (1, 2, 1, 4), torch.float32)
    expect_close(got[0, 0, 0, :1], torch.tensor([1.0]), "The first token sees only itself: its answer is its own value.")
    expect_close(got[0, 1, 0, :1], torch.tensor([2.0]), "Equal keys: the second token averages both values.")

    generator = torch.Generator().manual_seed(5)
    q, k, v = (2 * torch.randn(2, 9, heads, 16, generator=generator) for heads in (4, 4, 4))
    got, root = answer(q, k, v), 16**0.5
    expect_shape(got, (2, 9, 4, 16), torch.float32)
    for factor, sentence in ((root, "Scores are not scaled: divide by the root of the head dimension."),
                             (1 / root, "The scale is applied twice: divide by the root of the head dimension once.")):
        expect(not torch.allclose(got.double(), reference(q * factor, k, v), atol=1e-4), sentence)
    swapped = answer(q, torch.cat([k[:, :-1], 5 - k[:, -1:]], 1), v)
    expect_close(swapped[:, :-1], got[:, :-1], "Changing the last token changed earlier answers: a query sees the future.")
    expect_close(got, reference(q, k, v), "Full causal attention disagrees with PyTorch's.")
    for window in (0, 1, 3, 8, 20):
        got = answer(q, k, v, window)
        for off in (window - 1, window + 1):
            same = off < 0 or torch.allclose(reference(q, k, v, off), reference(q, k, v, window), atol=1e-4)
            expect(same or not torch.allclose(got.double(), reference(q, k, v, off), atol=1e-4),
                   f"With window {window} a query sees {off} keys before itself: the mask is off by one.")
        expect_close(got, reference(q, k, v, window), f"Window {window} disagrees with PyTorch under the same mask.")
    got = answer(q, k[:, :, :2], v[:, :, :2])
    expect_shape(got, (2, 9, 4, 16), torch.float32)
    turned = q[:, :, [0, 2, 1, 3]]
    expect(not torch.allclose(got.double(), reference(turned, k[:, :, :2], v[:, :, :2])[:, :, [0, 2, 1, 3]], atol=1e-4),
           "Four query heads on two key heads are paired 0 1 0 1: heads of one group are neighbours, 0 0 1 1.")
    expect_close(got, reference(q, k[:, :, :2], v[:, :, :2]), "Four query heads on two key heads disagree with PyTorch.")


class Loader:
    """load(n) of a block: tiles that it may visit, each in the same memory; it keeps which were visited."""

    def __init__(self, k, v, n, first, end):
        self.k, self.v, self.n, self.first, self.end, self.visited = k, v, n, first, end, []
        self.room = torch.empty(2, n, k.size(1))

    def __call__(self, number):
        expect_type(number, int)
        expect(self.first <= number < self.end, f"Tile {number} is visited, but only tiles {self.first} … {self.end - 1} hold "
               "keys that a query of this block sees.")
        self.visited.append(number)
        self.room[0], self.room[1] = (x[number * self.n:(number + 1) * self.n] for x in (self.k, self.v))
        return self.room[0], self.room[1]


@exercise(difficulty=4, importance=5, minutes=30, hints=[
    "The loop of exercise 1, with a maximum and a sum for each row: top (M,), total (M,), acc (M, D).",
    "Positions: rows start + arange(M), keys n · block_k + arange(block_k); hide where their distance is < 0 or > window.",
    "Subtract 0 instead of a maximum of −∞; at the end (top + log2(total)) / log2(e) is the natural logsumexp."])
def forward_block(answer):
    generator = torch.Generator().manual_seed(7)

    def run(T, M, D, start, window, n):
        q, k, v = (torch.randn(rows, D, generator=generator) for rows in (M, T, T))
        q *= 3
        load = Loader(k, v, n, max(0, start - window) // n, (start + M - 1) // n + 1)
        got = answer(q, load, start, window, n)
        expect_type(got, tuple)
        expect(len(got) == 2, "Return two things: the output and the logsumexp.")
        expect_shape(got[0], (M, D), torch.float32)
        expect_shape(got[1], (M,), torch.float32)
        missed = set(range(load.first, load.end)) - set(load.visited)
        expect(not missed, f"Tiles {sorted(missed)} are never loaded, but hold keys that a query of this block sees.")
        expect(len(load.visited) == load.end - load.first, "A tile is loaded twice: one pass must do.")
        return got, (q, k, v, start, window, n)

    got, case = run(T=1, M=1, D=16, start=0, window=4, n=1)
    expect_close(got[0], case[2], "One query and one key: the answer is the key's value.")
    for shape in (dict(T=32, M=4, start=28, window=32, n=4), dict(T=32, M=8, start=16, window=9, n=4)):
        got, case = run(D=16, **shape)
        expected = tiled(*case)
        expect(bool(got[0].isfinite().all()), "Not-a-number: a row that has seen nothing yet has the maximum −∞, and −∞ − (−∞) "
               "is undefined; subtract 0 there.")
        for mistake, sentence in FORWARD_MISTAKES:
            wrong = tiled(*case, **mistake)[0]
            if not torch.allclose(wrong, expected[0], atol=1e-3):
                expect(not torch.allclose(got[0].double(), wrong, atol=1e-4), sentence)
        expect_close(got[0], expected[0], "The output disagrees with the softmax over all visible keys.", atol=1e-4)
        expect(not torch.allclose(got[1].double(), expected[1] * LOG2E, atol=1e-4),
               "The logsumexp is in units of log 2: divide by log2(e) to have it natural.")
        expect_close(got[1], expected[1], "The logsumexp is wrong: the maximum plus the logarithm of the sum.", atol=1e-4)
    for shape in (dict(T=40, M=8, start=32, window=0, n=8), dict(T=40, M=8, start=20, window=13, n=8)):
        got, case = run(D=8, **shape)
        expect_close(got[0], tiled(*case)[0], f"Wrong for {shape}.", atol=1e-4)


@exercise(difficulty=4, importance=4, minutes=25, hints=[
    "p is the weight itself, not one of this tile: exp of (q @ k.T / √D − lse[:, None]), zero where not seen.",
    "δ = (grad * out).sum(1): one number a row.",
    "dk sums over queries, so it is a product with ds transposed: ds.T @ q, times 1/√D."])
def key_gradients(answer):
    generator = torch.Generator().manual_seed(11)
    M, D, T = 6, 16, 24
    q, k, v, grad = (torch.randn(rows, D, generator=generator) for rows in (M, T, T, M))
    visible = seen_by(T - M, M, 19, T)  # the last queries: the first tile cut by the window, the last by the diagonal
    leaves = [x.double().requires_grad_() for x in (k, v)]
    scores = (q.double() @ leaves[0].T / D**0.5).masked_fill(~visible, -torch.inf)
    out, lse = scores.softmax(1) @ leaves[1], scores.logsumexp(1)
    exact = torch.autograd.grad(out, leaves, grad.double())  # PyTorch's own gradients of all keys and values
    for first in (8, 0, 16):
        tile = slice(first, first + 8)
        case = (q, k[tile], v[tile], out.detach().float(), grad, lse.detach().float(), visible[:, tile])
        with torch.no_grad():
            got = answer(*case)
        expect_type(got, tuple)
        expect(len(got) == 2, "Return two things: dk and dv.")
        for name, part in zip(("dk", "dv"), got):
            expect_type(part, torch.Tensor)
            expect(part.shape == (8, D), f"{name} has shape {tuple(part.shape)}; it should be {(8, D)}, one row a key.")
        for mistake, sentence in BACKWARD_MISTAKES:
            wrong = key_gradients_with(*case, mistake)
            if not all(torch.allclose(a, b[tile], atol=1e-3) for a, b in zip(wrong, exact)):
                expect(not all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip(got, wrong)), sentence)
        expect_close(got[1], exact[1][tile], "dv disagrees with autograd: it is pᵀ @ grad.", atol=1e-4)
        expect_close(got[0], exact[0][tile], "dk disagrees with autograd: it is dsᵀ @ q / √D.", atol=1e-4)


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "By the bent logits: softmax(y), minus 1 at the target; then the chain rule through y = c · tanh(x / c).",
    "dy/dx = 1 − tanh²(x / c).",
    "Rows with target −1: all zero; the others divided by how many they are."])
def loss_gradient(answer):
    generator = torch.Generator().manual_seed(13)
    logits = 12 * torch.randn(6, 9, generator=generator)
    for targets in (torch.tensor([3, 0, -1, 8, 1, -1]), torch.tensor([2, 2, 2, 2, 2, 2]), torch.full((6,), -1)):
        with torch.inference_mode():
            got = answer(logits.clone(), targets.clone())
        expect_shape(got, (6, 9), torch.float32)
        expected = loss_gradient_with(logits, targets, 15.0)
        if (targets >= 0).any():
            wide = logits.double().requires_grad_()
            loss = F.cross_entropy(15 * torch.tanh(wide / 15), targets, ignore_index=-1)
            (expected,) = torch.autograd.grad(loss, wide)
        expect(bool(got.isfinite().all()), "With no target that counts the gradient is zero, not a division by zero.")
        for mistake, sentence in LOSS_MISTAKES:
            wrong = loss_gradient_with(logits, targets, 15.0, mistake)
            if not torch.allclose(wrong, expected, atol=1e-5):
                expect(not torch.allclose(got.double(), wrong, atol=1e-6), sentence)
        expect_close(got, expected, "The gradient disagrees with autograd's.", atol=1e-6)
    got, expected = answer(logits, torch.tensor([3, 0, -1, 8, 1, -1]), 5.0), loss_gradient_with(
        logits, torch.tensor([3, 0, -1, 8, 1, -1]), 5.0)
    expect_close(got, expected, "With cap 5 it disagrees: is 15 written into your formula?", atol=1e-6)
