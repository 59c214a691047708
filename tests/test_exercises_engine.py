"""The exercises of lesson 08: our solutions pass, and wrong answers are told what is wrong with them."""

import pytest
import torch

from nanochat_lib.course.checks import engine as check
from nanochat_lib.course.grading import solutions_of
from nanochat_lib.sampling import gumbel


@pytest.fixture(scope="module")
def solutions():
    return solutions_of("08_engine")


@pytest.mark.parametrize("name", ["sample", "cache_bytes", "calculate", "look_back", "continuous_steps"])
def test_solutions_pass(solutions, name, base_dir):
    verdict = getattr(check, name)(solutions[name])
    assert verdict.passed, verdict


def test_measured_answers(solutions, base_dir):
    assert check.batch_gain(solutions["answer"]).passed
    assert check.batch_gain(None).state == "not done yet"
    assert "cannot be" in check.batch_gain(1000.0).sentence
    assert "quiet machine" in check.batch_gain(0.05).sentence


def draw(logits, seeds):
    return (logits + gumbel(seeds, torch.arange(logits.size(-1)))).argmax(-1)


def filtered(logits, top_k, fill=-torch.inf):
    return logits.masked_fill(logits < logits.topk(min(top_k or 99, logits.size(-1))).values[:, -1:], fill)


def greedy_else(body):
    return lambda logits, seeds, temperature=1.0, top_k=None: (
        logits.argmax(-1) if temperature == 0 else body(logits, seeds, temperature, top_k))


WRONG_SAMPLES = {
    "Temperature 0": lambda logits, seeds, temperature=1.0, top_k=None: draw(filtered(logits, top_k), seeds),
    "At temperature 1 tokens": greedy_else(lambda logits, seeds, t, k: filtered(logits / t, k).argmax(-1)),
    "At temperature 0.5": greedy_else(lambda logits, seeds, t, k: draw(filtered(logits * t, k), seeds)),
    "not to 0": greedy_else(lambda logits, seeds, t, k: draw(filtered(logits / t, k, 0.0) + 100 * (filtered(logits, k) > -9)
                                                             * (k == 1), seeds)),
    "keeps all 5": greedy_else(lambda logits, seeds, t, k: draw(filtered(logits / t, 1 if k == 0 else k), seeds)),
    "were changed": greedy_else(lambda logits, seeds, t, k: draw(logits.div_(t).copy_(filtered(logits, k)), seeds)),
}


@pytest.mark.parametrize("sentence", WRONG_SAMPLES)
def test_wrong_samples(sentence, base_dir):
    verdict = check.sample(WRONG_SAMPLES[sentence])
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def cost(values=2, heads="n_kv_head", rows=True, size=True):
    return lambda config, n, capacity, bytes_per_number=4: (
        values * config.n_layer * getattr(config, heads) * config.n_embd // config.n_head * capacity * (n if rows else 1)
        * (bytes_per_number if size else 4))


@pytest.mark.parametrize("wrong, sentence", [
    (cost(values=1), "Half of it is missing"), (cost(heads="n_head"), "only kv heads"), (cost(size=False), "halves it"),
    (cost(rows=False), "every row has its own"), (lambda *a: 768.0, "not a float")])
def test_wrong_costs(wrong, sentence, base_dir):
    verdict = check.cache_bytes(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def by_eval(expression):
    try:
        return eval(expression.strip(), {})
    except Exception:
        return None


def only_numbers_by_eval(expression):
    value = by_eval(expression)
    return value if type(value) in (int, float) and "**" not in expression and "True" not in expression \
        and "~" not in expression else None


@pytest.mark.parametrize("wrong, sentence", [
    (lambda text: eval(text.strip()), "raised ZeroDivisionError"),
    (lambda text: str(by_eval(text)), "not a str"),
    (by_eval, "a power is not a key"),
    (lambda text: None, "has a value"),
    (only_numbers_by_eval, "never use eval"),
])
def test_wrong_calculators(wrong, sentence, base_dir):
    verdict = check.calculate(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def sums(q, k, v, bias, scale=True, shift=False, norm=False):
    scores = q @ k.transpose(1, 2) / (q.size(-1) ** 0.5 if scale else 1) + bias
    weights = (scores - scores.amax(-1, keepdim=True) if shift else scores).exp()
    total, weight = weights @ v, weights.sum(-1, keepdim=True)
    return (total / weight, weight / weight) if norm else (total, weight)


@pytest.mark.parametrize("wrong, sentence", [
    (lambda q, k, v, bias: sums(q, k, v, bias)[0], "not a Tensor"),
    (lambda q, k, v, bias: (*sums(q, k, v, bias), bias), "you gave 3"),
    (lambda q, k, v, bias: (sums(q, k, v, bias)[0], sums(q, k, v, bias)[1][..., 0]), "shape"),
    (lambda q, k, v, bias: sums(q, k, v, bias, scale=False), "Divide the scores"),
    (lambda q, k, v, bias: sums(q, k, v, bias, shift=True), "do not add up"),
    (lambda q, k, v, bias: sums(q, k, v, bias, norm=True), "do not add up"),
    (lambda q, k, v, bias: sums(q, k, v, bias * 0 if bias.isfinite().all() else torch.zeros_like(bias)), "are hidden"),
    (lambda q, k, v, bias: tuple(map(torch.nan_to_num, sums(q, k, v, bias))) if bias.isfinite().any() else sums(
        q, k, v, bias, norm=True), "not nan"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_sums(wrong, sentence, base_dir):
    verdict = check.look_back(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict


def longest_first(budgets, rows):
    ends = [0] * rows
    for budget in sorted(budgets, reverse=True):
        ends[ends.index(min(ends))] += budget
    return max(ends)


def emptied(budgets, rows):
    ends = [0] * rows
    while budgets:
        ends[ends.index(min(ends))] += budgets.pop(0)
    return max(ends)


@pytest.mark.parametrize("wrong, sentence", [
    (lambda budgets, rows: sum(max(budgets[i:i + rows]) for i in range(0, len(budgets), rows)), "waves of two"),
    (lambda budgets, rows: sum(budgets) / rows, "not a float"),
    (lambda budgets, rows: -(-sum(budgets) // rows), "longest decides"),
    (lambda budgets, rows: max(budgets), "raised"),
    (longest_first, "not taken first"),
    (emptied, "belongs to the caller"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_steps(wrong, sentence, base_dir):
    verdict = check.continuous_steps(wrong)
    assert verdict.state == "wrong" and sentence in verdict.sentence, verdict
