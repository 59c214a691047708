"""Checks of the exercises of lesson 07."""

import math
import random

from nanochat_lib.course.grading import Wrong, exercise, expect, expect_close, expect_equal, expect_type

LOST = (0.26, 0.36), (0.07, 0.13), (0.002, 0.009)  # fractions that several seeds give, with room on both sides


def documents(*lengths: int) -> list[list[int]]:
    """Documents of these lengths; the i-th is made of the numbers 100·(i + 1), 100·(i + 1) + 1, …"""
    return [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths, 1)]


def packed(answer, lengths: list[int], length: int) -> tuple[list[int], list[int]]:
    """(which documents are in the row, in order; lengths of what is left in the buffer), after checks of the row."""
    buffer = documents(*lengths)
    row = answer(buffer, length)
    expect_type(row, list)
    expect(all(isinstance(token, int) for token in row), "The row is a flat list of tokens: join documents with +=.")
    expect(len(row) == length, f"The row has {len(row)} tokens; it should have exactly {length}: no padding, and the last "
           "document is cropped to the room that is left.")
    expect(min(row) >= 100, "The row holds a token that is in no document: no padding, the shortest document is cropped "
           "to fill the row.")
    expect(all(token % 100 == 0 or row[i - 1] == token - 1 for i, token in enumerate(row)),
           "A document must enter the row from its first token on; crop its end, not its beginning.")
    return [token // 100 - 1 for token in row if token % 100 == 0], [len(document) for document in buffer]


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "Keep `room = length - len(row)` and choose again after each document.",
    "max and min with a key return the first of equals.",
    "buffer.pop(i) removes a document and returns it; [:room] crops it, and does nothing to one that fits.",
])
def pack_row(answer):
    order, left = packed(answer, [3, 5, 2, 4], 9)
    expect(order[:1] != [0], "The first document in the buffer went first: choose the longest that fits.")
    expect_equal(order, [1, 3], "Of documents of 3, 5, 2 and 4 tokens, a row of 9 takes the one of 5 and then the one of 4.")
    expect(len(left) == 2, "Documents that were used must leave the buffer.")
    order, left = packed(answer, [9, 4, 7, 8], 6)
    expect(order != [1, 0] and order != [1, 3], "When nothing fits, crop the shortest document: that loses least.")
    expect_equal(order, [1, 2], "A row of 6 takes the document of 4; then none of 9, 7 and 8 fits, and the one of 7 is cropped.")
    expect_equal(left, [9, 8], "A cropped document leaves the buffer whole; its rest is not read later.")
    order, _ = packed(answer, [2, 2, 2], 4)
    expect_equal(order, [0, 1], "Of equally long documents the one that came first goes first.")
    order, _ = packed(answer, [5, 5, 3], 4)
    expect_equal(order, [2, 0], "Of equally short documents the one that came first is cropped.")
    generator = random.Random(7)
    lengths = [generator.randrange(1, 60) for _ in range(60)]
    expected, waiting, room = [], list(enumerate(lengths)), 90
    while room > 0:  # by sorting, where the exercise suggests a search
        fits = sorted((-length, i) for i, length in waiting if length <= room)
        chosen = fits[0][1] if fits else sorted((length, i) for i, length in waiting)[0][1]
        expected.append(chosen)
        room -= lengths[chosen]
        waiting = [pair for pair in waiting if pair[0] != chosen]
    expect_equal(packed(answer, lengths, 90)[0], expected, "From 60 documents it takes others, or in another order.")


