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
# # 04 · GPT
#
# *What is the model?* — 40 minutes, less than one of them computing.
#
# Token ids go in, and for every position one number per token of the vocabulary comes out: how likely that token is
# next. In between lie a table of vectors, a stack of blocks that each add something to those vectors, and a table to
# read the answer from. This is GPT; what differs from the model of 2019 are a dozen details, taken from nanochat, which
# kept what lowered the loss in the same time. This lesson says each in a sentence, then in code.

# %%
#| default_exp gpt

# %%
import matplotlib.pyplot as plt

# %% [markdown]
# ## Two formulas, and their gradients
#
# Matrix products keep a processor busy; all else keeps its memory busy. A formula such as RMS norm, written as
# square, mean, root, divide, walks over all activations once per step, and autograd walks over them again and keeps
# what each step saw. For the two formulas that cost most we write the gradient by hand. On a GPU `torch.compile`
# and built-in kernels do the same work, so there the plain formula stays.

# %%
#| export fused
"""Formulas that are all memory traffic, with gradients by hand: norm, relu squared; and the softcap."""


import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def by_hand(x: Tensor) -> bool:
    """True where our gradients beat autograd's: training on the CPU, unless a compiler fuses the plain formula."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()

# %% [markdown]
# **Norm.** A vector is divided by the root of its mean square; there are no learned weights, since the matrix that
# reads the result can hold them. With $n$ channels, $r = \sqrt{\overline{x^2} + ε}$ and $y = s\,x/r$, a gradient $g$
# loses its part along $y$ and is scaled: $\partial x = \frac{s}{r}\left(g - y\,\frac{g\cdot y}{n s^2}\right)$. Only
# $y$ must be kept, and the next matrix keeps it anyway.

# %%
#| export fused
def norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """RMS norm over the last dimension, without weights, times scale (arXiv 1910.07467)."""
    if by_hand(x):
        return Norm.apply(x, scale)
    y = F.rms_norm(x, (x.size(-1),))
    return y if scale == 1 else scale * y


class Norm(Function):
    """scale · x / √(mean x² + eps)"""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = length.square_().div_(x.size(-1)).add_(torch.finfo(x.dtype).eps).rsqrt_().mul_(scale)
        y = (x * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, inverse = ctx.saved_tensors
        along = (grad * y).sum(-1, keepdim=True, dtype=inverse.dtype) / (-y.size(-1) * ctx.scale**2)
        return (torch.addcmul(grad, y, along.to(y.dtype)) * inverse).to(y.dtype), None

# %%
x = torch.tensor([[3.0, 4.0]])
print(norm(x), "mean square", round(norm(x).square().mean().item(), 4))
assert torch.autograd.gradcheck(norm, torch.randn(4, 6, dtype=torch.float64, requires_grad=True))

# %% [markdown]
# **Relu squared.** The simplest non-linearity that still lets a unit multiply: zero below zero, x² above. It did as
# well as costlier gates in a search over architectures (Primer).

# %%
#| export fused
def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (arXiv 2109.08668)."""
    return SquaredRelu.apply(x) if by_hand(x) else F.relu(x).square()


