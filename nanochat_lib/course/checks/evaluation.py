"""Checks of the exercises of lesson 06; the references are plain sums, a search by brute force, the binomial law."""

import math
import random

import torch

from nanochat_lib.course.grading import Wrong, exercise, expect, expect_close, expect_equal, expect_type


@exercise(difficulty=1, importance=5, minutes=10, hints=[
    "−1 is no index: look up `token_bytes[targets.clamp(min=0)]`, then put 0 where `targets < 0`.",
    "After that one mask, bytes > 0, serves the nats and the bytes."])
def bits_per_byte(answer):
    token_bytes = torch.tensor([1, 3, 0, 2])  # token 2 is a special; the last has bytes, so that −1 cannot hide
    got = answer(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1]]), token_bytes)
    expect_type(got, float)
    expect(abs(got - 3 / 4) > 1e-4, "These are nats per byte: divide by ln 2 to get bits.")
    expect(abs(got - 3 / math.log(2) / 2) > 1e-4, "These are bits per token: divide by the bytes instead.")
    expect(abs(got - (1 + 2 / 3) / 2 / math.log(2)) > 1e-4,
           "Divide the sum of nats by the sum of bytes; a mean of the tokens' own ratios weighs short tokens too much.")
    expect_close(got, 3 / math.log(2) / 4, "Two tokens, 1 and 2 nats, 1 and 3 bytes: 3 nats over 4 bytes.")
    got = answer(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0, 1, 2]]), token_bytes)
    expect_close(got, 3 / math.log(2) / 4, "A special token has no bytes: its nats must not count either.")
    got = answer(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0, 1, -1]]), token_bytes)
    expect_close(got, 3 / math.log(2) / 4, "A target of −1 is not scored: neither its nats nor any bytes count, "
                 "whichever token it looks up.")
    generator = torch.Generator().manual_seed(0)
    losses, targets = 4 * torch.rand(5, 40, generator=generator), torch.randint(-1, 4, (5, 40), generator=generator)
    nats = size = 0.0
    for loss, target in zip(losses.flatten().tolist(), targets.flatten().tolist()):
        if target >= 0 and token_bytes[target] > 0:
            nats, size = nats + loss, size + token_bytes[target].item()
    expect_close(answer(losses, targets, token_bytes), nats / math.log(2) / size, "A random batch comes out wrong.")


def spans(kind: str, rows: list[list[int]]) -> list[tuple[list[int], int, int]]:
    """The reference: the longest agreement, tried from long to short."""
    shortest = min(map(len, rows))
    if kind == "schema":
        back = next(n for n in range(shortest - 1, -1, -1) if all(ids[len(ids) - n:] == rows[0][len(rows[0]) - n:]
                                                                  for ids in rows))
        return [(ids, len(ids) - back, len(ids)) for ids in rows]
    longest = shortest - 1 if kind == "multiple_choice" else min(len(rows[0]), len(rows[1]) - 1)
    front = next(n for n in range(longest, -1, -1) if all(ids[:n] == rows[0][:n] for ids in rows))
    return [(ids, front, len(ids)) for ids in (rows if kind == "multiple_choice" else rows[1:])]


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "A helper that counts how many tokens all rows share at the front serves all three forms.",
    "The shared end is the shared beginning of the rows reversed, ids[::-1].",
    "end is exclusive: it is len(ids) in every form."])
def rows_of(answer):
    def got(kind, rows):
        found = answer(kind, [list(ids) for ids in rows])
        expect_type(found, list)
        if any(len(row) != 3 for row in found):
            raise Wrong("Each row is a triple (ids, start, end).")
        return [(list(ids), start, end) for ids, start, end in found]

    rows = [[9, 1, 2, 3], [9, 1, 4]]
    found = got("multiple_choice", rows)
    expect(len(found) == 2, f"Multiple choice scores every choice: 2 rows, not {len(found)}.")
    expect([end for *_, end in found] == [4, 3], "end is exclusive: the last token is scored, so end is len(ids).")
    expect_equal(found, spans("multiple_choice", rows), "Choices are scored from where they first differ.")
    rows = [[9, 1, 5, 6], [9, 2, 2, 5, 6]]
    found = got("schema", rows)
    expect([start for _, start, _ in found] != [1, 1],
           "A schema's rows end alike: score the shared end, not all that follows the shared beginning.")
    expect_equal(found, spans("schema", rows), "A schema's shared end, here [5, 6], starts elsewhere in each row.")
    rows = [[9, 1, 7], [9, 1, 7, 2, 3]]
    found = got("language_modeling", rows)
    expect(len(found) == 1, "Language modeling scores one row, the one with the answer.")
    expect_equal(found, spans("language_modeling", rows), "The answer begins where the row without it ends.")
    expect_equal(got("language_modeling", [[9, 1, 7], [9, 1, 8, 3]]), [([9, 1, 8, 3], 2, 4)],
                 "Context and answer may fuse into other tokens: start where the two rows first differ.")
    expect_equal(got("multiple_choice", [[9, 1], [9, 1, 2]]), [([9, 1], 1, 2), ([9, 1, 2], 1, 3)],
                 "One choice is the beginning of another: at least one token of each must be scored.")
    expect_equal(got("schema", [[9, 1], [9, 1]]), [([9, 1], 1, 2)] * 2, "The first token is never scored.")
    dice = random.Random(0)
    for _ in range(200):
        kind = dice.choice(["multiple_choice", "schema", "language_modeling"])
        rows = [[9, *(dice.randint(0, 1) for _ in range(dice.randint(1, 6)))] for _ in range(2)]
        expect_equal(got(kind, rows), spans(kind, rows), f"For {kind} the rows {rows} come out wrong.")


@exercise(difficulty=2, importance=4, minutes=10, hints=["Solve 2·√(p(1 − p)/n) = margin for n, then round up."])
def questions_needed(answer):
    got = answer(0.5, 0.1)
    expect_type(got, int)
    expect(got != 25, "Two standard deviations, not one, must fit into the margin: that takes four times as many.")
    expect_equal(got, 100, "At p = 0.5 the deviation is 0.5/√n; twice that is 0.1 at n = 100.")
    expect_equal(answer(0.3, 0.07), 172, "171.4 questions are needed, so 171 are too few: round up.")
    expect_equal(answer(1.0, 0.05), 1, "A model that is always right needs one question, not none.")
    for p, margin in ((0.25, 0.01), (0.9, 0.033), (0.62, 0.06)):
        got = answer(p, margin)
        expect(2 * math.sqrt(p * (1 - p) / got) <= margin + 1e-9, f"{got} are too few for p = {p}, margin {margin}.")
        expect(got == 1 or 2 * math.sqrt(p * (1 - p) / (got - 1)) > margin - 1e-9,
               f"Fewer than {got} questions would do for p = {p}, margin {margin}.")


@exercise(difficulty=2, importance=4, minutes=5, hints=[
    "`torch.rand(10_000, 100) < 0.62` plays ten thousand exams of a hundred questions.",
    "0.68 of 100 questions are 68 right answers, and 68 itself counts."])
def luck(answer):
    expect_type(answer, (float, int))
    exact = sum(math.comb(100, right) * 0.62**right * 0.38 ** (100 - right) for right in range(68, 101))
    expect(answer <= 1, "Give a share between 0 and 1, not a count or a percentage.")
    expect(answer > 0.07, "By the binomial law it happens more often: count 68 and more right answers out of 100.")
    expect(abs(answer - exact) < 0.015, "That is not near the binomial law: play each question with probability 0.62.")
