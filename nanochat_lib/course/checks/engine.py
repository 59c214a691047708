"""Checks of the exercises of lesson 08."""

import numpy as np
import torch

from nanochat_lib.course.grading import Wrong, exercise, expect, expect_equal, expect_shape, expect_type
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.kv_cache import KVCache
from nanochat_lib.sampling import draw_seeds

ROWS = 40_000


def seeds_of(rows: int) -> torch.Tensor:
    return torch.from_numpy(draw_seeds(np.full(rows, 8, np.uint64), np.arange(rows)))


def expect_frequencies(tokens: torch.Tensor, probabilities: torch.Tensor, sentence: str) -> None:
    """Tokens (rows,) that occur as often as they should, to within five standard errors."""
    got = tokens.bincount(minlength=len(probabilities)) / len(tokens)
    error = (probabilities * (1 - probabilities) / len(tokens)).sqrt()
    if ((got - probabilities).abs() > 5 * error + 1e-6).any():
        rounded = [[round(p, 3) for p in ps.tolist()] for ps in (probabilities, got)]
        raise Wrong(f"{sentence}\nexpected shares {rounded[0]}\ngot             {rounded[1]}")


@exercise(difficulty=2, importance=5, minutes=15, hints=[
    "Treat temperature 0 first: argmax over the last dimension, no noise.",
    "The k-th largest logit of each row is logits.topk(k, dim=-1).values[:, -1:]; what lies below becomes −inf by masked_fill.",
    "The noise comes last: (logits + gumbel(seeds, torch.arange(V))).argmax(dim=-1). Dividing it too would undo the temperature.",
])
def sample(answer):
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 1.0, 2.5]])
    before, seeds = logits.clone(), seeds_of(2)
    tokens = answer(logits.repeat(50, 1), seeds_of(100), temperature=0.0)
    expect_shape(tokens, (100,), torch.int64)
    expect(tokens.tolist() == [1, 0] * 50, "Temperature 0 takes the likeliest token of each row, without noise.")
    expect_shape(answer(logits, seeds), (2,), torch.int64)
    expect_equal(answer(logits, seeds, top_k=1).tolist(), [1, 0], "With top_k = 1 only the likeliest token is left.")
    expect(torch.equal(logits, before), "The logits were changed: they belong to the caller. Use masked_fill, not masked_fill_.")
    row, seeds = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5]), seeds_of(ROWS)
    many = row.expand(ROWS, -1)
    expect_frequencies(answer(many, seeds), row.softmax(0), "At temperature 1 tokens should follow the softmax of the logits: "
                       "is the noise added to the logits, and does each row get its own?")
    expect_frequencies(answer(many, seeds, temperature=0.5), (row / 0.5).softmax(0), "At temperature 0.5 tokens should follow "
                       "softmax(logits / 0.5): divide the logits by the temperature, and not the noise.")
    expect_frequencies(answer(many, seeds, temperature=2.0), (row / 2).softmax(0), "At temperature 2 tokens should follow "
                       "softmax(logits / 2): divide the logits by the temperature, and not the noise.")
    kept = row.masked_fill(row < 1.0, -torch.inf).softmax(0)
    expect_frequencies(answer(many, seeds, top_k=2), kept, "With top_k = 2 only the two largest logits may be drawn, in the "
                       "proportion they had: choose them before the noise is added, and set the others to −inf, not to 0.")
    for everything in (0, 5, 99):
        expect_frequencies(answer(many, seeds, top_k=everything), row.softmax(0), f"top_k = {everything} keeps all 5 tokens.")