class SquaredRelu(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = F.relu(x)
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # zero where the gradient is
        return (grad * x).mul_(2)

# %% [markdown]
# **Softcap.** The last matrix gives a number per token of the vocabulary, a logit. A tanh bends them to stay within
# ±15, so that no single token can run away. In training the logits are never seen as such: lesson 03's `head_loss` goes
# from the vectors to the loss, a few rows at a time, with the gradient on the way.

# %%
#| export fused
SOFTCAP = 15.0  # logits stay within ±15


def softcap(logits: Tensor) -> Tensor:
    """Logits in float32, bent to stay within ±SOFTCAP (arXiv 2408.00118)."""
    return SOFTCAP * torch.tanh(logits.float() / SOFTCAP)

# %%
logits = torch.linspace(-60, 60, 200)
fig, ax = plt.subplots(figsize=(5, 2.5))
_ = ax.plot(logits, softcap(logits))
_ = ax.plot(logits, logits, ":", color="gray")
_ = ax.set(xlabel="logit", ylabel="softcapped logit", ylim=(-20, 20))

# %% [markdown]
# ## Seven settings
#
# A model is fixed by seven settings. The window pattern is one of them: most layers look back only a quarter of the
# context, every fourth sees all of it, and so does the last. Far sight in a few layers is cheaper
# than in all.

# %%
#| export
"""The model: a transformer with rotary positions, windows, value embeddings, smear and backout."""


import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_lib.attention import attention, cached_attention
from nanochat_lib.common import NanochatError, compute_dtype
from nanochat_lib.fused import SOFTCAP, norm, softcap, squared_relu
from nanochat_lib.layers import SMEAR_CHANNELS, Linear, apply_rotary_emb, rotary_at, rotary_tables, smear
from nanochat_lib.loss import head_loss

VALUE_CHANNELS = 12  # a value gate looks at so many channels of a token
VOCAB_MULTIPLE = 64  # matrix units like round sizes

# %%
#| export
@dataclass
class GPTConfig:
    """The seven numbers that fix a model; wrong ones raise NanochatError."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise NanochatError(f"{name}={getattr(self, name)} makes no model: it must be at least 1")
        if self.n_embd % (2 * self.n_head) or self.n_embd < SMEAR_CHANNELS:
            raise NanochatError(f"n_embd={self.n_embd} does not give {self.n_head} heads of an even size: choose a "
                                f"multiple of {2 * self.n_head}, at least {SMEAR_CHANNELS}")
        if self.n_head % self.n_kv_head:
            allowed = ", ".join(str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0)
            raise NanochatError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}: choose {allowed}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise NanochatError(f"window_pattern={self.window_pattern!r} is not a pattern: use the letters S (short "
                                "window) and L (full context), for example SSSL")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

# %%
#| export
def window_sizes(config: GPTConfig) -> list[int]:
    """Keys before itself that a query sees, layer by layer: L the context, S a quarter of it in steps of 128."""
    size = {"L": config.sequence_len, "S": -(-config.sequence_len // (4 * 128)) * 128}
    pattern = config.window_pattern.upper()
    windows = [size[pattern[i % len(pattern)]] for i in range(config.n_layer)]
    return [*windows[:-1], size["L"]]


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every other layer has one, the last always."""
    return layer % 2 == (n_layer - 1) % 2

# %%
from nanochat_lib.attention import visible

windows = window_sizes(GPTConfig(sequence_len=1024, n_layer=4))
fig, axes = plt.subplots(1, 4, figsize=(10, 2.7), sharey=True)
for layer, (ax, window) in enumerate(zip(axes, windows)):
    _ = ax.imshow(visible(torch.arange(1024), torch.arange(1024), window), cmap="Blues", vmin=0, vmax=1.5)
    _ = ax.set(title=f"layer {layer}: window {window}", xlabel="key position (tokens)")
_ = axes[0].set(ylabel="query position (tokens)")

# %%
for wrong in (dict(window_pattern="SX"), dict(n_kv_head=4), dict(n_embd=700)):
    try:
        GPTConfig(**wrong)
    except NanochatError as error:
        print(error)

# %% [markdown]
# ## Where a token is
#
# Attention compares queries with keys and does not see their order. So each query and key is *rotated* by an angle
# that grows with its position: the pair of channels i and i + D/2 turns (clockwise) by position × base^(−2i/D)
# radians. A dot product of two rotated vectors depends on the difference of their positions only. The first pairs
# turn fast and tell neighbours apart, the last hardly turn and see distance.

# %%
#| export layers
"""The small parts of the model: rotary positions, matrices without bias, smear."""


from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_lib.common import NanochatError

ROPE_BASE = 100_000
SMEAR_CHANNELS = 24  # the smear gate looks at so many channels of a token


def rotary_tables(length: int, head_dim: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (length, head_dim / 2) float32."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROPE_BASE ** (-channels / head_dim))
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D) by its position's angle; cos, sin (1 or B, T, 1, D/2).

    y1 = x1·cos + x2·sin, y2 = −x1·sin + x2·cos (RoPE, arXiv 2104.09864), computed over whole heads: to read and write
    halves of rows is several times slower.
    """
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # (x2, x1)
    return torch.addcmul(x * torch.cat((cos, cos), dim=-1), swapped, torch.cat((sin, -sin), dim=-1))


def rotary_at(cos: Tensor, sin: Tensor, length: int, kv_cache: Any = None) -> tuple[Tensor, Tensor]:
    """The tables' rows for `length` tokens, from position 0 or behind each cached row: each (1 or B, T, 1, D/2)."""
    if kv_cache is not None:
        positions = kv_cache.lengths[:, None] + torch.arange(length, device=cos.device)
        return cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)
    if length > len(cos):
        raise NanochatError(f"{length} tokens are too many: this model reads at most {len(cos)}, ten times its context")
    return cos[None, :length, None], sin[None, :length, None]

