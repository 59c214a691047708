"""The exercises of lesson 05: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest
import torch

from nanochat_lib.course.checks import optimizer as check
from nanochat_lib.course.grading import solutions_of
from nanochat_lib.muon import POLAR_EXPRESS


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("05_optimizer")


@pytest.mark.parametrize("name", ["adamw_step", "polar_express", "owned_rows"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_the_measured_answer_passes(solutions, base_dir):
    assert check.step_growth(solutions["answer"]).passed
    assert check.step_growth(None).state == "not done yet"


def adamw(correct=True, decoupled=True, eps_inside=False, in_place=True, swap=False):
    def step_(weights, gradients, first, second, step, lr, betas, eps, weight_decay):
        beta1, beta2 = betas
        for w, g, m, v in zip(weights, gradients, first, second):
            if not decoupled:
                g = g + weight_decay * w
            m.lerp_(g, 1 - beta1)
            v.lerp_(g * g, 1 - beta2)
            c1, c2 = (1 - beta1**step, 1 - beta2**step) if correct else (1, 1)
            root = (v / c2 + eps).sqrt() if eps_inside else (v / c2).sqrt() + eps
            new = w * (1 - lr * weight_decay * decoupled) - lr * m / c1 / root
            if in_place:
                w.copy_(new)
    return step_


@pytest.mark.parametrize("answer, sentence", [
    (adamw(correct=False), "bias correction"),
    (adamw(decoupled=False), "does not go through the gradient"),
    (adamw(eps_inside=True), "outside the root"),
    (adamw(in_place=False), "in place"),
    (lambda w, g, m, v, *rest: g[0].zero_() and None, "weights are unchanged"),
])
def test_wrong_adamw(answer, sentence, base_dir):
    verdict = check.adamw_step(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence


def polar(norm=lambda x: 1.01 * torch.linalg.matrix_norm(x, keepdim=True), coefficients=POLAR_EXPRESS, guard=1e-30,
          elementwise=False):
    def express(matrices):
        x = matrices / norm(matrices).clamp_min(guard)
        turn = x.size(-2) > x.size(-1)
        x = x.mT if turn else x
        for a, b, c in coefficients:
            gram = x * x if elementwise else x @ x.mT
            x = a * x + ((b * gram + c * gram * gram) * x if elementwise else (b * gram + c * gram @ gram) @ x)
        return x.mT if turn else x
    return express


@pytest.mark.parametrize("answer, sentence", [
    (polar(coefficients=[(a, c, b) for a, b, c in POLAR_EXPRESS]), "check the powers"),
    (polar(coefficients=POLAR_EXPRESS[:2]), "check the powers"),
    (polar(norm=lambda x: torch.linalg.matrix_norm(x, keepdim=True)), "1.01 times"),
    (polar(norm=lambda x: 1.01 * x.norm()), "on its own"),
    (polar(guard=0), "stay zero"),
    (polar(elementwise=True), "U·Vᵀ"),
    (lambda x: x.mul_(2), "input was changed"),
])
def test_wrong_polar_express(answer, sentence, base_dir):
    verdict = check.polar_express(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


@pytest.mark.parametrize("answer, sentence", [
    (lambda rows, rank, n: (rank * (rows // n), (rank + 1) * (rows // n)), "round the piece up"),
    (lambda rows, rank, n: (rank * -(-rows // n), (rank + 1) * -(-rows // n)), "cut both ends"),
    (lambda rows, rank, n: [0, 1], "Return a tuple"),
    (lambda rows, rank, n: (rank, rank + 1), "rows 2 and 3"),
])
def test_wrong_owned_rows(answer, sentence, base_dir):
    verdict = check.owned_rows(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence


@pytest.mark.parametrize("answer, sentence", [
    ({"sgd": 1.0, "adamw": 1.0, "muon": 1.0}, "thousand times the step"),
    ({"sgd": 1000.0, "adamw": 31.6, "muon": 1.0}, "Measure adamw"),
    ({"sgd": 1000.0}, "lacks adamw, muon"),
])
def test_wrong_measurements(answer, sentence, base_dir):
    verdict = check.step_growth(answer)
    assert verdict.state == "wrong" and sentence in verdict.sentence