@exercise(difficulty=1, importance=5, minutes=10, hints=[
    "Three cases; the warm-down can be written by how much of it is left, (steps − step) / d, which falls from 1 to 0.",
    "With warmdown_ratio = 0 there is nothing to divide by: the rate stays 1.",
])
def learning_rate_multiplier(answer):
    first = answer(0, 100, 10, 0.5, 0.1)
    expect_type(first, (int, float))
    expect(first != 0, "The first step has rate 0 and is wasted: warm up as 1/w, 2/w, …, not 0/w, 1/w.")
    expect_close([answer(step, 100, 10, 0.5, 0.1) for step in range(11)], [*(0.1 * n for n in range(1, 11)), 1.0],
                 "The warm-up over 10 steps is 0.1, 0.2, …, 1.0, and then 1.")
    expect_close(answer(50, 100, 10, 0.5, 0.1), 1.0, "The warm-down starts at step steps − d, still at 1.")
    expect_close(answer(75, 100, 10, 0.5, 0.1), 0.55, "Half-way down, between 1 and 0.1, the factor is 0.55: final_lr_frac "
                 "is where the line ends, not where it is cut off.")
    expect_close(answer(99, 100, 10, 0.5, 0.1), 0.118, "The line reaches final_lr_frac at `steps`, one after the last step.")
    expect_close(answer(99, 100, 0, 0.0, 0.1), 1.0, "Without warm-up and warm-down the rate is always 1.")
    expect_close(answer(4, 5, 1, 0.5, 0.0), 0.5, "d = round(warmdown_ratio · steps): of 5 steps 0.5 is 2.")


@exercise(difficulty=2, importance=4, minutes=10, hints=[
    "Round the exponent, not the number: 2 ** round(log2(…)).",
    "log2 of a product is a sum: 19 + 0.383 · log2(D / D₁₂).",
])
def optimal_batch_size(answer):
    same = answer(1e9, 1e9)
    expect(isinstance(same, int), f"Return an int, not a {type(same).__name__}: tokens are counted.")
    expect_equal(same, 2**19, "A run as long as the reference has the reference's batch, 2¹⁹ = 524,288.")
    got = answer(8e9, 1e9)
    expect(got & (got - 1) == 0, f"{got} is not a power of two.")
    expect(got != 2**22, "Eight times the tokens do not ask for eight times the batch: the exponent is 0.383.")
    expect_equal(answer(1.8e9, 1e9), 2**19, "1.8 times the tokens: 1.8^0.383 = 1.25 is nearer to 1: round, do not round up.")
    expect_equal(got, 2**20, "Eight times the tokens: 8^0.383 = 2.2, so twice the batch.")
    expect_equal(answer(3e9, 1e9), 2**20, "Three times the tokens: 3^0.383 = 1.52, on a logarithmic scale nearer to 2 than to 1.")
    expect_equal(answer(1e8, 1e9), 2**18, "A tenth of the tokens: 0.1^0.383 = 0.41, so half the batch.")
    for depth in range(2, 40):  # D grows about like depth³; compared in whole numbers
        tokens = float(depth) ** 3
        expected = min(range(5, 40), key=lambda power: abs(power - 19 - 0.383 * math.log2(tokens / 1728)))
        expect_equal(answer(tokens, 1728.0), 2**expected, f"For {tokens:.0f} tokens against 1,728 the batch is another.")


@exercise(difficulty=2, importance=3, minutes=10, hints=[
    "BestFit takes anything that has a length: range(n) is a document of n tokens.",
    "A document that take(room) returns is longer than the room only when it is cropped; the difference is lost.",
    "Top the buffer up to `size` before each choice.",
])
def lost_to_cropping(answer):
    expect_type(answer, dict)
    expect(set(answer) == {10, 100, 1000}, "Give a dict {10: fraction, 100: fraction, 1000: fraction}.")
    values = [answer[size] for size in (10, 100, 1000)]
    expect(all(isinstance(value, float) and 0 <= value < 1 for value in values), "Give fractions between 0 and 1, as floats.")
    expect(values[0] > values[1] > values[2], "A larger buffer has a better fitting document, so less is lost: are the "
           "sizes mixed up, or is the buffer not topped up before each choice?")
    for value, (low, high) in zip(values, LOST):
        if not low <= value <= high:
            raise Wrong(f"{value:.4f} is not what 300 rows give: count the part of each cropped document that did not fit, "
                        "and divide by all tokens that left the buffer.")