# %%
cos, sin = rotary_at(*rotary_tables(64, 32), 64)
one = torch.zeros(1, 64, 1, 32)
one[..., :16] = 1  # the same vector at 64 positions: every pair points along its first axis
turned = apply_rotary_emb(one, cos, sin)[0, :, 0]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for pair in (0, 2, 4, 6):
    _ = left.plot(turned[:20, pair], turned[:20, pair + 16], ".-", label=f"pair {pair}")
_ = left.set(xlabel="channel i", ylabel="channel i + D/2", title="20 positions of four pairs", aspect="equal")
_ = left.legend(fontsize=7)
_ = right.plot(turned @ turned[40])
_ = right.set(xlabel="position (tokens)", ylabel="q · k", title="similarity to position 40")

q, k = torch.randn(2, 1, 1, 1, 32)
at = lambda x, position: apply_rotary_emb(x, cos[:, position, None], sin[:, position, None])
assert torch.isclose((at(q, 9) * at(k, 4)).sum(), (at(q, 29) * at(k, 24)).sum(), atol=1e-4)  # 5 apart, twice

# %% [markdown]
# ## What came just before
#
# One of the first things that attention learns is to look one token back. **Smear** does it for the price of 24
# weights: to each embedding it adds a part of the one before, as much as a gate says that looks at 24 channels.
#
# When tokens come one at a time (lesson 08), the one before is not in this call. A cache keeps, for each row, its last
# embedding (`previous`), its length so far (`lengths`) and its keys and values (`insert`); `counts` says how many of a
# padded call's tokens are real.

# %%
#| export layers
class Linear(nn.Linear):
    """A matrix without bias: its float32 weight is cast to the input's dtype in forward."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def smear(x: Tensor, gate: Linear, strength: Tensor, kv_cache: Any = None) -> Tensor:
    """Add to each token's embedding (B, T, C) a gated part of the one before it, if there is one."""
    if kv_cache is None:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
    else:
        before = torch.cat((previous_embedding(x, kv_cache).unsqueeze(1), x[:, :-1]), dim=1)
    return torch.addcmul(x, strength.to(x.dtype) * torch.sigmoid(gate(x[..., :SMEAR_CHANNELS])), before)


def previous_embedding(x: Tensor, kv_cache: Any) -> Tensor:
    """The embedding (B, C) before each row's first new one, zero in a fresh row; keeps this call's last ones of x."""
    before = torch.zeros_like(x[:, 0]) if kv_cache.previous is None else kv_cache.previous.to(x.dtype)
    before = torch.where(kv_cache.lengths.unsqueeze(1) > 0, before, 0)
    if kv_cache.counts is None:
        kv_cache.previous = x[:, -1]
    else:  # rows of several lengths, padded on the right
        last = x[torch.arange(len(x), device=x.device), (kv_cache.counts - 1).clamp(min=0)]
        kv_cache.previous = torch.where(kv_cache.counts.unsqueeze(1) > 0, last, before)
    return before

# %%
gate = Linear(SMEAR_CHANNELS, 1)
_ = nn.init.zeros_(gate.weight)  # σ(0) = ½
steps = torch.eye(4, 24)[None]  # four tokens, each a channel of its own
smear(steps, gate, torch.tensor([1.0]))[0, :, :4].tolist()

# %% [markdown]
# ## A block
#
# $x$, which every block reads and adds to, is the *residual stream*.
#
# **Attention.** Three matrices make queries, keys and values. With fewer key heads than query heads (`n_kv_head`),
# several queries share one key, and the cache of lesson 08 shrinks. Queries and keys are rotated, then *normed*, so
# that scores cannot grow without bound; 1.2 on both makes the softmax a little sharper.
#
# **Value embeddings.** Every other layer has a second table of vectors, one row per token, of which a gated part (0
# to 3 times) is added to the values. It costs memory and next to no arithmetic: a place to store what a token *is*.

