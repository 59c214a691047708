"""Lesson 00: the one exercise that shows how exercises work."""

import math

from nanochat_lib.course.grading import Wrong, exercise, expect, expect_close, expect_type


@exercise(difficulty=1, importance=3, minutes=2, hints=[
    "The probability of whatever token comes is 1/V.",
    "−ln(1/V) = ln V.",
])
def guessing_loss(answer):
    """The loss of a model that knows nothing: ln V."""
    got = answer(1024)
    expect_type(got, (float, int))
    if math.isclose(got, 10.0, rel_tol=1e-6):
        raise Wrong("That is the loss in bits; nats use the natural logarithm.\nexpected 6.931\ngot      10.0")
    expect(got > 0, "A loss is positive: mind the minus sign before the logarithm.")
    expect_close(got, 6.931471805599453, "The loss is −ln(1/V) with V = 1,024.")
    expect_close(answer(2), 0.6931471805599453, "With two tokens it is the surprise of a coin: −ln(1/2).")
    expect_close(answer(1), 0.0, "With a single token there is no surprise: −ln(1).")
