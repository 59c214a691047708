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
# # 08 · The engine
#
# *How does it answer quickly, and use a calculator?* — 25 minutes, about one of them computing.

# %%
#| default_exp engine

# %% [markdown]
# A model gives one thing: the probabilities of the next token. An answer of a hundred tokens takes a hundred calls, a step of
# reinforcement learning takes 256 answers, a web server has strangers waiting. This lesson makes that fast without changing a single
# token, and puts a calculator into the stream.
#
# First a small model with random weights to try things on. Speed does not depend on what a model knows.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch

from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.tokenizer import Tokenizer

tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])  # every byte a token, and the special ones
config = GPTConfig(sequence_len=256, vocab_size=tokenizer.get_vocab_size(), n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
torch.manual_seed(0)
model = build_model(config, "cpu").eval()
for parameter in model.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)  # fresh blocks add nothing; these do

# %% [markdown]
# ## Prefill and decode
#
# Attention looks back at the keys and values of all tokens before. They do not change when a token is added, since no token
# sees a later one. Computed again for each new token, a text of T tokens costs T²/2 positions; kept, it costs T.
#
# So generation has two phases. **Prefill** reads the prompt in one forward pass: many positions at once, big matrix products, bound by
# arithmetic. **Decode** adds a token at a time: each step reads all weights and the whole cache to multiply them with a single
# vector, and is bound by memory.

# %%
prompt, new = 24, 40
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for axes, title in ((left, "recomputing"), (right, "with a cache")):
    work = np.zeros((new, prompt + new))
    for step in range(new):
        first = 0 if title == "recomputing" or step == 0 else prompt + step - 1
        work[step, first:prompt + step] = 1 if step == 0 else 2
    axes.imshow(work, aspect="auto", cmap="GnBu", interpolation="none", vmax=2.5)
    axes.set(title=f"{title}: {int((work > 0).sum())} positions computed", xlabel="position (tokens)")
_ = left.set_ylabel("forward pass")

# %% [markdown]
# ## The cache
#
# A batch holds rows of different lengths, so each row writes at its own place. Four things to note in the code:
#
# - Position comes last but one, so that one head's keys lie in one piece of memory, as attention reads them.
# - Prompts of different length are prefilled together, padded on the right. What the padding writes lies behind the row's end and is
#   overwritten before anything sees it.
# - The smear of lesson 04 wants the previous token's embedding: one more vector per row.
# - A finished row leaves a hole. The last row moves into it: one copy, and the batch stays dense.

# %%
#| export kv_cache
"""Keys and values of past tokens, for a batch whose rows have their own lengths."""

import numpy as np
import torch

from nanochat_lib.gpt import GPTConfig

# %%
#| export kv_cache
class KVCache:
    """Keys and values of every layer for up to `rows` sequences, each with its own length.

    One tensor (2, layer, row, kv head, position, head dim), made at first use; the model sees the first `len(lengths)` rows.
    Places behind a row's length may hold anything finite: they are overwritten before they are seen.
    """

    def __init__(self, config: GPTConfig, rows: int, capacity: int):
        self.n_layer, self.rows, self.capacity = config.n_layer, rows, capacity
        self.store: torch.Tensor | None = None
        self.lengths = torch.zeros(0, dtype=torch.int64)  # (B,) tokens held by each row
        self.counts: torch.Tensor | None = None  # (B,) real tokens of the coming forward, if rows are right-padded
        self.previous: torch.Tensor | None = None  # (B, C) embedding before smear of each row's last token
        self.longest = 0  # max(lengths), known without asking the device

    def allocate(self, like: torch.Tensor) -> None:
        """Make the store for keys like this (…, KVH, D): zeros, since attention weighs unseen values 0, and 0 · nan is nan."""
        if self.store is None:
            self.store = like.new_zeros(2, self.n_layer, self.rows, like.size(-2), self.capacity, like.size(-1))

    def resize(self, lengths: list[int] | np.ndarray, device: torch.device | str) -> None:
        """The batch is now the first len(lengths) rows, which hold this many tokens."""
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64).to(device, non_blocking=True)
        self.longest = int(max(lengths))

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, T, KVH, D) behind each row's tokens; returns all keys and values (B, longest + T, KVH, D)."""
        B, T = k.shape[:2]
        self.allocate(k)
        end = self.longest + T
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} positions has no place for {end}")
        keys, values = self.store[:, layer, :B, :, :end].transpose(2, 3)
        if self.longest == 0:
            keys.copy_(k), values.copy_(v)
        else:
            if layer == 0:
                steps = torch.arange(T, device=k.device)
                self.places = torch.arange(B, device=k.device)[:, None], self.lengths[:, None] + steps
            keys[self.places], values[self.places] = k, v
        return keys, values

    def advance(self, T: int) -> None:
        """The forward is over: every row is longer by its count, or by T."""
        self.lengths = self.lengths + (T if self.counts is None else self.counts)
        self.longest += T
        self.counts = None

    def append_rows(self, source: "KVCache", rows: list[int], at: int) -> None:
        """Copy `rows` of `source` behind the first `at` rows: one prompt may serve many."""
        self.allocate(source.store[0, 0].transpose(1, 2))
        index, end = torch.tensor(rows, device=source.store.device), source.longest
        self.store[:, :, at:at + len(rows), :, :end] = source.store[:, :, :, :, :end].index_select(2, index)
        self.longest = max(self.longest, end)
        previous = source.previous[index]
        self.previous = torch.cat((self.previous[:at], previous)) if at else previous

    def close_holes(self, source: list[int], target: list[int], keep: int) -> None:
        """Copy rows `source` over the finished rows `target`; the first `keep` rows remain."""
        if source:
            self.store[:, :, target, :, :self.longest] = self.store[:, :, source, :, :self.longest]
            self.previous[target] = self.previous[source]
        self.previous = self.previous[:keep]

