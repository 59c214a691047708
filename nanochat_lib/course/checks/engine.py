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


@exercise(difficulty=1, importance=4, minutes=10, hints=[
    "rate(32) / rate(1); run it twice, the first call is slower.",
])
def batch_gain(answer):
    expect_type(answer, (int, float))
    expect(answer > 1.5, "Less than 1.5 times? Divide the rate of 32 rows by the rate of one, and measure again on a quiet machine.")
    expect(answer <= 40, "More than 32 times cannot be: 32 rows do at least the work of one. Divide the rates, not their product.")