# %%
#| export
class Attention(nn.Module):
    """Causal self-attention with grouped heads, rotary positions, normed queries and keys, value embeddings."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, window_sizes(config)[layer], config.head_dim
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if has_value_embedding(layer, config.n_layer):
            self.ve_gate = Linear(VALUE_CHANNELS, config.n_kv_head)

    def forward(self, x: Tensor, ve: Tensor | None, rotary: tuple[Tensor, Tensor], kv_cache: Any = None) -> Tensor:
        """x (B, T, C), ve (B, T, kv_dim) → (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_CHANNELS]))  # (B, T, n_kv_head), within 0 … 3
            v = torch.addcmul(v, gate.unsqueeze(-1), ve.view_as(v))
        q, k = (norm(apply_rotary_emb(heads, *rotary), 1.2) for heads in (q, k))  # 1.2 sharpens the softmax
        if kv_cache is None:
            y = attention(q, k, v, self.window)
        else:
            k, v = kv_cache.insert(self.layer, k, v)
            y = cached_attention(q, k, v, kv_cache.lengths, self.window)
        return self.c_proj(y.reshape(B, T, C))

# %% [markdown]
# **MLP.** Each token by itself: four times as wide, relu squared, back.

# %%
#| export
class MLP(nn.Module):
    """Four times wider, relu squared (arXiv 2109.08668), back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ve: Tensor | None, rotary: tuple[Tensor, Tensor], kv_cache: Any = None) -> Tensor:
        x = x + self.attn(norm(x), ve, rotary, kv_cache)
        return x + self.mlp(norm(x))

# %%
block = Block(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=64, sequence_len=256, window_pattern="L"), layer=0)
x = torch.randn(1, 256, 64)
rotary = rotary_at(*rotary_tables(256, 32), 256)
with torch.no_grad():
    other = torch.cat((x[:, :100], x[:, 100:] + 1), dim=1)  # the same up to position 100
    change = (block(x, None, rotary) - block(other, None, rotary)).abs().amax(-1)
print("changing tokens from 100 on changes position", change[0].nonzero()[0].item(), "and later, none before")

# %% [markdown]
# ## The model
#
# - Embed and norm; smear. The result, $x_0$, is kept.
# - Before each block the stream is mixed: $\lambda_i x + \mu_i x_0$, two learned numbers a layer (`resid_lambdas`,
#   `x0_lambdas`). Every block can
#   thus see the raw tokens.
# - **Backout**: what the stream was halfway is, in part, taken out again at the end. The first half may leave notes
#   for the second that should not reach the output.
# - Norm, last matrix, softcap.

# %%
#| export
class GPT(nn.Module):
    """The whole model. Call `init_weights` after construction, or use `build_model`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        rows, kv_dim = config.padded_vocab_size, config.n_kv_head * config.head_dim
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(rows, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        })
        self.lm_head = Linear(config.n_embd, rows)
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(rows, kv_dim) for layer in range(config.n_layer)
                                           if has_value_embedding(layer, config.n_layer)})
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.dtype = torch.float32  # of activations; init_weights asks the device
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache: Any = None,
                loss_reduction: str = "mean") -> Tensor:
        """Token ids (B, T) → logits (B, T, vocab_size) float32, or with targets (B, T) the loss in nats.

        Targets of -1 are ignored. loss_reduction: "mean" over the targets that count, "sum", or "none" → (B, T).
        With a kv_cache (nanochat_lib.engine.KVCache) the ids continue its rows.
        """
        x = self.hidden(idx, kv_cache)
        if targets is None:
            return self.logits(x)
        return head_loss(x, self.lm_head.weight, targets, self.config.vocab_size, SOFTCAP, loss_reduction)

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gave, (…, C) → logits (…, vocab_size) float32."""
        return softcap(F.linear(x, self.lm_head.weight[:self.config.vocab_size].to(x.dtype)))  # without the padding

    def hidden(self, idx: Tensor, kv_cache: Any = None) -> Tensor:
        """The normed residual stream (B, T, C) that lm_head reads."""
        rotary = rotary_at(self.cos, self.sin, idx.size(1), kv_cache)
        x = norm(self.transformer.wte(idx).to(self.dtype))
        x = x0 = smear(x, self.smear_gate, self.smear_lambda, kv_cache)
        for layer, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            ve = self.value_embeds[str(layer)](idx).to(self.dtype) if str(layer) in self.value_embeds else None
            x = block(x, ve, rotary, kv_cache)
            if layer == self.config.n_layer // 2:
                halfway = x
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        return norm(x - self.backout_lambda.to(x.dtype) * halfway)

    def init_weights(self) -> None:
        """Fill every parameter from the global generator, and choose the dtype of the device they are on."""
        init_weights(self)

    def setup_optimizer(self, unembedding_lr: float = 0.008, embedding_lr: float = 0.3, matrix_lr: float = 0.02,
                        weight_decay: float = 0.0, scalar_lr: float = 0.5) -> torch.optim.Optimizer:
        """Muon for the matrices of the blocks, AdamW for the rest (lesson 05)."""
        from nanochat_lib.optim import MuonAdamW, parameter_groups

        return MuonAdamW(parameter_groups(self, unembedding_lr=unembedding_lr, embedding_lr=embedding_lr,
                                          matrix_lr=matrix_lr, weight_decay=weight_decay, scalar_lr=scalar_lr))

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_scaling_params(self) -> dict[str, int]:
        """Parameters by part; scaling laws count transformer_matrices + lm_head."""
        return num_scaling_params(self)

    def estimate_flops(self) -> int:
        """Floating-point operations of a training step per token, forward and backward."""
        return estimate_flops(self)

    def generate(self, tokens: Sequence[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[int]:
        """Yield max_tokens tokens after `tokens`, reading the whole prefix again for each: the slow reference."""
        return generate(self, tokens, max_tokens, temperature, top_k, seed)

# %% [markdown]
# ## First weights
#
# Both matrices that write into the stream start at zero, so that every block starts as "add nothing"; the last matrix
# starts near zero, so that all tokens are equally likely. A fresh model's loss is therefore known in advance: $\ln
# V$.
#
# The model is laid out on the meta device, where tensors have shapes and no memory, and filled where it will live.

# %%
#| export
@torch.no_grad()
def init_weights(model: GPT) -> None:
    """Fill every parameter of the model from the global generator, and its rotary tables."""
    config, width = model.config, math.sqrt(3 / model.config.n_embd)  # a uniform ±√3/√n has the spread 1/√n
    nn.init.normal_(model.transformer.wte.weight, std=0.8)
    nn.init.normal_(model.lm_head.weight, std=0.001)  # near zero: the first guess is "all tokens alike"
    for block in model.transformer.h:
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
            nn.init.uniform_(linear.weight, -width, width)
        nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * width, 0.4 * width)
        nn.init.zeros_(block.attn.c_proj.weight)  # a new block adds nothing
        nn.init.zeros_(block.mlp.c_proj.weight)
        if hasattr(block.attn, "ve_gate"):
            nn.init.uniform_(block.attn.ve_gate.weight, 0, 0.02)
    for embedding in model.value_embeds.values():
        nn.init.uniform_(embedding.weight, -width, width)
    nn.init.uniform_(model.smear_gate.weight, 0, 0.02)
    model.resid_lambdas.copy_(torch.linspace(1.15, 1.05, config.n_layer))
    model.x0_lambdas.copy_(torch.linspace(0.20, 0.05, config.n_layer))
    model.smear_lambda.fill_(0.0)
    model.backout_lambda.fill_(0.2)

    device = model.lm_head.weight.device
    model.dtype = compute_dtype(device)
    stored = torch.float32 if model.dtype == torch.float16 else model.dtype  # float16 is too coarse to be updated
    for embedding in (model.transformer.wte, *model.value_embeds.values()):
        embedding.to(stored)
    tables = rotary_tables(10 * config.sequence_len, config.head_dim, device)  # an answer may run past the context
    model.cos, model.sin = (table.to(model.dtype) for table in tables)

# %%
#| export
def build_model(config: GPTConfig, device: torch.device | str) -> GPT:
    """A model with fresh weights: laid out on the meta device, which takes no memory, and filled where it will live."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model

