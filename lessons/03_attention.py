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
# # 03 · Attention
#
# *How does one kernel make attention fast?* — 40 minutes, about one of them computing.

# %%
#| default_exp attention

# %%
#| export
"""Causal attention with a sliding window and grouped queries: one interface, the fastest right way on each device."""

# %%
#| export
import functools
import os
import sys

import torch
import torch.nn.functional as F

from nanochat_lib.common import NanochatError, is_main_process

# %%
#| export
def visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Which keys each query sees, from positions (…, T) and (S,): bool (…, T, S), itself and `window` keys before it."""
    distance = queries[..., :, None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance <= window)


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None,
                        lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Attention as the formula says, softmax(q·kᵀ/√D)·v, in float32 or better: slow, and what all else is held against.

    q (B, T, H, D); k, v (B, S, KVH, D); row b's queries stand at lengths[b]… (default 0). Returns (B, T, H, D).
    """
    group = q.size(2) // k.size(2)
    positions = torch.arange(q.size(1), device=q.device)
    if lengths is not None:
        positions = lengths[:, None, None] + positions  # (B, 1, T)
    seen = visible(positions, torch.arange(k.size(1), device=q.device), window)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) / q.size(-1) ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.to(wide)).to(q.dtype)

# %%
#| export
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's fused attention in our layout; without a mask it is causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    if grouped and q.device.type == "mps":  # no grouped queries there
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def blocked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Windowed attention in blocks of queries, each of which sees only its own keys: work grows as T · window."""
    T, block, outs = q.size(1), max(window, 64), []
    for start in range(0, T, block):
        end, first = min(start + block, T), max(0, start - window)
        mask = None
        if start or end > window + 1:
            mask = visible(torch.arange(start, end, device=q.device), torch.arange(first, end, device=q.device), window)
        outs.append(sdpa(q[:, start:end], k[:, first:end], v[:, first:end], mask))
    return torch.cat(outs, dim=1)

# %%
#| export
CHOICES = ("reference", "sdpa", "triton")


@functools.cache
def notice(message: str) -> None:
    """Say something once, on the main process."""
    if is_main_process():
        print(f"attention: {message}", file=sys.stderr, flush=True)


def wanted() -> str:
    """What $NANOCHAT_ATTENTION asks for, "" when it leaves the choice to us."""
    name = os.environ.get("NANOCHAT_ATTENTION", "")
    if name and name not in CHOICES:
        raise NanochatError(f"NANOCHAT_ATTENTION={name} is not a way to compute attention: choose {', '.join(CHOICES)}")
    return name


def backend(q: torch.Tensor, window: int | None = None) -> str:
    """The way `attention` takes for q (B, T, H, D): "reference", "sdpa" or "blocks"."""
    if wanted() == "reference":
        return "reference"
    return "sdpa" if window is None or window >= q.size(1) - 1 else "blocks"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Causal attention of q (B, T, H, D) to k, v (B, T, KVH, D); H is a multiple of KVH. Returns (B, T, H, D).

    A query sees itself and the `window` keys before it; None, or window ≥ T − 1, is all of them. Differentiable.
    """
    way = backend(q, window)
    if way == "reference":
        return reference_attention(q, k, v, window)
    return sdpa(q, k, v) if way == "sdpa" else blocked_attention(q, k, v, window)

# %%
#| export
@torch.no_grad()
def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor,
                     window: int | None = None) -> torch.Tensor:
    """Attention of T new tokens per row, q (B, T, H, D), to caches k, v (B, capacity, KVH, D). No gradient.

    `lengths` (B,) int64 counts each row's tokens before this call; the caches already hold the new ones behind them.
    """
    T = q.size(1)
    if T > 1 and not lengths.any():  # a fresh prompt: plain causal attention
        return attention(q, k[:, :T], v[:, :T], window)
    if wanted() == "reference":
        return reference_attention(q, k, v, window, lengths)
    first, end = 0, k.size(1)
    if lengths.device.type == "cpu":  # reading lengths is free: leave out keys that no row sees
        end = min(end, int(lengths.max()) + T)
        first = 0 if window is None else max(0, int(lengths.min()) - window)
    positions = lengths[:, None, None] + torch.arange(T, device=q.device)
    mask = visible(positions, torch.arange(first, end, device=q.device), window)
    return sdpa(q, k[:, first:end], v[:, first:end], mask)
