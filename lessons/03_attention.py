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
#
# Attention is the only place in a transformer where tokens look at each other, and the only one whose cost grows with
# the square of the text. It is also three lines of PyTorch. This lesson starts from the three lines and ends with the
# function that trains the model: same numbers, far less memory moved, and no work on keys that a window hides.

# %%
#| default_exp attention

# %%
#| export
"""Causal attention with a sliding window and grouped queries: one interface, the fastest right way on each device.

Layout (B, T, H, D) throughout: batch, tokens, heads, head dimension. Keys and values may have fewer heads (KVH).
"""

# %%
#| export
import functools
import importlib.util
import os
import sys

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanochat_lib.common import NanochatError, is_main_process

# %%
import math
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
# - **Causal**: a token never sees the ones after it, or predicting the next token would be copying. - **Window**: in
# most layers a token sees itself and the `window` keys before it. Layers stack, so what is out of one   layer's
# window still arrives through the layer below. - **Grouped queries** (Ainslie et al., 2023): several query heads
# share one key-value head, so that the cache of   keys and values, which a chat must keep and reread for every token,
# is smaller.

# %%
#| export
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
def tiles(T, block, window=None):
    """Kind of each tile: 0 never visited, 1 visited without a mask, 2 visited with one. (T / block, T / block)."""
    t = torch.arange(T)
    seen = visible(t, t, window).view(T // block, block, T // block, block).float().mean((1, 3))
    return (seen > 0).int() + ((seen > 0) & (seen < 1)).int()


figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for axis, window in zip(axes, (None, 512)):
    kinds = tiles(2048, 128, window)
    axis.imshow(kinds, cmap=plt.cm.colors.ListedColormap(["white", "tab:blue", "tab:orange"]))
    axis.set(title=f"{f'window {window}' if window else 'full'}: {int((kinds > 0).sum())} tiles, {int((kinds == 2).sum())} with a mask",
             xlabel="tile of 128 keys", ylabel="block of 128 queries")

# %% [markdown]
# What that saves in memory traffic, per head, in two-byte numbers. Naive moves scores and weights four
# times; tiled reads, for each block of queries, the keys and values of the tiles it visits.

# %%
def traffic(T, D=128, block=128, window=None, naive=False):
    """Bytes moved between memory and chip for one head, forward."""
    own = 2 * T * D + (2 * T * D + 4 * T * T if naive else 0)  # q in, out out; naive: k, v, and the scores four times
    visited = sum(start + block - (0 if window is None else max(0, start - window) // block * block)
                  for start in range(0, T, block))
    return 2 * (own if naive else own + 2 * visited * D)


lengths_of_text = [512 * 2**i for i in range(7)]
_ = plt.figure(figsize=(6, 3.4), layout="constrained")
for name, settings in {"naive": dict(naive=True), "tiled": {}, "tiled, window 512": dict(window=512)}.items():
    plt.loglog(lengths_of_text, [traffic(T, **settings) / 2**20 for T in lengths_of_text], marker="o", label=name)
plt.gca().set(xlabel="T (tokens)", ylabel="memory traffic (MiB per head)", xticks=lengths_of_text,
              xticklabels=lengths_of_text)
plt.minorticks_off()
_ = plt.legend()
print("T = 8192:", {name: f"{traffic(8192, **settings) / 2**20:.0f} MiB" for name, settings in
                    {"naive": dict(naive=True), "tiled": {}, "window 512": dict(window=512)}.items()})

# %% [markdown]
# Tiled traffic still grows as T² (each block rereads the keys before it), but divided by the block; a window makes it
# grow as T. On a GPU most rereads hit the cache, and the kernel becomes what it should be, limited by arithmetic.
#
# ## The kernel
#
# Triton kernels are Python that is compiled for the GPU: one *program* handles one block of queries of one head, and
# tensors inside it live in registers and shared memory. Without a GPU, `TRITON_INTERPRET=1` runs the same source
# with numpy, slowly; it must be set before a kernel is decorated.

# %%
triton_here = importlib.util.find_spec("triton") is not None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if not triton_here:  # macOS, Windows: read the kernel here, run it elsewhere
    from unittest.mock import MagicMock

    sys.modules.update({"triton": MagicMock(), "triton.language": MagicMock()})

# %%
#| export kernels/flash_attention
"""Flash attention, forward (Dao et al., 2022; Dao, 2023): causal, sliding window, grouped queries; layout (B, T, H, D).

Keys come in tiles, scores stay on the chip, tiles that a window hides are never visited. Needs torch and triton only.
"""

import re

import torch
import triton
import triton.language as tl

INTERPRETING = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy instead of a GPU
HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = 1.4426950408889634  # exponentials are base 2: it is what the hardware has

# %% [markdown]
# First the step you know: one tile of keys after another, running maximum, rescaling. Two details. Rows at
# the left edge of a window may see nothing of a tile; their maximum is still −∞, and −∞ − (−∞) is not a number, hence
# `reference`. And `MASKED` is a compile-time constant: inner tiles are compiled without the comparison.

# %%
#| export kernels/flash_attention
@triton.jit
def visit_tiles(acc, total, top, q, k_head, v_head, k_stride, v_stride, rows, first, end, T, window, scale,
                D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Update acc (M, D), running sum and maximum (M,) with the key tiles of [first, end)."""
    dims = tl.arange(0, D)
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = k_head + keys[None, :] * k_stride + dims[:, None]  # (D, N): already transposed
        v_tile = v_head + keys[:, None] * v_stride + dims[None, :]  # (N, D)
        if MASKED:
            k = tl.load(k_tile, mask=keys[None, :] < T, other=0.0)
            v = tl.load(v_tile, mask=keys[:, None] < T, other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        scores = tl.dot(q, k, input_precision="tf32x3") * scale  # (M, N) float32, in units of log 2
        if MASKED:
            distance = rows[:, None] - keys[None, :]
            seen = (distance >= 0) & (distance <= window) & (keys[None, :] < T)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(top - reference)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="tf32x3")
        top = new_top
    return acc, total, top

# %% [markdown]
# Then the program around it. The visited keys fall into three stretches: the window's left edge (masked), the middle
# (no mask), the diagonal (masked). `head // group` is all there is to grouped queries: no copy of the keys is made.

# %%
#| export kernels/flash_attention
@triton.jit
def forward_kernel(q, k, v, out, lse, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                   out_batch, out_token, out_head, T, H, group, window, scale,
                   D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One block of BLOCK_M queries of one head: `out` (B, T, H, D), natural logsumexp `lse` (B, H, T) float32."""
    blocks = tl.num_programs(0)
    start = (blocks - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows first, so that no straggler comes last
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    kv_head = head // group
    rows = start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    inside = rows[:, None] < T
    q_start = q + batch * q_batch + head * q_head
    q_block = tl.load(q_start + rows[:, None] * q_token + dims[None, :], mask=inside, other=0.0)
    k_start = k + batch * k_batch + kv_head * k_head
    v_start = v + batch * v_batch + kv_head * v_head

    first = tl.maximum(start - window, 0) // BLOCK_N * BLOCK_N
    diagonal = start // BLOCK_N * BLOCK_N  # tiles before it hold only keys that every row has passed
    whole = (tl.maximum(start + BLOCK_M - 1 - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N  # …that the last row sees
    whole = tl.minimum(tl.maximum(whole, first), diagonal)
    end = tl.minimum(start + BLOCK_M, T)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, top = visit_tiles(acc, total, top, q_block, k_start, v_start, k_token, v_token, rows, first, whole,
                                  T, window, scale, D, BLOCK_N, True)
    acc, total, top = visit_tiles(acc, total, top, q_block, k_start, v_start, k_token, v_token, rows, whole, diagonal,
                                  T, window, scale, D, BLOCK_N, False)
    acc, total, top = visit_tiles(acc, total, top, q_block, k_start, v_start, k_token, v_token, rows, diagonal, end,
                                  T, window, scale, D, BLOCK_N, True)

    total = tl.where(rows < T, total, 1.0)
    top = tl.where(rows < T, top, 0.0)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + batch * out_batch + head * out_head + rows[:, None] * out_token + dims[None, :], result, mask=inside)
    tl.store(lse + tl.program_id(1).to(tl.int64) * T + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=rows < T)

# %%
#| export kernels/flash_attention
def block_sizes(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch settings: large tiles for two-byte numbers, which go to the tensor cores."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2)
    return dict(BLOCK_M=128, BLOCK_N=64, num_warps=8 if head_dim == 128 else 4, num_stages=3)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None,
                    out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of q (B, T, H, D) to k, v (B, T, KVH, D), any strides: output like q, and logsumexp (B, H, T).

    A query sees itself and `window` keys before it (None: all). No gradient. Other shapes or dtypes: ValueError.
    """
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.size(3) != D or H % k.size(2):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if D not in HEAD_DIMS or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"head dimension {D}, dtype {q.dtype}: the kernel takes {HEAD_DIMS} and one of {DTYPES}")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if INTERPRETING and q.dtype == torch.bfloat16:  # the interpreter is silently wrong in bfloat16
        result, lse = flash_attention(q.float(), k.float(), v.float(), window)
        return out.copy_(result), lse
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    sizes = block_sizes(D, q.dtype)
    grid = (triton.cdiv(T, sizes["BLOCK_M"]), B * H)
    seen = T if window is None else min(window, T)
    forward_kernel[grid](q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                         T, H, H // k.size(2), seen, LOG2E / D**0.5, D=D, **sizes)
    return out, lse


def compile_cases(capability: int):
    """What `compile_check` builds: (label, kernel, types, constants, options) of every way the kernels are launched."""
    for dtype, kind, dims in ((torch.bfloat16, "bf16", HEAD_DIMS), (torch.float32, "fp32", (64,))):
        for D in dims:
            sizes = block_sizes(D, dtype)
            options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
            types = {name: f"*{kind}" for name in ("q", "k", "v", "out")} | {"lse": "*fp32", "scale": "fp32"}
            types |= {name: "i32:16" for name in forward_kernel.arg_names if re.match("[qkv]_|out_", name)}
            yield f"forward {kind} D={D}", forward_kernel, types, {"D": D, **sizes}, options

# %% [markdown]
# Run it on a length that is no multiple of any tile, four query heads on two key heads, a window, and compare
# with the formula. The last line proves that hidden tiles are not visited: their values are not-a-number, and a
# weight of zero would not have saved us (0 · NaN is NaN).

# %%
if triton_here:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, 301, heads, 32, device=device) for heads in (4, 2, 2))
    for window in (None, 0, 70):
        result, _ = flash_attention(q, k, v, window)
        torch.testing.assert_close(result, reference_attention(q, k, v, window), rtol=1e-4, atol=1e-5)
    v[:, :128] = torch.nan
    result, _ = flash_attention(q, k, v, window=40)
    assert result[:, 256:].isfinite().all()  # the last block starts at 256 and sees keys from 216 on

# %% [markdown]
# ## What the compiler made of it
#
# A kernel that is right can still be slow for a reason that no test of numbers shows: a program's tensors need more
# registers than a thread has (255), and the rest *spills* to memory; or its tiles need more shared memory than the chip
# has, and it does not start at all. The compiler says both, and it needs no GPU to do so: `compile_check`
# builds every kernel as it is launched, for three generations of chips, and reads the machine code's own numbers.

# %%
#| export kernels/compile_check
#| cli compile_check
"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory on sm_80, sm_90 and sm_100.

    python -m nanochat_lib.kernels.compile_check                       # every kernel of nanochat_lib/kernels
    python -m nanochat_lib.kernels.compile_check --modules flash_attention --chips 90 --json build/kernels.json

Fails if a kernel spills registers to memory or wants more shared memory than the chip has.
"""

import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_lib.common import NanochatError, run_cli, write_json

CHIPS = {80: 163, 90: 227, 100: 227}  # compute capability × 10 → KiB of shared memory that one block may have


def modules() -> list[str]:
    """Modules beside this one that say what they launch, by a function compile_cases(capability)."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if "\ndef compile_cases(" in path.read_text())


def build(kernel, types: dict, constants: dict, options: dict, capability: int):
    """Compile a kernel as it is launched: an argument without a type is "i32", "i32:16" is divisible by 16, pointers are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    while not hasattr(kernel, "cache_key"):  # inside an autotuner or a heuristic
        kernel = kernel.fn
    if unknown := {*types, *constants} - set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds.values()) if kind[0] == "*" or ":16" in kind}
    source = ASTSource(kernel, {name: kind.removesuffix(":16") for name, kind in kinds.items()}, constants, aligned)
    return compile(source, GPUTarget("cuda", capability, 32), options)


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
    cases = importlib.import_module(f"nanochat_lib.kernels.{module}").compile_cases(capability)
    label, kernel, types, constants, options = list(cases)[index]
    row = {"module": module, "case": label, "sm": capability, "fault": ""}
    try:
        compiled = build(kernel, types, constants, options, capability)
    except Exception as error:  # the compiler's own words are the finding
        return row | {"fault": f"does not compile: {(str(error).splitlines() or [repr(error)])[0]}"}
    row |= resources(compiled.asm["cubin"]) | {"shared_kib": round(compiled.metadata.shared / 1024, 1),
                                               "warps": compiled.metadata.num_warps}
    if row["spilled_bytes"]:
        row["fault"] = f"spills {row['spilled_bytes']} bytes a thread: give it more warps or smaller tiles"
    elif row["shared_kib"] > CHIPS[capability]:
        row["fault"] = f"more shared memory than the {CHIPS[capability]} KiB of sm_{capability}: fewer stages or smaller tiles"
    return row


def check(names: list[str], chips: list[int], jobs: int | None = None) -> list[dict]:
    """Rows for all cases of these modules on these chips, compiled in `jobs` fresh processes (default: one per core)."""
    work = [(name, index, capability) for name in names for capability in chips
            for index in range(len(list(importlib.import_module(f"nanochat_lib.kernels.{name}").compile_cases(capability))))]
    with ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(report, *zip(*work)))


def table(rows: list[dict]) -> str:
    """The rows as text, faults behind them."""
    lines = [f"{'kernel':34} {'chip':>6} {'registers':>9} {'spilled':>8} {'shared KiB':>11} {'of':>4} {'warps':>6}"]
    for row in rows:
        lines.append(f"{row['module'] + ': ' + row['case']:34} {'sm_' + str(row['sm']):>6} {row.get('registers', '-'):>9} "
                     f"{row.get('spilled_bytes', '-'):>8} {row.get('shared_kib', '-'):>11} {CHIPS[row['sm']]:>4} "
                     f"{row.get('warps', '-'):>6}  {row['fault']}".rstrip())
    return "\n".join(lines)


@dataclass
class Settings:
    """What to compile."""

    modules: list[str] = field(default_factory=modules)  # of nanochat_lib/kernels
    chips: list[int] = field(default_factory=lambda: list(CHIPS))  # compute capability × 10
    json: Path | None = None  # write the rows there too
    jobs: int | None = None  # processes; default: one per core


def compile_check(settings: Settings) -> None:
    """Compile every kernel, print what it takes, and fail on a spill or on too much shared memory."""
    for what, asked, have in (("module", settings.modules, modules()), ("chip", settings.chips, CHIPS)):
        if unknown := [str(value) for value in asked if value not in have]:
            raise NanochatError(f"no kernels for {what} {', '.join(unknown)}: choose from {', '.join(map(str, have))}")
    if importlib.util.find_spec("triton") is None:
        raise NanochatError("Triton is not installed, and only Linux has it: there, pip install triton")
    rows = check(settings.modules, settings.chips, settings.jobs)
    print(table(rows))
    if settings.json:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.json, rows)
    if bad := sum(bool(row["fault"]) for row in rows):
        raise NanochatError(f"{bad} of {len(rows)} kernels cannot stay as they are: choose other sizes in their module")

# %%
if not triton_here:
    del sys.modules["triton"], sys.modules["triton.language"]

# %% [markdown]
# ## The same idea on a CPU
#
# A CPU has caches instead of shared memory, and PyTorch's `scaled_dot_product_attention` already tiles for them. It
# knows "causal" but no window; a mask would hide the far keys and still do their work. So cut the *queries*
# into blocks and hand each only the keys that it can see.

# %%
#| export
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's fused attention in our layout; without a mask it is causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
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
# the formula are fast as they stand, block by block. Their gradient we write ourselves, with the same blocks: with
# weights $p$ and $dp = do\,v^\top$, the softmax gives $ds = p\,(dp - \sum p\,dp)$, and three more products give $dq$,
# $dk$, $dv$.

# %%
#| export
class BandAttention(torch.autograd.Function):
    """Windowed attention as batched products over cache-sized blocks; keeps the weights (T · window) for backward."""

    BLOCK, CHUNK = 64, 1 << 17  # queries a block; scores a chunk and thread (512 KiB in float32, half an L2 cache)

    @staticmethod
    def heads(x: torch.Tensor, H: int) -> torch.Tensor:
        """(b, T, h, D) → contiguous (b · H, T, D), each key head repeated for its group of queries."""
        return x.transpose(1, 2).repeat_interleave(H // x.size(2), dim=1).reshape(-1, x.size(1), x.size(3))

    @staticmethod
    def forward(ctx, q, k, v, window):
        (B, T, H, D), block = q.shape, BandAttention.BLOCK
        t = torch.arange(T)
        ranges = [(start, min(start + block, T), max(0, start - window)) for start in range(0, T, block)]
        bias = [torch.zeros(end - start, end - first, dtype=q.dtype).masked_fill_(
            ~visible(t[start:end], t[first:end], window), -torch.inf) for start, end, first in ranges]
        rows = max(1, BandAttention.CHUNK * torch.get_num_threads() // (H * block * (window + block)))
        out, kept = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for row in range(0, B, rows):
            qs, ks, vs = (BandAttention.heads(x[row:row + rows], H) for x in (q, k, v))
            result = torch.empty_like(qs)
            for (start, end, first), hide in zip(ranges, bias):
                scores = torch.baddbmm(hide, qs[:, start:end], ks[:, first:end].transpose(1, 2), alpha=D**-0.5)
                weights = scores.softmax(-1)
                torch.bmm(weights, vs[:, first:end], out=result[:, start:end])
                if any(ctx.needs_input_grad):
                    kept.append(weights)
            out[row:row + rows] = result.view(-1, H, T, D).transpose(1, 2)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.rows, ctx.ranges = rows, ranges
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        (B, T, H, D), group, kept = q.shape, q.size(2) // k.size(2), iter(kept)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for row in range(0, B, ctx.rows):
            qs, ks, vs, gs = (BandAttention.heads(x[row:row + ctx.rows], H) for x in (q, k, v, grad))
            dqs, dks, dvs = torch.empty_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
            for start, end, first in ctx.ranges:
                p = next(kept)
                dvs[:, first:end] += torch.bmm(p.transpose(1, 2), gs[:, start:end])
                dp = torch.bmm(gs[:, start:end], vs[:, first:end].transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                torch.bmm(ds, ks[:, first:end], out=dqs[:, start:end])
                dks[:, first:end] += torch.bmm(ds.transpose(1, 2), qs[:, start:end])
            dq[row:row + ctx.rows] = dqs.mul_(D**-0.5).view(-1, H, T, D).transpose(1, 2)
            for total, part in ((dk, dks.mul_(D**-0.5)), (dv, dvs)):  # a key head gathers from all queries of its group
                total[row:row + ctx.rows] = part.view(-1, H // group, group, T, D).sum(2).transpose(1, 2)
        return dq, dk, dv, None

# %% [markdown]
# ## Choosing
#
# Nobody should have to know all this to call `attention(q, k, v, window)`. It picks: on a CPU the ways above; on a
# GPU PyTorch's fused kernel for full layers, and for windows FlexAttention, which compiles a kernel that skips hidden
# tiles, in training, and our own kernel where no gradient is asked for. `NANOCHAT_ATTENTION` overrules; whatever a
# machine lacks, it says in one line and takes the next best way.

# %%
#| export
CHOICES = ("reference", "sdpa", "flex", "triton")
FAILED: set[str] = set()  # ways that raised on this machine
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


@torch.compiler.assume_constant_result
def on_ampere() -> bool:
    """Whether the GPU in use is of compute capability 8.0 or later."""
    return torch.cuda.get_device_capability() >= (8, 0)


def lacks(way: str, q: torch.Tensor) -> str:
    """Why `way` ("flex" or "triton") cannot serve q here; "" if it can."""
    if way in FAILED:
        return "it failed before"
    if not HAVE_TRITON:
        return "Triton is not installed"
    if not (q.is_cuda and on_ampere()) and (way == "flex" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "it needs a CUDA GPU of compute capability 8.0 or later"
    if q.size(3) not in (32, 64, 128):
        return f"head dimension {q.size(3)} is none of 32, 64, 128"
    if way == "triton" and torch.is_grad_enabled() and q.requires_grad:
        return "our kernel has no backward pass"
    return ""

# %%
#| export
def backend(q: torch.Tensor, window: int | None = None) -> str:
    """The way `attention` takes for q (B, T, H, D).

    "reference", "sdpa" (full layers, or a mask), "blocks" or "band" (windows on a CPU), "flex" or "triton".
    """
    B, T, H, _ = q.shape
    full, want = window is None or window >= T - 1, wanted()
    if want == "reference":
        return want
    if want in ("flex", "triton"):
        if not (reason := lacks(want, q)):
            return want
        notice(f"{want} not used: {reason}")
    if full:
        return "sdpa"
    if q.device.type == "cpu":
        if want == "sdpa" or torch.compiler.is_compiling() or q.dtype not in (torch.float32, torch.float64):
            return "blocks"
        kept = B * H * T * (window + BandAttention.BLOCK) * q.element_size()
        return "band" if T > 2 * window and kept <= 1 << 28 else "blocks"
    if want == "sdpa" or q.device.type != "cuda":
        return "sdpa"
    training = (torch.is_grad_enabled() and q.requires_grad) or torch.compiler.is_compiling()
    way = "flex" if training else "triton"
    return "sdpa" if lacks(way, q) else way


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Causal attention of q (B, T, H, D) to k, v (B, T, KVH, D); H is a multiple of KVH. Returns (B, T, H, D).

    A query sees itself and the `window` keys before it; None, or window ≥ T − 1, is all of them. Differentiable.
    """
    full = window is None or window >= q.size(1) - 1
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
        except Exception as error:  # no compiler, a driver too old…: the run goes on
            FAILED.add(way)
            notice(f"{way} failed, going on with sdpa: {(str(error).splitlines() or [repr(error)])[0]}")
    if full:
        return sdpa(q, k, v)
    positions = torch.arange(q.size(1), device=q.device)
    return sdpa(q, k, v, visible(positions, positions, window))

# %%
#| export
def triton_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Our kernel; no gradient."""
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
# ## Decoding
#
# In a chat the queries come one at a time, and keys and values of all earlier tokens lie in a cache. Rows have
# different lengths, so each has its own mask. There is little to compute and much to read: each new token rereads its
# row's cache, and the time is the cache's size over the memory's speed. That is what grouped queries and windows
# shrink.

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
    if wanted() == "reference":
        return reference_attention(q, k, v, window, lengths)
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
# ## Exercises
#
# In [03_attention](../exercises/03_attention.ipynb):
#
# 1. **Softmax in one pass** — the running maximum and the rescaling, by hand.
# 2. **The window's tiles** — which tiles a block of queries visits, and which need a mask.
# 3. **Attention** — causal, windowed, grouped: the function that the next lessons call.
#
# **Next:** [04 · The model](04_gpt.ipynb), which needs this function once a layer.