@exercise(difficulty=1, importance=4, minutes=10, hints=[
    "Keys and values: two tensors per layer.",
    "Each holds rows × positions × kv heads × head dim numbers; head dim = n_embd / n_head.",
])
def cache_bytes(answer):
    config = GPTConfig(sequence_len=64, vocab_size=64, n_layer=3, n_head=4, n_kv_head=4, n_embd=32)
    got = answer(config, 1, 1)
    expect_type(got, int)
    expect(got * 2 != 2 * 3 * 4 * 8 * 4, "Half of it is missing: both keys and values are kept.")
    expect_equal(got, 768, "One row, one position: 2 (key, value) · 3 layers · 4 kv heads · 8 channels · 4 bytes.")
    grouped = GPTConfig(sequence_len=64, vocab_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
    expect_equal(answer(grouped, 1, 1), 384, "With two kv heads for four heads the cache is half as large: only kv heads are "
                 "kept, each n_embd / n_head wide.")
    expect_equal(answer(grouped, 1, 1, 2), 192, "bytes_per_number = 2 halves it.")
    cache = KVCache(grouped, rows=5, capacity=20)
    cache.resize([0], "cpu")
    with torch.inference_mode():
        build_model(grouped, "cpu")(torch.zeros(1, 1, dtype=torch.int64), kv_cache=cache)
    expect_equal(answer(grouped, 5, 20), cache.store.nbytes, "5 rows of 20 positions differ from what the engine allocates: every "
                 "row has its own capacity, used or not.")


@exercise(difficulty=3, importance=4, minutes=25, hints=[
    "ast.dump(ast.parse('1 + 2 * 3', mode='eval').body) shows the tree: BinOp, UnaryOp, Constant.",
    "A recursive function value(node): numbers give themselves, a BinOp works out both sides; all else raises ValueError.",
    "Catch SyntaxError, ValueError, ArithmeticError, RecursionError and MemoryError around the whole. True is an int, 'a' and 1j "
    "are constants too: look at type(number).",
])
def calculate(answer):
    for text, value in (("7", 7), ("1 + 2", 3), ("2 + 3 * 4", 14), ("(2 + 3) * 4", 20), ("8 / 4", 2), ("7 - 2 - 1", 4),
                        ("1.5 * 2", 3), ("-3 + 5", 2), ("2 * -4", -8), ("  6 ", 6)):
        got = answer(text)
        expect(got is not None, f"{text!r} has a value, but you gave None.")
        expect_type(got, (int, float))
        expect(abs(got - value) < 1e-9, f"{text!r} is {value}, not {got}.")
    for text, why in (("1 / 0", "nothing can be divided by zero"), ("", "there is nothing"), ("1 +", "it is cut off"), ("(" * 500, "it "
                      "is no expression"), ("x + 1", "names have no value"), ("2 ** 3", "a power is not a key of this calculator, and "
                      "9**9**9 would never end"), ("'a' * 3", "text is not a number"), ("'a'", "text is not a number"), ("True + 1",
                      "True is not a number here"), ("1j", "1j is not a number here"), ("[1, 2]", "a list is not a number"), ("1 < 2",
                      "a comparison is not a number"), ("~1", "~ is not a key"), ("-" * 5000 + "1", "it is nested too deep")):
        try:
            got = answer(text)
        except Exception as error:
            raise Wrong(f"{text[:12]!r} raised {type(error).__name__}: give None instead, since {why}.") from None
        expect(got is None, f"{text[:12]!r} should give None, since {why}.")
    attack = "__import__('nanochat_lib.course.checks.engine').course.checks.engine.CALLED.append(1)"
    CALLED.clear()
    got = answer(attack)
    expect(not CALLED, "Your calculator ran code from the expression: walk the tree, and never use eval or exec.")
    expect(got is None, "A call should give None.")


CALLED: list[int] = []  # an answer that uses eval leaves a trace here


@exercise(difficulty=3, importance=4, minutes=20, hints=[
    "Scores of all pairs: q @ k.transpose(1, 2), divided by the root of q.size(-1), plus the bias.",
    "weights = scores.exp(); an e to the −∞ is 0, so what is hidden drops out by itself.",
    "Return weights @ v and weights.sum(dim=-1, keepdim=True), and do not divide one by the other.",
])
def look_back(answer):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, generator=generator) for n in (3, 5, 5))
    got = answer(q, k, v, torch.zeros(2, 3, 5))
    expect_type(got, tuple)
    expect(len(got) == 2, f"Two sums are wanted, of e^score · value and of e^score; you gave {len(got)}.")
    expect_shape(got[0], (2, 3, 4), torch.float32)
    expect_shape(got[1], (2, 3, 1), torch.float32)
    one = answer(torch.full((1, 1, 4), 2.0), torch.ones(1, 1, 4), torch.full((1, 1, 4), 3.0), torch.zeros(1, 1, 1))
    e4 = float(np.exp(4.0))
    expect(abs(float(one[1]) - np.exp(8.0)) > 1, "Divide the scores by √D, the root of the head's width.")
    expect(abs(float(one[1]) - 1.0) > 1e-3, "The weights are normed, or a maximum was taken off: then two places do not add up. Give the "
           "plain sum of e^score.")
    expect(abs(float(one[1]) - e4) < 1e-2, f"One key with score 8 / √4 = 4: the sum of e^score is e⁴ = {e4:.2f}, not {float(one[1]):.2f}.")
    expect(abs(float(one[0][0, 0, 0]) - 3 * e4) < 0.1, f"One key with score 4 and value 3: the sum is 3 e⁴ = {3 * e4:.1f}, not "
           f"{float(one[0][0, 0, 0]):.1f}.")
    bias = torch.zeros(2, 3, 5)
    bias[:, :, 3:] = -torch.inf
    for have, want in zip(answer(q, k, v, bias), answer(q, k[:, :3], v[:, :3], bias[..., :3])):
        expect(torch.allclose(have, want, atol=1e-5), "Keys with a bias of −∞ are hidden: they should change nothing. Add the bias to the scores.")
    nothing = answer(q, k, v, torch.full((2, 3, 5), -torch.inf))
    expect(all(torch.equal(part, torch.zeros_like(part)) for part in nothing), "Where nothing is seen both sums are 0, not nan.")
    (a, b), (c, d) = answer(q, k[:, :2], v[:, :2], bias[..., :2]), answer(q, k[:, 2:], v[:, 2:], bias[..., 2:])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    expect(torch.allclose((a + c) / (b + d), expected, atol=1e-5), "Two places added up differ from PyTorch's attention over both.")


