"""The exercises of lesson 10: our solutions pass, and wrong answers are told what is wrong with them."""

import re

import pytest
import torch

from nanochat_lib.course.checks import rl as check
from nanochat_lib.course.grading import solutions_of


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("10_rl")


@pytest.mark.parametrize("name", ["group_advantages", "policy_gradient_loss", "pass_at_k", "careful_reward"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_the_measured_answer_passes(solutions, base_dir):
    verdict = check.best_baseline(solutions["answer"])
    assert verdict.passed, verdict


def paid(form, answer, right, same=lambda number, right: number == right):
    """A learner's reward: a pattern for the form, and a comparison of what follows the last blank."""
    if not re.search(form, answer, re.DOTALL):
        return 0.0
    number = answer.split("####")[-1].strip()
    return 1.0 if same(number, right) else 0.1


@pytest.mark.parametrize("name, answer, sentence", [
    ("group_advantages", lambda r: r - r.mean(), "own answers, not of all"),
    ("group_advantages", lambda r: (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6), "do not divide"),
    ("group_advantages", lambda r: r.sub_(r.mean(-1, keepdim=True)), "rewards were changed"),
    ("group_advantages", lambda r: r.mean(-1), "shape (2,)"),
    ("policy_gradient_loss", lambda l, a, m: -(l * a[:, None]).sum() / m.sum(), "mask 0"),
    ("policy_gradient_loss", lambda l, a, m: (l * m * a[:, None]).sum() / m.sum(), "sign is wrong"),
    ("policy_gradient_loss", lambda l, a, m: -(l * m * a[:, None]).mean(), "not by B·T"),
    ("policy_gradient_loss", lambda l, a, m: -((l * m).sum(1) / m.sum(1) * a).mean(), "not row by row"),
    ("policy_gradient_loss", lambda l, a, m: -(l * m * a[:, None]).sum() / m.sum(), "not nan"),
    ("policy_gradient_loss", lambda l, a, m: -(l.detach() * m * a[:, None]).sum() / m.sum(), "no gradient"),
    ("pass_at_k", lambda n, c, k: 1 - (1 - c / n) ** k, "puts every draw back"),
    ("pass_at_k", lambda n, c, k: c / n, "biased"),
    ("pass_at_k", lambda n, c, k: torch.tensor(c / n), "Return a float"),
    ("careful_reward", lambda a, r: float(r in a), "The form is kept"),
    ("careful_reward", lambda a, r: paid(r"####", a, r), "A bare number was paid"),
    ("careful_reward", lambda a, r: paid(r"^\w+", a, r), "An answer without ####"),
    ("careful_reward", lambda a, r: paid(r"^\w+.*####", a, r), "name all numbers"),
    ("careful_reward", lambda a, r: paid(r"^(?!.*####.*####)\w+.*#### -?\d+", a, r), "learn to hedge"),
    ("careful_reward", lambda a, r: paid(r"^(?!.*####.*####).+#### -?\d+\s*$", a, r), "Blanks were taken"),
    ("careful_reward", lambda a, r: paid(r"^(?!.*####.*####)\w+.*#### -?\d+\s*$", a, r, str.endswith), "12 is not 2"),
    ("best_baseline", 0.80, "expected reward"),
    ("best_baseline", 1.1, "below the mean"),
    ("best_baseline", 0.45, "still lower elsewhere"),
])
def test_wrong_answers_are_named(name, answer, sentence, base_dir):
    verdict = getattr(check, name)(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def test_nothing_written_is_not_done_yet(base_dir):
    assert check.best_baseline(None).state == "not done yet"