# %%
#| export kv_cache
def cache_bytes(config: GPTConfig, rows: int, capacity: int, bytes_per_number: int = 4) -> int:
    """Memory of keys and values: 2 · layers · rows · kv heads · positions · head dim numbers."""
    return 2 * config.n_layer * rows * config.n_kv_head * capacity * (config.n_embd // config.n_head) * bytes_per_number

# %%
cache = KVCache(config, rows=2, capacity=16)
ids = torch.randint(0, 256, (2, 12))
with torch.inference_mode():
    cache.resize([0, 0], "cpu")
    cache.counts = torch.tensor([5, 8])  # the first row has 5 tokens, the second 8
    model(ids[:, :8], kv_cache=cache)
    logits = model(torch.stack((ids[0, 5:6], ids[1, 8:9])), kv_cache=cache)[:, 0]  # one more token each
    expected = torch.stack((model(ids[:1, :6])[0, -1], model(ids[1:, :9])[0, -1]))
assert cache.lengths.tolist() == [6, 9] and torch.allclose(logits, expected, atol=1e-5)

# %% [markdown]
# What does it cost? Two numbers (key and value) per layer, head, channel and position. The memory of a GPU is shared by weights
# and cache, so this decides how many people can be served at once. Grouped queries (fewer kv heads than heads) and short
# contexts are the ways to shrink it. Change the numbers:

# %%
def gigabytes(depth=12, kv_heads=6, context=2048, rows=32):
    """Cache of a model of 12 heads of 128 channels, in bfloat16."""
    return cache_bytes(GPTConfig(context, 32768, depth, 12, kv_heads, 12 * 128), rows, context, bytes_per_number=2) / 1e9


print(f"6 kv heads: {gigabytes():.2f} GB, 1 kv head: {gigabytes(kv_heads=1):.2f} GB")

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets as widgets

dials = {"depth": widgets.IntSlider(12, 4, 32, 4), "kv_heads": widgets.SelectionSlider(options=[1, 2, 3, 4, 6, 12], value=6),
         "context": widgets.SelectionSlider(options=[512, 1024, 2048, 4096, 8192], value=2048), "rows": widgets.IntSlider(32, 1, 256)}
result = widgets.HTML()


def update(change=None):
    result.value = f"<b>{gigabytes(**{name: dial.value for name, dial in dials.items()}):.2f} GB</b>"


for name, dial in dials.items():
    dial.description = name
    dial.observe(update, "value")
update()
widgets.VBox([*dials.values(), result])

# %% [markdown]
# ## From logits to a token
#
# **Temperature** divides the logits: below 1 the likely gets likelier, 0 is the likeliest alone. **Top-k** keeps the k likeliest
# tokens; **top-p** the fewest whose probabilities reach p.

# %%
logits = torch.tensor([2.2, 1.9, 1.2, 0.9, 0.3, 0.1, -0.4, -0.8, -1.5, -2.0])
fig, axes = plt.subplots(1, 4, figsize=(10, 2.4), sharey=True, layout="constrained")
for panel, (temperature, k) in zip(axes, ((1.0, 10), (0.5, 10), (2.0, 10), (1.0, 3))):
    kept = logits.masked_fill(torch.arange(10) >= k, -torch.inf) / temperature
    panel.bar(range(10), kept.softmax(0), color="tab:green" if k < 10 else "tab:blue")
    panel.set(xticks=range(0, 10, 3), title=f"temperature {temperature}" + (f", top-k {k}" if k < 10 else ""), xlabel="token, by rank")
_ = axes[0].set_ylabel("probability")

# %% [markdown]
# Drawing from them needs chance, and chance is a trap in a batch: with one generator for all rows, an answer would change with
# its neighbours. Here each row has a key made of its prompt, seed and sample number, and the noise of its n-th token is a *hash* of key and
# n. No state, no order, nothing shared: the same request gives the same answer alone or among 255 others.
#
# How to draw with noise: add to each logit a number −log(−log u), u uniform, and take the largest. That is an exact draw from the softmax
# (Gumbel's trick). It beats throwing a dart at the cumulated probabilities, where each of 32,768 borders is a place at which rounding
# can tip the choice; here only the two best compete.

# %%
#| export sampling
"""Choosing tokens: temperature, top-k, top-p, and noise that depends on nothing but the row itself."""

import numpy as np
import torch

# %%
#| export sampling
def draw_seeds(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """32 fresh bits per row from its key and its number of tokens: splitmix64 (Steele et al. 2014).

    A row draws the same bits in any batch. keys uint64 (B,), counts int64 (B,) → int32 (B,).
    """
    x = keys + (counts.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(32)).astype(np.uint32).view(np.int32)


def gumbel(seeds: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise for tokens `ids` (V,) or (B, k), from each row's seed (B,) int32: a hash, not a generator → (B, V or k)."""
    x = (ids.int() * -1640531535) ^ seeds[:, None]  # spread the ids over 32 bits; products wrap around
    for multiplier in (-2048144789, -1028477387):  # the finish of MurmurHash3 (Appleby 2011)
        x = (x ^ (x >> 15)).mul_(multiplier)
    u = (x >> 9).float().add_(0.5).mul_(2.0**-23).add_(0.5)  # inside (0, 1), exact in float32
    return u.log_().neg_().log_().neg_()


def sample(logits: torch.Tensor, seeds: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> torch.Tensor:
    """One token per row of logits (B, V), with the randomness of seeds (B,) int32 → (B,) int64.

    Temperature 0 takes the likeliest. top_k keeps the k likeliest, top_p the fewest whose probabilities reach p. The largest
    of logit / temperature + Gumbel noise is a draw from the softmax (Gumbel 1954), and hardly ever depends on rounding.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    vocab, ids = logits.size(-1), torch.arange(logits.size(-1), device=logits.device)
    logits = logits / max(temperature, 1e-6)
    nucleus = top_p is not None and top_p < 1
    if nucleus or 0 < (top_k or 0) < vocab:
        logits, ids = logits.topk(min(top_k or vocab, vocab), dim=-1, sorted=nucleus)
    if nucleus:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p.cumsum(dim=-1) - p >= top_p, -torch.inf)
    place = (logits + gumbel(seeds, ids)).argmax(dim=-1, keepdim=True)
    return ids.expand_as(logits).gather(-1, place)[:, 0]

# %%
rows = 100_000
seeds = torch.from_numpy(draw_seeds(np.full(rows, 42, np.uint64), np.arange(rows)))
drawn = sample(logits.expand(rows, -1), seeds, temperature=0.8, top_k=5).bincount(minlength=10) / rows
expected = (logits[:5] / 0.8).softmax(0)
assert torch.allclose(drawn[:5], expected, atol=0.006) and drawn[5:].sum() == 0

# %% [markdown]
# ## A calculator that can be trusted
#
# The model writes the expression, so it is a stranger's text: `eval` is out of the question. Python's own parser turns it into a
# tree; we walk the tree and know only numbers, six operators and `'word'.count('r')`. Fractions keep 0.1 + 0.2 at 0.3.

# %%
#| export tools
"""The calculator a chat model may call while it answers."""

import ast
import operator
import re
from decimal import Context, Decimal
from fractions import Fraction

MAX_LENGTH, MAX_DEPTH, MAX_SIZE = 256, 32, 10**40
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg}
QUOTED = r"'[^'\\]*'|\"[^\"\\]*\""
ALLOWED = re.compile(rf"(?:[0-9\s.+\-*/%()]|{QUOTED}|(?<=['\"])\.count\()*")  # no letter outside quotes, so no names
COMMA = re.compile(rf"({QUOTED})|(?<=\d),(?=\d{{3}}(?!\d))")  # a thousands comma, not one in a quoted word


def evaluate(node: ast.AST, depth: int = 0) -> Fraction:
    """The exact value of an expression's tree. Raises ValueError or ArithmeticError for what a calculator has no key for."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=int() | float() as number):
            value = Fraction(str(number))  # the decimal that was typed, not its nearest binary
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = Fraction(OPERATORS[type(op)](evaluate(left, depth + 1), evaluate(right, depth + 1)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](evaluate(operand, depth + 1))
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
                      args=[ast.Constant(value=str() as part)], keywords=[]):
            value = Fraction(text.count(part))
        case _:
            raise ValueError(f"no key for {type(node).__name__}")
    if abs(value.numerator) > MAX_SIZE or value.denominator > MAX_SIZE:
        raise ValueError("too many digits")
    return value


def calculate(expression: str) -> str | None:
    """The value of `expression` as decimal text (ten significant digits), or None if it is not one. Never raises.

    Knows numbers (with thousands commas), + - * / // %, parentheses and 'word'.count('r'). Nothing is executed; length,
    nesting and digits are bounded, and so is time (well under a millisecond).
    """
    text = COMMA.sub(lambda match: match[1] or "", expression[:MAX_LENGTH + 1].strip())
    if len(expression) > MAX_LENGTH or not ALLOWED.fullmatch(text):
        return None
    try:
        value = evaluate(ast.parse(" ".join(text.split()), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if value.denominator == 1:
        return str(value.numerator)
    return f"{Context(prec=10).divide(Decimal(value.numerator), Decimal(value.denominator)).normalize():f}"

# %%
for expression in ("12 * 34", "0.1 + 0.2", "1,250 / 4", "'strawberry'.count('r')", "1 / 0", "9**9**9", "__import__('os')"):
    print(f"{expression:26} {calculate(expression)}")

# %% [markdown]
# The calculator enters the stream by a small state machine, one per row. The model opens a call, writes the expression, closes
# it; then the result is *forced*: these tokens are fed as if the model had said them, and marked with mask 0, because no one may
# learn from words it did not choose. Whatever else a model does with the markers (never closes, opens twice, closes what is not
# open) leads back to a state from which it simply goes on.

# %%
states = {"text": (0, 0), "in a call": (1, 0), "forced": (2, 0), "end": (-0.9, 0)}
arrows = [("text", "in a call", "python_start", 0.3), ("in a call", "text", "python_end, no value", 0.3),
          ("in a call", "forced", "python_end:\ncalculate", 0), ("forced", "text", "all said:\noutput_start result output_end", -0.4),
          ("text", "end", "assistant_end,\nbos", 0)]
fig, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
for a, b, label, bend in arrows:
    (x0, y0), (x1, y1) = states[a], states[b]
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="->", shrinkA=32, shrinkB=32, lw=1.5,
                                                         connectionstyle=f"arc3,rad={-bend}"))
    height = (bend * abs(x1 - x0) * 0.62 + (0.05 if bend >= 0 else -0.05)) * (1 if x1 > x0 or not bend else -1)  # off the arc
    axes.text((x0 + x1) / 2, (y0 + y1) / 2 + height, label, ha="center", va="bottom" if height >= 0 else "top", fontsize=9)
for name, (x, y) in states.items():
    axes.text(x, y, name, ha="center", va="center", bbox=dict(boxstyle="circle,pad=0.6", fc="#fec" if name == "forced" else "#cdf"))
axes.text(1, -0.42, "python_start: begin anew", ha="center", fontsize=9)
axes.set(xlim=(-1.2, 2.4), ylim=(-0.7, 1.1))
axes.axis("off")
plt.show()

# %% [markdown]
# ## Rows that come and go
#
# Answers differ in length. If a batch waits for its longest answer, most of it computes nothing. In **continuous batching** a finished
# row leaves at once and a waiting request takes its place. A request says what is wanted; the batch holds all that runs.

# %%
#| export batch
"""A running batch: requests join when rows are free, leave when finished, and may call the calculator."""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.kv_cache import KVCache
from nanochat_lib.sampling import draw_seeds, sample

if TYPE_CHECKING:
    from nanochat_lib.engine import Engine

# %%
#| export batch
@dataclass(frozen=True)
class Token:
    """One token of an answer as it comes; the last one says why it is the last."""

    id: int
    forced: bool  # put there by a tool, not chosen by the model
    logprob: float  # by the model itself, before temperature and top-k; 0 if forced
    finish_reason: str | None = None  # "stop", "length" or "context"
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their probabilities, if asked for
    text: str = ""  # the whole characters it completes (only from Engine.stream)


@dataclass(frozen=True)
class Completion:
    """An answer without its prompt and without the token that ended it. mask: 1 chosen by the model, 0 forced by a tool."""

    tokens: list[int]
    mask: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop", "length", "context" or "cancelled"
    stop_token: int | None = None


@dataclass(eq=False)
class Request:
    """One row of a batch: what is wanted and, once it has left the batch, its completion. NanochatError without a prompt."""

    prompt: list[int]
    max_tokens: int | None = None  # None: until the context is full
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 42
    sample: int = 0  # which of several answers to this prompt
    watch: Callable[[Token], None] | None = None  # called with every token as it comes
    top: int = 0  # how many alternatives a watched token carries
    completion: Completion | None = None

    def __post_init__(self):
        if not self.prompt:
            raise NanochatError("nothing to continue: a prompt has at least one token (a document starts with <|bos|>)")
        if not 0 <= self.temperature < float("inf") or (self.top_k or 0) < 0 or not 0 < (self.top_p or 1) <= 1:
            raise NanochatError("sampling settings out of range: temperature and top-k are 0 or more, top-p in (0, 1]")
        self.settings = (self.temperature, self.top_k, self.top_p)

    def key(self) -> int:
        """64 bits for `draw_seeds`: a row depends on its prompt, seed and sample number, and on nothing around it."""
        text = f"{self.seed} {self.sample} {self.prompt}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

# %% [markdown]
# One step: sample every row, note the tokens, let the tools speak, drop what is finished, run the model on the rest. All of it
# works on whole arrays. Python looks at single rows only where something special happened, and the host waits for the
# device once per step, for the chosen tokens.

# %%
#| export batch
PREFILL = 8192  # most tokens of one prefill, padding included: bounds its memory


class Batch:
    """A running batch: requests wait, join when rows are free, leave when finished. One `step` is one token for each row.

    Running row i lives in cache row i. Its notes (tokens, counts) stay on line `line[i]` while the cache is compacted.
    """

    def __init__(self, engine: "Engine", rows: int, capacity: int, refill: float = 0.0):
        self.engine, self.rows, self.capacity = engine, rows, capacity
        self.refill = max(1, int(refill * rows))  # rows that must be free before new ones join: fewer, larger prefills
        self.cache = KVCache(engine.model.config, rows, capacity)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.cancelled: set[Request] = set()
        self.logits: torch.Tensor | None = None  # (B, V) for the coming token of each running row
        self.groups: list | None = None  # (settings, rows) of rows sampled alike; None: to be found
        self.watchers: list[int] = []  # rows whose tokens are watched
        self.line, self.free = np.zeros(rows, np.int64), list(range(rows))
        self.keys = np.zeros(rows, np.uint64)
        self.lengths, self.counts, self.budgets, self.calls, self.forced_until = np.zeros((5, rows), np.int64)
        self.tokens = np.zeros((rows, capacity + 1), np.int64)
        self.mask, self.logprobs = np.zeros(self.tokens.shape, np.int64), np.zeros(self.tokens.shape)

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Let go of a request at the next step; its completion is what it has until then."""
        self.cancelled.add(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One more token for every running row, after letting waiting ones join; returns the requests finished now."""
        finished = self.drop_cancelled() if self.cancelled else []
        finished += self.admit() if self.waiting else []
        if self.running:
            finished += self.drop(self.settle(*self.choose()))
        if self.running:
            line = self.line[:len(self.running)]
            last = torch.from_numpy(self.tokens[line, self.counts[line] - 1])
            self.cache.resize(self.lengths[line] + self.counts[line] - 1, self.engine.device)
            self.logits = self.engine.forward(last[:, None], self.cache)
        return finished

    def admit(self) -> list[Request]:
        """Prefill waiting requests into the free rows, each distinct prompt once; returns those with no room for a token."""
        finished, prompts = [], {}
        if len(self.free) < self.refill and self.running:
            return finished
        for _ in range(min(len(self.free), len(self.waiting))):
            request = self.waiting.popleft()
            room = self.capacity + 1 - len(request.prompt)
            if room <= 0 or request.max_tokens == 0:
                request.completion = Completion([], [], [], "length" if room > 0 else "context")
                finished.append(request)
            else:
                prompts.setdefault(tuple(request.prompt), []).append(request)
        chunk: list[tuple[int, ...]] = []
        for prompt in sorted(prompts, key=len):
            if chunk and (len(chunk) + 1) * len(prompt) > PREFILL:
                self.prefill(chunk, prompts)
                chunk = []
            chunk.append(prompt)
        if chunk:
            self.prefill(chunk, prompts)
        return finished

    def prefill(self, chunk: list[tuple[int, ...]], prompts: dict[tuple[int, ...], list[Request]]) -> None:
        """Run prompts, sorted by length, in one forward, right-padded; copy each result to all rows that ask for it."""
        lengths, device = [len(prompt) for prompt in chunk], self.engine.device
        padded = torch.tensor([prompt + (0,) * (lengths[-1] - len(prompt)) for prompt in chunk])
        cache = KVCache(self.engine.model.config, len(chunk), lengths[-1])
        cache.resize([0] * len(chunk), device)
        ends = torch.tensor(lengths, device=device)
        cache.counts = None if lengths[0] == lengths[-1] else ends
        logits = self.engine.forward(padded, cache, ends - 1)
        rows = [row for row, prompt in enumerate(chunk) for _ in prompts[prompt]]
        at = len(self.running)
        self.cache.append_rows(cache, rows, at)
        self.logits = torch.cat([self.logits] * (at > 0) + [logits[rows]])
        for request in (request for prompt in chunk for request in prompts[prompt]):
            line = self.line[len(self.running)] = self.free.pop()
            self.running.append(request)
            room = self.capacity + 1 - len(request.prompt)
            self.keys[line], self.lengths[line], self.counts[line] = request.key(), len(request.prompt), 0
            self.budgets[line] = room if request.max_tokens is None else min(room, request.max_tokens)
            self.calls[line], self.forced_until[line] = -1, 0
        self.groups = None

    def choose(self) -> tuple[np.ndarray, np.ndarray]:
        """Sample every running row: tokens (B,) and log-probabilities (B,), on the host. The step's only wait for the device."""
        if self.groups is None:
            alike: dict[tuple, list[int]] = {}
            for row, request in enumerate(self.running):
                alike.setdefault(request.settings, []).append(row)
            self.groups = [(settings, torch.tensor(rows, device=self.engine.device)) for settings, rows in alike.items()]
            self.watchers = [row for row, request in enumerate(self.running) if request.watch]
        line = self.line[:len(self.running)]
        seeds = torch.from_numpy(draw_seeds(self.keys[line], self.counts[line]))
        seeds = seeds.to(self.engine.device, non_blocking=True)
        if len(self.groups) == 1:
            ids = sample(self.logits, seeds, *self.groups[0][0])
        else:
            ids = torch.empty(len(line), dtype=torch.int64, device=self.engine.device)
            for settings, rows in self.groups:
                ids[rows] = sample(self.logits[rows], seeds[rows], *settings)
        logprobs = self.logits.gather(-1, ids[:, None])[:, 0] - self.logits.logsumexp(dim=-1)
        tokens, logprobs = torch.stack((ids.double(), logprobs.double())).cpu().numpy()
        return tokens.astype(np.int64), logprobs

    def settle(self, tokens: np.ndarray, logprobs: np.ndarray) -> dict[int, str]:
        """Note the tokens, forced ones in place of sampled ones, run the tools; returns {row: finish reason} of ended rows."""
        line, special = self.line[:len(self.running)], self.engine
        counts = self.counts[line]
        forced = counts < self.forced_until[line]
        tokens = np.where(forced, self.tokens[line, counts], tokens)
        self.tokens[line, counts], self.mask[line, counts] = tokens, ~forced
        self.logprobs[line, counts] = logprobs = np.where(forced, 0.0, logprobs)
        self.counts[line] = counts = counts + 1
        ended = {}
        for row in np.flatnonzero(counts >= self.budgets[line]).tolist():
            ended[row] = "length" if counts[row] == self.running[row].max_tokens else "context"
        for row in np.flatnonzero(special.notable[tokens] & ~forced).tolist():
            place, token, count = line[row], tokens[row], counts[row]
            if token in special.stops:
                ended[row] = "stop"
            elif token == special.python_start:  # a second start begins the call anew
                self.calls[place] = count
            elif self.calls[place] >= 0:  # python_end of an open call
                said = special.answer_call(self.tokens[place, self.calls[place]:count - 1].tolist())
                said = said[:self.capacity + 1 - count]
                self.tokens[place, count:count + len(said)] = said
                self.calls[place], self.forced_until[place] = -1, count + len(said)
        for row in self.watchers:
            request, top = self.running[row], ()
            if request.top:
                p, ids = self.logits[row].softmax(dim=-1).topk(request.top)
                top = tuple(zip(ids.tolist(), p.tolist()))
            request.watch(Token(int(tokens[row]), bool(forced[row]), float(logprobs[row]), ended.get(row), top))
        return ended

    def drop_cancelled(self) -> list[Request]:
        """Take cancelled requests out, waiting or running."""
        waiting = [request for request in self.waiting if request in self.cancelled]
        for request in waiting:
            self.waiting.remove(request)
            request.completion = Completion([], [], [], "cancelled")
        rows = {row: "cancelled" for row, request in enumerate(self.running) if request in self.cancelled}
        self.cancelled.clear()
        return waiting + self.drop(rows)

    def drop(self, ended: dict[int, str]) -> list[Request]:
        """Complete the requests of these rows and close the holes with the last rows; returns the requests."""
        if not ended:
            return []
        finished, keep = [self.running[row] for row in ended], len(self.running) - len(ended)
        for (row, reason), request in zip(ended.items(), finished):
            place = self.line[row]
            count = self.counts[place] - (reason == "stop")
            notes = (notes[place, :count].tolist() for notes in (self.tokens, self.mask, self.logprobs))
            stop = int(self.tokens[place, count]) if reason == "stop" else None
            request.completion = Completion(*notes, reason, stop)
            self.free.append(int(place))
        holes = [row for row in ended if row < keep]
        movers = [row for row in range(keep, len(self.running)) if row not in ended]
        self.cache.close_holes(movers, holes, keep)
        if holes:
            self.logits[holes], self.line[holes] = self.logits[movers], self.line[movers]
        for hole, mover in zip(holes, movers):
            self.running[hole] = self.running[mover]
        self.logits, self.groups = self.logits[:keep], None
        del self.running[keep:]
        return finished

# %% [markdown]
# ## One row on a CPU: the price of an operation
#
# A step of a small model is some 300 operations on a few hundred numbers each. PyTorch takes a few microseconds to start one (it looks up
# device, dtype, layout, gradients), NumPy a fraction of that. For a single row on a CPU, a chat on a laptop, the engine therefore has
# the step once more in NumPy: the same weights, the same cache, the formulas of lesson 04. (On a GPU, CUDA graphs play this part.)

# %%
#| export numpy_step
"""One decode step of one row on a CPU, in NumPy: for a small model several times as fast as through PyTorch."""

import numpy as np
import torch

from nanochat_lib.fused import SOFTCAP
from nanochat_lib.gpt import GPT, SMEAR_CHANNELS, VALUE_CHANNELS, window_sizes
from nanochat_lib.kv_cache import KVCache

# %%
#| export numpy_step
EPSILON = np.float32(torch.finfo(torch.float32).eps)  # that of F.rms_norm


def norm(x: np.ndarray) -> np.ndarray:
    """RMS norm of x (C,)."""
    return x * (1 / np.sqrt(x.dot(x) / np.float32(len(x)) + EPSILON))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class NumpyStep:
    """GPT.forward for one token of one row, float32 on the CPU. It reads the model's own memory, so it sees training."""

    def __init__(self, model: GPT):
        self.config, self.windows = model.config, window_sizes(model.config)
        self.weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        self.cos, self.sin = model.cos.numpy(), model.sin.numpy()
        names = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "attn.ve_gate")
        self.layers = [[self.weights.get(f"transformer.h.{layer}.{name}.weight") for name in names]
                       for layer in range(model.config.n_layer)]

    @staticmethod
    def suits(model: GPT) -> bool:
        return type(model) is GPT and model.lm_head.weight.device.type == "cpu" and model.dtype == torch.float32

    def __call__(self, token: int, cache: KVCache) -> torch.Tensor:
        """Logits (1, V) after `token`, which the cache's only row holds afterwards."""
        w, position = self.weights, cache.longest
        if position >= cache.capacity:
            raise ValueError(f"a cache of {cache.capacity} positions has no place for {position + 1}")
        x = norm(w["transformer.wte.weight"][token])
        before, cache.previous = cache.previous[0].numpy(), torch.from_numpy(x)[None]
        gate = w["smear_lambda"] * sigmoid(w["smear_gate.weight"].dot(x[:SMEAR_CHANNELS]))
        x = x0 = x + gate * before
        store = cache.store[:, :, 0].numpy()  # (2, layer, kv head, position, head dim)
        for layer, (c_q, c_k, c_v, c_proj, c_fc, c_out, ve_gate) in enumerate(self.layers):
            x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
            h = norm(x)
            v = c_v.dot(h).reshape(self.config.n_kv_head, -1)
            if ve_gate is not None:
                ve = w[f"value_embeds.{layer}.weight"][token].reshape(v.shape)
                v = v + (3 * sigmoid(ve_gate.dot(h[:VALUE_CHANNELS])))[:, None] * ve
            qk = np.concatenate((c_q.dot(h), c_k.dot(h)))
            x = x + c_proj.dot(self.attend(qk, v, store[:, layer], position, self.windows[layer]))
            x = x + c_out.dot(np.square(np.maximum(c_fc.dot(norm(x)), 0)))
            if layer == self.config.n_layer // 2:
                halfway = x
        cache.advance(1)
        logits = w["lm_head.weight"][:self.config.vocab_size].dot(norm(x - w["backout_lambda"] * halfway))
        return torch.from_numpy(np.tanh(logits / np.float32(SOFTCAP)) * np.float32(SOFTCAP))[None]

    def attend(self, qk: np.ndarray, v: np.ndarray, store: np.ndarray, position: int, window: int) -> np.ndarray:
        """Turn and norm queries and keys (heads one after another), keep k and v, look back → (C,)."""
        config, half = self.config, self.config.head_dim // 2
        qk, cos, sin = qk.reshape(-1, 2, half), self.cos[position], self.sin[position]
        turned = np.concatenate((qk[:, 0] * cos + qk[:, 1] * sin, qk[:, 1] * cos - qk[:, 0] * sin), axis=1)
        size = np.einsum("hd,hd->h", turned, turned) / np.float32(2 * half) + EPSILON
        turned *= (np.float32(1.2) / np.sqrt(size))[:, None]
        store[0, :, position], store[1, :, position] = turned[config.n_head:], v
        keys, values = store[:, :, max(0, position - window):position + 1]
        q = turned[:config.n_head].reshape(config.n_kv_head, -1, 2 * half)  # (kv head, queries of it, head dim)
        scores = np.matmul(q, keys.transpose(0, 2, 1)) * np.float32((2 * half) ** -0.5)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (np.matmul(weights, values) / weights.sum(axis=-1, keepdims=True)).ravel()

# %%
step, cache = NumpyStep(model), KVCache(config, rows=1, capacity=16)
with torch.inference_mode():
    cache.resize([0], "cpu")
    model(ids[:1, :9], kv_cache=cache)
    logits = step(int(ids[0, 9]), cache)
    assert torch.allclose(logits[0], model(ids[:1, :10])[0, -1], atol=1e-4)

# %% [markdown]
# ## The engine
#
# What remains is a face for each use: `generate_many` for reinforcement learning and evaluation, `stream` for a chat, `generate` and
# `generate_batch` for one prompt.

# %%
#| export
"""Fast generation from a model: streams, batches, samples, with a calculator in the loop."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import psutil
import torch

from nanochat_lib.batch import Batch, Completion, Request, Token
from nanochat_lib.common import NanochatError, progress as progress_bar
from nanochat_lib.fused import softcap
from nanochat_lib.gpt import GPT
from nanochat_lib.kv_cache import KVCache, cache_bytes
from nanochat_lib.numpy_step import NumpyStep
from nanochat_lib.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_lib.tools import calculate

# %%
#| export
class Speller:
    """Turns tokens into text as they come; a character spread over several tokens appears with its last byte."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.held = tokenizer, []
        self.vocab = tokenizer.get_vocab_size() - len(SPECIAL_TOKENS)

    def read(self, token: int, last: bool = False) -> str:
        """The text that is certain now; special tokens have none."""
        special = token >= self.vocab
        self.held += [] if special else [token]
        text = self.tokenizer.decode(self.held)
        if text.endswith("\ufffd") and len(self.held) < 4 and not (special or last):
            return ""  # the first bytes of a character that has up to four
        self.held.clear()
        return text

# %%
#| export
class Engine:
    """Generates with a model: streams, batches, samples, tools."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.numpy_step = NumpyStep(model) if NumpyStep.suits(model) else None
        special = tokenizer.encode_special
        self.assistant_end = special("<|assistant_end|>")
        self.stops = {self.assistant_end, special("<|bos|>")}
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.notable = np.zeros(max(model.config.vocab_size, tokenizer.get_vocab_size()), bool)
        self.notable[[*self.stops, self.python_start, self.python_end]] = True

    def forward(self, tokens: torch.Tensor, cache: KVCache, last: torch.Tensor | None = None) -> torch.Tensor:
        """Feed tokens (B, T) to the cache; returns the logits (B, V) after each row's token `last` (B,), default T − 1."""
        if self.numpy_step and tokens.numel() == 1 and cache.longest:
            return self.numpy_step(int(tokens), cache)
        x = self.model.hidden(tokens.to(self.device, non_blocking=True), cache)
        x = x[:, -1] if last is None else x[torch.arange(len(x), device=x.device), last]
        return softcap(self.model.lm_head(x)[:, :self.model.config.vocab_size])

    def answer_call(self, expression: list[int]) -> list[int]:
        """The tokens a tool call puts into the stream: the result between output markers, or nothing if there is none."""
        result = calculate(self.tokenizer.decode(expression))
        return [] if result is None else [self.output_start, *self.tokenizer.encode(result), self.output_end]

    def batch(self, rows: int, capacity: int | None = None, refill: float = 0.0) -> Batch:
        """An empty batch of at most `rows` rows of `capacity` positions (default and most: the model's context)."""
        context = self.model.config.sequence_len
        return Batch(self, rows, min(capacity or context, context), refill)

    def rows_that_fit(self, capacity: int) -> int:
        """How many rows of `capacity` positions take at most a quarter of the free memory (at least 1)."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        return max(1, free // 4 // cache_bytes(self.model.config, 1, capacity))

    def run(self, requests: list[Request], rows: int = 256, progress: bool = False) -> None:
        """Complete all requests, `rows` at a time: the general form of what follows."""
        context = self.model.config.sequence_len
        capacity = max((min(context, len(r.prompt) + (context if r.max_tokens is None else r.max_tokens)) for r in requests),
                       default=1)
        batch = self.batch(min(rows, max(1, len(requests)), self.rows_that_fit(capacity)), capacity, refill=1 / 8)
        for request in sorted(requests, key=lambda request: len(request.prompt)):
            batch.add(request)
        with progress_bar(total=len(requests), desc="answers") if progress else contextlib.nullcontext() as bar:
            while batch:
                finished = batch.step()
                if bar is not None:
                    bar.update(len(finished))

    def generate_many(self, prompts: list[list[int]], num_samples: int = 1, max_tokens: int | None = None,
                      temperature: float = 1.0, top_k: int | None = None, seed: int = 42, top_p: float | None = None,
                      rows: int = 256, progress: bool = False) -> list[list[Completion]]:
        """`num_samples` completions of every prompt, [prompt][sample], all in one batch that refills as rows finish."""
        requests = [[Request(prompt, max_tokens, temperature, top_k, top_p, seed, number) for number in range(num_samples)]
                    for prompt in prompts]
        self.run([request for samples in requests for request in samples], rows, progress)
        return [[request.completion for request in samples] for samples in requests]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                       temperature: float = 1.0, top_k: int | None = None, seed: int = 42) -> tuple[list, list]:
        """(sequences, masks) of `num_samples` answers to one prompt; both begin with the prompt, whose mask is 0."""
        [answers] = self.generate_many([tokens], num_samples, max_tokens, temperature, top_k, seed)
        return [tokens + a.tokens for a in answers], [[0] * len(tokens) + a.mask for a in answers]

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int = 42) -> Iterator[tuple[list[int], list[int]]]:
        """Yield a column per step: the next token of each sample and its mask (1 chosen, 0 forced by a tool).

        A sample that has ended goes on with <|assistant_end|>, mask 0. Stop iterating to stop generating.
        """
        batch = self.batch(num_samples, len(tokens) + (max_tokens or self.model.config.sequence_len))
        said: list[tuple[int, Token]] = []
        for number in range(num_samples):
            batch.add(Request(tokens, max_tokens, temperature, top_k, None, seed, number,
                              watch=lambda token, number=number: said.append((number, token))))
        while batch:
            batch.step()
            column, mask = [self.assistant_end] * num_samples, [0] * num_samples
            for number, token in said:
                column[number], mask[number] = token.id, int(not token.forced)
            if said:
                yield column, mask
            said.clear()

    def stream(self, tokens: list[int], max_tokens: int | None = None, temperature: float = 1.0, top_k: int | None = None,
               seed: int = 42, top_p: float | None = None, top: int = 0) -> Iterator[Token]:
        """Yield the tokens of one answer as they come, each with the text it completes; `top` alternatives on demand.

        Stop iterating (or close the generator) to stop. NanochatError if the prompt leaves no room in the context.
        """
        said: list[Token] = []
        request = Request(tokens, max_tokens, temperature, top_k, top_p, seed, watch=said.append, top=top)
        batch = self.batch(1, len(tokens) + (max_tokens or self.model.config.sequence_len))
        batch.add(request)
        speller = Speller(self.tokenizer)
        while batch:
            batch.step()
            for token in said:
                yield replace(token, text=speller.read(token.id, last=token.finish_reason is not None))
            said.clear()
        if request.completion.finish_reason == "context" and not request.completion.tokens:
            raise NanochatError(f"the prompt has {len(tokens)} tokens, the context {self.model.config.sequence_len}: shorten it")

# %% [markdown]
# The same tokens as the slow way, in any company:

# %%
engine = Engine(model, tokenizer)
prompts = [list(range(60, 60 + length)) for length in (3, 30, 90, 91)]
answers = engine.generate_many(prompts, max_tokens=24, temperature=0.0, rows=3)
for prompt, [answer] in zip(prompts, answers):
    slow = list(model.generate(prompt, 24, temperature=0.0))
    assert answer.tokens == slow[:len(answer.tokens)]
    print(f"{len(prompt):2} tokens of prompt, {len(answer.tokens)} of answer: {answer.finish_reason}")

# %% [markdown]
# And the timeline: twelve requests on four rows. Each colour is a request; compare with batches of four that wait for their slowest.

# %%
requests = [Request([65 + i] * (4 + i), max_tokens=budget, temperature=0.0)
            for i, budget in enumerate((30, 6, 12, 9, 22, 5, 14, 8, 26, 7, 10, 16))]
engine.notable[:] = False  # for the picture, only the budget ends an answer
batch, timeline = engine.batch(rows=4), []
for request in requests:
    batch.add(request)
while batch:
    before = set(zip(batch.line.tolist(), batch.running))
    batch.step()
    timeline.append(before | set(zip(batch.line.tolist(), batch.running)))  # those who left in this step, and those who joined
waves = [requests[i:i + 4] for i in range(0, 12, 4)]
fig, (above, below) = plt.subplots(2, 1, figsize=(10, 3.6), sharex=True, layout="constrained")
colour = {request: plt.cm.tab20(i) for i, request in enumerate(requests)}
for step, running in enumerate(timeline):
    for row, request in running:
        above.broken_barh([(step, 1)], (row - 0.4, 0.8), color=colour[request])
start = 0
for wave in waves:
    for row, request in enumerate(wave):
        below.broken_barh([(start, request.max_tokens)], (row - 0.4, 0.8), color=colour[request])
    start += max(request.max_tokens for request in wave)
for axes, title in ((above, f"rows that come and go: {len(timeline)} steps"), (below, f"waves of four: {start} steps")):
    axes.set(title=title, ylabel="row", yticks=range(4))
_ = below.set_xlabel("step (one token for each row)")

# %% [markdown]
# ## How fast?
#
# `python -m nanochat_lib.scripts.infer_bench` measures what the cache and the batch bring, in interleaved rounds, and how near decoding comes
# to the bound set by memory: a token cannot be faster than reading the weights and the cache once.

# %%
#| export scripts/infer_bench
"""How fast a model generates: cache against recomputation, one batch against one by one, and the memory bound.

    python -m nanochat_lib.scripts.infer_bench                   # laptop-sized model, random weights
    python -m nanochat_lib.scripts.infer_bench --source sft      # a trained one
    python -m nanochat_lib.scripts.infer_bench --depth 12 --aspect-ratio 64 --head-dim 128 --max-seq-len 2048
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat_lib.checkpoint import load_model
from nanochat_lib.common import pick_device, print0, run_cli
from nanochat_lib.batch import Request
from nanochat_lib.engine import Engine
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.kv_cache import cache_bytes
from nanochat_lib.tokenizer import Tokenizer

# %%
#| export scripts/infer_bench
@dataclass
class Settings:
    """What to measure. Without --source a model of random weights is made: speed does not depend on what it learned."""

    source: str = ""  # base, sft or rl: a checkpoint instead of random weights
    model_tag: str | None = None
    step: int | None = None
    depth: int = 4
    aspect_ratio: int = 32
    head_dim: int = 32
    max_seq_len: int = 256
    vocab_size: int = 1024
    requests: int = 64  # of mixed lengths, batched against one by one
    questions: int = 16  # and samples of each: a step of RL
    max_new_tokens: int = 64
    repeats: int = 3  # rounds; each runs every contestant, and medians are shown
    device_type: str = ""


def medians(contestants: dict[str, Callable[[], int]], repeats: int, device: torch.device) -> dict[str, float]:
    """Tokens per second of each contestant (a call that returns its tokens): medians of interleaved rounds."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            begin = time.perf_counter()
            tokens = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(tokens / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


def bandwidth(device: torch.device) -> float:
    """Bytes per second this device reads from memory, measured on 256 MB."""
    block = torch.ones(2**26, device=device)
    return 2**28 * medians({"read": lambda: int(block.sum() > 0)}, 5, device)["read"]

# %%
#| export scripts/infer_bench
#| cli infer_bench
def infer_bench(settings: Settings) -> None:
    """Measure generation: the cache, the batch, the memory bound."""
    device = torch.device(pick_device(settings.device_type))
    if settings.source:
        model, tokenizer, _ = load_model(settings.source, device, "eval", settings.model_tag, settings.step)
    else:
        heads = -(-settings.depth * settings.aspect_ratio // settings.head_dim)
        config = GPTConfig(settings.max_seq_len, settings.vocab_size, settings.depth, heads, heads,
                           heads * settings.head_dim, "SSSL")
        torch.manual_seed(0)
        model, tokenizer = build_model(config, device).eval(), Tokenizer([bytes([byte]) for byte in range(256)])
    engine, config, dice = Engine(model, tokenizer), model.config, random.Random(0)
    engine.notable[:] = False  # nothing ends an answer early: the work is the same in every round
    room = config.sequence_len - settings.max_new_tokens

    def prompt(length: int) -> list[int]:
        return [dice.randrange(256) for _ in range(length)]

    full = prompt(config.sequence_len - 16)
    running = engine.batch(1)
    running.add(Request(full, temperature=0.0))
    running.step()

    def one_token() -> int:  # the same place again and again: the longest the cache gets
        running.counts[:] = 1
        running.step()
        return 1

    one = medians({
        "recomputing": lambda: len(list(model.generate(full, 1, temperature=0.0))),
        "cached": lambda: sum(one_token() for _ in range(16)),
    }, settings.repeats, device)
    print0(f"{config.n_layer} layers of width {config.n_embd}, {model.num_parameters():,} parameters, context "
           f"{config.sequence_len}, {device.type}, {torch.get_num_threads()} threads")
    print0(f"one row at {len(full)} tokens: {one['cached']:,.0f} tokens/s with the cache, {one['recomputing']:,.0f} without: "
           f"{one['cached'] / one['recomputing']:.1f}×")
    weights = sum(p.numel() * p.element_size() for p in (*model.transformer.h.parameters(), *model.lm_head.parameters()))
    moved = weights + cache_bytes(config, 1, len(full), running.cache.store.element_size())
    print0(f"each token reads {moved / 1e6:.1f} MB: {moved * one['cached'] / bandwidth(device):.0%} of this memory's bandwidth")

    mixed = [Request(prompt(dice.randint(1, room // 2)), dice.randint(1, settings.max_new_tokens))
             for _ in range(settings.requests)]
    asked = [prompt(dice.randint(room // 4, room // 2)) for _ in range(settings.questions)]
    budget = dict(num_samples=settings.questions, max_tokens=settings.max_new_tokens, top_k=50)

    def run(requests: list[Request], rows: int) -> int:
        engine.run(requests, rows)
        return sum(len(request.completion.tokens) for request in requests)

    def ask(prompts: list[list[int]]) -> int:
        return sum(len(answer.tokens) for answers in engine.generate_many(prompts, **budget) for answer in answers)

    for title, contestants in {
        f"{settings.requests} mixed requests": {"batched": lambda: run(mixed, 256), "one by one": lambda: run(mixed, 1)},
        f"{settings.questions} samples × {settings.questions} questions": {
            "batched": lambda: ask(asked), "question by question": lambda: sum(ask([one]) for one in asked)},
    }.items():
        rates = medians(contestants, settings.repeats, device)
        text = ", ".join(f"{rate:,.0f} tokens/s {name}" for name, rate in rates.items())
        batched, single = rates.values()
        print0(f"{title}: {text}: {batched / single:.1f}×")

# %%
# NBVAL_IGNORE_OUTPUT
infer_bench(Settings(repeats=1, requests=16, questions=4, max_new_tokens=16, device_type="cpu"))

# %% [markdown]
# A model this small is not bound by memory on a CPU but by the hundreds of little operations of a step, each of which has a fixed price.
# A batch shares that price, which is why it gains so much. On a GPU with a larger model the last line comes nearer to 100 %.
#
# ## Exercises
#
# In [exercises/08_engine](../exercises/08_engine.ipynb):
#
# 1. `sample`: temperature and top-k.
# 2. `cache_bytes`: what a cache costs, and which context fits.
# 3. `calculate`: a calculator on Python's syntax tree.
# 4. Measure: where does a batch stop paying?
#
# **Next:** [09 · Chat](09_sft.ipynb) turns a base model into one that answers.
