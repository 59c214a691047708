"""The exercises of lesson 06: our solutions pass, and wrong answers are told what is wrong with them."""

import math

import pytest
import torch

from nanochat_lib import evaluation, scoring
from nanochat_lib.course.checks import evaluation as check
from nanochat_lib.course.grading import solutions_of


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("06_evaluation")


@pytest.mark.parametrize("name", ["bits_per_byte", "rows_of", "questions_needed"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_the_library_passes_its_own_exercises(solutions, base_dir):
    assert check.bits_per_byte(evaluation.bits_per_byte).passed
    assert check.rows_of(scoring.rows_of).passed
    assert check.luck(solutions["answer"]).passed
    assert check.luck(None).state == "not done yet"


def bpb(bits=math.log(2), clamp=True, specials=False, per_token=False, mean=False):
    def bits_per_byte(losses, targets, token_bytes):
        size = token_bytes[targets.clamp(min=0) if clamp else targets]
        if clamp:
            size = torch.where(targets >= 0, size, 0)
        keep = (size > 0) | specials & (targets >= 0)
        if mean:
            return (losses[keep] / size[keep]).mean().item() / bits
        return losses[keep].sum().item() / bits / (keep.sum() if per_token else size.sum()).item()
    return bits_per_byte


@pytest.mark.parametrize("answer, sentence", [
    (bpb(bits=1), "nats per byte"),
    (bpb(per_token=True), "bits per token"),
    (bpb(mean=True), "sum of nats by the sum of bytes"),
    (bpb(specials=True), "its nats must not count"),
    (bpb(clamp=False), "target of −1"),
    (lambda *a: torch.tensor(bpb()(*a)), "Return a float"),
])
def test_wrong_bits_per_byte(answer, sentence, base_dir):
    verdict = check.bits_per_byte(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def inclusive(kind, rows):
    return [(ids, start, end - 1) for ids, start, end in scoring.rows_of(kind, rows)]


def prefix_only(kind, rows):
    return scoring.rows_of("multiple_choice" if kind == "schema" else kind, rows)


def both_rows(kind, rows):
    return scoring.rows_of("multiple_choice" if kind == "language_modeling" else kind, rows)


def by_length(kind, rows):
    if kind == "language_modeling":
        return [(rows[1], len(rows[0]), len(rows[1]))]
    return scoring.rows_of(kind, rows)


def unguarded(kind, rows):
    if kind == "multiple_choice":
        start = scoring.common_prefix(rows)
        return [(ids, start, len(ids)) for ids in rows]
    return scoring.rows_of(kind, rows)


def from_the_first(kind, rows):
    if kind == "schema":
        shared = scoring.common_prefix([ids[::-1] for ids in rows])
        return [(ids, len(ids) - shared, len(ids)) for ids in rows]
    return scoring.rows_of(kind, rows)


@pytest.mark.parametrize("answer, sentence", [
    (inclusive, "end is exclusive"),
    (prefix_only, "end alike"),
    (both_rows, "scores one row"),
    (by_length, "may fuse"),
    (unguarded, "beginning of another"),
    (from_the_first, "first token is never scored"),
    (lambda kind, rows: [row[:2] for row in scoring.rows_of(kind, rows)], "triple"),
])
def test_wrong_rows_of(answer, sentence, base_dir):
    verdict = check.rows_of(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


@pytest.mark.parametrize("answer, sentence", [
    (lambda p, margin: math.ceil(p * (1 - p) / margin**2 - 1e-9), "Two standard deviations"),
    (lambda p, margin: round(4 * p * (1 - p) / margin**2), "round up"),
    (lambda p, margin: math.ceil(4 * p * (1 - p) / margin**2 - 1e-9), "not none"),
    (lambda p, margin: 4 * p * (1 - p) / margin**2, "Return a int"),
])
def test_wrong_questions_needed(answer, sentence, base_dir):
    verdict = check.questions_needed(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


@pytest.mark.parametrize("answer, sentence", [(125, "share"), (0.0, "more often"), (0.5, "not near")])
def test_wrong_luck(answer, sentence, base_dir):
    verdict = check.luck(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict
