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
# *How does one kernel make attention fast?* — 90 minutes, about one of them computing; the exercises take 135 more.
#
# Attention is the only place in a transformer where tokens look at each other, and the only one whose cost grows with
# the square of the text. It is also three lines of PyTorch. This lesson starts from the three lines and ends with the
# kernels that train the model and let it speak: same numbers, far less memory moved, and no work on keys that a
# window hides.
#
# The way there: a softmax in one pass → tiles → the kernel → its gradient → one query against a cache → the loss, which
# has the same disease → what the compiler made of them → what a CPU does → who chooses → how fast it is.

# %%
#| default_exp attention

# %%
#| export plain_attention
"""Causal attention in plain PyTorch: the formula, the fused kernel, and windows in blocks that see only their keys.

Layout (B, T, H, D) throughout: batch, tokens, heads, head dimension. Keys and values may have fewer heads (KVH).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# %%
import importlib.util
import math
import os
import sys
import time

import matplotlib.pyplot as plt

_ = torch.manual_seed(0)

# %% [markdown]
# ## The formula
#
# Each token asks with a query $q$, and each token offers a key $k$ and a value $v$. The answer is an average of
# values, weighted by how well their keys fit:
# $\;o_i = \sum_j p_{ij} v_j,\quad p_{ij} = \mathrm{softmax}_j\left(q_i \cdot k_j / \sqrt{D}\right)$
# (Vaswani et al., 2017). Three rules say which $j$ count:
#
# - **Causal**: a token never sees the ones after it, or predicting the next token would be copying.
# - **Window**: in most layers a token sees itself and the `window` keys before it. Layers stack, so what is out of one
#   layer's window still arrives through the layer below.
# - **Grouped queries** (Ainslie et al., 2023): several query heads share one key-value head, so that the cache of
#   keys and values, which a chat must keep and reread for every token, is smaller.

# %%
#| export plain_attention
def visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Which keys each query sees, by positions (…, T) and (S,): itself and `window` keys before it. Bool (…, T, S)."""
    distance = queries[..., :, None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance <= window)


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None,
                        lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Attention as the formula says, in float32 or better: slow, and what every other way is held against.

    q (B, T, H, D); k, v (B, S, KVH, D); row b's queries stand at lengths[b]… (default 0). Returns (B, T, H, D).
    """
    positions, keys = (torch.arange(x.size(1), device=q.device) for x in (q, k))
    if lengths is not None:
        positions = lengths[:, None, None] + positions  # (B, 1, T)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) / q.size(-1) ** 0.5
    weights = scores.masked_fill(~visible(positions, keys, window), -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v.to(wide)).to(q.dtype)

# %% [markdown]
# Three masks: rows are queries, columns are keys, dark is seen. The third is a chat's: four rows of different
# length, each asking with one new token.

# %%
t = torch.arange(24)
masks = {"full": visible(t, t), "window 6": visible(t, t, 6),
         "decoding, window 6": visible(torch.tensor([[5], [11], [17], [23]]), t, 6)[:, 0]}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for axis, (name, mask) in zip(axes, masks.items()):
    axis.imshow(mask, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    axis.set(title=f"{name}: {int(mask.sum())} pairs", xlabel="key position", ylabel="query")
_ = axes[2].set_yticks(range(4), ["row 0", "row 1", "row 2", "row 3"])

# %% [markdown]
# Causality is worth a proof rather than a look: change the last token, and nothing before it may move.

# %%
q, k, v = torch.randn(1, 8, 4, 32), torch.randn(1, 8, 2, 32), torch.randn(1, 8, 2, 32)
before = reference_attention(q, k, v)
k[:, -1], v[:, -1] = 9.0, 9.0
after = reference_attention(q, k, v)
assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])

# %% [markdown]
# ## Why the formula is slow
#
# Count bytes, not multiplications. The three lines write all scores (T × T) to memory, read them for the softmax,
# write the weights, and read those again. For one head of 128 dimensions at T = 8,192 in two-byte numbers, queries,
# keys, values and output together are 8 MiB; scores and weights are moved four times, 512 MiB. A GPU's arithmetic
# waits for that.
#
# So never write them. Take the keys tile by tile, keep the tile's scores on the chip, and update a running answer.
# What stands in the way is the softmax, which needs the sum over *all* keys before it can weigh the first.
#
# ## Softmax in one pass
#
# It does not need to. Keep the maximum $m$ so far, the sum $\ell$ of $e^{s_j - m}$, and the weighted sum of values
# $a$. When a tile brings a new maximum $m'$, everything gathered was counted with the wrong reference: multiply
# $\ell$ and $a$ by $e^{m - m'}$ and go on. At the end the answer is $a / \ell$ (Milakov & Gimelshein, 2018). The
# maximum is there only so that no exponential overflows.

# %%
scores, values = 4 * torch.randn(64), torch.randn(64, 3)
m, l, a, trace = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(3), []
for tile in range(0, 64, 8):
    s = scores[tile:tile + 8]
    new_m = torch.maximum(m, s.max())
    rescale, p = torch.exp(m - new_m), torch.exp(s - new_m)  # exp(−∞) = 0: the first tile has nothing to rescale
    l, a, m = l * rescale + p.sum(), a * rescale + p @ values[tile:tile + 8], new_m
    trace.append((m.item(), l.item(), rescale.item()))
assert torch.allclose(a / l, scores.softmax(0) @ values, atol=1e-6)

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
for axis, name, series in zip(axes, ["running max m", "running sum ℓ", "rescaling factor"], zip(*trace)):
    axis.bar(range(8), series)
    axis.set(title=name, xlabel="tile of 8 keys")

# %% [markdown]
# The sum falls wherever the maximum jumps: that is the rescaling. The pair $(m, \ell)$ is all that must be kept of a
# row; its *logsumexp* $m + \ln \ell$ lets a backward pass recompute any weight as $e^{s - \mathrm{lse}}$ without a
# second softmax.
#
# ## Tiles, and the tiles a window never visits
#
# FlashAttention (Dao et al., 2022) gives each block of queries to one group of threads, which walks over tiles of
# keys and values. For queries `start … start + block − 1` the first key anyone sees is `start − window`, the last is
# the block's own last position. Tiles outside are not masked: they are not *visited*. Tiles wholly inside need no
# mask either.

# %%
#| export tiles
"""What a block of queries visits: kinds of tiles, bytes moved, and the online softmax of one block step by step."""

from dataclasses import dataclass

import torch

from nanochat_lib.plain_attention import visible


def tile_kinds(T: int, block: int, window: int | None = None) -> torch.Tensor:
    """Each tile's kind (T / block, T / block): 0 never visited, 1 visited without a mask, 2 visited with one."""
    t = torch.arange(T)
    seen = visible(t, t, window).view(T // block, block, T // block, block).float().mean((1, 3))
    return (seen > 0).int() + ((seen > 0) & (seen < 1)).int()

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for axis, window in zip(axes, (None, 512)):
    kinds = tile_kinds(2048, 128, window)
    axis.imshow(kinds, cmap=plt.cm.colors.ListedColormap(["white", "tab:blue", "tab:orange"]))
    axis.set(title=f"{f'window {window}' if window else 'full'}: {int((kinds > 0).sum())} tiles, "
             f"{int((kinds == 2).sum())} with a mask", xlabel="tile of 128 keys", ylabel="block of 128 queries")

# %% [markdown]
# White is work that is never done. Watch one block of queries do the rest: eight queries at positions 24 … 31 with a
# window of 17, tiles of eight keys. `walk` is the algorithm, and keeps what a kernel has in registers after each tile.

# %%
#| export tiles
@dataclass
class Step:
    """What a block of M queries knows after one tile of N keys."""

    tile: int
    weights: torch.Tensor  # (M, N) e^(score − top), 0 where hidden
    seen: torch.Tensor  # (M, N) bool
    top: torch.Tensor  # (M,) running maximum; −∞ while nothing was seen
    rescale: torch.Tensor  # (M,) what the earlier sum and output were multiplied by
    total: torch.Tensor  # (M,) running sum
    out: torch.Tensor  # (M, D) the answer so far: weighted sum of values over running sum


def walk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, n: int,
         window: int | None = None) -> list[Step]:
    """The tiles that queries q (M, D) at positions start… visit among k, v (T, D), n keys each, one Step a tile."""
    M, D = q.shape
    rows, first = torch.arange(start, start + M), 0 if window is None else max(0, start - window) // n
    top, total, acc, steps = torch.full((M,), -torch.inf), torch.zeros(M), torch.zeros(M, v.size(1)), []
    for tile in range(first, (start + M - 1) // n + 1):
        keys = torch.arange(tile * n, min((tile + 1) * n, len(k)))
        seen = visible(rows, keys, window)
        scores = (q @ k[keys].T / D**0.5).masked_fill(~seen, -torch.inf)
        new = torch.maximum(top, scores.amax(1))
        reference = new.masked_fill(new == -torch.inf, 0.0)  # −∞ − (−∞) is not a number
        weights, rescale = torch.exp(scores - reference[:, None]), torch.exp(top - reference)
        total, acc, top = total * rescale + weights.sum(1), acc * rescale[:, None] + weights @ v[keys], new
        steps.append(Step(tile, weights, seen, top, rescale, total, acc / total.clamp(min=1e-30)[:, None]))
    return steps

# %%
few = 2 * torch.randn(8, 16), 2 * torch.randn(32, 16), torch.randn(32, 16)  # queries, keys, values
steps = walk(*few, start=24, n=8, window=17)
expected = reference_attention(*(x[None, :, None] for x in few), 17, torch.tensor([24]))[0, :, 0]
assert torch.allclose(steps[-1].out, expected, atol=1e-5)


def draw_step(axes, steps, number):
    """One tile's weights; each row's maximum; its sum, old part (rescaled) and new; how far its answer still is off."""
    step, old = steps[number], steps[number - 1].total if number else torch.zeros(8)
    rows, kept = range(24, 32), old * step.rescale
    grid = torch.where(step.seen, step.weights, torch.nan)
    axes[0].imshow(grid, cmap="Blues", vmin=0, vmax=1, extent=(8 * step.tile - 0.5, 8 * step.tile + 7.5, 31.5, 23.5))
    axes[0].set(title=f"tile {step.tile}: weights", xlabel="key", ylabel="query", facecolor="0.85",
                xticks=(8 * step.tile, 8 * step.tile + 7))
    axes[1].barh(rows, step.top.clamp(min=0), color="tab:purple")
    axes[1].set(title="running max", xlim=(0, 14), xlabel="nats")
    axes[2].barh(rows, kept, color="tab:grey")
    axes[2].barh(rows, step.total - kept, left=kept, color="tab:blue")
    axes[2].set(title="sum: kept + new", xlim=(0, 4))
    axes[3].barh(rows, step.rescale * (old > 0), color="tab:orange")
    axes[3].set(title="rescaled by", xlim=(0, 1.05))
    axes[4].barh(rows, (step.out - steps[-1].out).norm(dim=1), color="tab:red")
    axes[4].set(title="distance to answer", xlim=(0, 6))
    for axis in axes[1:]:
        axis.set(ylim=(31.5, 23.5), yticks=[])


figure, axes = plt.subplots(len(steps), 5, figsize=(10, 1.8 * len(steps)), layout="constrained")
for number in range(len(steps)):
    draw_step(axes[number], steps, number)

# %% [markdown]
# Read a row from top to bottom. In the first tile some queries see nothing (grey: the window's far edge) and have no
# sum yet. Where the maximum rises, the sum and the answer shrink to what the new maximum leaves of them (orange below
# 1); where it stays, the tile is just added. After the last tile the distance is zero: nothing was approximated. With
# a live notebook, step through it, and move the window:

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets


def browse(tile, window):
    steps = walk(*few, start=24, n=8, window=window)
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.1), layout="constrained")
    draw_step(axes, steps, min(tile, len(steps) - 1))
    figure.suptitle(f"step {min(tile, len(steps) - 1) + 1} of {len(steps)}")
    plt.show()


_ = ipywidgets.interact(browse, tile=ipywidgets.IntSlider(0, 0, 3), window=ipywidgets.IntSlider(17, 0, 31))

# %% [markdown]
# ## Bytes, counted
#
# What tiles save in memory traffic, for one head forward, in two-byte numbers. Naive moves scores and weights four
# times; tiled reads, for each block of queries, the keys and values of the tiles it visits.

