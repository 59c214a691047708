"""Lesson 00: the exercise that shows how exercises work."""

import math

import pytest

from nanochat_lib.course.checks import tour as check

WRONG = {
    "bits": (lambda v: math.log2(v), "natural logarithm"),
    "sign": (lambda v: math.log(1 / v), "minus sign"),
    "probability": (lambda v: 1 / v, "−ln(1/V)"),
    "constant": (lambda v: 6.931471805599453, "coin"),
    "shifted": (lambda v: math.log(v) if v > 1 else 1.0, "no surprise"),
    "text": (lambda v: "6.93", "Return a float"),
}


def test_right_and_undone_answers(base_dir):
    assert check.guessing_loss(lambda v: -math.log(1 / v)).passed
    assert check.guessing_loss(None).state == "not done yet"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told_why(base_dir, name):
    answer, sentence = WRONG[name]
    verdict = check.guessing_loss(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence
