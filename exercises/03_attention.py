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
# The ideas of a flash attention kernel one by one, the loss's gradient, then the function that the next lessons call. The
# lesson is [03 · Attention](../lessons/03_attention.ipynb).

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
# ## 3 · The forward inner loop
#
# difficulty 4/5 · importance 5/5 · 30 minutes
#
# One program of the kernel, in plain PyTorch: the queries `q` (M, D) stand at positions `start … start + M − 1`.
# `load(n)` brings tile n, keys and values (block_k, D) each, into the same memory as the tile before. Visit exactly the
# tiles of exercise 2, keep a running maximum and sum of *each row*, and give the output (M, D) and the natural logsumexp
# (M,).
#
# Write the exponentials as a GPU has them, in base 2: scores in units of log 2 are `q @ k.T · log2(e) / √D`, and then
# `torch.exp2`. At the left edge of a window some rows see nothing of a tile: their maximum is still −∞.

# %%
LOG2E = 1.4426950408889634


def forward_block(q, load, start, window, block_k):
    """Output (M, D) and natural logsumexp (M,) of one block of queries; a query sees `window` keys before it, and itself."""
    raise NotImplementedError  # your code here

# %%
check.forward_block(forward_block)

# %% [markdown]
# ## 4 · One tile of the backward pass
#
# difficulty 4/5 · importance 4/5 · 25 minutes
#
# The backward kernel has kept no weights, only each row's logsumexp. For one block of queries (M) and one tile of keys
# (N) give what this pair adds to the gradients of the tile's keys and values:
#
# $p = e^{s - \mathrm{lse}},\quad dv = p^\top do,\quad dp = do\, v^\top,\quad ds = p \circ (dp - \delta),\quad dk = ds^\top q / \sqrt D$
#
# where $s = q k^\top / \sqrt D$, weights of pairs that are not `seen` are zero, and $\delta_i = do_i \cdot o_i$. That is
# $\sum_j p_{ij}\, dp_{ij}$ over *all* keys of the row, which this program does not have.

# %%
def key_gradients(q, k, v, out, grad, lse, seen):
    """What a block of queries adds to (dk (N, D), dv (N, D)) of a tile.

    q, out, grad (M, D): queries, their answers, the gradient of the loss by the answers; k, v (N, D); lse (M,) natural;
    seen (M, N) bool. No autograd.
    """
    raise NotImplementedError  # your code here

# %%
check.key_gradients(key_gradients)

# %% [markdown]
# ## 5 · The loss's gradient
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# The loss kernel writes over each line of logits the gradient of that token's own loss; the mean's factor comes later.
# Here the loss is the mean, over the tokens that count, of the cross entropy (in nats) of the bent logits
# $y = c \tanh(x / c)$, so each line is divided by their number; a target of −1 does not count. Give its gradient by the
# raw logits $x$. No autograd.

# %%
def loss_gradient(logits, targets, cap=15.0):
    """d mean loss / d logits (N, V), for raw logits (N, V) float32 and targets (N,) int64, −1 ignored."""
    raise NotImplementedError  # your code here

# %%
check.loss_gradient(loss_gradient)

# %% [markdown]
# ## 6 · Attention
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
