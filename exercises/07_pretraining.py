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
# # 07 · Exercises: pretraining
#
# Rows, rates and the size of a batch: three functions to rebuild, and one question to answer by measuring. The lesson is
# [07 · Pretraining](../lessons/07_pretraining.ipynb).

# %%
import math
import random

from nanochat_lib.course.checks import pretraining as check

# %% [markdown]
# ## 1 · Best fit
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# Fill one row from a buffer of tokenized documents: put in the longest document that still fits, again and again; when none
# fits, the shortest, cropped to the room that is left. Of equally long documents the one that came first goes first. What
# has been used leaves the buffer, a cropped document too.
#
# A plain search through the list is fine here (the library's finds its document by bisection).

# %%
def pack_row(buffer, length):
    """A list of exactly `length` tokens; `buffer`, a list of non-empty lists of tokens, loses what was used.

    The buffer holds enough tokens to fill the row.
    """
    raise NotImplementedError  # your code here

# %%
check.pack_row(pack_row)

# %% [markdown]
# ## 2 · A rate for each step
#
# difficulty 1/5 · importance 5/5 · 10 minutes
#
# The factor on every learning rate at `step` = 0, 1, …, steps − 1:
#
# - warm-up: 1/w, 2/w, …, 1 over the first w = `warmup_steps` steps;
# - then 1;
# - warm-down over the last d = round(warmdown_ratio · steps) steps: a straight line from 1 at `steps − d` to `final_lr_frac` at
#   `steps` (a step that is never taken).

# %%
def learning_rate_multiplier(step, steps, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05):
    """A float between 0 and 1; warmup_steps and warmdown_ratio may be 0."""
    raise NotImplementedError  # your code here

# %%
check.learning_rate_multiplier(learning_rate_multiplier)

# %% [markdown]
# ## 3 · How large a batch?
#
# difficulty 2/5 · importance 4/5 · 10 minutes
#
# The best batch grows with the length of the run, but slowly: B = 2¹⁹ · (D / D₁₂)^0.383 tokens for a run of D tokens, where a
# run of D₁₂ tokens was found to like 2¹⁹. Computers like powers of two: take the one nearest on a logarithmic scale.

# %%
def optimal_batch_size(tokens, reference_tokens):
    """Tokens a step, an int and a power of two."""
    raise NotImplementedError  # your code here

# %%
check.optimal_batch_size(optimal_batch_size)

# %% [markdown]
# ## 4 · What does cropping cost?
#
# difficulty 2/5 · importance 3/5 · 10 minutes
#
# Best fit crops documents, and what is cropped is never read. Measure: of all tokens that leave a full buffer of `size`
# documents, which part is lost to cropping? Take lengths as below and rows of 513 tokens, pack 300 rows, and try `size` = 10, 100 and 1,000.
# Answer with the three fractions, and look at how they fall: this is why the buffer holds 1,000 documents.

# %%
from nanochat_lib.dataloader import BestFit


def lengths(seed=0):
    """Endless lengths of documents, in tokens: many short, a few long (log-normal, median 150)."""
    generator = random.Random(seed)
    while True:
        yield max(int(generator.lognormvariate(5, 1)), 2)


answer = None
# your code here

# %%
check.lost_to_cropping(answer)
