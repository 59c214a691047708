# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · Exercises: the engine
#
# Four functions of the engine to rebuild, one to work out, and one question to answer by measuring. The lesson is [08 · The
# engine](../lessons/08_engine.ipynb).

# %%
import ast
import time

import torch

from nanochat_lib.course.checks import engine as check

# %% [markdown]
# ## 1 · From logits to tokens
#
# difficulty 2/5 · importance 5/5 · 15 minutes
#
# Choose one token for each row. Temperature 0 means the likeliest token. Otherwise divide the logits by the temperature, keep only the
# `top_k` likeliest (None or 0: keep all; k may be larger than the vocabulary), add Gumbel noise and take the largest. The noise for
# token i of row b stands in `gumbel(seeds, ids)[b, i]`, with `ids` = 0 … V − 1.

# %%
from nanochat_lib.sampling import gumbel


def sample(logits, seeds, temperature=1.0, top_k=None):
    """logits (B, V) float32, seeds (B,) int32 → tokens (B,) int64; the logits are left as they are."""
    raise NotImplementedError  # your code here

# %%
check.sample(sample)

# %% [markdown]
# ## 2 · What a cache costs
#
# difficulty 1/5 · importance 4/5 · 10 minutes
#
# The bytes of keys and values for a batch of `rows` rows with room for `capacity` positions each. Read the seven numbers of
# `GPTConfig` with care: which heads are kept?

# %%
def cache_bytes(config, rows, capacity, bytes_per_number=4):
    """Memory of keys and values of all layers, in bytes (an int)."""
    raise NotImplementedError  # your code here

# %%
check.cache_bytes(cache_bytes)

# %% [markdown]
# ## 3 · A calculator without eval
#
# difficulty 3/5 · importance 4/5 · 25 minutes
#
# Work out an expression that a model wrote: whole and decimal numbers, `+ - * /`, parentheses, a leading minus. Let
# `ast.parse(expression, mode="eval")` read it, and walk the tree yourself. Everything else (names, calls, powers, other types,
# division by zero, text that is no expression) gives None; nothing raises, and nothing is executed.

# %%
def calculate(expression):
    """The value of the expression as an int or float, or None."""
    raise NotImplementedError  # your code here

# %%
check.calculate(calculate)

# %% [markdown]
# ## 4 · Attention in two places
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# A row looks back at a beginning it shares and at a part of its own. So that the two can be put together, attention over one place gives
# two sums: of e^score · value and of e^score. A score is q · k / √D plus the bias of query and key (0: seen, −∞: hidden). Sums over two
# places add up, and their quotient is attention over both. Do not take off a maximum: queries and keys are normed, so scores are
# small, and two places with different maxima would not add up.

# %%
def look_back(q, k, v, bias):
    """q (N, n, D), k and v (N, S, D), bias (N, n, S) → sums (N, n, D) and weights (N, n, 1)."""
    raise NotImplementedError  # your code here

# %%
check.look_back(look_back)

# %% [markdown]
# ## 5 · Rows that come and go
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# `budgets` are the tokens that requests want, in order of arrival; a batch has `rows` rows, and each running row gets one token a step. A row
# that is finished is given at once to the next in line. How many steps does it take until all are finished? Compare with waves that wait for
# their slowest: `sum(max(budgets[i:i + rows]) for i in range(0, len(budgets), rows))`.

# %%
def continuous_steps(budgets, rows):
    """Steps (an int) until all requests are finished; 0 for none."""
    raise NotImplementedError  # your code here

# %%
check.continuous_steps(continuous_steps)

# %% [markdown]
# ## 6 · What does a batch bring?
#
# difficulty 1/5 · importance 4/5 · 10 minutes
#
# A step for 32 rows costs more than a step for one, but not 32 times as much. Measure it: `rate(rows)` gives tokens per second. Let
# `answer` be how many times more tokens per second 32 rows give than one. Then think: which part of a step is shared by
# the rows, and what would you expect of a model a hundred times larger?

# %%
from nanochat_lib.engine import Engine
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.tokenizer import Tokenizer

tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
model = build_model(GPTConfig(256, tokenizer.get_vocab_size(), 4, 4, 4, 128), "cpu").eval()
engine = Engine(model, tokenizer)
engine.notable[:] = False  # nothing ends an answer early


def rate(rows, tokens=24):
    """Tokens per second of a batch of `rows` rows."""
    begin = time.perf_counter()
    engine.generate_many([[65]], num_samples=rows, max_tokens=tokens)
    return rows * tokens / (time.perf_counter() - begin)

# %%
answer = None
# your code here

# %%
check.batch_gain(answer)
