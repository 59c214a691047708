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

# %%
#| default_exp gpt

# %%
#| export
"""The model: a transformer with rotary positions, windows, value embeddings, smear and backout."""

# %%
#| export
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_lib.attention import attention, cached_attention
from nanochat_lib.common import NanochatError, compute_dtype

# %%
#| export
SMEAR_CHANNELS = 24  # the smear gate looks at so many channels of a token
VALUE_CHANNELS = 12  # a value gate at so many
SOFTCAP = 15.0  # logits stay within ±15
ROPE_BASE = 100_000
VOCAB_MULTIPLE = 64  # matrix units like round sizes


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
#| export
def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without weights (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))

# %%
#| export
def rotary_tables(length: int, head_dim: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (length, head_dim / 2) float32."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROPE_BASE ** (-channels / head_dim))
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D) by its position's angle; cos, sin (1 or B, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)  # RoPE, arXiv 2104.09864

# %%
#| export
class Linear(nn.Linear):
    """A matrix without bias: its float32 weight is cast to the input's dtype in forward."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


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
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = (1.2 * norm(apply_rotary_emb(heads, *rotary)) for heads in (q, k))  # 1.2 sharpens the softmax
        if kv_cache is None:
            y = attention(q, k, v, self.window)
        else:
            k, v = kv_cache.insert(self.layer, k, v)
            y = cached_attention(q, k, v, kv_cache.lengths, self.window)
        return self.c_proj(y.reshape(B, T, C))

# %%
#| export
class MLP(nn.Module):
    """Four times wider, relu squared (arXiv 2109.08668), back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


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
#| export
def softcap(logits: Tensor) -> Tensor:
    """Logits in float32, bent to stay within ±SOFTCAP."""
    return SOFTCAP * torch.tanh(logits.float() / SOFTCAP)

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
        weight = self.lm_head.weight[:self.config.vocab_size].to(x.dtype)  # without the padding
        if targets is None:
            return softcap(F.linear(x, weight))
        losses = F.cross_entropy(softcap(F.linear(x, weight)).flatten(0, 1), targets.flatten(), ignore_index=-1,
                                 reduction="none").view_as(targets)
        return reduce_losses(losses, targets, loss_reduction)

    def hidden(self, idx: Tensor, kv_cache: Any = None) -> Tensor:
        """The normed residual stream (B, T, C) that lm_head reads."""
        x = norm(self.transformer.wte(idx).to(self.dtype))
        x = self.smear(x, kv_cache)
        rotary = self.rotary(idx, kv_cache)
        x0 = x
        for layer, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            ve = self.value_embeds[str(layer)](idx).to(self.dtype) if str(layer) in self.value_embeds else None
            x = block(x, ve, rotary, kv_cache)
            if layer == self.config.n_layer // 2:
                halfway = x
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        return norm(x - self.backout_lambda.to(x.dtype) * halfway)

    def smear(self, x: Tensor, kv_cache: Any = None) -> Tensor:
        """Add to each token's embedding (B, T, C) a gated part of the one before it."""
        before = F.pad(x[:, :-1], (0, 0, 1, 0))  # nothing comes before the first token
        if kv_cache is not None:
            before = torch.cat((previous_embedding(x, kv_cache).unsqueeze(1), x[:, :-1]), dim=1)
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        return x + gate * before

    def rotary(self, idx: Tensor, kv_cache: Any = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines at the positions of idx, each (1 or B, T, 1, head_dim / 2)."""
        T = idx.size(1)
        if kv_cache is None:
            if T > len(self.cos):
                raise NanochatError(f"{T} tokens are too many: a model of context {self.config.sequence_len} reads "
                                    f"at most {len(self.cos)}")
            return self.cos[None, :T, None], self.sin[None, :T, None]
        positions = kv_cache.lengths[:, None] + torch.arange(T, device=idx.device)
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)

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
        counts = {
            "wte": self.transformer.wte.weight.numel(),
            "value_embeds": sum(parameter.numel() for parameter in self.value_embeds.parameters()),
            "lm_head": self.lm_head.weight.numel(),
            "transformer_matrices": sum(parameter.numel() for parameter in self.transformer.h.parameters()),
        }
        return {**counts, "scalars": self.num_parameters() - sum(counts.values()), "total": self.num_parameters()}

    def estimate_flops(self) -> int:
        """Floating-point operations of a training step per token, forward and backward."""
        config = self.config
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        scores = sum(min(window, config.sequence_len) for window in window_sizes(config))
        return 6 * matrices + 12 * config.n_head * config.head_dim * scores

    def generate(self, tokens: Sequence[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[int]:
        """Yield max_tokens tokens after `tokens`, reading the whole prefix again for each: the slow reference."""
        return generate(self, tokens, max_tokens, temperature, top_k, seed)

# %%
#| export
def reduce_losses(losses: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Losses (B, T), zero where targets are -1 → their "mean" over the targets that count, "sum", or themselves."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise NanochatError(f"loss_reduction={reduction!r} is unknown: choose mean, sum or none")
    return losses.sum() / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else losses.sum()


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


def build_model(config: GPTConfig, device: torch.device | str) -> GPT:
    """A model with fresh weights: laid out on the meta device, which takes no memory, and filled where it will live."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model

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
