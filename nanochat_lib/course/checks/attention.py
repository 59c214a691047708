"""Checks of lesson 03: softmax in one pass, the tiles of a window, attention."""

import torch
import torch.nn.functional as F

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