def simulated_steps(budgets: list[int], rows: int) -> int:
    """Step by step, as a batch does it."""
    left, running, steps = list(budgets), [], 0
    while left or running:
        while left and len(running) < rows:
            running.append(left.pop(0))
        running, steps = [n - 1 for n in running if n > 1], steps + 1
    return steps


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "Keep for each row the step after which it is free; at first they are all 0.",
    "The next request goes to the row that is free first: ends[ends.index(min(ends))] += budget.",
    "All are finished when the last row is: max(ends).",
])
def continuous_steps(answer):
    got = answer([3, 1, 1, 1], 2)
    expect_type(got, int)
    expect(got != 4, "That is waves of two: 3 + 1 steps. While the first request takes its three steps, the other row serves three.")
    expect_equal(got, 3, "Requests of 3, 1, 1 and 1 tokens on two rows: one row takes the first, the other the rest.")
    expect_equal(answer([], 4), 0, "No request takes no step.")
    expect_equal(answer([4, 2, 5], 1), 11, "On one row they come one after another.")
    expect_equal(answer([4, 2, 5], 8), 5, "With more rows than requests the longest decides.")
    expect_equal(answer([1, 1, 5], 2), 6, "Order of arrival: a long request that comes last is not taken first.")
    dice = np.random.default_rng(0)
    for _ in range(50):
        budgets, rows = dice.integers(1, 20, dice.integers(1, 15)).tolist(), int(dice.integers(1, 6))
        before = list(budgets)
        expect_equal(answer(budgets, rows), simulated_steps(before, rows), f"Requests of {before} tokens on {rows} rows, step by step.")
        expect(budgets == before, "The list of budgets was changed: it belongs to the caller.")


@exercise(difficulty=1, importance=4, minutes=10, hints=[
    "rate(32) / rate(1); run it twice, the first call is slower.",
])
def batch_gain(answer):
    expect_type(answer, (int, float))
    expect(answer > 1.5, "Less than 1.5 times? Divide the rate of 32 rows by the rate of one, and measure again on a quiet machine.")
    expect(answer <= 40, "More than 32 times cannot be: 32 rows do at least the work of one. Divide the rates, not their product.")
