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
# # 05 · Exercises: the optimizer
#
# Three functions of `nanochat_lib.optim` and `nanochat_lib.muon` to rebuild, and one question to answer by measuring.
# The lesson is [05 · The optimizer](../lessons/05_optimizer.ipynb).

# %%
import torch

from nanochat_lib.course.checks import optimizer as check

# %% [markdown]
# ## 1 · AdamW
#
# difficulty 2/5 · importance 5/5 · 15 minutes
#
# Write one AdamW step on lists of tensors, everything in place. With gradient g, rate η and step t = 1, 2, …:
#
# - first ← β₁·first + (1 − β₁)·g and second ← β₂·second + (1 − β₂)·g²
# - both began at zero, so at step t they are too small by the factor 1 − βᵗ: divide it out
# - w ← w · (1 − η·weight_decay), then w ← w − η · first̂ / (√second̂ + eps)

# %%
def adamw_step(weights, gradients, first, second, step, lr, betas, eps, weight_decay):
    """One AdamW step, in place on every tensor of `weights`, `first` and `second`; `gradients` are left as they are.

    All four are lists of float32 tensors of matching shapes; `step` counts from 1; returns nothing.
    """
    raise NotImplementedError  # your code here

# %%
check.adamw_step(adamw_step)

# %% [markdown]
# ## 2 · Orthogonal by products alone
#
# difficulty 3/5 · importance 5/5 · 20 minutes
#
# Given a stack of matrices, return one with the same singular vectors and all singular values near 1. Divide each
# matrix by 1.01 times its Frobenius norm; then for each triple (a, b, c) of `POLAR_EXPRESS`, in order, X ← a·X +
# b·(XXᵀ)X + c·(XXᵀ)²X. The matrices may be tall: form the smaller of XXᵀ and XᵀX, since (XXᵀ)X = X(XᵀX).

# %%
from nanochat_lib.muon import POLAR_EXPRESS


def polar_express(matrices):
    """(N, rows, cols) float32 → the same shape and dtype; the input stays as it is, a matrix of zeros stays zero."""
    raise NotImplementedError  # your code here

# %%
check.polar_express(polar_express)

# %% [markdown]
# ## 3 · Who owns which rows
#
# difficulty 1/5 · importance 3/5 · 10 minutes
#
# `rows` rows are dealt to `world_size` ranks in order: every rank gets ⌈rows / world_size⌉ of them, until there are
# none left. Then 5 rows on 4 ranks are 2, 2, 1, 0: equal pieces can be sent in one call, and torch's DTensor deals
# the same way.

# %%
def owned_rows(rows, rank, world_size):
    """(first row, one past the last) of `rank`, as ints; equal where a rank has none, and never beyond `rows`."""
    raise NotImplementedError  # your code here

# %%
check.owned_rows(owned_rows)

# %% [markdown]
# ## 4 · Explore: how far does one step go?
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# The same gradient arrives, but a thousand times larger: a strange batch, or a loss that someone forgot to average.
# Take a random matrix of 64×32, random gradients, fresh buffers, and measure by what factor the *first* step grows
# (the norm of the change of the weights) for gradient descent, for AdamW and for Muon, all without weight decay. Then
# say why: what does this mean for gradient clipping?

# %%
answer = None  # {"sgd": factor, "adamw": factor, "muon": factor}
# your code here

# %%
check.step_growth(answer)