# %%
#| export tiles
def traffic(T: int, D: int = 128, block: int = 128, window: int | None = None, naive: bool = False) -> dict[str, int]:
    """Bytes that one head's forward pass moves between memory and chip, in two-byte numbers, by what is moved."""
    if naive:
        return {"q, out": 4 * T * D, "k, v": 4 * T * D, "scores": 8 * T * T}
    visited = sum(start + block - (0 if window is None else max(0, start - window) // block * block)
                  for start in range(0, T, block))
    return {"q, out": 4 * T * D, "k, v": 4 * visited * D, "scores": 0}

# %%
texts = [512 * 2**i for i in range(7)]
ways = {"naive": dict(naive=True), "tiled": {}, "tiled, window 512": dict(window=512)}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, settings in ways.items():
    left.loglog(texts, [sum(traffic(T, **settings).values()) / 2**20 for T in texts], marker="o", label=name)
left.set(xlabel="T (tokens)", ylabel="memory traffic (MiB per head)", xticks=texts, xticklabels=texts)
left.minorticks_off()
left.legend()
counted = {name: traffic(8192, **settings) for name, settings in ways.items()}
begin = torch.zeros(3)
for part in ("q, out", "k, v", "scores"):
    width = torch.tensor([moved[part] / 2**20 for moved in counted.values()])
    right.barh(list(counted), width, left=begin, label=part)
    begin += width
right.set(xlabel="MiB per head at T = 8,192", ylim=(2.5, -0.5))
right.legend()
print("T = 8192:", {name: f"{sum(moved.values()) / 2**20:.0f} MiB" for name, moved in counted.items()})

# %% [markdown]
# Tiled traffic still grows as T² (each block rereads the keys before it), but divided by the block; a window makes it
# grow as T. Most rereads end in the GPU's cache, so that the memory proper moves each tensor about once.
#
# ## The roofline
#
# Is that enough? A chip has two speeds: operations a second, and bytes a second. Their ratio is how many operations a
# byte must be good for, or the arithmetic waits. A kernel's own ratio is its *arithmetic intensity*; the roof above
# it is the lower of the two limits (Williams et al., 2009). Below, one chip by its datasheet, and what each kernel of
# this lesson asks of it.

# %%
import json
from pathlib import Path

CHIP, FLOPS, BYTES = "H200 SXM", 989e12, 4.8e12  # datasheet: dense bfloat16, memory
docs = [folder / "docs/kernels.json" for folder in (Path("."), Path("..")) if (folder / "docs/kernels.json").exists()]
found = json.loads(docs[0].read_text()) if docs else {"rows": [], "targets": []}  # where kernel_bench has measured
rates = {(row["part"], row["case"], row["way"]): row["rate"] for row in found["rows"] if "rate" in row}


def intensity(T, D=128, window=None, naive=False):
    """Operations per byte of one head's forward pass. Tiled: keys and values counted once, the cache has the rest."""
    pairs = sum(min(t, T if window is None else window) + 1 for t in range(T))
    return 4 * D * pairs / (sum(traffic(T, D, naive=True).values()) if naive else 8 * T * D)


asked = {"naive, T 2,048": intensity(2048, naive=True), "flash, T 2,048": intensity(2048),
         "flash, window 512": intensity(2048, window=512),
         "decoding, batch 1 or 64": 1,  # 4 · D operations for a key and its value, 4 · D bytes; each row has its own
         "decoding, 4 queries a key head": 4, "a weight matrix, batch 1": 1, "a weight matrix, batch 64": 64,
         "the loss between its products": 10 / 4}  # two bytes read, two written
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
line = torch.logspace(-0.5, 4, 100)
axis.loglog(line, torch.minimum(line * BYTES, torch.tensor(FLOPS)) / 1e12, color="black", label=f"roof of one {CHIP}")
for number, (name, x) in enumerate(asked.items()):
    axis.plot(x, min(x * BYTES, FLOPS) / 1e12, "os^vD<>P"[number], label=f"{name}: {x:.3g}", ms=8)
axis.axvline(FLOPS / BYTES, ls=":", color="grey")
multiply, copy = rates.get(("roof", "8,192³", "matmul"), 0), rates.get(("roof", "1 GiB", "copy"), 0)
if multiply and copy:  # TFLOP/s, GB/s
    axis.loglog(line, torch.minimum(line * copy / 1e3, torch.tensor(multiply)), ls="--", color="grey",
                label=f"roof measured, {found['chip']}")
    for name, x, rate in (("flash, T 2,048", asked["flash, T 2,048"], rates.get(("forward", "T 2,048", "ours"))),
                          ("decoding, batch 64", 1, rates.get(("decoding", "batch 64", "ours"), 0) / 1e3)):
        axis.plot(x, rate or torch.nan, "*", ms=14, label=f"{name}, measured")
axis.set(xlabel="operations per byte", ylabel="TFLOP/s at most",
         title=f"the ridge: {FLOPS / BYTES:.0f} operations per byte")
_ = axis.legend(fontsize=8)

# %% [markdown]
# Three neighbourhoods. The naive formula sits far left of the ridge: at best a seventh of the chip, whatever one
# does. Flash attention sits right of it, windowed or not, and becomes what a kernel should be: limited by arithmetic.
# Decoding sits at one operation per byte, and *batching does not move it*, since each row has a cache of its own; only
# query heads that share a key head do. (A weight matrix is shared by all rows: there the batch helps.) For decoding
# the whole art is to read at full speed. And the loss has, between its large products, a pass over the logits that does
# ten operations on each: memory again.
#
# ## The kernel
#
# Triton kernels are Python that is compiled for the GPU. A launch starts a *grid* of *programs*: copies of the kernel
# that differ in their number alone, which tells each its part of the work, here one block of queries of one head. A
# program is a few *warps*, groups of 32 threads in step; the *tiles* it works on are small blocks of large tensors,
# spread over its threads' registers. What threads exchange goes through *shared memory*, 99 to 227 KiB in each of the
# chip's hundred or so *multiprocessors*, which run the programs, a few at a time.
#
# Without a GPU, `TRITON_INTERPRET=1` runs the same source with numpy, slowly; it must be set before a kernel is
# decorated.

# %%
triton_here = importlib.util.find_spec("triton") is not None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
mocked = [] if triton_here else ["triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor"]
if mocked:  # macOS, Windows: read the kernel here, run it elsewhere
    from unittest.mock import MagicMock

    sys.modules.update({name: MagicMock() for name in mocked})

# %%
#| export kernels/flash_attention
"""Flash attention (Dao et al., 2022; Dao, 2023), forward and backward: causal, sliding window, grouped queries.

Keys come in tiles, scores stay on the chip, tiles that a window hides are never visited; no atomics, so the same
input gives the same bits. Layout (B, T, H, D). Needs torch and triton only.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETING = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy instead of a GPU
HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = tl.constexpr(1.4426950408889634)  # log₂ e
SIZES = ["T", "H", "KVH", "group", "window"]  # arguments that change often: not compiled anew for each value

# %% [markdown]
# The hardware's exponential has base 2, and $e^x = 2^{x \log_2 e}$. So kernels multiply `scale` by $\log_2 e$ once and
# use `exp2`: running maxima are in units of $\log 2$, and a logsumexp is divided by $\log_2 e$ when it is stored.
#
# One tile first: hide what must be hidden, then the running maximum and the rescaling you know. Two details.
#
# - Most tiles lie wholly between diagonal and window, and there nothing is compared: one `if` on the tile's corners.
# - A row at a window's left edge may see nothing of a tile. Its maximum then stays at the −10³⁰ it started with
#   rather than −∞, since −∞ − (−∞) is not a number.

# %%
#| export kernels/flash_attention
@triton.jit
def hide(values, rows, keys, window, hidden):
    """Values (…) where a row sees the key: itself and `window` before; `hidden` elsewhere."""
    return tl.where((rows >= keys) & (rows - keys <= window), values, hidden)


@triton.jit
def softmax_tile(scores, total, top, start, key, window, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Weights (M, N) of the tile at (start, key), new running sum and maximum (M,), the past's rescaling."""
    if (key + BLOCK_N - 1 > start) | (key < start + BLOCK_M - 1 - window):
        rows, keys = start + tl.arange(0, BLOCK_M), key + tl.arange(0, BLOCK_N)
        scores = hide(scores, rows[:, None], keys[None, :], window, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)  # in units of log 2
    weights = tl.exp2(scores * scale - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    return weights, total * rescale + tl.sum(weights, 1), new_top, rescale

# %% [markdown]
# Who does what, and in which order? Programs start in the order of their numbers. Late rows see most keys, so the
# longest blocks should start first, or the chip ends up waiting for one that began late. In all heads at once, their
# keys would compete for the cache; so sixteen heads go side by side, which on an H200 is 6 to 9 % faster than head by
# head.

# %%
#| export kernels/flash_attention
BUNCH = tl.constexpr(16)  # heads whose programs run side by side


@triton.jit
def share_of_work(blocks):
    """(block, line) of this program, one of lines · blocks: a bunch of lines together, block 0 of each first."""
    number, lines = tl.program_id(0), tl.num_programs(0) // blocks
    first = number // (BUNCH * blocks) * BUNCH
    width = tl.minimum(lines - first, BUNCH)  # the last bunch may be a smaller one
    rest = number - first * blocks
    return rest // width, first + rest % width

# %% [markdown]
# Then the program around it. Tiles are fetched by the chip's copy engine: `k_all` *describes* the tensor (where it
# lies, its shape and strides), `load` names a tile's corner, and what lies past the end reads as zero, so no load
# needs a mask. `head // group` is all there is to grouped queries: no copy of the keys is made.
#
# Tensor cores idle while a program does its softmax, unless a second program is there to use them, so the tiles are
# such that two fit on a multiprocessor: 128 queries by 64 keys for four warps take nearly all 255 registers that a
# thread can have, and 96 KiB of the 227 of shared memory. On an H200 (bfloat16, 16 heads of 128, 16K tokens) that is
# 0.84 of cuDNN's speed at T = 2,048 and 0.88 at 8,192; one program of eight warps would be 12 % slower.

# %%
#| export kernels/flash_attention
@triton.jit(do_not_specialize=SIZES)
def forward_kernel(q_all, k_all, v_all, out_all, lse_all, T, H, group, window, scale,
                   D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """One block of BLOCK_M queries of one head: `out_all`, and natural logsumexp `lse_all` (B, H, T) float32."""
    blocks = tl.cdiv(T, BLOCK_M)
    block, line = share_of_work(blocks)
    start = (blocks - 1 - block) * BLOCK_M  # the longest rows first
    batch, head = line // H, line % H
    kv_head = head // group
    q = q_all.load([batch, head, start, 0]).reshape(BLOCK_M, D)
    first = tl.maximum(start - window, 0) // BLOCK_N * BLOCK_N  # the first tile that any row sees

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    for key in tl.range(first, start + BLOCK_M, BLOCK_N, disable_licm=True):  # sums kept out of the loop cost registers
        k = k_all.load([batch, kv_head, key, 0]).reshape(BLOCK_N, D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        weights, total, top, rescale = softmax_tile(scores, total, top, start, key, window, scale, BLOCK_M, BLOCK_N)
        v = v_all.load([batch, kv_head, key, 0]).reshape(BLOCK_N, D)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    out_all.store([batch, head, start, 0], (acc / total[:, None]).to(out_all.dtype).reshape(1, 1, BLOCK_M, D))
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(lse_all + line.to(tl.int64) * T + rows, (top + tl.log2(total)) / LOG2E, mask=rows < T)

# %% [markdown]
# Around a kernel: tile sizes, descriptors, the launch. Sizes were chosen by trial on an H200: large tiles read keys
# less often, but a thread has 255 registers, and a kernel that wants more is slow. It is registered with PyTorch as
# an operator of its own (`custom_op`), whose call `torch.compile` puts into its graph without looking inside. For that
# it needs to know the result's shape (`register_fake`), and later the gradient.

# %%
#| export kernels/flash_attention
SETTINGS = {  # head dimension → BLOCK_M, BLOCK_N, num_warps, num_stages; two-byte numbers, Hopper and later
    "forward": {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 4, 2), 256: (64, 32, 4, 2)},
    "dq": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (128, 32, 8, 3), 256: (64, 32, 4, 2)},
    "dq windowed": {128: (64, 64, 4, 2)},
    "dkdv": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 8, 2)},
}
SMALL = {  # chips with less shared memory, whose tensor cores take their numbers from registers
    "forward": {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    "dq": {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "dkdv": {32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
}


def settings(kernel: str, D: int, dtype: torch.dtype, capability: int = 90, windowed: bool = False) -> dict[str, int]:
    """Tile sizes and launch settings of a kernel ("forward", "dq" or "dkdv") on a chip of compute capability × 10."""
    if dtype == torch.float32:  # three tf32 products for one: operands fill the registers
        sizes = (32, 32, 4, 1) if INTERPRETING else (16, 16, 8 if kernel == "dkdv" else 4, 1)
    else:
        table = SETTINGS if capability in (90, 100) else SMALL
        sizes = (table.get(f"{kernel} windowed", {}) if windowed else {}).get(D) or table[kernel][D]
        if capability == 100 and (kernel, D) == ("forward", 128):  # accumulators lie elsewhere: four warps spill
            sizes = (128, 128, 8, 2)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes))


def describe(x: torch.Tensor, block: int) -> TensorDescriptor:
    """x (B, T, H, D), any strides, as the copy engine takes it: tiles of `block` tokens of one head, zeros past T."""
    B, T, H, D = x.shape
    strides = [D if n == 1 else s for n, s in zip(x.shape[:3], x.stride())]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(s == 0 or s * x.element_size() % 16 for s in strides):
        x, strides = x.clone(memory_format=torch.contiguous_format), [T * H * D, H * D, D]
    return TensorDescriptor(x, [B, H, T, D], [strides[0], strides[2], strides[1], 1], [1, 1, block, D])


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability × 10; where the kernel is interpreted, an H200's."""
    return 90 if device.type != "cuda" else 10 * torch.cuda.get_device_capability(device)[0]


def launch_settings(kernel: str, q: torch.Tensor, window: int) -> tuple[dict, int, int]:
    """(all compile-time arguments and launch settings, BLOCK_M, BLOCK_N)."""
    sizes = settings(kernel, q.size(3), q.dtype, capability(q.device), window < q.size(1) - 1)
    return dict(D=q.size(3), PRECISION="tf32x3", **sizes), sizes["BLOCK_M"], sizes["BLOCK_N"]

# %%
#| export kernels/flash_attention
@torch.library.custom_op("nanochat::flash_forward", mutates_args=())
def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output like q, and logsumexp (B, H, T) float32; arguments as `flash_attention` has checked them."""
    if INTERPRETING and q.dtype == torch.bfloat16:  # the interpreter is silently wrong in bfloat16
        out, lse = flash_forward(q.float(), k.float(), v.float(), window)
        return out.to(q.dtype), lse
    B, T, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    rest, M, N = launch_settings("forward", q, window)
    forward_kernel[triton.cdiv(T, M) * B * H,](describe(q, M), describe(k, N), describe(v, N), describe(out, M), lse,
                                               T, H, H // k.size(2), window, LOG2E.value / D**0.5, **rest)
    return out, lse


@flash_forward.register_fake
def _(q, k, v, window):
    return q.new_empty(q.shape), q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)

# %% [markdown]
# Run it on a length that is no multiple of any tile, four query heads on two key heads, a window, and compare
# with the formula. The last line proves that hidden tiles are not visited: their values are not-a-number, and a
# weight of zero would not have saved us (0 · NaN is NaN).

# %%
if triton_here:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, 301, heads, 32, device=device) for heads in (4, 2, 2))
    for window in (301, 0, 70):
        result, _ = flash_forward(q, k, v, window)
        torch.testing.assert_close(result, reference_attention(q, k, v, window), rtol=1e-4, atol=1e-5)
    v[:, :128] = torch.nan
    result, _ = flash_forward(q, k, v, 40)
    assert result[:, 256:].isfinite().all()  # keys from 216 on, in tiles that begin behind 128

# %% [markdown]
# ## Backward: recompute, do not remember
#
# Given the gradient $do$ of the output, the chain rule wants all weights $p$ once more. Keeping them would cost the
# T × T memory that we just saved, so a tile of them is *recomputed*: with the logsumexp of its row at hand,
# $p_{ij} = e^{s_{ij} - \mathrm{lse}_i}$ is final at once, no running maximum, no rescaling. Then
#
# $$dv_j = \sum_i p_{ij}\, do_i \qquad dp_{ij} = do_i \cdot v_j \qquad ds_{ij} = p_{ij}\,(dp_{ij} - \delta_i) \qquad
# dq_i = \tfrac{1}{\sqrt D} \sum_j ds_{ij}\, k_j \qquad dk_j = \tfrac{1}{\sqrt D} \sum_i ds_{ij}\, q_i$$
#
# The $\delta_i = \sum_j p_{ij}\, dp_{ij}$ of the softmax looks like trouble: a sum over *all* keys, needed before the
# first tile. But $\sum_j p_{ij}\,(do_i \cdot v_j) = do_i \cdot \sum_j p_{ij} v_j = do_i \cdot o_i$: one short product
# of two rows that lie in memory already. On one head of 48 tokens with a window of 16, by the formulas and by autograd:

# %%
q, k, v, do = (torch.randn(48, 16, dtype=torch.float64, requires_grad=True) for _ in range(4))
hidden = ~visible(torch.arange(48), torch.arange(48), 16)
s = (q @ k.T / 16**0.5).masked_fill(hidden, -torch.inf)
o, lse = s.softmax(1) @ v, s.logsumexp(1)
with torch.no_grad():
    p = (s - lse[:, None]).exp()
    delta = (do * o).sum(1)
    dp = do @ v.T
    ds = p * (dp - delta[:, None])
    ours = ds @ k / 16**0.5, ds.T @ q / 16**0.5, p.T @ do
for got, expected in zip(ours, torch.autograd.grad(o, (q, k, v), do)):
    torch.testing.assert_close(got, expected)

figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, (name, values) in zip(axes, {"p": p, "dp − δ": dp - delta[:, None], "ds = p · (dp − δ)": ds}.items()):
    axis.imshow(values.detach(), cmap="RdBu", vmin=-values.abs().max(), vmax=values.abs().max())
    axis.set(title=name, xlabel="key", ylabel="query")

# %% [markdown]
# Only the band's tiles of $dp$ are ever needed. Who sums up what? $dq_i$ is a sum over keys: a program that owns a
# block of queries walks over key tiles, as in forward. $dk_j$ and $dv_j$ are sums over queries: a program that owns a
# block of keys walks over query tiles. One kernel could do both and recompute once, but then many programs add to the
# same $dq$, in whatever order they finish: the last bits would differ from run to run. Two kernels do seven products
# instead of five, and every number has one writer. (On the H200 that is 0.93 and 0.85 of cuDNN's speed.)

# %%
#| export kernels/flash_attention
@triton.jit(do_not_specialize=SIZES)
def dq_kernel(q_all, k_all, v_all, out_all, do_all, dq_all, lse_all, delta_all, T, H, group, window, scale, factor,
              D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """dq of one block of queries of one head; leaves delta (B, H, T) for the other kernel."""
    blocks = tl.cdiv(T, BLOCK_M)
    block, number = share_of_work(blocks)
    start = (blocks - 1 - block) * BLOCK_M
    batch, head = number // H, number % H
    kv_head = head // group
    rows = start + tl.arange(0, BLOCK_M)
    line = number.to(tl.int64) * T
    do = do_all.load([batch, head, start, 0]).reshape(BLOCK_M, D)
    out = out_all.load([batch, head, start, 0]).reshape(BLOCK_M, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_all + line + rows, delta, mask=rows < T)
    lse = tl.load(lse_all + line + rows, mask=rows < T, other=0.0) * LOG2E
    q = q_all.load([batch, head, start, 0]).reshape(BLOCK_M, D)
    first = tl.maximum(start - window, 0) // BLOCK_N * BLOCK_N

    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for key in range(first, start + BLOCK_M, BLOCK_N):
        k = k_all.load([batch, kv_head, key, 0]).reshape(BLOCK_N, D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        v = v_all.load([batch, kv_head, key, 0]).reshape(BLOCK_N, D)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        p = tl.exp2(scores * scale - lse[:, None])
        if (key + BLOCK_N - 1 > start) | (key < start + BLOCK_M - 1 - window):
            p = hide(p, rows[:, None], key + tl.arange(0, BLOCK_N)[None, :], window, 0.0)
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    dq_all.store([batch, head, start, 0], (dq * factor).to(dq_all.dtype).reshape(1, 1, BLOCK_M, D))

# %% [markdown]
# The other kernel is its mirror image: keys are the rows, every product is transposed, and the loop runs over
# the queries that see this block of keys, from the diagonal to `window` further. With grouped queries it runs
# over them once per head of the group, and the sum over the group costs nothing.
#
# Two accumulators leave few registers. A product may start from any value instead of zero, so `lse` and `delta`, one
# number per *column* here, go in as the start of their products and need no registers of their own.

# %%
#| export kernels/flash_attention
@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(q_all, k_all, v_all, do_all, dk_all, dv_all, lse_all, delta_all, T, KVH, group, window, scale, factor,
                D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv of one block of keys of one key head, from all heads of its group."""
    blocks = tl.cdiv(T, BLOCK_N)
    start = tl.program_id(0) % blocks * BLOCK_N  # the first keys are seen by most: longest first again
    batch, kv_head = tl.program_id(0) // blocks // KVH, tl.program_id(0) // blocks % KVH
    keys = start + tl.arange(0, BLOCK_N)
    k = k_all.load([batch, kv_head, start, 0]).reshape(BLOCK_N, D)
    v = v_all.load([batch, kv_head, start, 0]).reshape(BLOCK_N, D)
    end = tl.minimum(start + BLOCK_N + window, T)  # no later query sees any of these keys

    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        line = (batch * KVH * group + head).to(tl.int64) * T
        for query in range(start // BLOCK_M * BLOCK_M, end, BLOCK_M):
            rows = query + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_all + line + rows, mask=rows < T, other=0.0) * (-LOG2E / scale)
            delta = tl.load(delta_all + line + rows, mask=rows < T, other=0.0)
            q = q_all.load([batch, head, query, 0]).reshape(BLOCK_M, D)
            scores = tl.dot(k, q.T, tl.broadcast_to(lse[None, :], (BLOCK_N, BLOCK_M)), input_precision=PRECISION)
            do = do_all.load([batch, head, query, 0]).reshape(BLOCK_M, D)
            dp = tl.dot(v, do.T, tl.broadcast_to(-delta[None, :], (BLOCK_N, BLOCK_M)), input_precision=PRECISION)
            p = tl.exp2(scores * scale)  # (N, M)
            if (query < start + BLOCK_N - 1) | (query + BLOCK_M - 1 > start + window):
                p = hide(p, rows[None, :], keys[:, None], window, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PRECISION)
    dk_all.store([batch, kv_head, start, 0], (dk * factor).to(dk_all.dtype).reshape(1, 1, BLOCK_N, D))
    dv_all.store([batch, kv_head, start, 0], dv.to(dv_all.dtype).reshape(1, 1, BLOCK_N, D))

# %%
#| export kernels/flash_attention
@torch.library.custom_op("nanochat::flash_backward", mutates_args=())
def flash_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                   lse: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `flash_forward`, from the gradient of its output."""
    if INTERPRETING and q.dtype == torch.bfloat16:
        wide = flash_backward(*(x.float() for x in (grad, q, k, v, out)), lse, window)
        return tuple(x.to(q.dtype) for x in wide)
    (B, T, H, D), KVH = q.shape, k.size(2)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    numbers = H // KVH, window, LOG2E.value / D**0.5, D**-0.5
    rest, M, N = launch_settings("dq", q, window)
    dq_kernel[triton.cdiv(T, M) * B * H,](describe(q, M), describe(k, N), describe(v, N), describe(out, M),
                                          describe(grad, M), describe(dq, M), lse, delta, T, H, *numbers, **rest)
    rest, M, N = launch_settings("dkdv", q, window)
    dkdv_kernel[triton.cdiv(T, N) * B * KVH,](describe(q, M), describe(k, N), describe(v, N), describe(grad, M),
                                              describe(dk, N), describe(dv, N), lse, delta, T, KVH, *numbers, **rest)
    return dq, dk, dv


@flash_backward.register_fake
def _(grad, q, k, v, out, lse, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def remember(ctx, inputs, output):
    """What backward needs: O(T), never the weights."""
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def pull_back(ctx, grad, _):
    """Gradients of q, k, v, window."""
    return *flash_backward(grad, *ctx.saved_tensors, ctx.window), None


flash_forward.register_autograd(pull_back, setup_context=remember)

# %%
#| export kernels/flash_attention
def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of q (B, T, H, D) to k, v (B, T, KVH, D), any strides: output like q, and logsumexp (B, H, T).

    A query sees itself and `window` keys before it (None: all). The output is differentiable, the logsumexp is not.
    Other shapes or dtypes: ValueError.
    """
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.size(3) != D or H % k.size(2):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if D not in HEAD_DIMS or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"head dimension {D}, dtype {q.dtype}: the kernel takes {HEAD_DIMS} and one of {DTYPES}")
    if D == 256 and q.dtype == torch.float32 and q.is_cuda:
        raise ValueError("float32 with head dimension 256: more registers than a GPU has")
    return flash_forward(q, k, v, T if window is None else min(window, T))


