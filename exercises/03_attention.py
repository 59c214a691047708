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
# # 03 · Exercises: attention
#
# The two ideas of a flash attention kernel, then the function itself. The lesson is
# [03 · Attention](../lessons/03_attention.ipynb).

# %%
import torch

from nanochat_lib.course.checks import attention as check

# %% [markdown]
# ## 1 · Softmax in one pass
#
# difficulty 3/5 · importance 5/5 · 20 minutes
#
# One query, and keys that arrive tile by tile: each tile is a pair `scores` (n,), `values` (n, D) in float32, and is gone
# when the next one comes (its memory is used again, as a kernel would). Keep a running maximum, a running sum
# and a running weighted sum of values; return the softmax-weighted average of all values and the logarithm of the sum
# of all exponentials. Scores may be in the thousands. A score of −∞ is a hidden key; a whole tile may be hidden, even the
# first, but not all of them.

# %%
def online_softmax(tiles):
    """(average (D,), logsumexp ()) of an iterator over (scores (n,), values (n, D)); each tile is seen once."""
    raise NotImplementedError  # your code here

# %%
check.online_softmax(online_softmax)

# %% [markdown]
# ## 2 · The window's tiles
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# A program handles the queries `start … start + block_q − 1`. A query sees itself and the `window` keys before it. Keys
# come in tiles: tile number n holds the keys `n · block_k … (n + 1) · block_k − 1`. Give four tile numbers:
#
# | tiles | what they are |
# |---|---|
# | `first … whole − 1` | visited, cut by the window's far edge: need a mask |
# | `whole … diagonal − 1` | every query of the block sees every key: no mask |
# | `diagonal … end − 1` | visited, reach into the future of some query: need a mask |
#
# Each stretch may be empty; if no tile is whole, `whole == diagonal` may stand anywhere between `first` and `end`.
# A tile in which no query sees any key must not be visited: that is where a window's speed comes from.

# %%
def tile_bounds(start, block_q, block_k, window):
    """(first, whole, diagonal, end): numbers of the key tiles for one block of queries. All integers."""
    raise NotImplementedError  # your code here

# %%
check.tile_bounds(tile_bounds)

# %% [markdown]
# ## 3 · Attention
#
# difficulty 2/5 · importance 5/5 · 20 minutes
#
# Rebuild `attention.attention`: causal, with a window, with grouped queries (query head h reads key head
# `h // (H // KVH)`), scaled by one over the root of the head dimension. Write the formula; no fused function of PyTorch.

# %%
def attention(q, k, v, window=None):
    """Causal attention of q (B, T, H, D) to k, v (B, T, KVH, D) → (B, T, H, D).

    A query sees itself and the `window` keys before it; None is all of them.
    """
    raise NotImplementedError  # your code here

# %%
check.attention(attention)