# %%
config = GPTConfig(sequence_len=256, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
_ = torch.manual_seed(0)
model = build_model(config, "cpu")
ids = torch.randint(0, 1024, (2, 257))
loss = model(ids[:, :-1], ids[:, 1:])
print(f"loss {loss.item():.3f}, ln V = {math.log(1024):.3f}")
assert abs(loss.item() - math.log(1024)) < 0.01

# %% [markdown]
# ## How much of everything
#
# Two numbers follow from a model and rule a whole run (lesson 07): its parameters, and the floating-point operations
# a token costs. Each weight of a matrix takes part in one multiplication and one addition forward and twice that
# backward: 6 per token. Attention adds, per layer, 12 for each of the channels of its heads and each key it may see.

# %%
#| export

def num_scaling_params(model: GPT) -> dict[str, int]:
    """See GPT.num_scaling_params."""
    counts = {
        "wte": model.transformer.wte.weight.numel(),
        "value_embeds": sum(parameter.numel() for parameter in model.value_embeds.parameters()),
        "lm_head": model.lm_head.weight.numel(),
        "transformer_matrices": sum(parameter.numel() for parameter in model.transformer.h.parameters()),
    }
    total = model.num_parameters()
    return {**counts, "scalars": total - sum(counts.values()), "total": total}


def estimate_flops(model: GPT) -> int:
    """See GPT.estimate_flops."""
    config = model.config
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    keys = sum(min(window, config.sequence_len) for window in window_sizes(config))
    return 6 * matrices + 12 * config.n_head * config.head_dim * keys

# %%
fig, ax = plt.subplots(figsize=(8, 3))
for depth in (4, 8, 12, 16, 20):
    with torch.device("meta"):
        sized = GPT(GPTConfig(n_layer=depth, n_head=depth // 2, n_kv_head=depth // 2, n_embd=64 * depth))
    bottom = 0
    for part, colour in zip(("transformer_matrices", "lm_head", "wte", "value_embeds"), ("C0", "C1", "C2", "C3")):
        millions = sized.num_scaling_params()[part] / 1e6
        _ = ax.bar(depth, millions, 2.5, bottom, color=colour, label=part if depth == 4 else None)
        bottom += millions
    print(f"depth {depth:2}: {sized.num_parameters() / 1e6:6.1f} M parameters, "
          f"{sized.estimate_flops() / 1e9:5.2f} GFLOPs a token")
_ = ax.set(xlabel="depth (layers)", ylabel="parameters (millions)", xticks=(4, 8, 12, 16, 20))
_ = ax.legend(fontsize=8)

# %% [markdown]
# ## Where the time and the bytes of a step go
#
# Time follows from arithmetic where matrices are multiplied, and from bytes everywhere else. In a small model with a
# large vocabulary the last matrix is most of the arithmetic; the deeper the model, the more the blocks are. Bytes are
# what autograd keeps for the way back. Below: for 2,048 tokens, written plainly and as this library has it.
# A norm keeps its result, which the next matrix keeps anyway, and not its input too. Attention never keeps the weights
# of all pairs of tokens. And the loss, which plainly keeps its logits several times over in float32, keeps the
# gradients of its inputs.

# %%
def kept_bytes(function, *inputs):
    """Bytes that autograd keeps for the way back through function(*inputs), without the inputs (or views of them)."""
    kept, given = {}, {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    del result
    return sum(kept.values())


def plain_norm_and_matrix(x, weight):
    x = x * 1  # what came before
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ weight.T


def plain_head(x, weight, targets):
    return F.cross_entropy(15 * torch.tanh(F.linear(x, weight).float() / 15), targets)


def plain_attention(q, k, v):
    q, k, v = q * 1, k * 1, v * 1  # what came before
    weights = (q @ k.mT).masked_fill(~visible(torch.arange(512), torch.arange(512), 128), -math.inf).softmax(-1)
    return weights @ v


x = torch.randn(2048, 256, requires_grad=True)
qkv = [torch.randn(4, 2, 512, 128, requires_grad=True) for _ in range(3)]
weight, targets = torch.randn(32768, 256, requires_grad=True), torch.randint(0, 32768, (2048,))
square = torch.randn(256, 256, requires_grad=True)
rows = {"norm and a matrix": (plain_norm_and_matrix, lambda x, matrix: norm(x * 1) @ matrix.T, [x, square]),
        "attention": (plain_attention, lambda *qkv: attention(*[(x * 1).transpose(1, 2) for x in qkv], 128), qkv),
        "softcap and loss": (plain_head, head_loss, [x, weight, targets])}
megabytes = {name: [kept_bytes(function, *inputs) / 1e6 for function in pair] for name, (*pair, inputs) in rows.items()}
for name, (plain, ours) in megabytes.items():
    print(f"{name:18} plain {plain:6.1f} MB, ours {ours:5.1f} MB")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
for place, (depth, vocabulary) in enumerate(((4, 1024), (4, 32768), (12, 32768), (24, 32768))):
    width, context = 64 * depth, 2048 if depth > 4 else 512
    windows = window_sizes(GPTConfig(context, vocabulary, depth, depth // 2, depth // 2, width))
    parts = {"attention's matrices": 6 * depth * 4 * width**2, "MLP": 6 * depth * 8 * width**2,
             "scores and sums": 12 * width * sum(min(window, context) for window in windows),
             "last matrix": 6 * width * vocabulary}
    bottom = 0
    for number, (name, flops) in enumerate(parts.items()):
        share = flops / sum(parts.values())
        _ = left.barh(place, share, left=bottom, color=f"C{number}", label=name if place == 0 else None)
        bottom += share
_ = left.set(yticks=range(4), yticklabels=("depth 4, vocabulary 1,024", "depth 4, 32,768",
                                           "depth 12, 32,768", "depth 24, 32,768"),
             xlabel="share of a step's arithmetic", xlim=(0, 1))
left.invert_yaxis()
_ = left.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1))
for number, label in enumerate(("plain", "ours")):
    _ = right.bar([place + 0.4 * number for place in range(len(megabytes))],
                  [pair[number] for pair in megabytes.values()], 0.4, label=label)
_ = right.set(xticks=[place + 0.2 for place in range(len(megabytes))], xticklabels=list(megabytes), yscale="log",
              ylabel="kept for the way back (MB)")
_ = right.legend()

# %% [markdown]
# What is left is arithmetic: matrix products, forward once and backward twice. Those get cheaper only with fewer bits a
# number: 16 where the processor multiplies them faster, on GPUs since 2020 and some CPUs since 2022, and 8. (What did
# not help, on an H200: queries, keys and values as one product instead of three, 597,000 tokens a second either way.)

# %% [markdown]
# ## Reading on
#
# To write, the model reads all there is, picks the next token, and reads again. Lesson 08 replaces this by a cache;
# here is the plain version it will be held against.

# %%
#| export
@torch.inference_mode()
def generate(model: GPT, tokens: Sequence[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             seed: int = 42) -> Iterator[int]:
    """See GPT.generate. Temperature 0 takes the likeliest token."""
    if not len(tokens):
        raise NanochatError("nothing to continue: give at least one token, for example <|bos|>")
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([list(tokens)], device=device)
    for _ in range(max_tokens):
        logits = model(ids)[:, -1]  # (1, vocab)
        if top_k:
            kept = logits.topk(min(top_k, logits.size(-1))).values
            logits[logits < kept[:, -1:]] = -math.inf
        if temperature > 0:
            token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        yield token.item()

# %%
assert list(model.generate([1, 2, 3], 5, temperature=0)) == list(model.generate([1, 2, 3], 5, top_k=1))
try:
    next(model.generate([], 1))
except NanochatError as error:
    print(error)

# %% [markdown]
# ## Eight bits
#
# Hopper's matrix units multiply 8-bit floats twice as fast as 16-bit ones. Two formats share the eight bits
# differently: **e4m3** has three bits of fraction and ends at 448, **e5m2** has two and ends at 57,344. Activations
# and weights need the digits, gradients need the range. So that nothing overflows and little sinks below the smallest
# step, each tensor is first divided by a scale of its own, its largest entry over the format's (*tensorwise*;
# Micikevicius et al., arXiv 2209.05433), and the product is multiplied by both scales.

# %%
#| export fp8
"""Matrix products in 8-bit floats, forward and backward, one scale a tensor (arXiv 2209.05433)."""


import torch
from torch import Tensor, nn
from torch.autograd import Function

from nanochat_lib.common import NanochatError
from nanochat_lib.layers import Linear

MULTIPLE, SMALLEST = 16, 128  # the hardware's step; smaller matrices lose more to scaling than they gain


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in an 8-bit dtype, scale): a float32 scale that brings the largest entry to the format's largest."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).to(dtype), scale


def columns(x: Tensor) -> Tensor:
    """The same matrix laid out column by column, as the hardware reads a second factor."""
    return x.t().contiguous().t()


class Fp8Product(Function):
    """x (N, inputs) @ weight (outputs, inputs)ᵀ with 8-bit factors; what backward needs is kept in 8 bits too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = to_fp8(x, torch.float8_e4m3fn)
        weight8, weight_scale = to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return torch._scaled_mm(x8, weight8.t(), x_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, grad_scale = to_fp8(grad, torch.float8_e5m2)
        by_x = torch._scaled_mm(grad8, columns(weight8), grad_scale, weight_scale, out_dtype=ctx.dtypes[0])
        by_weight = torch._scaled_mm(grad8.t().contiguous(), columns(x8), grad_scale, x_scale, out_dtype=ctx.dtypes[1])
        return by_x, by_weight

# %%
#| export fp8
class Fp8Linear(Linear):
    """A Linear whose products are 8-bit while it trains; in eval mode, or for rows the hardware can't, as before."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if not self.training or len(rows) % MULTIPLE:
            return super().forward(x)
        return Fp8Product.apply(rows, self.weight).view(*x.shape[:-1], -1)


def convert_to_fp8(model: nn.Module) -> list[str]:
    """Make every Linear of the blocks that is wide enough an Fp8Linear, in place; returns their names.

    Names and weights stay, so checkpoints and optimizer do not notice. The last matrix is part of the fused loss and
    stays as it is. Raises NanochatError if nothing is wide enough.
    """
    fit = {name: module for name, module in model.transformer.h.named_modules() if type(module) is Linear and
           all(size >= SMALLEST and size % MULTIPLE == 0 for size in module.weight.shape)}
    if not fit:
        raise NanochatError(f"no matrix of this model suits FP8: each side must be at least {SMALLEST} and a multiple "
                            f"of {MULTIPLE}; leave --fp8 away")
    for module in fit.values():
        module.__class__ = Fp8Linear
    return [f"transformer.h.{name}" for name in fit]


def lacks_fp8(device: torch.device) -> str:
    """Why a device cannot multiply 8-bit floats; "" if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= (8, 9) else f"it needs compute capability 8.9, and this GPU has {major}.{minor}"

# %% [markdown]
# PyTorch multiplies 8-bit floats on a CPU too, slowly. So the error can be measured anywhere: a few percent in each
# product.

# %%
_ = torch.manual_seed(0)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
    every = torch.arange(128, dtype=torch.uint8).view(dtype).float()  # all numbers that are not negative
    every = every[every.isfinite()]
    _ = left.plot(every[1:-1], every[1:].diff() / every[1:-1], drawstyle="steps-post", label=name)
    x = 10 ** torch.linspace(-9, 2, 400)
    scaled, scale = to_fp8(x, dtype)
    _ = right.loglog(x, ((scaled.float() * scale - x).abs() / x).clamp(min=1e-4), ".", markersize=3, label=name)
_ = left.set(xlabel="number", ylabel="gap to the next, relative", title="what the formats hold", xscale="log",
             yscale="log")
_ = right.set(xlabel="entry of a tensor whose largest is 100", ylabel="relative error", title="after scaling")
_ = left.legend()
_ = right.legend()

layer, x = Fp8Linear(256, 512), torch.randn(64, 256, requires_grad=True)
exact = F.linear(x, layer.weight)
error = ((layer(x) - exact).norm() / exact.norm()).item()
print(f"relative error of a product: {error:.3f}, in eval mode: {(layer.eval()(x) - exact).norm().item():.0f}")
assert error < 0.05

# %% [markdown]
# ## Exercises
#
# [exercises/04_gpt.ipynb](../exercises/04_gpt.ipynb)
#
# 1. **norm**: the mean square, and where its epsilon goes.
# 2. **apply_rotary_emb**: the right pairs, turned the right way.
# 3. **SquaredRelu**: a formula with its gradient by hand.
# 4. **parameters_by_depth**: what grows when only the depth is turned.
# 5. **to_fp8**: sixteen bits into eight, with a scale.
#
# **Next:** [05 · The optimizer](05_optimizer.ipynb)