def compile_cases(capability: int):
    """What `compile_check` builds: (label, kernel, types, constants, options) of every way the kernels are launched."""
    # float32 with 128 dimensions is right, but its backward spills: no case here, and no way to train fast
    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dq windowed": dq_kernel, "dkdv": dkdv_kernel}
    for dtype, kind, dims in ((torch.bfloat16, "bf16", (64, 128, 256)), (torch.float16, "fp16", (128,)),
                              (torch.float32, "fp32", (64,))):
        for D, (label, kernel) in itertools.product(dims, kernels.items()):
            name, *windowed = label.split()
            sizes = settings(name, D, dtype, capability, bool(windowed))
            if windowed and sizes == settings(name, D, dtype, capability):
                continue
            options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
            types = {"lse_all": "*fp32", "delta_all": "*fp32", "scale": "fp32", "factor": "fp32"}
            for x in ("q", "k", "v", "out", "do", "dq", "dk", "dv"):
                block = sizes["BLOCK_N" if x in ("k", "v", "dk", "dv") else "BLOCK_M"]
                types[f"{x}_all"] = f"tensordesc<{kind}[1, 1, {block}, {D}]>"
            yield (f"{label} {kind} D={D}", kernel, {x: types[x] for x in types if x in kernel.arg_names},
                   {"D": D, "PRECISION": "tf32x3", **sizes}, options)

# %% [markdown]
# The gradient of our kernels against that of the formula, two query heads on one key head:

# %%
if triton_here:
    q, k, v = (torch.randn(1, 150, heads, 32, device=device, requires_grad=True) for heads in (2, 1, 1))
    for window in (None, 40):
        result, expected = flash_attention(q, k, v, window)[0], reference_attention(q, k, v, window)
        do = torch.randn_like(result)
        for got, wanted in zip(torch.autograd.grad(result, (q, k, v), do),
                               torch.autograd.grad(expected, (q, k, v), do)):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## One query, all the keys
#
# When a model writes, each row of a batch brings one new query, and everything before it lies in a cache of keys and
# values. A key of `D` numbers is read (two bytes each), multiplied with the query, and never needed again; the same for
# its value. That is one operation per byte, where a GPU could do two hundred: the time of a step is the cache's
# size over the memory's speed, and a kernel is good if it reads at that speed.
#
# So the tensor cores may idle, but the *memory* may not, and here the flash kernel fails: one block of queries
# per head and row means 16 programs for a chat of one with 16 heads, on a chip with 132 multiprocessors. The keys
# themselves must be divided. Each part of a row's keys becomes a program (Flash-Decoding, Dao et al., 2023) that
# leaves its own softmax: output $o_p$ and logsumexp $\mathrm{lse}_p$. A second small kernel puts the parts together,
# with the rescaling you know: $o = \sum_p e^{\mathrm{lse}_p - \mathrm{lse}}\, o_p$, where
# $\mathrm{lse} = \ln\sum_p e^{\mathrm{lse}_p}$.

