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
    # BEGIN SOLUTION
    beta1, beta2 = betas
    for w, g, m, v in zip(weights, gradients, first, second):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        w.mul_(1 - lr * weight_decay)
        w.sub_(lr * m_hat / (v_hat.sqrt() + eps))
    # END SOLUTION

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
    # BEGIN SOLUTION
    x = matrices / (1.01 * torch.linalg.matrix_norm(matrices, keepdim=True)).clamp_min(1e-30)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
    # END SOLUTION

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
    # BEGIN SOLUTION
    chunk = (rows + world_size - 1) // world_size
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)
    # END SOLUTION

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
# BEGIN SOLUTION
from nanochat_lib.muon import muon_step, second_moment_like
from nanochat_lib.optim import adamw_step as library_adamw


def first_step(kind, scale):
    torch.manual_seed(0)
    w, g = torch.randn(1, 64, 32), torch.randn(1, 64, 32) * scale
    before, buffer = w.clone(), torch.zeros_like(w)
    if kind == "sgd":
        w -= 0.1 * g
    elif kind == "adamw":
        library_adamw([w], [g], [buffer], [torch.zeros_like(w)], 1, 0.1, (0.8, 0.95), 1e-10, 0.0)
    else:
        muon_step(w, g, buffer, second_moment_like(w), 0.02, 0.95, 0.9, 0.0)
    return (w - before).norm().item()


answer = {kind: first_step(kind, 1000) / first_step(kind, 1) for kind in ("sgd", "adamw", "muon")}
# AdamW divides by the gradients' own size and Muon keeps directions only: neither step grows. So a single wild
# gradient cannot throw the weights far, which is why nothing here clips gradients.
# END SOLUTION

# %%
check.step_growth(answer)