# %%
def shares(length, parts, tile=64, window=None):
    """The keys that each part of a row with `length` tokens and one new query reads: [(first, end), …]."""
    first, end = max(0, length - (length if window is None else window)), length + 1
    share = -(-(-(-(end - first) // parts)) // tile) * tile  # of keys, in whole tiles
    return [(min(first + p * share, end), min(first + (p + 1) * share, end)) for p in range(parts)]


figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True, layout="constrained")
for axis, window in zip(axes, (None, 512)):
    for row, length in enumerate((2047, 1300, 700, 90)):
        axis.barh(row, length + 1, color="whitesmoke", edgecolor="lightgrey")
        for p, (first, end) in enumerate(shares(length, 8, window=window)):
            axis.barh(row, end - first, left=first, color=plt.cm.tab10(p), edgecolor="white")
    axis.set(title=f"window {window}" if window else "full", xlabel="key position", yticks=range(4), ylim=(3.6, -0.6))
_ = axes[0].set(ylabel="row of the batch")

# %% [markdown]
# Every row is cut into the same *number* of parts, whatever its length, so that the grid of programs is known
# without asking the GPU for the lengths: the host never waits, and a CUDA graph can replay the step.
#
# The inner loop is flash attention's, with two differences. A tile of scores has one line for each query head that
# shares the key head, since each key that was read should be used for all of them. And a key's place in the text is not
# its place in the cache (`offset`), because several rows may share the cache of one prompt: for sixteen answers to one
# question the question's keys are *kept* once. They are still read for each row: what is saved is room.

# %%
#| export kernels/decoding
"""Decoding attention: a few new tokens per row against a cache in which each row has its own length.

Flash-decoding (Dao et al., 2023): the keys of a row are split between programs, so that one row alone fills the chip; a
second kernel combines the parts. All query heads of a key head share its tile. Lengths stay on the device, so a CUDA
graph can replay it. Needs torch and triton only.
"""

import functools

import torch
import triton
import triton.language as tl

INTERPRETING = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy instead of a GPU
HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_QUERIES = {4: 16, 2: 64}  # new tokens × query heads of a key head, the rows of a tile, by the bytes of a number

# %%
#| export kernels/decoding
@triton.jit
def visit_cache(acc, total, top, q, k_head, v_head, k_token, v_token, places, first, end, offset, window,
               D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Update acc (M, D), running sum and maximum (M,) with keys first … end − 1; key j lies at j − offset."""
    dims = tl.arange(0, D)
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        held = keys < end
        at = (keys - offset).to(tl.int64)
        k = tl.load(k_head + at[None, :] * k_token + dims[:, None], mask=held[None, :], other=0.0)  # (D, N)
        scores = tl.dot(q, k, input_precision="tf32x3") * (1.4426950408889634 / D**0.5)  # units of log 2
        distance = places[:, None] - keys[None, :]
        scores = tl.where((distance >= 0) & (distance <= window) & held[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(top - reference)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(v_head + at[:, None] * v_token + dims[None, :], mask=held[:, None], other=0.0)  # (N, D)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
        top = new_top
    return acc, total, top

# %% [markdown]
# Around it: which row, which key head, which part of the keys. The prompt's keys come first, then the row's own.

# %%
#| export kernels/decoding
@triton.jit
def split_kernel(q, k, v, lengths, part, part_lse, prompt_k, prompt_v, prompt_lengths, owners,
                 q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                 pk_batch, pk_token, pk_head, pv_batch, pv_token, pv_head, T, group, window,
                 D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A part of one key head's keys: part (B, KVH, parts, T · group, D), part_lse its log2-sum-exp, float32."""
    part_id, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, kv_heads = tl.num_programs(0), tl.num_programs(1)
    queries = tl.arange(0, BLOCK_M)  # T · group of them: new token by new token, head by head
    asked = queries < T * group
    dims = tl.arange(0, D)
    length = tl.load(lengths + row).to(tl.int32)
    places = length + queries // group
    heads = kv_head * group + queries % group
    q_tile = tl.load(q + row * q_batch + ((queries // group) * q_token + heads * q_head)[:, None] + dims[None, :],
                     mask=asked[:, None], other=0.0)

    end = length + T
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(end - first, parts), BLOCK_N) * BLOCK_N  # of keys, in whole tiles
    first += part_id * share
    end = tl.minimum(first + share, end)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    shared = 0  # how many keys lie in a prompt's cache
    if owners is not None:
        prompt = tl.load(owners + row).to(tl.int64)
        shared = tl.load(prompt_lengths + prompt).to(tl.int32)
        acc, total, top = visit_cache(acc, total, top, q_tile, prompt_k + prompt * pk_batch + kv_head * pk_head,
                                     prompt_v + prompt * pv_batch + kv_head * pv_head, pk_token, pv_token, places,
                                     first, tl.minimum(end, shared), 0, window, D, BLOCK_N)
    acc, total, top = visit_cache(acc, total, top, q_tile, k + row * k_batch + kv_head * k_head,
                                 v + row * v_batch + kv_head * v_head, k_token, v_token, places,
                                 tl.maximum(first, shared), end, shared, window, D, BLOCK_N)

    total = tl.where(total > 0, total, 1.0)  # a part without a visible key: acc 0, log-sum −∞
    lines = ((row * kv_heads + kv_head) * parts + part_id) * (T * group) + queries
    tl.store(part + lines[:, None] * D + dims[None, :], acc / total[:, None], mask=asked[:, None])
    tl.store(part_lse + lines, top + tl.log2(total), mask=asked)

# %%
#| export kernels/decoding
@triton.jit
def combine_kernel(part, part_lse, out, parts, kv_heads, queries, group, D: tl.constexpr, PARTS: tl.constexpr):
    """out (B, T, H, D), contiguous: the parts of one query, each weighed by its share of the softmax's sum."""
    query, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, D)
    first = (row * kv_heads + kv_head) * parts
    every = tl.arange(0, PARTS)
    sums = tl.load(part_lse + (first + every) * queries + query, mask=every < parts, other=float("-inf"))
    top = tl.max(sums, 0)  # finite: a query sees its own key
    total = tl.sum(tl.exp2(sums - top), 0)
    acc = tl.zeros([D], tl.float32)
    for start in range(0, parts, 16):
        some = start + tl.arange(0, 16)
        lines = (first + some) * queries + query
        lse = tl.load(part_lse + lines, mask=some < parts, other=float("-inf"))
        values = tl.load(part + lines[:, None] * D + dims[None, :], mask=(lse > float("-inf"))[:, None], other=0.0)
        acc += tl.sum(values * tl.exp2(lse - top)[:, None], 0)
    head = kv_head * group + query % group
    line = (row * (queries // group) + query // group) * (kv_heads * group) + head
    tl.store(out + line * D + dims, (acc / total).to(out.dtype.element_ty))

# %% [markdown]
# How many parts? Enough that every multiprocessor has a few programs, and no more, since each part costs a line to
# write and to read. At batch 64 with 16 key heads there are 1,024 programs without any split. (There the kernel reads
# 2,048 tokens a row at 4,067 GB/s on an H200, where a copy moves 4,253.)

# %%
#| export kernels/decoding
@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def decoding_settings(head_dim: int, dtype: torch.dtype, queries: int) -> dict[str, int]:
    """Tile of queries (at least the 16 rows of a matrix unit), tile of keys, launch settings of the split kernel."""
    rows = max(16, triton.next_power_of_2(queries))
    if dtype == torch.float32:
        return dict(BLOCK_M=rows, BLOCK_N=32, num_warps=4, num_stages=2)
    keys, stages = (64, 3) if head_dim <= 128 else (32, 2)  # at most 99 KiB where that is all there is
    return dict(BLOCK_M=rows, BLOCK_N=keys, num_warps=4 if rows <= 32 else 8, num_stages=stages)


def count_parts(programs: int, keys: int, tile: int, device: torch.device) -> int:
    """Parts of a row's keys: a power of two, for a few programs a multiprocessor, of two tiles or more each."""
    parts = 1
    while parts < 128 and programs * parts < 4 * processors(device) and keys > 2 * parts * tile:
        parts *= 2
    return parts


def decode_parts(launch, q, k, v, lengths, window, prompt_k, prompt_v, prompt_lengths, owners) -> torch.Tensor:
    """Both kernels, each passed through `launch` first; the rest as in `decode_attention`, window −1 is none."""
    (B, T, H, D), KVH = q.shape, k.size(2)
    group, sizes = H // KVH, decoding_settings(D, q.dtype, T * (H // KVH))
    keys = k.size(1) + (0 if prompt_k is None else prompt_k.size(1))  # no row has more
    window = keys if window < 0 else window
    parts = count_parts(B * KVH, min(keys, window + T), sizes["BLOCK_N"], q.device)
    part = torch.empty(B, KVH, parts, T * group, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(B, KVH, parts, T * group, dtype=torch.float32, device=q.device)
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    strides = [x.stride()[:3] if x is not None else (0, 0, 0) for x in (q, k, v, prompt_k, prompt_v)]
    launch(split_kernel)[parts, KVH, B](q, k, v, lengths, part, part_lse, prompt_k, prompt_v, prompt_lengths, owners,
                                        *sum(strides, ()), T, group, window, D=D, **sizes)
    launch(combine_kernel)[T * group, KVH, B](part, part_lse, out, parts, KVH, T * group, group, D=D,
                                              PARTS=triton.next_power_of_2(parts), num_warps=2)
    return out

# %% [markdown]
# This operator is a `triton_op`, which `torch.compile` does look into: it sees two kernels and calls them itself, and a
# step of a few microseconds is spared the way through an operator. (Flash attention takes long enough to hide it.)

# %%
#| export kernels/decoding
def decode_visibly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, window: int,
                   prompt_k: torch.Tensor | None, prompt_v: torch.Tensor | None, prompt_lengths: torch.Tensor | None,
                   owners: torch.Tensor | None) -> torch.Tensor:
    """`decode_parts` with the kernels in wrappers that torch.compile can look into; the interpreter's need none."""
    launch = as_it_is if INTERPRETING else torch.library.wrap_triton
    return decode_parts(launch, q, k, v, lengths, window, prompt_k, prompt_v, prompt_lengths, owners)


def as_it_is(kernel):
    return kernel


register = torch.library.custom_op if INTERPRETING else torch.library.triton_op
decoding_op = register("nanochat::decode_attention", decode_visibly, mutates_args=())
decoding_op.register_fake(lambda q, *others: q.new_empty(q.shape))


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor,
                       window: int | None = None, prompts: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
    """Attention of T new tokens per row, q (B, T, H, D), to caches k, v (B, capacity, KVH, D) of any strides.

    `lengths` (B,) counts each row's tokens before this call; the caches hold the new ones behind them. A query sees
    itself and `window` keys before it (None: all). Rows may share prompts: `prompts` = (k, v, lengths, owners), caches
    (P, capacity, KVH, D), the tokens of each prompt (P,), and the prompt of each row (B,); a row's first tokens are its
    prompt's, and its own cache starts behind them. Returns (B, T, H, D). ValueError: no such kernel. There is no
    gradient: to ask for one is a RuntimeError.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(prompts or ())[:2])):
        raise RuntimeError("decoding attention has no gradient: call it under torch.no_grad(), or train with attention")
    B, T, H, D = q.shape
    if k.shape != v.shape or k.size(0) != B or k.size(3) != D or H % k.size(2) or lengths.shape != (B,):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
                         f"lengths {tuple(lengths.shape)}")
    queries, size = T * (H // k.size(2)), q.element_size()
    if D not in HEAD_DIMS or D * size > 512 or q.dtype not in DTYPES:
        raise ValueError(f"{q.dtype} heads of {D}: the kernel takes {HEAD_DIMS}, 512 bytes at most, in {DTYPES}")
    if queries > MAX_QUERIES[size]:  # no number that differs from call to call: who goes another way says so once
        raise ValueError(f"more than {MAX_QUERIES[size]} queries, tokens × heads, to a key head in {q.dtype}")
    prompt_k, prompt_v, prompt_lengths, owners = prompts or (None, None, None, None)
    tensors = [q, k, v, prompt_k, prompt_v]
    if INTERPRETING and q.dtype == torch.bfloat16:  # the interpreter is silently wrong in bfloat16
        tensors = [x if x is None else x.float() for x in tensors]
    q_, k, v, prompt_k, prompt_v = (x if x is None or x.stride(3) == 1 else x.contiguous() for x in tensors)
    window = -1 if window is None else window
    arguments = (q_, k, v, lengths, window, prompt_k, prompt_v, prompt_lengths, owners)
    if torch.compiler.is_compiling():
        return decoding_op(*arguments).to(q.dtype)
    return decode_parts(as_it_is, *arguments).to(q.dtype)  # nobody looks: no detour

# %%
#| export kernels/decoding
def compile_cases(capability: int):
    """What `compile_check` builds: (label, kernel, types, constants, options) of every way the kernels are launched."""
    strides = {f"{x}_{axis}": "i32:16" for x in ("q", "k", "v", "pk", "pv") for axis in ("batch", "token", "head")}
    prompts = ("prompt_k", "prompt_v", "prompt_lengths", "owners")
    for kind, D, queries, shared in (("bf16", 128, 1, False), ("bf16", 128, 64, True), ("bf16", 256, 64, True),
                                     ("fp16", 128, 64, True), ("fp32", 128, 16, True)):
        sizes = decoding_settings(D, torch.float32 if kind == "fp32" else torch.bfloat16, queries)
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        types = {**dict.fromkeys(("q", "k", "v", "prompt_k", "prompt_v"), f"*{kind}"), "part": "*fp32",
                 "part_lse": "*fp32", **dict.fromkeys(("lengths", "prompt_lengths", "owners"), "*i64"), **strides}
        constants = {"D": D, **sizes} | ({} if shared else dict.fromkeys(prompts))
        label = f"split {kind} D={D}, {queries} queries" + ", prompts" * shared
        yield label, split_kernel, {name: types[name] for name in types if name not in constants}, constants, options
    types = {"part": "*fp32", "part_lse": "*fp32", "out": "*bf16"}
    yield "combine D=256", combine_kernel, types, {"D": 256, "PARTS": 128}, {"num_warps": 2}

# %%
if triton_here:
    q, k, v = (torch.randn(3, tokens, heads, 32, device=device) for tokens, heads in ((1, 4), (100, 2), (100, 2)))
    lengths = torch.tensor([0, 37, 99], device=device)
    for window in (None, 20):
        result = decode_attention(q, k, v, lengths, window)
        torch.testing.assert_close(result, reference_attention(q, k, v, window, lengths), rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## The loss needs a kernel of its own
#
# The last layer turns each token's vector into one number per token of the vocabulary: the **logits**. A softcap
# (Gemma 2, 2024) bends them to stay within ±15, and the loss is the surprise, in nats, at the token that came next:
# $\;z = 15 \tanh(x W^\top / 15), \quad \mathrm{loss} = \ln\sum_j e^{z_j} - z_\text{target}$.
#
# Three lines again, and again the trouble is what they write. With a vocabulary of 32,768, one batch of
# 16,384 tokens has 537 million logits. PyTorch holds them in two bytes, in four for the tanh, bent, as log-softmax,
# and then the gradients of all these.

# %%
tokens, vocab, width, MiB = 16_384, 32_768, 1_536, 2**20
logits = tokens * vocab
held = {"hidden states (2 bytes)": 2 * tokens * width, "weight (2 bytes)": 2 * vocab * width,
        "logits (2 bytes)": 2 * logits, "logits (float32)": 4 * logits, "their tanh": 4 * logits,
        "log-softmax": 4 * logits, "its gradient": 4 * logits,
        "ours: a chunk of logits": 2 * 2**27, "ours: the weight's gradient": 4 * vocab * width}
_ = plt.figure(figsize=(7, 3), layout="constrained")
_ = plt.barh(list(held), [size / MiB for size in held.values()],
             color=["tab:green" if "ours" in name else "tab:orange" if "(2" in name else "tab:red" for name in held])
plt.gca().invert_yaxis()
_ = plt.xlabel("MiB for one batch of 16,384 tokens")
print(f"logits in two bytes: {2 * logits // MiB} MiB, each float32 copy: {4 * logits // MiB} MiB; "
      f"a chunk: {2 * 2**27 // MiB} MiB")

# %% [markdown]
# Nobody needs all of them at once. The loss of a token depends on its own line of logits alone, and so does the
# gradient by that line, which is short to write down. With probabilities $p_j = e^{z_j} / \sum_k e^{z_k}$ the softmax
# gives $p_j - [j = \text{target}]$, and the tanh multiplies by its slope $1 - (z_j/15)^2$:
#
# $$\frac{\partial\,\mathrm{loss}}{\partial\,\mathrm{logit}_j} =
# \left(p_j - [j = \text{target}]\right)\left(1 - \tanh^2(\mathrm{logit}_j / 15)\right)$$

# %%
logit = torch.linspace(-50, 50, 201)
slope = 1 - torch.tanh(logit / 15) ** 2
p = torch.sigmoid(15 * torch.tanh(logit / 15))  # two tokens, the other logit is 0
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
axes[0].plot(logit, 15 * torch.tanh(logit / 15), label="z")
axes[0].plot(logit, 15 * slope, label="15 × slope")
axes[1].plot(logit, (p - 1) * slope, label="by the target's logit")
axes[1].plot(logit, p * slope, label="by another's")
axes[1].set(title="gradient of the loss, two tokens")
for axis in axes:
    axis.set(xlabel="logit")
    axis.legend(fontsize=8)

# %% [markdown]
# Far beyond ±15 the gradient fades: what pushes a logit there is hard to undo, and the cap sees to it that nothing
# gains by pushing.
#
# So work goes in chunks of tokens: multiply to get the chunk's logits; in one pass compute its losses and
# overwrite the logits by their gradient; multiply twice more, for the gradient of the hidden states and for the chunk's
# part of the weight's. The arithmetic is the same as before (three products, nearly all of it, stay with the vendor's
# library), and one small buffer is used again and again. The gradient is thus ready before backward begins, up to the
# factor by which the mean divides. For this batch an H200 takes 8,192 MiB and 19.4 ms with the three lines, 1,168 MiB
# and 8.3 ms with the three lines compiled, 592 MiB and 8.1 ms in chunks.
#
# The pass is our kernel: one program a row. Bent logits cannot exceed 15, so $e^z$ cannot overflow and no maximum is
# sought first.

# %%
#| export kernels/loss_head
"""The loss head's pass over logits: softcap, cross entropy and its gradient, in place; one program a row.

A row is read twice, for the sum and for the gradient, and comes from a cache the second time. The gradient by the
logits takes the logits' place, so that no second tensor of their size exists. Needs torch and triton only.
"""

import torch
import triton
import triton.language as tl

INTERPRETING = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy instead of a GPU
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# %%
#| export kernels/loss_head
@triton.jit
def bend(logits, cap):
    """(cap · tanh(x / cap), its derivative 1 − tanh²), through e^(−2|x|/cap), which cannot overflow or cancel."""
    small = tl.exp2(tl.abs(logits) * (-2.8853900817779268 / cap))  # 2 / ln 2
    inverse = 1.0 / (1.0 + small)
    size = (1.0 - small) * inverse * cap
    return tl.where(logits < 0, -size, size), 4.0 * small * inverse * inverse


@triton.jit
def loss_kernel(logits, targets, losses, factors, row_stride, V, cap, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """losses (N,) in nats; if GRADIENT, logits (N, V) become d loss / d logits, times factors (N,) if given."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    line = logits + row * row_stride
    aim = tl.load(line + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    aim, aim_slope = bend(aim, cap)
    seen = tl.where(target < 0, 0, V)  # a row with an ignored target has nothing to sum
    sums = tl.zeros([BLOCK], tl.float32)  # of e^(z − cap): capped logits need no maximum
    for start in range(0, seen, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z, slope = bend(tl.load(line + ids, mask=ids < V, other=0.0).to(tl.float32), cap)
        sums += tl.where(ids < V, tl.exp2((z - cap) * 1.4426950408889634), 0.0)
    total = tl.where(target < 0, 1.0, tl.sum(sums, 0))
    tl.store(losses + row, tl.where(target < 0, 0.0, tl.log(total) + cap - aim))
    if GRADIENT:
        if target < 0:
            for start in range(0, V, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                tl.store(line + ids, tl.zeros([BLOCK], logits.dtype.element_ty), mask=ids < V)
        else:
            factor = 1.0
            if factors is not None:
                factor = tl.load(factors + row)
            scale = factor / total
            for start in range(0, V, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                z, slope = bend(tl.load(line + ids, mask=ids < V, other=0.0).to(tl.float32), cap)
                chance = tl.exp2((z - cap) * 1.4426950408889634) * scale
                gradient = (chance - tl.where(ids == target, factor, 0.0)) * slope
                tl.store(line + ids, gradient.to(logits.dtype.element_ty), mask=ids < V)

# %%
#| export kernels/loss_head
def loss_settings(vocab: int) -> dict[str, int]:
    """Tile of a row and its warps."""
    block = min(4096, triton.next_power_of_2(vocab))
    return dict(BLOCK=block, num_warps=max(4, block // 256))


def softcap_loss_(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, cap: float, gradient: bool,
                  factors: torch.Tensor | None = None) -> None:
    """Write losses (N,) float32 of logits (N, V) before the softcap; with `gradient`, overwrite them by it.

    Targets (N,) int64; −1 is ignored: loss and gradient 0. `factors` (N,) float32 multiply each row's gradient.
    """
    N, V = logits.shape
    if logits.dtype not in DTYPES or logits.stride(1) != 1 or targets.shape != (N,):
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}, targets {tuple(targets.shape)}: rows must be "
                         f"contiguous, with one target each, in one of {DTYPES}")
    if INTERPRETING and logits.dtype == torch.bfloat16:  # the interpreter is silently wrong in bfloat16
        wide = logits.float()
        softcap_loss_(wide, targets, losses, cap, gradient, factors)
        logits.copy_(wide)
    elif N:
        loss_kernel[(N,)](logits, targets, losses, factors, logits.stride(0), V, cap, GRADIENT=gradient,
                          **loss_settings(V))


def compile_cases(capability: int):
    """What `compile_check` builds: (label, kernel, types, constants, options) of every way the kernels are launched."""
    for kind in ("bf16", "fp16", "fp32"):
        sizes = loss_settings(1 << 15)
        options = {"num_warps": sizes.pop("num_warps")}
        types = {"logits": f"*{kind}", "targets": "*i64", "losses": "*fp32", "row_stride": "i32:16", "cap": "fp32"}
        yield f"loss {kind}", loss_kernel, types, {"factors": None, "GRADIENT": True, **sizes}, options

# %% [markdown]
# On a CPU and on Apple's GPU the pass is PyTorch's, a few rows at a time, and the chunks around it are the same.

# %%
#| export loss
"""The loss head: last matrix, softcap and cross entropy in chunks of tokens, never all logits at once."""

import importlib.util
import sys

import torch
from torch import Tensor

from nanochat_lib.common import NanochatError, is_main_process

CHUNK = {"cuda": 1 << 27, "mps": 1 << 25, "cpu": 1 << 24}  # logits held at once
CACHED = 1 << 19  # logits that a CPU takes through the softmax at once: they stay in its cache
HAVE_TRITON = importlib.util.find_spec("triton") is not None
NO_KERNEL: list[str] = []  # why the GPU of this machine goes without our kernel

# %%
#| export loss
def limit(device: torch.device) -> int:
    return CHUNK.get(device.type, CHUNK["cpu"])


def chunks(N: int, V: int, device: torch.device) -> list[slice]:
    """Slices of N tokens, of one size but for the last, whose logits fit CHUNK."""
    rows = max(1, limit(device) // V)
    if rows < N:
        rows = min(-(-N // (-(-N // rows) * 128)) * 128, max(128, rows // 128 * 128))  # steps that matrix units like
    return [slice(first, min(first + rows, N)) for first in range(0, N, rows)]


def plain_loss_(logits: Tensor, targets: Tensor, losses: Tensor, cap: float, gradient: bool,
                factors: Tensor | None = None) -> None:
    """What kernels.loss_head.softcap_loss_ does, in PyTorch."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, min(len(logits), CACHED // logits.size(1) if logits.device.type == "cpu" else len(logits)))
    room = torch.empty(rows, logits.size(1), dtype=wide, device=logits.device)  # fresh memory is slow: use it again
    for first in range(0, len(logits), rows):
        part = slice(first, min(first + rows, len(logits)))
        target, counts = targets[part].clamp(min=0).unsqueeze(1), (targets[part] >= 0).to(wide).unsqueeze(1)
        bent = logits[part].to(wide).div_(cap).tanh_()  # in place, if logits are wide
        chances = torch.mul(bent, cap, out=room[:len(bent)]).exp_()  # at most e^cap: no maximum is sought first
        total = chances.sum(1, keepdim=True)
        losses[part] = ((total.log() - cap * bent.gather(1, target)) * counts).squeeze(1)
        if gradient:  # d loss / d logits = (chances − [is target]) · (1 − tanh²)
            share = counts if factors is None else counts * factors[part].unsqueeze(1)
            ahead = chances.mul_(share / total).scatter_add_(1, target, -share)
            logits[part] = ahead.addcmul_(ahead, bent.square_(), value=-1)

# %%
#| export loss
def loss_(logits: Tensor, *rest) -> None:
    """Losses, and in place of logits their gradient, by our kernel where there is a GPU for it."""
    if logits.is_cuda and HAVE_TRITON and not NO_KERNEL and logits.dtype != torch.float64:
        try:
            from nanochat_lib.kernels.loss_head import softcap_loss_  # triton only where it is used

            return softcap_loss_(logits, *rest)
        except Exception as error:  # no compiler, a driver too old…: the run goes on
            NO_KERNEL.append((str(error).splitlines() or [repr(error)])[0])
            if is_main_process():
                print(f"loss: the kernel failed, going on in PyTorch: {NO_KERNEL[0]}", file=sys.stderr, flush=True)
    plain_loss_(logits, *rest)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def in_chunks(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float, gradient: bool,
              factors: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (N,), and with `gradient` Σ factors · losses by x and by weight, else empty tensors)."""
    wide, V = torch.promote_types(x.dtype, torch.float32), vocab_size
    near = weight[:V].to(x.dtype)
    losses = torch.empty(len(x), dtype=wide, device=x.device)
    dx = torch.empty_like(x) if gradient else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if gradient else weight.new_empty(0)
    parts = chunks(len(x), V, x.device)
    room = x.new_empty(parts[0].stop if parts else 0, V)
    for part in parts:
        logits = torch.mm(x[part], near.T, out=room[:part.stop - part.start])
        loss_(logits, targets[part], losses[part], cap, gradient, None if factors is None else factors[part])
        if gradient:
            torch.mm(logits, near, out=dx[part])
            add_product_(dweight[:V], logits.T, x[part])
    return losses, dx, dweight.to(weight.dtype)

# %% [markdown]
# Two operators for two uses. For training one number is wanted, the sum (or mean) over tokens, and its gradients are
# made on the way. Reinforcement learning weighs each token's loss, by weights that come with backward: there the
# logits of large vocabularies are computed a second time, which costs a product and no memory. `torch.compile` takes
# both as they are: it is told their shapes (`register_fake`) and their gradients (`register_autograd`).

# %%
#| export loss
@torch.library.custom_op("nanochat::summed_loss", mutates_args=())
def summed_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float,
                gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of losses, and its gradients: computed here, where the logits are at hand."""
    losses, dx, dweight = in_chunks(x, weight, targets, vocab_size, cap, gradient)
    return losses.sum(), dx, dweight


@summed_loss.register_fake
def _(x, weight, targets, vocab_size, cap, gradient):
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return (total, *(torch.empty_like(tensor) if gradient else tensor.new_empty(0) for tensor in (x, weight)))


def keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx, grad, *unused):
    if grad is None:
        return (None,) * 6
    dx, dweight = ctx.saved_tensors
    return dx * grad.to(dx.dtype), dweight * grad.to(dweight.dtype), None, None, None, None


summed_loss.register_autograd(scale_gradients, setup_context=keep_gradients)

# %%
#| export loss
@torch.library.custom_op("nanochat::token_losses", mutates_args=())
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float,
                 gradient: bool) -> tuple[Tensor, Tensor]:
    """The loss of each token (N,), and its gradient by the logits (N, vocab_size) if that is wanted and small.

    What each loss weighs is known in backward only; where the logits are too many to be kept, they are computed again.
    """
    if not keeps(x, vocab_size, gradient):
        return in_chunks(x, weight, targets, vocab_size, cap, False)[0], x.new_empty(0)
    losses = torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    logits = x @ weight[:vocab_size].to(x.dtype).T
    loss_(logits, targets, losses, cap, True)
    return losses, logits


def keeps(x: Tensor, vocab_size: int, gradient: bool) -> bool:
    return gradient and len(x) * vocab_size <= limit(x.device)

# %%
#| export loss
@torch.library.custom_op("nanochat::token_losses_backward", mutates_args=())
def token_losses_backward(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float, kept: Tensor,
                          factors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Σ factors · losses by x and weight."""
    if not kept.numel():
        return in_chunks(x, weight, targets, vocab_size, cap, True, factors)[1:]
    factors = factors.to(x.dtype).unsqueeze(1)
    dweight = torch.zeros_like(weight)
    dweight[:vocab_size] = kept.T @ (x * factors)
    return (kept @ weight[:vocab_size].to(x.dtype)).mul_(factors), dweight


@token_losses.register_fake
def _(x, weight, targets, vocab_size, cap, gradient):
    shape = (len(x), vocab_size) if keeps(x, vocab_size, gradient) else 0
    return x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)), x.new_empty(shape)


token_losses_backward.register_fake(lambda x, weight, *others: (torch.empty_like(x), torch.empty_like(weight)))


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.settings = inputs[3:5]
    ctx.set_materialize_grads(False)


def weigh_gradients(ctx, grad, unused):
    *inputs, kept = ctx.saved_tensors
    gradients = (None, None) if grad is None else token_losses_backward(*inputs, *ctx.settings, kept, grad.contiguous())
    return *gradients, None, None, None, None


token_losses.register_autograd(weigh_gradients, setup_context=keep_inputs)

# %%
#| export loss
def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None = None, softcap: float = 15.0,
              reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of softcap · tanh(hidden @ weight[:vocab_size].T / softcap), never holding all logits.

    hidden (…, C), weight (≥ vocab_size, C), cast to hidden's dtype; targets (…) int64, −1 is ignored. reduction: "mean"
    over the targets that count (0 if none does), "sum", or "none" → (…), 0 where ignored; anything else: NanochatError.
    The loss and the sums of weight's gradient are float32 at least.
    """
    if reduction not in ("mean", "sum", "none"):
        raise NanochatError(f"loss_reduction={reduction!r} is unknown: choose mean, sum or none")
    x, aims, V = hidden.flatten(0, -2), targets.flatten(), len(weight) if vocab_size is None else vocab_size
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction == "none":
        return token_losses(x, weight, aims, V, softcap, gradient)[0].view(targets.shape)
    total = summed_loss(x, weight, aims, V, softcap, gradient)[0]
    return total / (aims >= 0).sum().clamp(min=1) if reduction == "mean" else total

# %% [markdown]
# Against the three lines, gradients too; the weight has a row more than the vocabulary (padding), and one target is
# ignored.

# %%
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(21, 8, requires_grad=True)
aims = torch.tensor([3, 0, -1, 19, 7, 7])
plain = F.cross_entropy(15 * torch.tanh(hidden @ weight[:20].T / 15), aims, ignore_index=-1)
ours = head_loss(hidden, weight, aims, vocab_size=20)
torch.testing.assert_close(ours, plain)
for got, want in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight))):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
if triton_here and not torch.cuda.is_available():  # the kernel, interpreted
    logits, each = (hidden @ weight[:20].T).detach(), torch.empty(6)
    softcap_loss_(logits, aims, each, 15.0, gradient=True)
    torch.testing.assert_close(each, head_loss(hidden, weight, aims, 20, reduction="none").detach())

# %% [markdown]
# ## What the compiler made of it
#
# A kernel that is right can still be slow for a reason that no test of numbers shows: a program's tensors need more
# registers than a thread has (255), and the rest *spills* to memory; or its tiles need more shared memory than the chip
# has, and it does not start at all. The compiler says both, and it needs no GPU to do so: `compile_check`
# builds every kernel as it is launched, for four generations of chips, and reads the machine code's own numbers.

# %%
#| export kernels/compile_check
#| cli compile_check
"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory on sm_80 to sm_120.

    python -m nanochat_lib.kernels.compile_check                       # every kernel of nanochat_lib/kernels
    python -m nanochat_lib.kernels.compile_check --modules flash_attention --chips 90
    python -m nanochat_lib.kernels.compile_check --json docs/kernels_compiled.json     # record them (a test compares)

Fails if a kernel spills registers to memory, wants more shared memory than the chip has, or has products serialized.
"""

import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_lib.common import NanochatError, run_cli, write_json

# Compute capability × 10 → KiB of shared memory that a program may have. 80 stands for 8.6 and 8.9 (RTX 30 and 40, L4),
# too, which take its settings: 99, though an A100 has 163. 120 is the RTX 50.
CHIPS = {80: 99, 90: 227, 100: 227, 120: 99}

# %%
#| export kernels/compile_check
def modules() -> list[str]:
    """Modules beside this one that say what they launch, by a function compile_cases(capability)."""
    here = Path(__file__).parent
    return sorted(path.stem for path in here.glob("[a-z]*.py") if "\ndef compile_cases(" in path.read_text())


def build(kernel, types: dict, constants: dict, options: dict, capability: int):
    """Compile a kernel as it is launched. Arguments without a type: "i32"; "i32:16" and pointers divide by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    while not hasattr(kernel, "cache_key"):  # inside an autotuner or a heuristic
        kernel = kernel.fn
    if unknown := {*types, *constants} - set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [n for n, kind in enumerate(kinds.values()) if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(kernel, {name: kind.removesuffix(":16") for name, kind in kinds.items()}, constants,
                       {(n,): [["tt.divisibility", 16]] for n in aligned})
    return compile(source, GPUTarget("cuda", capability, 32), options)

# %%
#| export kernels/compile_check
def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of its registers that spilled to memory, as the machine code says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    found = {name: max(map(int, re.findall(rf"\b{name}:(\d+)", text))) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "spilled_bytes": max(found["STACK"], found["LOCAL"])}


def report(module: str, index: int, capability: int) -> dict:
    """One row of the table: case `index` of a module, compiled for a chip."""
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it always was; without it Triton 3.9 warns
    os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}  # what the assembler says, is printed
    cases = importlib.import_module(f"nanochat_lib.kernels.{module}").compile_cases(capability)
    label, kernel, types, constants, options = list(cases)[index]
    row = {"module": module, "case": label, "sm": capability, "fault": ""}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = build(kernel, types, constants, options, capability)
    except Exception as error:  # the compiler's own words are the finding
        return row | {"fault": f"does not compile: {(str(error).splitlines() or [repr(error)])[0]}"}
    row |= resources(compiled.asm["cubin"]) | {"shared_kib": round(compiled.metadata.shared / 1024, 1),
                                               "warps": compiled.metadata.num_warps}
    if row["spilled_bytes"]:
        row["fault"] = f"spills {row['spilled_bytes']} bytes a thread: give it more warps or smaller tiles"
    elif row["shared_kib"] > CHIPS[capability]:
        row["fault"] = (f"more shared memory than the {CHIPS[capability]} KiB of sm_{capability}: "
                        "give it fewer stages or smaller tiles")
    elif "instructions are serialized" in log.getvalue():
        row["fault"] = "its products wait for each other (wgmma serialized): other tiles or warps"
    return row

# %%
#| export kernels/compile_check
def check(names: list[str], chips: list[int], jobs: int | None = None, only: str = "") -> list[dict]:
    """Rows for the cases of these modules on these chips, compiled in `jobs` fresh processes (default: a core each)."""
    work = [(name, index, chip) for name in names for chip in chips
            for index, case in enumerate(importlib.import_module(f"nanochat_lib.kernels.{name}").compile_cases(chip))
            if only in case[0]]
    if not work:
        raise NanochatError(f"no kernel's name holds {only!r}: leave --only away to see them all")
    with ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(report, *zip(*work)))


def table(rows: list[dict]) -> str:
    """The rows as text, faults behind them."""
    lines = [f"{'kernel':48} {'chip':>6} {'registers':>9} {'spilled':>8} {'shared KiB':>11} {'of':>4} {'warps':>6}"]
    for row in rows:
        registers, spilled, shared = (row.get(name, "-") for name in ("registers", "spilled_bytes", "shared_kib"))
        lines.append(f"{row['module'] + ': ' + row['case']:48} {'sm_' + str(row['sm']):>6} {registers:>9} {spilled:>8} "
                     f"{shared:>11} {CHIPS[row['sm']]:>4} {row.get('warps', '-'):>6}  {row['fault']}".rstrip())
    return "\n".join(lines)

# %%
#| export kernels/compile_check
@dataclass
class Settings:
    """What to compile."""

    modules: list[str] = field(default_factory=modules)  # of nanochat_lib/kernels
    chips: list[int] = field(default_factory=lambda: list(CHIPS))  # compute capability × 10
    only: str = ""  # cases whose name holds this, e.g. "bf16 D=128"
    json: Path | None = None  # write the rows there too
    jobs: int | None = None  # processes; default: one per core


def compile_check(settings: Settings) -> None:
    """Compile every kernel, print what it takes, and fail on a spill or on too much shared memory."""
    for what, asked, have in (("module", settings.modules, modules()), ("chip", settings.chips, CHIPS)):
        if unknown := [str(value) for value in asked if value not in have]:
            raise NanochatError(f"no kernels for {what} {', '.join(unknown)}: choose from {', '.join(map(str, have))}")
    if importlib.util.find_spec("triton") is None:
        raise NanochatError("Triton is not installed, and only Linux has it: there, pip install triton")
    rows = check(settings.modules, settings.chips, settings.jobs, settings.only)
    print(table(rows))
    if settings.json:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.json, {"triton": importlib.import_module("triton").__version__, "rows": rows})
    if bad := sum(bool(row["fault"]) for row in rows):
        raise NanochatError(f"{bad} of {len(rows)} kernels cannot stay as they are: choose other sizes in their module")

# %% [markdown]
# The three attention kernels as the H200 gets them (a fresh process compiles them: in this one they may be
# interpreted):

# %%
# NBVAL_IGNORE_OUTPUT
import subprocess

if triton_here:
    command = "-m nanochat_lib.kernels.compile_check --modules flash_attention --chips 90 --only".split()
    print(subprocess.run([sys.executable, *command, "bf16 D=128"], capture_output=True, text=True).stdout)

# %%
for name in mocked:
    del sys.modules[name]

# %% [markdown]
# ## The same idea on a CPU
#
# A CPU has caches instead of shared memory, and PyTorch's `scaled_dot_product_attention` already tiles for them. It
# knows "causal" but no window; a mask would hide the far keys and still do their work. So cut the *queries*
# into blocks and hand each only the keys that it can see.

# %%
#| export plain_attention
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's fused attention in our layout; without a mask it is causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = True if q.size(1) != k.size(1) else False  # a constant, even for a compiler that leaves sizes open
    if grouped and q.device.type == "mps":  # no grouped queries there
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped).transpose(1, 2)


def blocked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, block: int = 192) -> torch.Tensor:
    """Windowed attention in blocks of queries that see only their own keys: work grows as T · (window + block)."""
    positions, outs = torch.arange(q.size(1), device=q.device), []
    for start in range(0, q.size(1), block):
        end, first = min(start + block, q.size(1)), max(0, start - window)
        plain = start == 0 and end <= window + 1  # nothing hidden but the future
        mask = None if plain else visible(positions[start:end], positions[first:end], window)
        outs.append(sdpa(q[:, start:end], k[:, first:end], v[:, first:end], mask))
    return torch.cat(outs, dim=1)

# %% [markdown]
# For long texts that leaves something on the table: `scaled_dot_product_attention` takes small tiles when it is given
# few queries. A block's scores, `block × (window + block)` per head, fit a CPU's cache, so here the three lines of
# the formula are fast as they stand, block by block. First the plan: which blocks of queries see which keys, and how
# many heads are taken at once.

# %%
#| export plain_attention
def band_plan(q: torch.Tensor, k: torch.Tensor, window: int, block: int, scores: int) -> tuple[list, list, int]:
    """How windowed attention is cut: heads taken together, blocks of queries, and the most scores held at once.

    Of heads: (row of the batch, heads, their key heads), as many as have `scores` scores in a block, at least one.
    Of blocks: (queries, keys that they see, what is added to their scores: 0, or -inf where hidden).
    """
    B, T, H, _ = q.shape
    group, added, blocks = H // k.size(2), {}, []
    for start in range(0, T, block):
        end, first = min(start + block, T), max(0, start - window)
        if (shape := (end - start, end - first)) not in added:  # most blocks are alike
            t = torch.arange(first, end)
            hidden = ~visible(t[start - first:], t, window)
            added[shape] = torch.zeros(shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        blocks.append((slice(start, end), slice(first, end), added[shape]))
    together = min(H, max(1, scores // (block * (window + block))))
    if group > 1:  # heads that share keys add to one gradient, so one after the other
        together = 1
    heads = [(b, slice(h, h + together), slice(h // group, h // group + together))
             for b in range(B) for h in range(0, H, together)]
    return heads, blocks, together * max(hide.numel() for *_, hide in blocks)


def band_weights(room: torch.Tensor, hide: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Softmax of q @ kᵀ / √D + hide, written into `room`; q, k: (heads, tokens, D)."""
    p = room[:len(q) * hide.numel()].view(-1, *hide.shape)
    torch.baddbmm(hide, q, k.transpose(1, 2), alpha=q.size(-1)**-0.5, out=p)
    return torch.softmax(p, -1, out=p)

# %% [markdown]
# The gradient we write ourselves, with the same blocks: with weights $p$ and $dp = do\,v^\top$, the softmax gives
# $ds = p\,(dp - \sum p\,dp)$, and three more products give $dq$, $dk$, $dv$.

# %%
#| export plain_attention
class BandAttention(torch.autograd.Function):
    """Windowed attention as batched products over cache-sized blocks; keeps weights for backward while they are few."""

    BLOCK, CHUNK = 128, 1 << 18  # queries a block; scores held at once for each thread, 1 MiB in float32
    KEEP = 1 << 28  # bytes of weights; above that backward computes them again

    @staticmethod
    def forward(ctx, q, k, v, window):
        scores = BandAttention.CHUNK * torch.get_num_threads()
        heads, blocks, most = ctx.plan = band_plan(q, k, window, BandAttention.BLOCK, scores)
        number = q.size(0) * q.size(2) * sum(hide.numel() for *_, hide in blocks)
        keep = any(ctx.needs_input_grad) and number * q.element_size() <= BandAttention.KEEP
        out, room, used = torch.empty_like(q), q.new_empty(number if keep else most), 0
        for b, mine, theirs in heads:
            qs, outs = (x[b, :, mine].transpose(0, 1) for x in (q, out))
            ks, vs = (x[b, :, theirs].transpose(0, 1) for x in (k, v))
            for at, seen, hide in blocks:
                p = band_weights(room[used:], hide, qs[:, at], ks[:, seen])
                torch.bmm(p, vs[:, seen], out=outs[:, at])
                used += p.numel() if keep else 0
        ctx.save_for_backward(q, k, v, room if keep else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (q, k, v, kept), (heads, blocks, most), used = ctx.saved_tensors, ctx.plan, 0
        dq, dk, dv, scale = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), q.size(-1)**-0.5
        room, more = q.new_empty(most if kept is None else 0), q.new_empty(most)
        for b, mine, theirs in heads:
            qs, gs, dqs = (x[b, :, mine].transpose(0, 1) for x in (q, grad, dq))
            ks, vs, dks, dvs = (x[b, :, theirs].transpose(0, 1) for x in (k, v, dk, dv))
            for at, seen, hide in blocks:
                if kept is None:
                    p = band_weights(room, hide, qs[:, at], ks[:, seen])
                else:
                    p = kept[used:used + len(qs) * hide.numel()].view(-1, *hide.shape)
                    used += p.numel()
                dvs[:, seen].baddbmm_(p.transpose(1, 2), gs[:, at])
                dp = torch.bmm(gs[:, at], vs[:, seen].transpose(1, 2), out=more[:p.numel()].view_as(p))
                ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
                torch.baddbmm(dqs[:, at], ds, ks[:, seen], beta=0, alpha=scale, out=dqs[:, at])
                dks[:, seen].baddbmm_(ds.transpose(1, 2), qs[:, at], alpha=scale)
        return dq, dk, dv, None

# %% [markdown]
# ## Choosing
#
# Nobody should have to know all this to call `attention(q, k, v, window)`. It picks: on a CPU the ways above; on a
# GPU PyTorch's fused kernel for full layers, our kernel for windows, and our decoding kernel for a chat.
# (FlexAttention, which compiles a kernel for any mask, is the second choice for windows.) `NANOCHAT_ATTENTION`
# overrules; whatever a machine lacks, it says in one line and takes the next best way.

# %%
#| export
"""Causal attention with a sliding window and grouped queries: one interface, the fastest right way on each device.

Layout (B, T, H, D) throughout. `attention` is for texts, `cached_attention` for new tokens against a cache;
`backend` says which way is taken, $NANOCHAT_ATTENTION overrules it.
"""

import functools
import importlib.util
import os
import sys

import torch

from nanochat_lib.common import NanochatError, is_main_process
from nanochat_lib.plain_attention import BandAttention, blocked_attention, reference_attention, sdpa, visible

CHOICES = ("reference", "sdpa", "flex", "triton")
HEAD_DIMS = (32, 64, 128, 256)  # that our kernels take
FAILED: set[str] = set()  # of "flex", "triton" and "decoding", those that raised on this machine
HAVE_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def notice(message: str) -> None:
    """Say something once, on the main process."""
    if is_main_process():
        print(f"attention: {message}", file=sys.stderr, flush=True)


def wanted() -> str:
    """What $NANOCHAT_ATTENTION asks for; "" leaves the choice to us."""
    name = os.environ.get("NANOCHAT_ATTENTION", "")
    if name and name not in CHOICES:
        raise NanochatError(f"NANOCHAT_ATTENTION={name} is no way to compute attention: choose {', '.join(CHOICES)}")
    return name


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]

# %%
#| export
@functools.cache
def fault(device: str, dtype: torch.dtype, D: int, full: bool) -> str:
    """Why our kernel cannot train here, "" if it can: both passes over a few tokens, tried once."""
    try:
        q = torch.ones(1, 4, 1, D, device=device, dtype=dtype, requires_grad=True)
        torch.autograd.grad(triton_attention(q, q, q, None if full else 1).sum(), q)[0].cpu()
    except Exception as error:  # no compiler, a driver too old, too little memory on the chip…
        reason = f"{dtype} heads of {D}: {first_line(error)}"
        notice(f"triton not used: {reason}")
        return reason
    return ""


def lacks(way: str, device: str, D: int, dtype: torch.dtype, full: bool = False, train: bool = False) -> str:
    """Why `way` cannot serve on a "cpu", "cuda" or "mps" device; "" if it can.

    `way`: "flex", "triton" or "decoding"; `D`: head_dim(q); `full`: the window hides no key; `train`: with a gradient.
    """
    if way in FAILED:
        return "it failed before"
    if not HAVE_TRITON:
        return "Triton is not installed"
    on_ampere = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if not on_ampere and (way == "flex" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "it needs a CUDA GPU of compute capability 8.0 or later"
    if not D:
        return f"the head dimension is none of {', '.join(map(str, HEAD_DIMS))}"
    if way == "triton" and D > 64 and dtype == torch.float32 and device == "cuda":
        return "float32 heads above 64 do not fit a thread's registers"
    return fault(device, dtype, D, full) if way == "triton" and train else ""

# %% [markdown]
# The choice looks at nothing but a few facts, never at numbers. So a compiler that traces the model may make it once,
# while tracing (`assume_constant_result`), notice and all; a trial of our kernel, too, before it is trusted with a
# gradient: once it is part of a graph, or called by backward, nothing could catch what it raises.

# %%
#| export
@torch.compiler.assume_constant_result
def choose(device: str, dtype: torch.dtype, D: int, full: bool, short: bool, compiling: bool, train: bool) -> str:
    """The way for one layer. `short`: T ≤ two windows; `compiling`: by torch.compile; the others as in `lacks`."""
    want = wanted()
    if want == "reference":
        return want
    if want in ("flex", "triton"):
        if not (reason := lacks(want, device, D, dtype, full, train)):
            return want
        notice(f"{want} not used: {reason}")
    if full:
        return "sdpa"
    if device == "cpu":
        plain = want == "sdpa" or compiling or dtype not in (torch.float32, torch.float64)
        return "blocks" if plain or short else "band"
    if device == "cuda" and not want:
        for way in ("triton", "flex"):
            if not (reason := lacks(way, device, D, dtype, full, train)):
                return way
        notice(f"windows are a mask here, which saves no time: {reason}")
    return "sdpa"


def yes(condition: bool) -> bool:
    """The condition as a constant: a compiler that leaves T open settles it here."""
    return True if condition else False


def head_dim(q: torch.Tensor) -> int:
    """Of q, as a constant; 0 if it is none that our kernels take."""
    for D in HEAD_DIMS:
        if q.size(3) == D:
            return D
    return 0


def backend(q: torch.Tensor, window: int | None = None) -> str:
    """The way `attention` takes for q (B, T, H, D).

    "reference", "sdpa" (full layers, or a mask), "blocks" or "band" (windows on a CPU), "flex" or "triton".
    """
    T = q.size(1)
    full = yes(window is None or window >= T - 1)
    short = yes(not full and T <= 2 * window)
    train, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
    return choose(q.device.type, q.dtype, head_dim(q), full, short, compiling, train)

# %%
#| export
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Causal attention of q (B, T, H, D) to k, v (B, T, KVH, D); H is a multiple of KVH. Returns (B, T, H, D).

    A query sees itself and the `window` keys before it; None, or window ≥ T − 1, is all of them. Differentiable.
    """
    way = backend(q, window)
    if way == "reference":
        return reference_attention(q, k, v, window)
    if way == "blocks":
        return blocked_attention(q, k, v, window)
    if way == "band":
        return BandAttention.apply(q, k, v, window)
    if way in ("flex", "triton"):
        try:
            return flex(q, k, v, window) if way == "flex" else triton_attention(q, k, v, window)
        except ValueError as error:  # heads or numbers that the kernel does not take
            notice(f"{way} not used: {error}")
        except Exception as error:  # no compiler, a driver too old…: the run goes on
            give_up(way, error)
    if window is None or window >= q.size(1) - 1:
        return sdpa(q, k, v)
    positions = torch.arange(q.size(1), device=q.device)
    return sdpa(q, k, v, visible(positions, positions, window))


def give_up(way: str, error: Exception) -> None:
    """Remember that a way raised, and say so."""
    FAILED.add(way)
    notice(f"{way} failed, going on with sdpa: {first_line(error)}")

# %%
#| export
def triton_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Our kernel."""
    from nanochat_lib.kernels.flash_attention import flash_attention  # triton only where it is used

    return flash_attention(q, k, v, window)[0]


@functools.lru_cache(maxsize=64)
def band_mask(T: int, window: int, device: torch.device):
    """FlexAttention's list of tiles to visit for a window."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    return create_block_mask(seen, None, None, T, T, device=device)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """FlexAttention (PyTorch): a kernel compiled for the mask, which skips the tiles that a window hides."""
    from torch.nn.attention.flex_attention import flex_attention

    T = q.size(1)
    run = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    mask = band_mask(T, T if window is None else window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return run(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

# %% [markdown]
# Every way gives the formula's numbers, gradients too.

# %%
q, k, v = (torch.randn(2, 400, heads, 32, requires_grad=True) for heads in (4, 2, 2))
for window in (None, 300, 64, 0):
    result, expected = attention(q, k, v, window), reference_attention(q, k, v, window)
    pull = torch.randn_like(result)
    for got, want in zip(torch.autograd.grad(result, (q, k, v), pull), torch.autograd.grad(expected, (q, k, v), pull)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if not torch.cuda.is_available():
        print(f"window {window}: {backend(q, window)}")

# %% [markdown]
# And the window pays, in time as in traffic (one sequence, four heads of 64, window 512, forward and backward here):

# %%
# NBVAL_IGNORE_OUTPUT
def seconds(window, T):
    q, k, v = (torch.randn(1, T, 4, 64, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        attention(q, k, v, window).sum().backward()
        times.append(time.perf_counter() - begin)
    return min(times)


texts = [512, 1024, 2048, 3072]
_ = plt.figure(figsize=(6, 3), layout="constrained")
for window, name in ((None, "full"), (512, "window 512")):
    plt.plot(texts, [1000 * seconds(window, T) for T in texts], marker="o", label=name)
plt.gca().set(xlabel="T (tokens)", ylabel="forward + backward (ms)", ylim=(0, None))
_ = plt.legend()

# %% [markdown]
# ## The same choice for a chat
#
# `cached_attention` is what the model calls while it writes: a few new tokens a row, a cache, and how long each row
# is. A fresh prompt is plain causal attention. On a GPU the decoding kernel reads each row's own keys; elsewhere
# PyTorch gets a mask, over no more keys than the longest row has.

# %%
#| export
@torch.compiler.assume_constant_result
def decoding_backend(device: str, D: int) -> str:
    """The way `cached_attention` takes: "reference", "sdpa", or "triton", our kernel, the default on CUDA."""
    want = wanted()
    if want not in ("", "triton") or (not want and device != "cuda"):
        return "reference" if want == "reference" else "sdpa"
    if reason := lacks("decoding", device, D, torch.float32):
        notice(f"triton not used for decoding: {reason}")
    return "sdpa" if reason else "triton"


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor,
           window: int | None = None) -> torch.Tensor:
    """Our decoding kernel."""
    from nanochat_lib.kernels.decoding import decode_attention

    return decode_attention(q, k, v, lengths, window)

# %%
#| export
@torch.no_grad()
def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor,
                     window: int | None = None) -> torch.Tensor:
    """Attention of T new tokens per row, q (B, T, H, D), to caches k, v (B, capacity, KVH, D). No gradient.

    `lengths` (B,) int64 counts each row's tokens before this call; the caches already hold the new ones behind them.
    A cache that lies in memory as (B, KVH, capacity, D), seen through a transpose, is read fastest.
    """
    T = q.size(1)
    if T > 1 and not lengths.any():  # a fresh prompt: plain causal attention
        return attention(q, k[:, :T], v[:, :T], window)
    way = decoding_backend(q.device.type, head_dim(q))
    if way == "reference":
        return reference_attention(q, k, v, window, lengths)
    if way == "triton":
        try:
            return decode(q, k, v, lengths, window)
        except ValueError as error:  # too many new tokens at once, or heads that the kernel does not take
            notice(f"triton not used for decoding: {error}")
        except Exception as error:
            give_up("decoding", error)
    first, end = 0, k.size(1)
    if lengths.device.type == "cpu":  # reading lengths is free: leave out keys that no row sees
        end = min(end, int(lengths.max()) + T)
        first = 0 if window is None else max(0, int(lengths.min()) - window)
    positions = lengths[:, None, None] + torch.arange(T, device=q.device)  # (B, 1, T)
    mask = visible(positions, torch.arange(first, end, device=q.device), window)
    return sdpa(q, k[:, first:end], v[:, first:end], mask)

# %% [markdown]
# One token at a time against a cache must give what the whole text gave at once. The unused end of the cache holds
# garbage on purpose.

# %%
with torch.no_grad():
    whole = attention(q, k, v, 64)
    rows, lengths = torch.arange(2), torch.tensor([150, 399])
    token = q[rows, lengths][:, None]  # (2, 1, 4, 32): the next token of each row
    caches = [x.clone() for x in (k, v)]
    for cache in caches:
        cache[0, 151:] = 1e4
    torch.testing.assert_close(cached_attention(token, *caches, lengths, 64)[:, 0], whole[rows, lengths])

# %% [markdown]
# What a row of chat rereads for each new token, in the model that eight GPUs train (24 layers, 12 heads of 128,
# two-byte numbers, 2,048 tokens so far; three layers of four have a window of a quarter):

# %%
def cache_mib(kv_heads, layers=24, tokens=2048, windowed=0.75, D=128):
    return layers * (windowed * min(tokens, 512) + (1 - windowed) * tokens) * kv_heads * D * 2 * 2 / 2**20


print(f"full layers: {cache_mib(12, windowed=0):.0f} MiB; windows: {cache_mib(12):.0f} MiB; "
      f"windows and 4 key heads: {cache_mib(4):.0f} MiB")

# %% [markdown]
# ## Measured
#
# A claim about speed is a race: all contestants in one process, in turns (a machine warms up, throttles and is
# shared), medians, and next to them the roof, what the chip does when it only multiplies or only copies. GPUs run
# behind: work is queued while a long pause keeps the GPU busy, and its own clock stamps begin and end; before each
# run the cache is overwritten, so that nobody finds a rival's keys there.

# %%
#| export timing
"""Races: how long several ways to compute the same take, in turns on one machine, as medians."""

import statistics
import time
from collections.abc import Callable

import torch

PAUSE = 4_000_000  # GPU cycles, about 2 ms: enough to queue a round
FLUSH = 2**28  # bytes, more than any L2 cache


def queue_round(contestants: dict[str, Callable[[], object]], flush: torch.Tensor) -> dict[str, float]:
    """Milliseconds of one run of each on the current CUDA device, by its own clock."""
    stamps = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in contestants}
    torch.cuda._sleep(PAUSE)
    for name, run in contestants.items():
        flush.zero_()
        stamps[name][0].record()
        run()
        stamps[name][1].record()
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) for name, (begin, end) in stamps.items()}


def clock_round(contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of one run of each on the CPU."""
    times = {}
    for name, run in contestants.items():
        begin = time.perf_counter()
        run()
        times[name] = 1000 * (time.perf_counter() - begin)
    return times

# %%
#| export timing
def race(contestants: dict[str, Callable[[], object]], device: torch.device | str, rounds: int = 20,
         seconds: float = 2.0) -> tuple[dict[str, float], dict[str, str]]:
    """Medians in milliseconds of interleaved rounds, and why each contestant that raised is not among them.

    Every contestant runs twice unmeasured (compilers, caches). Ends after `rounds` or `seconds`, but not before three.
    """
    on_gpu, able, failed = torch.device(device).type == "cuda", {}, {}
    for name, run in contestants.items():
        try:
            run(), run()
            if on_gpu:
                torch.cuda.synchronize()
            able[name] = run
        except Exception as error:  # what this machine lacks is a finding
            failed[name] = (str(error).strip().splitlines() or [repr(error)])[0][:100]
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if on_gpu else None
    times, begin = {name: [] for name in able}, time.perf_counter()
    for number in range(rounds if able else 0):
        if number >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, value in (queue_round(able, flush) if on_gpu else clock_round(able)).items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}, failed

# %%
#| export kernel_races
"""What is raced: our kernels, PyTorch's, and the chip's roof, on the shapes that the targets name."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat_lib import attention as ways
from nanochat_lib import loss
from nanochat_lib.common import print0
from nanochat_lib.timing import race

# %%
#| export kernel_races
@dataclass
class Bench:
    """Rows as they are measured, each printed at once: part, case, way, milliseconds, rate and its unit."""

    device: torch.device
    quick: bool = False
    seconds: float = 90.0  # after that nothing new is begun
    rows: list[dict] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def measure(self, part: str, case: str, contestants: dict[str, Callable], work: float | dict = 0, unit: str = "",
                peaks: dict[str, float] | None = None) -> None:
        """Race these; `work` is what one run does, in FLOP or bytes, of all or of each; `peaks` their memory in MiB."""
        times, failed = ({}, dict.fromkeys(contestants, "no time was left")) if self.late() else race(
            contestants, self.device, *((5, 0.5) if self.quick else (15, 1.0)))
        for name in contestants:
            row = {"part": part, "case": case, "way": name}
            if name in failed:
                row["failed"] = failed[name]
            else:
                done = work[name] if isinstance(work, dict) else work
                scale = 1e12 if unit == "TFLOP/s" else 1e9
                row |= {"ms": times[name]} | ({"rate": done / times[name] * 1e3 / scale, "unit": unit} if done else {})
                row |= {"peak_mib": peaks[name]} if peaks and name in peaks else {}
            self.add(row)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        value = f"{row['ms']:10.3f} ms" if "ms" in row else f"not here: {row['failed']}"
        rate = f"{row['rate']:9.4g} {row['unit']}" if "rate" in row else ""
        memory = f"  {row['peak_mib']:8.0f} MiB" if "peak_mib" in row else ""
        print0(f"{row['part']:20} {row['case']:22} {row['way']:24} {value}{rate}{memory}")

    def late(self) -> bool:
        return time.monotonic() - self.begin > self.seconds

    def get(self, part: str, case: str, way: str, what: str = "ms") -> float:
        """One measured figure; nan if it is not there."""
        wanted = (part, case, way)
        found = [row[what] for row in self.rows if (row["part"], row["case"], row["way"]) == wanted and what in row]
        return found[0] if found else float("nan")

# %% [markdown]
# Attention's work is counted in pairs that are seen, so that nobody earns TFLOP/s for computing what the mask throws
# away: two products forward, five backward, two operations for each of `D` numbers.

# %%
#| export kernel_races
def pairs(T: int, window: int | None) -> int:
    """How many (query, key) pairs a head sees."""
    seen = T if window is None else min(window + 1, T)
    return seen * (seen + 1) // 2 + (T - seen) * seen


def of_pytorch(backend: SDPBackend) -> Callable:
    def run(q, k, v, window=None):
        with sdpa_kernel(backend):
            return ways.sdpa(q, k, v)

    return run


SDPA = {"cuDNN": of_pytorch(SDPBackend.CUDNN_ATTENTION), "flash (PyTorch)": of_pytorch(SDPBackend.FLASH_ATTENTION),
        "efficient (PyTorch)": of_pytorch(SDPBackend.EFFICIENT_ATTENTION)}
OURS = {"ours": ways.triton_attention}
FLEX = {"FlexAttention": ways.flex}

# %%
#| export kernel_races
def backward_of(run: Callable, leaves: tuple[torch.Tensor, ...]) -> Callable:
    """The backward pass alone: its forward runs once, when it is first called."""
    kept = []

    def again():
        if not kept:
            out = run(*leaves)
            kept.extend((out, torch.randn_like(out)))
        torch.autograd.grad(kept[0], leaves, kept[1], retain_graph=True)

    return again


def attention_rows(bench: Bench, B: int, T: int, window: int, flex_full: bool, H: int = 16, D: int = 128) -> None:
    """Both passes with a window, then each pass full; bfloat16. `flex_full`: FlexAttention there too, a compilation."""
    q, k, v = (torch.randn(B, T, H, D, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    pull, full, case = torch.randn_like(q), 4 * B * H * D * pairs(T, None), f"T {T:,}"

    def both(run, seen=None):
        return lambda: torch.autograd.grad(run(q, k, v, seen), (q, k, v), pull)

    contestants = {name: both(run, window) for name, run in (OURS | FLEX).items()}
    contestants |= {f"{name}, full": both(SDPA[name]) for name in ("cuDNN", "flash (PyTorch)")}
    banded = 4 * B * H * D * pairs(T, window)
    work = {name: 3.5 * (full if name.endswith("full") else banded) for name in contestants}
    bench.measure("forward + backward", f"{case}, window {window:,}", contestants, work, "TFLOP/s")
    every = OURS | SDPA | (FLEX if flex_full else {})
    contestants = {name: lambda run=run: run(q, k, v) for name, run in every.items()}  # as in training, with logsumexp
    bench.measure("forward", case, contestants, full, "TFLOP/s")
    contestants = {name: backward_of(run, (q, k, v)) for name, run in every.items()}
    bench.measure("backward", case, contestants, 2.5 * full, "TFLOP/s")

# %%
#| export kernel_races
def decoding_rows(bench: Bench, B: int, H: int = 16, KVH: int = 16, S: int = 2048, D: int = 128) -> None:
    """One new token a row against a cache of S tokens; counted in bytes of keys and values."""
    q = torch.randn(B, 1, H, D, device=bench.device, dtype=torch.bfloat16)
    k, v = (torch.randn(B, KVH, S, D, device=bench.device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    lengths = torch.full((B,), S - 1, device=bench.device)
    mask = ways.visible(lengths[:, None, None], torch.arange(S, device=bench.device))
    contestants = {"ours": lambda: ways.decode(q, k, v, lengths), "PyTorch, masked": lambda: ways.sdpa(q, k, v, mask)}
    case = f"batch {B}" + (f", {KVH} key heads" if KVH < H else "")
    bench.measure("decoding", case, contestants, 2 * k.nbytes, "GB/s")


def loss_rows(bench: Bench, tokens: int, vocab: int, width: int) -> None:
    """The loss of a whole batch, forward and backward: time, and the memory it needs beside its inputs."""
    on_gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    x = torch.randn(tokens, width, device=bench.device, dtype=dtype, requires_grad=True)
    weight = (0.05 * torch.randn(vocab, width, device=bench.device, dtype=dtype)).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=bench.device)
    targets[::10] = -1

    def plain(x, weight, targets):
        return F.cross_entropy(15 * torch.tanh(F.linear(x, weight).float() / 15), targets, ignore_index=-1)

    def once(run):
        return lambda: torch.autograd.grad(run(x, weight, targets), (x, weight))

    contestants = {"ours": once(loss.head_loss), "PyTorch": once(plain)}
    if on_gpu:
        contestants |= {"PyTorch, compiled": once(torch.compile(plain)), "in chunks": once(chunked_loss)}
    case, peaks = f"{tokens:,} × {vocab:,}", {}
    for name, run in contestants.items() if on_gpu and not bench.late() else ():
        try:
            run()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception:  # the race says why
            continue
    bench.measure("loss", case, contestants, 6 * tokens * vocab * width, "TFLOP/s", peaks)

# %%
#| export kernel_races
def chunked_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss head without our kernel: its chunks in plain PyTorch."""
    loss.NO_KERNEL.append("not asked for")
    try:
        return loss.head_loss(x, weight, targets)
    finally:
        loss.NO_KERNEL.pop()


def roof_rows(bench: Bench) -> None:
    """What this GPU does when it only multiplies (bfloat16, 8,192³), or only copies (1 GiB, read and written)."""
    a, b = (torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.measure("roof", "8,192³", {"matmul": lambda: a @ b}, 2 * 8192**3, "TFLOP/s")
    source, target = (torch.empty(2**29, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.measure("roof", "1 GiB", {"copy": lambda: target.copy_(source)}, 2 * source.nbytes, "GB/s")


def cpu_rows(bench: Bench) -> None:
    """What a CPU can race: a window against the full context, the loss against the plain formula."""
    q, k, v = (torch.randn(1, 2048, 16, 128, requires_grad=True) for _ in range(3))
    pull = torch.randn_like(q)

    def both(window):
        return lambda: torch.autograd.grad(ways.attention(q, k, v, window), (q, k, v), pull)

    bench.measure("forward + backward", "CPU, T 2,048", {"full": both(None), "window 512": both(512)})
    loss_rows(bench, 2048, 4096, 256)


# %%
#| export scripts/kernel_bench
#| cli kernel_bench
"""Our kernels against PyTorch's and against the chip's roof: TFLOP/s, GB/s, memory, and which targets are reached.

    python -m nanochat_lib.scripts.kernel_bench            # on a GPU: everything, about 90 s; on a CPU: what it can run
    python -m nanochat_lib.scripts.kernel_bench --quick    # one length, few rounds
"""

import importlib
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from math import isnan
from pathlib import Path

import torch

from nanochat_lib.common import pick_device, print0, run_cli, write_json
from nanochat_lib.kernel_races import Bench, attention_rows, cpu_rows, decoding_rows, loss_rows, roof_rows

ON_GPU = "on a machine with a GPU: python -m nanochat_lib.scripts.kernel_bench"


@dataclass
class Settings:
    """What to measure, and where to put it."""

    out: Path = Path("build/kernels")  # writes OUT.json and OUT.png
    quick: bool = False  # T = 2,048 only, few rounds
    seconds: float = 90.0  # races that would begin later are left out, and said so
    compile_figures: bool = True  # on a CPU: registers and shared memory, from the compiler
    device_type: str = ""

# %%
#| export scripts/kernel_bench
def targets(bench: Bench) -> list[dict]:
    """What is promised, as ratios: what, measured (nan where it was not), sign, bound."""
    lengths = {2048: 768} if bench.quick else {2048: 768, 8192: 2048}
    get, found = bench.get, []

    def promise(what: str, value: float, sign: str, bound: float) -> None:
        reached = value >= bound if sign == "≥" else value <= bound
        found.append({"what": what, "measured": value, "sign": sign, "bound": bound, "reached": bool(reached)})

    for T, window in lengths.items():
        case, banded, both = f"T {T:,}", f"T {T:,}, window {window:,}", "forward + backward"
        for part, bound in (("forward", 0.8), ("backward", 0.7)):
            ratio = get(part, case, "cuDNN") / get(part, case, "ours")
            promise(f"{part}, full, {case}: speed over cuDNN", ratio, "≥", bound)
        ours = get(both, banded, "ours")
        promise(f"both, {banded}: speed over FlexAttention", get(both, banded, "FlexAttention") / ours, "≥", 1.3)
        promise(f"both, {banded}: speed over cuDNN full", get(both, banded, "cuDNN, full") / ours, "≥", 1.0)
    promise("decoding, batch 64: of copy bandwidth",
            get("decoding", "batch 64", "ours", "rate") / get("roof", "1 GiB", "copy", "rate"), "≥", 0.7)
    case = "16,384 × 32,768"
    memory = [get("loss", case, way, "peak_mib") for way in ("ours", "PyTorch")]
    promise("loss: memory over PyTorch's", memory[0] / memory[1], "≤", 0.25)
    ratio = get("loss", case, "ours") / get("loss", case, "PyTorch, compiled")
    promise("loss: time over PyTorch's, compiled", ratio, "≤", 1.0)
    case = "CPU, T 2,048"
    promise("CPU: window 512 over full, T 2,048", get("forward + backward", case, "window 512")
            / get("forward + backward", case, "full"), "≤", 0.5)
    return found

# %%
#| export scripts/kernel_bench
ROOFS = {"TFLOP/s": ("8,192³", "matmul"), "GB/s": ("1 GiB", "copy")}


def draw(bench: Bench, path: Path, title: str) -> None:
    """Bars of what was measured, by part: rates, and the roof as a dashed line; time where the work differs."""
    import matplotlib.pyplot as plt

    shown = [row for row in bench.rows if "ms" in row and row["part"] != "roof"]
    shown += [row | {"part": "loss: extra memory"} for row in shown if "peak_mib" in row]
    parts = list(dict.fromkeys(row["part"] for row in shown))
    columns = max(1, min(3, len(parts)))
    lines = max(1, -(-len(parts) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.8 * lines), layout="constrained",
                                squeeze=False)
    for axis in axes.flat[len(parts):]:
        axis.axis("off")
    for axis, part in zip(axes.flat, parts):
        rows = [row for row in shown if row["part"] == part][::-1]
        differ = part == "forward + backward" or any("rate" not in row for row in rows)
        unit = "MiB" if part == "loss: extra memory" else "ms" if differ else rows[0]["unit"]
        values = [row[{"MiB": "peak_mib", "ms": "ms"}.get(unit, "rate")] for row in rows]
        colours = ["tab:blue" if row["way"] in ("ours", "window 512") else "lightgrey" for row in rows]
        bars = axis.barh([f"{row['case']}\n{row['way']}" for row in rows], values, color=colours)
        axis.bar_label(bars, fmt="{:.3g}" if unit == "ms" else "{:,.0f}", fontsize=7)
        if unit in ROOFS and (roof := bench.get("roof", *ROOFS[unit], "rate")) > 0:
            axis.axvline(roof, ls="--", color="black", lw=1)
        axis.set(title=part, xlabel=unit)
        axis.margins(x=0.12)
        axis.tick_params(axis="y", labelsize=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)

# %%
#| export scripts/kernel_bench
def parts_for(bench: Bench) -> list[Callable[[], None]]:
    """What this machine can race, the most telling first."""
    if bench.device.type != "cuda":
        return [lambda: cpu_rows(bench)] if bench.device.type == "cpu" else []
    decoding = [lambda B=B, KVH=KVH: decoding_rows(bench, B, KVH=KVH) for B, KVH in ((1, 16), (64, 16), (64, 4))]
    long = [] if bench.quick else [lambda: attention_rows(bench, 2, 8192, 2048, flex_full=False)]
    return [lambda: roof_rows(bench), *decoding, lambda: attention_rows(bench, 8, 2048, 768, flex_full=not bench.quick),
            *long, lambda: loss_rows(bench, 16384, 32768, 1536)]


def kernel_bench(settings: Settings) -> None:
    """Race our kernels against PyTorch's and the roof; print, and save as JSON and PNG."""
    device = torch.device(pick_device(settings.device_type))
    torch.manual_seed(0)
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    about = {"date": date.today().isoformat(), "chip": chip, "torch": torch.__version__, "triton": triton}
    bench, compiled = Bench(device, settings.quick, settings.seconds), []
    settings.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:  # after each part: what was measured stays
        found = {"rows": bench.rows, "targets": targets(bench), "compiled": compiled}
        write_json(settings.out.with_suffix(".json"), about | found)

    for part in parts_for(bench):
        part()
        save()
    if device.type == "cpu" and triton and settings.compile_figures:
        from nanochat_lib.kernels import compile_check

        compiled += compile_check.check(compile_check.modules(), [90])
        print0(compile_check.table(compiled))
        save()
    for row in targets(bench):
        state = "not measured here" if isnan(row["measured"]) else "reached" if row["reached"] else "NOT reached"
        print0(f"{row['what']:52} {row['measured']:6.2f} {row['sign']} {row['bound']:.2f}  {state}")
    draw(bench, settings.out.with_suffix(".png"), " · ".join(f"{name} {value}" for name, value in about.items()))
    rest = "" if device.type == "cuda" else f"; the rest, {ON_GPU}"
    print0(f"{settings.out.with_suffix('.json')} and .png written{rest}")

# %% [markdown]
# `python -m nanochat_lib.scripts.kernel_bench` makes this table on your GPU in a minute. Ours was made on the card
# that it names, and stands in `docs/kernels.json`.

# %%
# NBVAL_IGNORE_OUTPUT
from IPython.display import Image, display


def show_promises(title, rows):
    print(title)
    for row in rows:
        if row["measured"] is not None:
            missed = "" if row["reached"] else "  missed"
            print(f"  {row['what']:52} {row['measured']:6.2f} {row['sign']} {row['bound']:.2f}{missed}")


if docs:
    card = f"{found['chip']}, {found['date']}, torch {found['torch']}, triton {found['triton']}"
    show_promises(card, found["targets"])
    display(Image(docs[0].with_suffix(".png")))

# %% [markdown]
# What the choice above rests on. *Windows* are where our kernel earns its place: a third to a half faster than
# FlexAttention, and faster than the vendor's kernel that does all the work. *Full* layers stay with the vendor: ours
# come near (0.84 to 0.93 of cuDNN's speed); what is missing is a softmax that runs while the tensor cores multiply, in
# specialised groups of threads (FlashAttention-3, Shah et al., 2024). *Decoding* reads the cache at 0.96 of what a copy
# reaches: nothing is left to gain there but to read less. The *loss* takes the time of the compiled formula, and a
# fourteenth of the plain one's memory.

# %% [markdown]
# ## Exercises
#
# In [03_attention](../exercises/03_attention.ipynb):
#
# 1. **Softmax in one pass** — the running maximum and the rescaling, by hand.
# 2. **The window's tiles** — which tiles a block of queries visits, and which need a mask.
# 3. **The forward inner loop** — both together: one program of the kernel, exponentials in base 2.
# 4. **One tile of the backward pass** — dk and dv from a logsumexp, without the other tiles.
# 5. **The loss's gradient** — what the loss kernel writes over its logits.
# 6. **Attention** — causal, windowed, grouped: the function that the next lessons call.
#
# **Next:** [04 · The model](04_gpt.ipynb), which needs this function once a layer.
