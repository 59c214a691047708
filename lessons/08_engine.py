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
# *How does it answer quickly, and use a calculator?* — 35 minutes, about one of them computing.

# %%
#| default_exp engine

# %% [markdown]
# A model gives one thing: the probabilities of the next token. An answer of a hundred tokens takes a hundred calls, a
# step of reinforcement learning takes 256 answers, a web server has strangers waiting. This lesson makes that fast
# without changing what the model says (at temperature 0, token for token), and puts a calculator into the stream.
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
config = GPTConfig(sequence_len=256, vocab_size=tokenizer.get_vocab_size(),
                   n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
torch.manual_seed(0)
model = build_model(config, "cpu").eval()
for parameter in model.parameters():
    parameter.data += 0.05 * torch.randn_like(parameter)  # fresh blocks add nothing; these do

# %% [markdown]
# ## Prefill and decode
#
# Attention looks back at the keys and values of all tokens before. They do not change when a token is added, since no
# token sees a later one. Computed again for each new token, a text of T tokens costs T²/2 positions; kept, it costs T.
#
# So generation has two phases. **Prefill** reads the prompt in one forward pass: many positions at once, big matrix
# products, bound by arithmetic. **Decode** adds a token at a time: each step reads all weights and the whole cache to
# multiply them with a single vector, and is bound by memory.

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
# Prompts of different length are read together, padded on the right. Three things to note in the code:
#
# - Position comes last but one, so that one head's keys lie in one piece of memory, as attention reads them.
# - What the padding writes lies behind the row's end and is overwritten before anything sees it.
# - The smear of lesson 04 wants the previous token's embedding: one more vector per row.

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

    One tensor (2, layer, row, kv head, position, head dim), made at first use; the model sees the first `len(lengths)`
    rows. Places behind a row's length may hold anything finite: they are overwritten before they are seen.
    """

    def __init__(self, config: GPTConfig, rows: int, capacity: int):
        self.n_layer, self.rows, self.capacity = config.n_layer, rows, capacity
        self.store: torch.Tensor | None = None
        self.lengths = torch.zeros(0, dtype=torch.int64)  # (B,) tokens held by each row
        self.counts: torch.Tensor | None = None  # (B,) real tokens of the coming forward, if rows are right-padded
        self.previous: torch.Tensor | None = None  # (B, C) embedding before smear of each row's last token
        self.longest = 0  # max(lengths), known without asking the device

    def allocate(self, like: torch.Tensor) -> None:
        """Make the store for keys like this (…, KVH, D): zeros, since unseen values weigh 0, and 0 · nan is nan."""
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
# What does it cost? Two numbers (key and value) per layer, head, channel and position. The memory of a GPU is shared
# by weights and cache, so this decides how many people can be served at once. Grouped queries (fewer kv heads than
# heads) and short contexts are the ways to shrink it. Change the numbers:

# %%
def gigabytes(depth=12, kv_heads=6, context=2048, rows=32):
    """Cache of a model of 12 heads of 128 channels, in bfloat16."""
    config = GPTConfig(context, 32768, depth, 12, kv_heads, 12 * 128)
    return cache_bytes(config, rows, context, bytes_per_number=2) / 1e9


print(f"6 kv heads: {gigabytes():.2f} GB, 1 kv head: {gigabytes(kv_heads=1):.2f} GB")

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets as widgets

dials = {"depth": widgets.IntSlider(12, 4, 32, 4),
         "kv_heads": widgets.SelectionSlider(options=[1, 2, 3, 4, 6, 12], value=6),
         "context": widgets.SelectionSlider(options=[512, 1024, 2048, 4096, 8192], value=2048),
         "rows": widgets.IntSlider(32, 1, 256)}
result = widgets.HTML()


def update(change=None):
    result.value = f"<b>{gigabytes(**{name: dial.value for name, dial in dials.items()}):.2f} GB</b>"


for name, dial in dials.items():
    dial.description = name
    dial.observe(update, "value")
update()
widgets.VBox([*dials.values(), result])


# %% [markdown]
# ## Why decoding is bound by memory
#
# To multiply a matrix with one vector, every weight is read and used once: two operations for each number read. A
# processor can do ten to a hundred times as many in that time. With more vectors the matrix is still read once, so at
# first **more rows cost little**: the time grows more slowly than the rows. Only with many does arithmetic become the
# bound, and the time grows with the rows. Measured on a matrix of 64 MB, too large for the processor's caches:

# %%
# NBVAL_IGNORE_OUTPUT
def seconds(run, repeats=7):
    """The least time of several runs."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


matrix, rows = torch.randn(4096, 4096), [1, 2, 4, 8, 16, 32, 64, 128]
read = seconds(lambda: matrix.sum())  # reads it, and hardly computes
took = [seconds(lambda: torch.randn(n, 4096) @ matrix) for n in rows]
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
left.loglog(rows, [1000 * t for t in took], "o-", label="a step")
left.axhline(1000 * read, color="grey", ls=":", label="reading the matrix")
left.set(xlabel="rows", ylabel="milliseconds", xticks=rows, xticklabels=rows)
left.legend()
right.loglog(rows, [n / t for n, t in zip(rows, took)], "o-")
right.set(xlabel="rows", ylabel="vectors per second", xticks=rows, xticklabels=rows)
plt.show()
print(f"one row: {matrix.nbytes / took[0] / 1e9:.0f} GB/s; "
      f"128 rows: {2 * 128 * matrix.numel() / took[-1] / 1e9:.0f} GFLOP/s, "
      f"{128 * took[0] / took[-1]:.0f} times the vectors of one row")

# %% [markdown]
# Hence the two aims of this lesson: few bytes and few operations for one row, and as many rows as possible in a step.

# %% [markdown]
# ## From logits to a token
#
# **Temperature** divides the logits: below 1 the likely gets likelier, 0 is the likeliest alone. **Top-k** keeps the k
# likeliest tokens; **top-p** the fewest whose probabilities reach p.

# %%
logits = torch.tensor([2.2, 1.9, 1.2, 0.9, 0.3, 0.1, -0.4, -0.8, -1.5, -2.0])
fig, axes = plt.subplots(1, 4, figsize=(10, 2.4), sharey=True, layout="constrained")
for panel, (temperature, k) in zip(axes, ((1.0, 10), (0.5, 10), (2.0, 10), (1.0, 3))):
    kept = logits.masked_fill(torch.arange(10) >= k, -torch.inf) / temperature
    panel.bar(range(10), kept.softmax(0), color="tab:green" if k < 10 else "tab:blue")
    title = f"temperature {temperature}" + (f", top-k {k}" if k < 10 else "")
    panel.set(xticks=range(0, 10, 3), title=title, xlabel="token, by rank")
_ = axes[0].set_ylabel("probability")


# %% [markdown]
# Try it on the same ten tokens. The function says what a token's chance is; the dials only show it.

# %%
def chances(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (V,) with which tokens are drawn. logits (V,), in falling order here."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    kept = logits / temperature
    if top_k:
        kept = kept.masked_fill(torch.arange(len(logits)) >= top_k, -torch.inf)
    p = kept.softmax(0)
    return (p * (p.cumsum(0) - p < top_p)) / p[p.cumsum(0) - p < top_p].sum()


assert chances(logits, top_k=3).count_nonzero() == 3 and abs(chances(logits, 0.5, 4, 0.9).sum() - 1) < 1e-6
kept = [int(chances(logits, t, top_p=0.9).count_nonzero()) for t in (0.5, 1.0, 2.0)]
print("top-p 0.9 keeps", kept, "tokens at temperature 0.5, 1, 2")

# %%
# NBVAL_IGNORE_OUTPUT
knobs = {"temperature": widgets.FloatSlider(1.0, min=0, max=2, step=0.1), "top_k": widgets.IntSlider(0, min=0, max=10),
         "top_p": widgets.FloatSlider(1.0, min=0.05, max=1, step=0.05)}
bars = widgets.HTML()


def redraw(change=None):
    p = chances(logits, **{name: knob.value for name, knob in knobs.items()})
    bar = "display: inline-block; background: #4a90d9; width"
    bars.value = "".join(f'<div style="font-family: monospace">{i} <span style="{bar}: {300 * x:.0f}px">&nbsp;</span> '
                         f"{x:.0%}</div>" for i, x in enumerate(p.tolist()))


for name, knob in knobs.items():
    knob.description = name
    knob.observe(redraw, "value")
redraw()
widgets.HBox([widgets.VBox([*knobs.values()]), bars])

# %% [markdown]
# Drawing from them needs chance, and chance is a trap in a batch: with one generator for all rows, an answer would
# change with its neighbours. Here each row has a key made of its prompt, seed and sample number, and the noise of its
# n-th token is a *hash* of key and n. No state, no order, nothing shared: the same request gives the same answer alone
# or among 255 others.
#
# How to draw with noise: add to each logit a number −log(−log u), u uniform, and take the largest. That is an exact
# draw from the softmax (Gumbel's trick). It beats throwing a dart at the cumulated probabilities, where each of 32,768
# borders is a place at which rounding can tip the choice; here only the two best compete.


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
    """Gumbel noise (B, V or k) for tokens `ids` (V,) or (B, k), from each row's seed (B,) int32: a plain hash."""
    x = (ids.int() * -1640531535) ^ seeds[:, None]  # spread the ids over 32 bits; products wrap around
    for multiplier in (-2048144789, -1028477387):  # the finish of MurmurHash3 (Appleby 2011)
        x = (x ^ (x >> 15)).mul_(multiplier)
    u = (x >> 9).float().add_(0.5).mul_(2.0**-23).add_(0.5)  # inside (0, 1), exact in float32
    return u.log_().neg_().log_().neg_()

# %%
#| export sampling
def sample(logits: torch.Tensor, seeds: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> torch.Tensor:
    """One token per row of logits (B, V), with the randomness of seeds (B,) int32 → (B,) int64.

    Temperature 0 takes the likeliest. top_k keeps the k likeliest, top_p the fewest whose probabilities reach p. The
    largest of logit / temperature + Gumbel noise is a draw from the softmax (Gumbel 1954), and hardly ever depends on
    rounding.
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


def pick(logits: torch.Tensor, seeds: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
         top_p: float | None = None) -> torch.Tensor:
    """Sampled tokens and their log-probabilities by the model itself, before temperature and top-k: (2, B) float64."""
    ids = sample(logits, seeds, temperature, top_k, top_p)
    logprobs = logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.stack((ids.double(), logprobs.double()))

# %%
rows = 100_000
seeds = torch.from_numpy(draw_seeds(np.full(rows, 42, np.uint64), np.arange(rows)))
drawn = sample(logits.expand(rows, -1), seeds, temperature=0.8, top_k=5).bincount(minlength=10) / rows
expected = (logits[:5] / 0.8).softmax(0)
assert torch.allclose(drawn[:5], expected, atol=0.006) and drawn[5:].sum() == 0

# %% [markdown]
# ## A calculator that can be trusted
#
# The model writes the expression, so it is a stranger's text: `eval` is out of the question. Python's own parser turns
# it into a tree; we walk the tree and know only numbers, six operators and `'word'.count('r')`. Fractions keep 0.1 +
# 0.2 at 0.3.

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
GROUPED = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"  # 1,234,567: commas of thousands, none behind a decimal point
WORDS = re.compile(rf"(?P<quoted>{QUOTED})|(?P<grouped>{GROUPED})|\s+")


def tidy(match: re.Match) -> str:
    """A number without its commas, one blank for several; a quoted word stays as it is."""
    return match["quoted"] or (match["grouped"] or " ").replace(",", "")


def evaluate(node: ast.AST, source: bytes, depth: int = 0) -> Fraction:
    """The exact value of the tree parsed from `source`.

    Raises ValueError or ArithmeticError for what a calculator has no key for.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=int() | float()):  # the decimal that was typed, not its nearest binary
            value = Fraction(source[node.col_offset:node.end_col_offset].decode())
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = Fraction(OPERATORS[type(op)](evaluate(left, source, depth + 1), evaluate(right, source, depth + 1)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](evaluate(operand, source, depth + 1))
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
                      args=[ast.Constant(value=str() as part)], keywords=[]):
            value = Fraction(text.count(part))
        case _:
            raise ValueError(f"no key for {type(node).__name__}")
    if abs(value.numerator) > MAX_SIZE or value.denominator > MAX_SIZE:
        raise ValueError("too many digits")
    return value


def calculate(expression: str) -> str | None:
    """The value of `expression` as decimal text, or None if it is not one. Never raises.

    Whole values are exact; others have ten significant digits, or two behind the point where those are more. Knows
    numbers (with thousands commas), + - * / // %, parentheses and 'word'.count('r'). Nothing is executed; length,
    nesting and digits are bounded, and so is time (well under a millisecond).
    """
    text = WORDS.sub(tidy, expression[:MAX_LENGTH + 1].strip())
    if len(expression) > MAX_LENGTH or not ALLOWED.fullmatch(text):
        return None
    try:
        value = evaluate(ast.parse(text, mode="eval").body, text.encode())
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if value.denominator == 1:
        return str(value.numerator)
    digits = max(10, len(str(abs(int(value)))) + 2)
    return f"{Context(prec=digits).divide(Decimal(value.numerator), Decimal(value.denominator)).normalize():f}"

# %%
for expression in ("12 * 34", "0.1 + 0.2", "1,250 / 4", "'strawberry'.count('r')",
                   "1 / 0", "9**9**9", "__import__('os')"):
    print(f"{expression:26} {calculate(expression)}")

# %% [markdown]
# The calculator enters the stream by a small state machine, one per row. The model opens a call, writes the
# expression, closes it; then the result is *forced*: these tokens are fed as if the model had said them, and marked
# with mask 0, because no one may learn from words it did not choose. Whatever else a model does with the markers
# (never closes, opens twice, closes what is not open) leads back to a state from which it simply goes on.

# %%
states = {"text": (0, 0), "in a call": (1, 0), "forced": (2, 0), "end": (-0.9, 0)}
arrows = [("text", "in a call", "python_start", 0.3), ("in a call", "text", "python_end, no value", 0.3),
          ("in a call", "forced", "python_end:\ncalculate", 0),
          ("forced", "text", "all said:\noutput_start result output_end", -0.4),
          ("text", "end", "assistant_end,\nbos", 0)]
fig, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
for a, b, label, bend in arrows:
    (x0, y0), (x1, y1) = states[a], states[b]
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="->", shrinkA=32, shrinkB=32, lw=1.5,
                                                         connectionstyle=f"arc3,rad={-bend}"))
    height = bend * abs(x1 - x0) * 0.62 + (0.05 if bend >= 0 else -0.05)  # off the arc
    height *= 1 if x1 > x0 or not bend else -1
    side = "bottom" if height >= 0 else "top"
    axes.text((x0 + x1) / 2, (y0 + y1) / 2 + height, label, ha="center", va=side, fontsize=9)
for name, (x, y) in states.items():
    box = dict(boxstyle="circle,pad=0.6", fc="#fec" if name == "forced" else "#cdf")
    axes.text(x, y, name, ha="center", va="center", bbox=box)
axes.text(1, -0.42, "python_start: begin anew", ha="center", fontsize=9)
axes.set(xlim=(-1.2, 2.4), ylim=(-0.7, 1.1))
axes.axis("off")
plt.show()


# %% [markdown]
# ## Requests
#
# Answers differ in length. If a batch waits for its longest answer, most of it computes nothing. In **continuous
# batching** a finished row leaves at once and a waiting request takes its place. First what is asked, and what comes
# back:

# %%
#| export request
"""What is asked of an engine, and what comes back."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from nanochat_lib.common import NanochatError

# %%
#| export request
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
    """An answer without its prompt and the token that ended it. mask: 1 chosen by the model, 0 forced by a tool."""

    tokens: list[int]
    mask: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop", "length", "context" or "cancelled"
    stop_token: int | None = None

# %%
#| export request
@dataclass(eq=False)
class Request:
    """One row of a batch: what is wanted and, once it has left the batch, its completion.

    NanochatError without a prompt, or for settings out of range.
    """

    prompt: list[int]
    max_tokens: int | None = None  # None: until the context is full
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 42
    sample: int = 0  # which of several answers to this prompt
    watch: Callable[[Token], None] | None = None  # called with every token as it comes
    top: int = 0  # how many alternatives a watched token carries
    stop: tuple[int, ...] = ()  # tokens that end this answer, besides <|assistant_end|> and <|bos|>
    completion: Completion | None = None
    shared: int | None = None  # tokens of the prompt kept once for several rows; None: not looked at yet

    def __post_init__(self):
        if not self.prompt:
            raise NanochatError("nothing to continue: a prompt has at least one token (a document starts with <|bos|>)")
        if not 0 <= self.temperature < float("inf") or (self.top_k or 0) < 0 or not 0 < (self.top_p or 1) <= 1:
            raise NanochatError("sampling settings out of range: temperature and top-k are 0 or more, top-p in (0, 1]")
        if (self.max_tokens or 0) < 0:
            raise NanochatError(f"max_tokens is {self.max_tokens}: an answer has 0 or more")
        self.settings = (self.temperature, self.top_k, self.top_p)

    def key(self) -> int:
        """64 bits for `draw_seeds`: a row depends on its prompt, seed and sample number, and on nothing around it."""
        text = f"{self.seed} {self.sample} {self.prompt}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def tail(self) -> int:
        """Tokens of the prompt that the row holds alone."""
        return len(self.prompt) - (self.shared or 0)

# %% [markdown]
# While it runs, the host keeps notes on each row: tokens so far, budget, and the state machine above. All of it works
# on whole arrays; Python looks at single rows only where something special happened.

# %%
#| export notes
"""What the host knows of the running rows: their tokens so far, their budgets, and the state of their tool calls."""

from typing import TYPE_CHECKING

import numpy as np

from nanochat_lib.request import Completion, Request
from nanochat_lib.sampling import draw_seeds

if TYPE_CHECKING:
    from nanochat_lib.engine import Engine

# %%
#| export notes
class Notes:
    """Notes on up to `rows` running rows of up to `width` tokens of answer each.

    Row i of the batch keeps its notes on line `line[i]`, so that rows can move without them.
    """

    def __init__(self, rows: int, width: int):
        self.running: list[Request] = []
        self.line, self.free = np.zeros(rows, np.int64), list(range(rows))
        self.keys = np.zeros(rows, np.uint64)
        self.lengths, self.shared, self.counts = np.zeros((3, rows), np.int64)
        self.budgets, self.calls, self.forced_until = np.zeros((3, rows), np.int64)
        self.tokens = np.zeros((rows, width), np.int64)
        self.mask, self.logprobs = np.zeros(self.tokens.shape, np.int64), np.zeros(self.tokens.shape)

    def join(self, request: Request, budget: int) -> None:
        """A request becomes the last row; it may say `budget` tokens."""
        line = self.line[len(self.running)] = self.free.pop()
        self.running.append(request)
        self.keys[line], self.lengths[line], self.shared[line] = request.key(), len(request.prompt), request.shared or 0
        self.counts[line], self.budgets[line], self.calls[line], self.forced_until[line] = 0, budget, -1, 0

    @property
    def lines(self) -> np.ndarray:
        return self.line[:len(self.running)]

    def seeds(self) -> np.ndarray:
        """Fresh bits for the coming token of each row."""
        return draw_seeds(self.keys[self.lines], self.counts[self.lines])

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For Slots.feed: each row's last token, how many tokens its tail holds before it, how many it shares."""
        line = self.lines
        counts, shared = self.counts[line], self.shared[line]
        return self.tokens[line, counts - 1], self.lengths[line] + counts - 1 - shared, shared

    def write(self, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Note a token of each row, forced ones in place of sampled ones; returns tokens, logprobs, forced (B,)."""
        line = self.lines
        counts = self.counts[line]
        forced = counts < self.forced_until[line]
        tokens, logprobs = np.where(forced, self.tokens[line, counts], tokens), np.where(forced, 0.0, logprobs)
        self.tokens[line, counts], self.mask[line, counts], self.logprobs[line, counts] = tokens, ~forced, logprobs
        self.counts[line] = counts + 1
        return tokens, logprobs, forced

    def ended(self, engine: "Engine", tokens: np.ndarray, forced: np.ndarray) -> dict[int, str]:
        """{row: finish reason} of rows that end with these tokens. Tool calls are followed and answered on the way."""
        line, ended = self.lines, {}
        counts, context = self.counts[line], engine.model.config.sequence_len
        for row in np.flatnonzero(counts >= self.budgets[line]).tolist():
            full = self.lengths[line[row]] + counts[row] > context and counts[row] != self.running[row].max_tokens
            ended[row] = "context" if full else "length"
        for row in np.flatnonzero(engine.notable[tokens] & ~forced).tolist():
            if tokens[row] in engine.stops:
                ended[row] = "stop"
            else:
                self.follow_call(engine, line[row], tokens[row])
        for row, request in enumerate(self.running):
            if request.stop and tokens[row] in request.stop and not forced[row]:
                ended[row] = "stop"
        return ended

    def follow_call(self, engine: "Engine", line: int, token: int) -> None:
        """The tool state machine: a call's start is noted; its end puts the result into the stream."""
        count = self.counts[line]
        if token == engine.python_start:  # a second start begins the call anew
            self.calls[line] = count
        elif self.calls[line] >= 0:  # python_end of an open call
            said = engine.answer_call(self.tokens[line, self.calls[line]:count - 1].tolist())
            said = said[:self.budgets[line] - count]
            self.tokens[line, count:count + len(said)] = said
            self.calls[line], self.forced_until[line] = -1, count + len(said)

    def completion(self, row: int, reason: str) -> Completion:
        """A row's answer; a stop token is not part of it."""
        line = self.line[row]
        count = self.counts[line] - (reason == "stop")
        notes = (notes[line, :count].tolist() for notes in (self.tokens, self.mask, self.logprobs))
        return Completion(*notes, reason, int(self.tokens[line, count]) if reason == "stop" else None)

    def leave(self, ended: list[int], movers: list[int], holes: list[int]) -> None:
        """Ended rows go; the rows `movers` take the places `holes`, and the batch is dense again."""
        keep = len(self.running) - len(ended)
        self.free += self.line[ended].tolist()
        self.line[holes] = self.line[movers]
        for hole, mover in zip(holes, movers):
            self.running[hole] = self.running[mover]
        del self.running[keep:]

# %% [markdown]
# ## Prompts that begin alike
#
# Sixteen answers to one question hold the same prompt sixteen times; a thousand chats begin with the same
# instructions. Such a beginning needs to be computed only once, and kept only once: it never changes, since no token
# sees a later one. What a row adds is its own (**copy on write** at the finest grain: nothing is ever copied). Which
# prompts share how much? In sorted order, those that begin alike are neighbours.

# %%
#| export sharing
"""Which prompts begin alike, and by how much it pays to keep that beginning once."""

from collections import Counter
from dataclasses import dataclass

from nanochat_lib.request import Request

# %%
#| export sharing
LEAST = 16  # a beginning shorter than this is not worth a place of its own


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@dataclass
class Group:
    """Prompts with a common beginning of `length` tokens, `uses` rows in all."""

    length: int
    uses: int
    prompts: list[tuple[int, ...]]

    @property
    def saved(self) -> int:
        """Positions that are kept once instead of in every row."""
        return self.length * (self.uses - 1)

# %%
#| export sharing
def shared_beginnings(prompts: Counter[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """How many tokens each prompt shares with others (0: none), given how many rows want it.

    In sorted order, prompts that begin alike are neighbours; a prompt joins the group before it if that saves more.
    """
    groups: list[Group] = []
    for prompt in sorted(prompts):
        new = Group(len(prompt), prompts[prompt], [prompt])
        if groups:
            last = groups[-1]
            both = Group(common(last.prompts[0][:last.length], prompt), last.uses + new.uses, [*last.prompts, prompt])
            if both.length >= LEAST and both.saved >= last.saved + new.saved:
                groups[-1] = both
                continue
        groups.append(new)
    return {prompt: group.length if group.uses > 1 and group.length >= LEAST else 0
            for group in groups for prompt in group.prompts}


def plan(requests: list[Request], kept: list[tuple[int, ...]] = (), most: int | None = None) -> None:
    """Set `shared` of requests not looked at yet: first what is `kept` already, then what they have in common.

    `most`: tokens of the longest beginning for which there is a place.
    """
    new = [request for request in requests if request.shared is None]
    wanted = Counter(tuple(request.prompt) for request in new)
    lengths = {prompt: max((len(head) for head in kept if prompt[:len(head)] == head), default=0) for prompt in wanted}
    lengths |= shared_beginnings(Counter({prompt: n for prompt, n in wanted.items() if not lengths[prompt]}))
    for request in new:
        length = lengths[tuple(request.prompt)]
        request.shared = length if most is None else min(length, most)

# %%
rules = tuple(range(100, 140))  # instructions of 40 tokens before every question
wanted = Counter({rules + (1, 2, 3): 16, rules + (7,): 4, rules + (8, 9): 1, (5,) * 30: 1, (6,) * 50: 2})
for prompt, shared in shared_beginnings(wanted).items():
    print(f"{wanted[prompt]:2} rows want a prompt of {len(prompt)} tokens: {shared} shared")

# %% [markdown]
# Attention of a row is now a sum over two places. A softmax can be taken apart: for the keys of each place, keep the
# sum of e^score · value and the sum of e^score. Both sums add up, and their quotient is the attention over all keys:
#
# $$\frac{\sum_{\text{shared}} e^{s_i} v_i + \sum_{\text{own}} e^{s_j} v_j}
# {\sum_{\text{shared}} e^{s_i} + \sum_{\text{own}} e^{s_j}}$$
#
# For the shared part, the queries of all its rows meet the same keys: a product of matrices, which reads the keys once
# for sixteen rows (Hydragen, Juravsky et al., arXiv 2402.05099). The memory of a batch, then: a fixed number of rows
# and of shared beginnings, made once. Nothing changes its place, and who does not fit waits.

# %%
#| export slots
"""The memory of a running batch: what each row holds alone, and beginnings that several rows share."""

import numpy as np
import torch

from nanochat_lib.gpt import GPT
from nanochat_lib.kv_cache import KVCache

# %%
#| export slots
class Slots:
    """Keys and values of up to `rows` running rows, each alone or behind one of `prefixes` shared beginnings.

    tails and heads are (layer, 2, row or prefix, kv head, position, head dim): each row's own part, and the shared
    parts, kept once however many rows stand on them and never written again. Nothing changes its place or shape, as
    CUDA graphs want it. Places behind an end may hold anything finite: they are written before they are seen.
    """

    def __init__(self, model: GPT, rows: int, capacity: int, prefixes: int = 0, prefix_capacity: int = 0):
        config, self.device = model.config, model.lm_head.weight.device
        self.rows, self.capacity, self.prefixes, self.prefix_capacity = rows, capacity, prefixes, prefix_capacity
        place = dict(dtype=model.dtype, device=self.device)
        layers, heads, D = config.n_layer, config.n_kv_head, config.head_dim
        self.tails, self.heads = (torch.zeros(layers, 2, n, heads, positions, D, **place)
                                  for n, positions in ((rows, capacity), (prefixes, prefix_capacity)))
        self.previous = torch.zeros(rows, config.n_embd, **place)  # each row's last embedding before smear
        self.head_previous = torch.zeros(prefixes, config.n_embd, **place)
        self.head_logits = torch.zeros(prefixes, config.vocab_size, device=self.device)  # after each beginning
        self.head_lengths = torch.zeros(prefixes + 1, dtype=torch.int64, device=self.device)  # the last: no beginning
        self.inputs = torch.zeros(4, rows, dtype=torch.int64, device=self.device)
        self.ids, self.lengths, self.offsets, self.owners = self.inputs  # coming token, own tokens, shared ones, where
        self.places = torch.arange(max(capacity, prefix_capacity), device=self.device)
        self.longest = 0  # max(lengths), known without asking the device
        self.members: torch.Tensor | None = None  # (prefixes, n) rows that stand on each, padded with −1
        self.clear()

    def clear(self) -> None:
        """Forget all rows and beginnings."""
        self.shares = np.full(self.rows, -1)  # the beginning each row stands on, or −1
        self.known: dict[tuple[int, ...], int] = {}  # beginnings and their places, the one used last at the end
        self.users = [0] * self.prefixes

    def claim(self, head: tuple[int, ...]) -> bool | None:
        """One more row will stand on `head`: True if it is here, False if it is to be filled, None without a place."""
        place = self.known.pop(head, None)
        here = place is not None
        if not here and len(head) <= self.prefix_capacity:
            place = next((place for place in range(self.prefixes) if place not in self.known.values()), None)
            if place is None and (unused := [old for old, place in self.known.items() if not self.users[place]]):
                place = self.known.pop(unused[0])  # the one used least recently
        if place is None:
            return None
        self.known[head] = place
        self.users[place] += 1
        return here

    def keep_head(self, place: int, cache: KVCache, row: int, length: int, logits: torch.Tensor) -> None:
        """Copy a beginning out of a prefill."""
        self.heads[:, :, place, :, :length] = cache.store[:, :, row, :, :length].transpose(0, 1)
        self.head_previous[place], self.head_logits[place] = cache.previous[row], logits
        self.head_lengths[place] = length

    def fill(self, cache: KVCache, places: list[int], lengths: list[int]) -> None:
        """Begin a cache of len(places) rows with these shared beginnings."""
        cache.allocate(self.heads[0, 0].transpose(1, 2))
        for row, (place, length) in enumerate(zip(places, lengths)):
            cache.store[:, :, row, :, :length] = self.heads[:, :, place, :, :length].transpose(0, 1)
        cache.previous = self.head_previous[places]

    def keep_tails(self, at: int, cache: KVCache, source: list[int], start: int = 0, end: int | None = None) -> None:
        """Copy rows `source` of a prefill, positions `start` to `end`, to the rows from `at` on: one may serve many."""
        end, rows = cache.longest if end is None else end, slice(at, at + len(source))
        index = torch.tensor(source, device=self.device)
        for layer, tails in enumerate(self.tails[:, :, rows, :, :end - start]):
            tails.copy_(cache.store[:, layer, :, :, start:end].index_select(1, index))
        self.previous[rows], self.longest = cache.previous[index], max(self.longest, end - start)

    def stand(self, at: int, places: list[int]) -> None:
        """The rows from `at` on stand on these shared beginnings; claiming a place has counted them as users."""
        self.shares[at:at + len(places)] = places

    def leave(self, row: int) -> None:
        """This row has ended; its beginning stays as long as its place is not needed."""
        if self.shares[row] >= 0:
            self.users[self.shares[row]] -= 1
            self.shares[row] = -1

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows `source` over the rows `target`, which have ended."""
        if source:
            self.tails[:, :, target, :, :self.longest + 1] = self.tails[:, :, source, :, :self.longest + 1]
            self.previous[target] = self.previous[source]
            self.shares[target], self.shares[source] = self.shares[source], -1

    def group(self, B: int) -> None:
        """Note which of the first B rows stand on which beginning."""
        used, self.members = self.shares[:B], None
        if used.max(initial=-1) >= 0:
            rows = [np.flatnonzero(used == place) for place in range(used.max() + 1)]
            members = np.full((len(rows), max(map(len, rows))), -1)
            for place, found in enumerate(rows):
                members[place, :len(found)] = found
            self.members = torch.from_numpy(members).to(self.device)

    def feed(self, ids: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> None:
        """Set the coming tokens and what the first len(ids) rows hold: one copy to the device."""
        self.longest, self.host_lengths = int(lengths.max()), lengths
        owners = self.shares[:len(ids)] % (self.prefixes + 1)  # −1 becomes the last
        self.inputs[:, :len(ids)].copy_(torch.from_numpy(np.stack((ids, lengths, offsets, owners))), non_blocking=True)

# %%
#| export lookback
"""Attention of one new token per row to all that its row holds, its own part and the beginning it shares."""

import torch
from torch import Tensor

from nanochat_lib.attention import HEAD_DIMS, cached_attention, decoding_backend
from nanochat_lib.gpt import GPTConfig, window_sizes
from nanochat_lib.slots import Slots

# %%
#| export lookback
SPAN = 16  # rows whose attention is worth calls of their own


def look_back(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Σ e^score · v (N, n, D) and Σ e^score (N, n, 1) of queries (N, n, D) over keys and values (N, S, D), in float32.

    Normed queries and keys bound a score by 1.44 √D, so no maximum need be taken off, and two such pairs add up.
    """
    scores = torch.baddbmm(bias, q.float(), k.float().transpose(1, 2), alpha=q.size(-1) ** -0.5).exp_()
    return torch.bmm(scores, v.float()), scores.sum(-1, keepdim=True)


def seen_bias(queries: Tensor, keys: Tensor, ends: Tensor, window: int, heads: int, group: int) -> Tensor:
    """0 where a query sees a key, −∞ elsewhere.

    Positions of queries and ends (N, n) and of keys (S,) → (N · heads, n · group, S).
    """
    seen = (keys < ends[..., None]) & (keys >= queries[..., None] - window)
    bias = torch.zeros(seen.shape, device=keys.device).masked_fill_(~seen, -torch.inf)
    N, n, S = bias.shape
    return bias[:, None, :, None].expand(N, heads, n, group, S).reshape(N * heads, n * group, S)

# %%
#| export lookback
def runs_of(lengths: list[int]) -> list[tuple[slice, int]]:
    """Runs of rows, each with the end of its longest tail: short rows need not look as far as the longest."""
    runs: list[tuple[slice, int]] = []
    for start in range(0, len(lengths), SPAN):
        rows, end = slice(start, min(start + SPAN, len(lengths))), max(lengths[start:start + SPAN]) + 1
        if runs and max(end, runs[-1][1]) <= 1.2 * min(end, runs[-1][1]):  # alike: one run
            before, last = runs.pop()
            rows, end = slice(before.start, rows.stop), max(end, last)
        runs.append((rows, end))
    return runs


def sharing_kernel(config: GPTConfig, device: torch.device):
    """Lesson 03's decoding kernel, which reads shared beginnings where they lie; None where it does not run."""
    D = config.head_dim if config.head_dim in HEAD_DIMS else 0
    if device.type != "cuda" or decoding_backend("cuda", D) != "triton":
        return None
    from nanochat_lib.kernels.decoding import decode_attention

    return decode_attention

# %%
#| export lookback
class LookBack:
    """Attention for a step of B rows: `begin` once a step, `attend` in each layer."""

    def __init__(self, config: GPTConfig, device: torch.device):
        self.config, self.windows = config, window_sizes(config)
        self.heads, self.kernel = (config.n_kv_head, config.n_head // config.n_kv_head), sharing_kernel(config, device)

    def begin(self, slots: Slots, B: int, static: bool) -> None:
        """Find out what each row sees. `static`: no look at lengths on the host, all shapes fixed, for a CUDA graph."""
        self.plain = static and (slots.members is None or self.kernel is not None)
        if self.plain:
            self.totals = slots.lengths[:B] + slots.offsets[:B]
            return
        self.runs = [(slice(0, B), slots.capacity)] if static else runs_of(slots.host_lengths.tolist())
        lengths = slots.lengths[:, None]
        self.own = {window: [seen_bias(lengths[rows], slots.places[:end], lengths[rows] + 1, window, *self.heads)
                             for rows, end in self.runs] for window in set(self.windows)}
        if slots.members is not None:
            members = slots.members.clamp(min=0)
            offsets = slots.offsets[members]
            ends = torch.where(slots.members < 0, 0, offsets)
            positions, keys = slots.lengths[members] + offsets, slots.places[:slots.prefix_capacity]
            self.shared = {window: seen_bias(positions, keys, ends, window, *self.heads)
                           for window in set(self.windows)}

    def attend(self, layer: int, q: Tensor, slots: Slots) -> Tensor:
        """q (B, H, D) over everything its rows hold → (B, C)."""
        (B, H, D), KVH, window = q.shape, self.config.n_kv_head, self.windows[layer]
        store = slots.tails[layer]
        if self.plain:
            q, (k, v) = q.unsqueeze(1), store[:, :B].transpose(2, 3)
            if slots.members is None:
                return cached_attention(q, k, v, slots.lengths[:B], window).reshape(B, -1)
            shared = (*slots.heads[layer].transpose(2, 3), slots.head_lengths, slots.owners[:B])
            return self.kernel(q, k, v, self.totals, window, shared).reshape(B, -1)
        queries, parts = q.reshape(B * KVH, -1, D), []
        for (rows, end), bias in zip(self.runs, self.own[window]):
            k, v = (store[i, rows].flatten(0, 1)[:, :end] for i in (0, 1))
            parts.append(look_back(queries[rows.start * KVH:rows.stop * KVH], k, v, bias))
        total, weight = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
        total, weight = total.view(B, H, D), weight.view(B, H, 1)
        if slots.members is not None:
            self.add_shared(q, slots.heads[layer], slots.members, self.shared[window], total, weight)
        return total.div_(weight).view(B, -1).to(q.dtype)

    def add_shared(self, q: Tensor, store: Tensor, members: Tensor, bias: Tensor, total: Tensor,
                   weight: Tensor) -> None:
        """Add what q (B, H, D) sees in shared beginnings (2, prefix, kv head, S, D): a product for all rows on one."""
        (P, n), KVH, D = members.shape, self.config.n_kv_head, q.size(-1)
        rows = members.clamp(min=0).flatten()
        asked = q[rows].view(P, n, KVH, -1, D).transpose(1, 2).reshape(P * KVH, -1, D)
        k, v = (store[i, :P].flatten(0, 1) for i in (0, 1))
        for whole, part in zip((total, weight), look_back(asked, k, v, bias)):
            part = part.view(P, KVH, n, -1, part.size(-1)).transpose(1, 2)
            whole.index_add_(0, rows, part.reshape(P * n, -1, part.size(-1)))

# %%
q, k, v = torch.randn(3, 5, 8), torch.randn(3, 20, 8), torch.randn(3, 20, 8)
nothing_hidden = torch.zeros(3, 5, 12)
left = look_back(q, k[:, :12], v[:, :12], nothing_hidden)
right = look_back(q, k[:, 12:], v[:, 12:], nothing_hidden[..., :8])
whole = torch.nn.functional.scaled_dot_product_attention(q, k, v)
assert torch.allclose((left[0] + right[0]) / (left[1] + right[1]), whole, atol=1e-5)

# %% [markdown]
# ## A step, written for speed
#
# `GPT.forward` is written to be read, and to train. A step of decoding repeats it for one token of each row, thousands
# of times, so it pays to write it again with fewer and larger operations: queries, keys, values and the value gate in
# one product, sums fused into the products that follow, and weights in the dtype that computes (the model keeps
# float32 and casts at each use, which would triple the bytes a step reads).

# %%
#| export decoder
"""One decode step for all rows of a batch: fixed shapes, few operations, no word to the host."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_lib.fused import SOFTCAP
from nanochat_lib.gpt import GPT, SMEAR_CHANNELS, VALUE_CHANNELS
from nanochat_lib.lookback import LookBack
from nanochat_lib.slots import Slots

# %%
#| export decoder
class Layer(NamedTuple):
    """A block's weights as a step uses them."""

    qkv: Tensor  # queries, keys, values and the value gate as one matrix
    proj: Tensor
    fc: Tensor
    out: Tensor
    mix: Tensor  # (2,): how much of the stream, how much of x0
    values: Tensor | None  # value embeddings


class Place(NamedTuple):
    """The coming tokens of a step, and where they stand."""

    ids: Tensor  # (B,)
    cos: Tensor  # (B, 1, D), each angle twice
    sin: Tensor
    places: Tensor  # (B · 2 · KVH,): in which line of a layer's store each key and value goes

# %%
#| export decoder
def layer_weights(model: GPT, number: int) -> Layer:
    """A block's weights in the model's dtype: the model's own memory where that is its dtype already, else copies."""
    block, embedding = model.transformer.h[number], f"{number}" in model.value_embeds
    attn, parts = block.attn, [block.attn.c_q.weight, block.attn.c_k.weight, block.attn.c_v.weight]
    if embedding:
        parts.append(F.pad(attn.ve_gate.weight, (0, model.config.n_embd - VALUE_CHANNELS)))
    mix = torch.stack((model.resid_lambdas[number], model.x0_lambdas[number]))
    weights = [torch.cat(parts), attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight, mix]
    weights += [model.value_embeds[f"{number}"].weight] if embedding else []
    return Layer(*(weight.detach().to(model.dtype) for weight in weights), *[None] * (not embedding))


def top_weights(model: GPT) -> list[Tensor]:
    """The weights outside the blocks."""
    weights = (model.transformer.wte.weight, model.lm_head.weight, model.smear_gate.weight, model.smear_lambda,
               torch.cat((torch.ones_like(model.backout_lambda), -model.backout_lambda)))  # of the stream, of halfway
    return [weight.detach().to(model.dtype) for weight in weights]

# %%
#| export decoder
class Decoder:
    """GPT.forward for one token of each row, written with fewer and larger operations."""

    def __init__(self, model: GPT):
        self.model, self.config = model, model.config
        self.static = model.lm_head.weight.device.type == "cuda"  # shapes that do not depend on lengths
        self.look = LookBack(model.config, model.lm_head.weight.device)
        self.cos = torch.cat((model.cos, model.cos), dim=-1)
        self.sin = torch.cat((model.sin, -model.sin), dim=-1)
        self.layers = [layer_weights(model, number) for number in range(self.config.n_layer)]
        self.top = top_weights(model)

    def refresh(self) -> None:
        """Take over weights that have been trained meanwhile, into the same memory."""
        fresh = [layer_weights(self.model, number) for number in range(self.config.n_layer)]
        for old, new in zip((*self.layers, self.top), (*fresh, top_weights(self.model))):
            for mine, theirs in zip(old, new):
                if theirs is not None and mine.data_ptr() != theirs.data_ptr():
                    mine.copy_(theirs)

    def project(self, x: Tensor, x0: Tensor, layer: Layer, at: Place, store: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with x0 mixed in (B, C) and queries (B, H, D); keys and values go to the store (positions, D)."""
        D, H, turned = self.config.head_dim, self.config.n_head, self.config.n_head + self.config.n_kv_head
        x = torch.addcmul(layer.mix[1] * x0, layer.mix[0], x)
        qkv = F.linear(F.rms_norm(x, x.shape[-1:]), layer.qkv)
        heads = qkv[:, :(turned + self.config.n_kv_head) * D].view(len(x), -1, D)
        qk, v = heads[:, :turned], heads[:, turned:]
        qk = torch.addcmul(qk * at.cos, qk.roll(D // 2, -1), at.sin)
        qk = F.rms_norm(qk, qk.shape[-1:]) * 1.2
        if layer.values is not None:
            gate = 3 * torch.sigmoid(qkv[:, -self.config.n_kv_head:, None])
            v = torch.addcmul(v, gate, F.embedding(at.ids, layer.values).view(v.shape))
        store.index_copy_(0, at.places, torch.cat((qk[:, H:], v), 1).view(-1, D))
        return x, qk[:, :H]

    def finish(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        """Add attention's y and the MLP to the stream."""
        x = torch.addmm(x, y, layer.proj.t())
        h = F.linear(F.rms_norm(x, x.shape[-1:]), layer.fc)
        return torch.addmm(x, F.relu_(h).square_(), layer.out.t())

    def embed(self, ids: Tensor, previous: Tensor) -> Tensor:
        """x0 (B, C): embeddings with smear; `previous` holds the embeddings before, and afterwards these."""
        wte, _, gate, strength, _ = self.top
        x = F.rms_norm(F.embedding(ids, wte), (self.config.n_embd,))
        x0 = torch.addcmul(x, strength * torch.sigmoid(F.linear(x[:, :SMEAR_CHANNELS], gate)), previous)
        previous.copy_(x)
        return x0

    def place(self, slots: Slots, B: int) -> Place:
        """Where the coming tokens stand."""
        lengths, config = slots.lengths[:B], self.config
        positions = lengths + slots.offsets[:B]
        heads = torch.arange(B * config.n_kv_head, device=slots.device).view(B, 1, -1)
        values = torch.arange(2, device=slots.device)[:, None] * (slots.rows * config.n_kv_head)  # behind all keys
        places = ((heads + values) * slots.capacity + lengths[:, None, None]).flatten()
        return Place(slots.ids[:B], self.cos[positions][:, None], self.sin[positions][:, None], places)

    def __call__(self, slots: Slots, B: int) -> Tensor:
        """Logits (B, vocab) float32 after the tokens slots.ids, whose keys and values are now the rows' last."""
        self.look.begin(slots, B, self.static)
        at = self.place(slots, B)
        x = x0 = self.embed(at.ids, slots.previous[:B])
        for number, layer in enumerate(self.layers):
            x, q = self.project(x, x0, layer, at, slots.tails[number].view(-1, self.config.head_dim))
            x = self.finish(x, self.look.attend(number, q, slots), layer)
            if number == self.config.n_layer // 2:
                halfway = x
        x = F.rms_norm(x + self.top[4][1] * halfway, x.shape[-1:])
        logits = F.linear(x, self.top[1][:self.config.vocab_size]).float()
        return logits.div_(SOFTCAP).tanh_().mul_(SOFTCAP)

# %% [markdown]
# It agrees with the model. Two rows here stand on one beginning of 20 tokens, a third stands alone:

# %%
sequence = torch.randint(0, 256, (1, 30))
with torch.inference_mode():
    cache = KVCache(config, rows=1, capacity=30)
    slots = Slots(model, rows=3, capacity=32, prefixes=1, prefix_capacity=32)
    cache.resize([0], "cpu")
    logits = model(sequence[:, :25], kv_cache=cache)[0, -1]
    slots.claim("the first 20 tokens")
    slots.keep_head(0, cache, 0, 20, logits)
    slots.keep_tails(0, cache, [0, 0], 20, 25)  # rows 0 and 1: what comes behind the beginning
    slots.stand(0, [0, 0])
    slots.keep_tails(2, cache, [0], 0, 25)  # row 2: all of it
    slots.group(3)
    slots.feed(ids=np.full(3, int(sequence[0, 25])), lengths=np.array([5, 5, 25]), offsets=np.array([20, 20, 0]))
    stepped, expected = Decoder(model)(slots, 3), model(sequence[:, :26])[0, -1]
assert all(torch.allclose(row, expected, atol=1e-4) for row in stepped)

# %% [markdown]
# ### On a GPU: one launch
#
# A step of a 12-layer model is some 300 kernels of a few microseconds each. Python and PyTorch take longer to start
# them than the GPU to run them, so the GPU waits. A **CUDA graph** records a step once, with all addresses and shapes,
# and replays it with a single launch. That is why the slots never move and why a step asks the host for nothing.
# `torch.compile` makes one kernel of all that stands between two matrix products. An early form of these cells,
# measured on an H200 (12 layers of width 768, bfloat16, one row): `GPT.forward` 12.2 ms, the step above 6.6 ms,
# recorded 0.78 ms, recorded and fused 0.57 ms: a ninth of the bandwidth. With 64 rows a step takes 1.16 ms, 54,900
# tokens a second.
#
# A model so small is bound by the latency of 170 kernels, one after another. So one or two rows take **five kernels a
# layer**: norm and queries, keys, values; attention over parts of the keys; sum of the parts and projection; norm and
# the wide product; the narrow one. A kernel's weights do not depend on the kernel before it: it asks for them, lets
# the next one start (*programmatic dependent launch*), and only then waits for its input. On an H100, at 2,016 tokens
# of context, such a step takes 0.20 ms, and the choice of a token 0.007 instead of 0.036 ms: while the step runs, 43 %
# of the bandwidth. The engine as a whole gives some 2,500 tokens a second, 22 %: the host, which waits for a token
# before it starts the next step, takes as long as the device.

# %%
#| export kernels/step
"""A decode step of a few rows in five kernels a layer, and the choice of the next token in one.

A product with one row reads its matrix once and computes next to nothing: all that counts is that the memory never
waits. Weights do not depend on the kernel before, so each kernel first asks for its own, lets the next one start
(programmatic dependent launch, from Hopper on), and only then waits for its input. Between the weights everything is
float32. Needs torch and triton only.
"""

import functools

import torch
import triton
import triton.language as tl

# %%
#| export kernels/step
INTERPRETING = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy instead of a GPU
EPSILON = tl.constexpr(1.1920929e-07)  # that of F.rms_norm: float32's
MOST_ROWS = 2  # with more, cuBLAS and its matrix units are faster


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Let the next kernel start, and wait until the one before is done."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def inverse_length(x, K):
    """1 / √(mean x²) of K numbers, behind which x holds zeros."""
    return tl.rsqrt(tl.sum(x * x, 0) / K + EPSILON)


@triton.jit
def tile_of(weights, rows, columns, N, K):
    """These rows of a matrix (N, K)."""
    return tl.load(weights + rows.to(tl.int64)[:, None] * K + columns[None, :],
                   mask=(rows < N)[:, None] & (columns < K)[None, :], other=0.0)

# %%
#| export kernels/step
@triton.jit
def embed_kernel(ids, wte, gate, strength, previous, out, K, CHANNELS: tl.constexpr, CHAINED: tl.constexpr,
                 BLOCK_K: tl.constexpr):
    """out (B, K): normed embeddings, with smear; `previous` (B, K) holds those before, then these."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    row, columns = tl.program_id(0), tl.arange(0, BLOCK_K)
    inside, line = columns < K, row * K + columns
    x = tl.load(wte + tl.load(ids + row) * K + columns, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(previous + line, mask=inside, other=0.0).to(tl.float32)
    x = (x * inverse_length(x, K)).to(previous.dtype.element_ty)
    tl.store(previous + line, x, mask=inside)
    x = x.to(tl.float32)
    opened = tl.sum(x * tl.load(gate + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32), 0)
    x += tl.load(strength).to(tl.float32) * tl.sigmoid(opened) * before
    tl.store(out + line, x, mask=inside)

# %% [markdown]
# A product with what it needs before (mix, norm) and after (relu², softcap). The norm's factor is applied to the sums,
# so that no thread waits for it.

# %%
#| export kernels/step
@triton.jit
def norm_product_kernel(x, other, mix, mixed, weights, out, N, K, cap, B: tl.constexpr, SQUARED_RELU: tl.constexpr,
                        CHAINED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (B, N) = act(weights (N, K) · norm(x)) of x (B, K), or of mix[0] · x + mix[1] · other, kept in `mixed`.

    The activation is relu², or a softcap if there is a `cap`, or none.
    """
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    tile, inside = tile_of(weights, rows, columns, N, K), columns < K
    if other is not None:
        keep, take = tl.load(mix).to(tl.float32), tl.load(mix + 1).to(tl.float32)
    follow(CHAINED)
    for row in tl.static_range(B):
        h = tl.load(x + row * K + columns, mask=inside, other=0.0)
        if other is not None:
            h = keep * h + take * tl.load(other + row * K + columns, mask=inside, other=0.0)
        if mixed is not None:
            if tl.program_id(0) == 0:
                tl.store(mixed + row * K + columns, h, mask=inside)
        y = tl.sum(tile.to(tl.float32) * h[None, :], 1) * inverse_length(h, K)  # neither sum waits for the other
        if SQUARED_RELU:
            y = tl.maximum(y, 0.0)
            y *= y
        if cap is not None:
            small = tl.exp(-2 * tl.abs(y) / cap)
            y = tl.where(y < 0, -cap, cap) * (1 - small) / (1 + small)
        tl.store(out + row * N + rows, y, mask=rows < N)

# %% [markdown]
# Attention: a program takes one part of one head's keys and leaves a sum of values and a sum of weights; the next
# kernel adds the parts up. Keys and queries stay in halves, as rotary positions pair them. The first part also takes
# the new token, and writes its key and value to the cache.

# %%
#| export kernels/step
@triton.jit
def turned(x, cos, sin, D: tl.constexpr):
    """Both halves of a head's query or key, turned by their position and normed to 1.2."""
    half = tl.arange(0, D // 2)
    one, two = tl.load(x + half), tl.load(x + D // 2 + half)
    one, two = one * cos + two * sin, two * cos - one * sin
    size = 1.2 * tl.rsqrt((tl.sum(one * one, 0) + tl.sum(two * two, 0)) / D + EPSILON)
    return one * size, two * size


@triton.jit
def cached(keys, values, start, end, D: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of the keys, and the values, from position `start` on; zeros from `end` on."""
    positions, half, dims = start + tl.arange(0, BLOCK), tl.arange(0, D // 2), tl.arange(0, D)
    held, at = (positions < end)[:, None], positions[:, None] * D
    one = tl.load(keys + at + half[None, :], mask=held, other=0.0)
    two = tl.load(keys + at + D // 2 + half[None, :], mask=held, other=0.0)
    return one, two, tl.load(values + at + dims[None, :], mask=held, other=0.0)

# %%
#| export kernels/step
@triton.jit
def attend_kernel(qkv, lengths, ids, cos, sin, values, keys_held, values_held, out, sums, width, kv_heads, capacity,
                  window, GROUP: tl.constexpr, D: tl.constexpr, CHAINED: tl.constexpr, BLOCK: tl.constexpr):
    """A part of what one head sees: out (B, parts, H · D) = Σ e^score · v, sums (B, parts, H) = Σ e^score.

    qkv (B, width): queries, keys, values and, with value embeddings, their gates. The cache is (row, kv head, position,
    D); the new key and value take the place `length`. Scores are bounded, so no maximum need be taken off.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts, heads, kv_head = tl.num_programs(0), tl.num_programs(1), head // GROUP
    half, dims = tl.arange(0, D // 2), tl.arange(0, D)
    length = tl.load(lengths + row).to(tl.int32)
    seen = tl.minimum(length, window)  # besides itself
    share = tl.cdiv(tl.cdiv(seen, parts), BLOCK) * BLOCK
    first = length - seen + part * share
    end = tl.minimum(first + share, length)
    keys_held += (row * kv_heads + kv_head).to(tl.int64) * capacity * D
    values_held += (row * kv_heads + kv_head).to(tl.int64) * capacity * D
    angles = length * (D // 2) + half
    cosine, sine = tl.load(cos + angles).to(tl.float32), tl.load(sin + angles).to(tl.float32)
    k_one, k_two, v = cached(keys_held, values_held, first, end, D, BLOCK)
    follow(CHAINED)
    qkv += row * width
    q_one, q_two = turned(qkv + head * D, cosine, sine, D)
    q_one, q_two = q_one * (1.0 / D**0.5), q_two * (1.0 / D**0.5)
    acc, total = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        if start > first:
            k_one, k_two, v = cached(keys_held, values_held, start, end, D, BLOCK)
        scores = tl.sum(k_one.to(tl.float32) * q_one[None, :] + k_two.to(tl.float32) * q_two[None, :], 1)
        shares = tl.where(start + tl.arange(0, BLOCK) < end, tl.exp(scores), 0.0)
        total += shares
        acc += shares[:, None] * v.to(tl.float32)
    y, weight = tl.sum(acc, 0), tl.sum(total, 0)
    if part == 0:  # the token itself
        new_one, new_two = turned(qkv + (heads + kv_head) * D, cosine, sine, D)
        new = tl.load(qkv + (heads + kv_heads + kv_head) * D + dims)
        if values is not None:
            gate = 3 * tl.sigmoid(tl.load(qkv + (heads + 2 * kv_heads) * D + kv_head))
            new += gate * tl.load(values + (tl.load(ids + row) * kv_heads + kv_head) * D + dims).to(tl.float32)
        if head % GROUP == 0:
            tl.store(keys_held + length * D + half, new_one.to(keys_held.dtype.element_ty))
            tl.store(keys_held + length * D + D // 2 + half, new_two.to(keys_held.dtype.element_ty))
            tl.store(values_held + length * D + dims, new.to(values_held.dtype.element_ty))
        own = tl.exp(tl.sum(q_one * new_one + q_two * new_two, 0))
        y, weight = y + own * new, weight + own
    line = (row * parts + part) * heads + head
    tl.store(out + line * D + dims, y)
    tl.store(sums + line, weight)

# %%
#| export kernels/step
@triton.jit
def add_product_kernel(stream, x, sums, weights, N, K, B: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
                       CHAINED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """stream (B, N) += weights (N, K) · x (B, K), or · what attention left in `PARTS` parts with their sums."""
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    tile = tile_of(weights, rows, columns, N, K)
    follow(CHAINED)
    for row in tl.static_range(B):
        if sums is None:
            h = tl.load(x + row * K + columns[None, :], mask=(columns < K)[None, :], other=0.0)
        else:
            heads, dims = tl.arange(0, BLOCK_K // D), tl.arange(0, D)
            inside, at = heads < K // D, heads[:, None] * D + dims[None, :]
            h, weight = tl.zeros([BLOCK_K // D, D], tl.float32), tl.zeros([BLOCK_K // D], tl.float32)
            for part in tl.static_range(PARTS):
                line = row * PARTS + part
                h += tl.load(x + line * K + at, mask=inside[:, None], other=0.0)
                weight += tl.load(sums + line * (K // D) + heads, mask=inside, other=1.0)
            h = tl.reshape(h / weight[:, None], [1, BLOCK_K])
        y = tl.load(stream + row * N + rows, mask=rows < N, other=0.0)
        tl.store(stream + row * N + rows, y + tl.sum(tile.to(tl.float32) * h, 1), mask=rows < N)

# %% [markdown]
# The choice of a token is one kernel. It reads the logits once, or with top-k 33 times: the k-th largest is found by
# halving the range in which it lies.

# %%
#| export kernels/step
@triton.jit
def in_order(z):
    """Integers that are ordered as these float32 numbers are."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def bound_of(logits, V, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """The largest integer that TOP_K of V numbers reach, taken as integers of the same order; found by bisection."""
    low, high = tl.full([], -2147483648, tl.int32), tl.full([], 2147483647, tl.int32)
    for _ in range(32):
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = tl.load(logits + ids, mask=ids < V, other=float("-inf"))
            count += ((in_order(z) >= middle) & (ids < V)).to(tl.int32)
        enough = tl.sum(count, 0) >= TOP_K
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@triton.jit
def choose_kernel(logits, seeds, picked, B, V, temperature, TOP_K: tl.constexpr, NOISE: tl.constexpr,
                  BLOCK: tl.constexpr):
    """picked (2, B) float64: a token of each row, and its log-probability. Equals sampling.pick, but for ties."""
    row = tl.program_id(0)
    logits += row * V
    if TOP_K > 0:
        bound = bound_of(logits, V, TOP_K, BLOCK)
    best, best_id = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(logits + ids, mask=ids < V, other=float("-inf"))
        total += tl.exp(z)  # logits are within ±15
        score = z
        if NOISE:  # as in sampling.gumbel
            x = (ids * -1640531535) ^ tl.load(seeds + row)
            x = (x ^ (x >> 15)) * -2048144789
            x = (x ^ (x >> 15)) * -1028477387
            score = z / temperature - tl.log(-tl.log(((x >> 9).to(tl.float32) + 0.5) * 1.1920929e-07 + 0.5))
        if TOP_K > 0:
            score = tl.where(in_order(z) >= bound, score, float("-inf"))
        best_id, best = tl.where(score > best, ids, best_id), tl.maximum(score, best)
    token = tl.min(tl.where(best == tl.max(best, 0), best_id, V), 0)
    chance = tl.load(logits + token) - tl.log(tl.sum(total, 0))
    tl.store(picked + row, token.to(tl.float64))
    tl.store(picked + B + row, chance.to(tl.float64))

# %%
#| export kernels/step
@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Kernels may start before the one ahead is done from compute capability 9.0 on."""
    if INTERPRETING or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return dict(CHAINED=False)
    return dict(CHAINED=True, launch_pdl=True)


def product_settings(K: int, parts: int = 0) -> dict[str, int]:
    """Tile of a product with a matrix of K columns: whole rows, about 8,192 numbers, in the registers of four warps."""
    columns = triton.next_power_of_2(K)
    numbers = 16384 if parts and K <= 1024 else 8192  # every program adds up all parts: fewer programs
    return dict(BLOCK_N=max(1, numbers // columns), BLOCK_K=columns, num_warps=4)


def attend_settings(seen: int) -> tuple[int, dict[str, int]]:
    """Parts into which a head's keys are cut, and how many are read at a time."""
    return 8 if seen <= 512 else 16, dict(BLOCK=64, num_warps=4)

# %%
#| export kernels/step
def embed(ids, wte, gate, strength, previous) -> torch.Tensor:
    """(B, C) float32: see embed_kernel. The first kernel of a step starts when all before it is done."""
    B, K = previous.shape
    out, chained = torch.empty(B, K, device=previous.device), launch_options(previous.device)["CHAINED"]
    embed_kernel[B,](ids, wte, gate, strength, previous, out, K, gate.size(-1), chained, triton.next_power_of_2(K))
    return out


def norm_product(x, weights, other=None, mix=None, mixed=None, squared_relu=False, cap=None) -> torch.Tensor:
    """(B, N) float32: see norm_product_kernel."""
    (B, K), N = x.shape, len(weights)
    out, sizes = torch.empty(B, N, device=x.device), product_settings(K)
    norm_product_kernel[triton.cdiv(N, sizes["BLOCK_N"]),](x, other, mix, mixed, weights, out, N, K, cap, B,
                                                          squared_relu, **sizes, **launch_options(x.device))
    return out


def attend(qkv, lengths, ids, cos, sin, values, store, heads, window) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts (B, parts, H · D) and their sums (B, parts, H): see attend_kernel. store (2, rows, KVH, capacity, D)."""
    (B, width), (_, _, KVH, capacity, D) = qkv.shape, store.shape
    parts, sizes = attend_settings(min(window, capacity))
    out, sums = torch.empty(B, parts, heads * D, device=qkv.device), torch.empty(B, parts, heads, device=qkv.device)
    attend_kernel[parts, heads, B](qkv, lengths, ids, cos, sin, values, store[0], store[1], out, sums, width, KVH,
                                   capacity, window, heads // KVH, D, **sizes, **launch_options(qkv.device))
    return out, sums


def add_product(stream, x, weights, sums=None) -> torch.Tensor:
    """stream (B, N) + x · weightsᵀ, in place: see add_product_kernel."""
    (B, N), K = stream.shape, weights.size(1)
    D, parts = (1, 0) if sums is None else (K // sums.size(-1), sums.size(1))
    sizes = product_settings(K, parts)
    add_product_kernel[triton.cdiv(N, sizes["BLOCK_N"]),](stream, x, sums, weights, N, K, B, D, parts, **sizes,
                                                         **launch_options(x.device))
    return stream

# %%
#| export kernels/step
def choose(logits: torch.Tensor, seeds: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """(2, B) float64: see choose_kernel. logits (B, V) float32 within ±15; seeds (B,) int32."""
    B, V = logits.shape
    picked = torch.empty(2, B, dtype=torch.float64, device=logits.device)
    k = top_k if 0 < (top_k or 0) < V and temperature > 0 else 0
    choose_kernel[B,](logits, seeds, picked, B, V, max(temperature, 1e-6), k, temperature > 0,
                      min(4096, triton.next_power_of_2(V)), num_warps=16)
    return picked

# %%
#| export kernels/step
def compile_cases(capability: int):
    """What `compile_check` builds: (label, kernel, types, constants, options) of every way the kernels are launched."""
    chained = capability >= 90
    links, D = {"launch_pdl": True} if chained else {}, 128
    matrix = {"weights": "*bf16", "N": "i32:16", "K": "i32:16"}
    floats = dict.fromkeys(("x", "other", "mixed", "out", "stream", "sums", "qkv"), "*fp32")
    embedding = {"ids": "*i64", **dict.fromkeys(("wte", "gate", "strength", "previous"), "*bf16"), "out": "*fp32"}
    yield "embedding", embed_kernel, embedding, {"CHANNELS": 24, "CHAINED": chained, "BLOCK_K": 1024}, {}
    for N, K, parts, B in ((768, 768, 8, 1), (768, 3072, 0, 2), (3072, 768, None, 1), (1536, 1536, 16, 2)):
        sizes = product_settings(K, parts or 0) | {"B": B, "CHAINED": chained}
        options = links | {"num_warps": sizes.pop("num_warps")}
        if parts is None:
            types = {name: floats[name] for name in ("x", "other", "mixed", "out")} | matrix | {"mix": "*bf16"}
            constants = {"cap": None, "SQUARED_RELU": False, **sizes}
            yield f"norm, product {N} × {K}", norm_product_kernel, types, constants, options
            continue
        types = {name: floats[name] for name in ("stream", "x", "sums")} | matrix
        constants = {"D": D if parts else 1, "PARTS": parts, **sizes} | ({} if parts else {"sums": None})
        types = {name: kind for name, kind in types.items() if name not in constants}
        yield f"product {N} × {K}, {parts} parts, {B} rows", add_product_kernel, types, constants, options
    sizes = attend_settings(2048)[1] | {"GROUP": 1, "D": D, "CHAINED": chained}
    options = links | {"num_warps": sizes.pop("num_warps")}
    types = {name: floats[name] for name in ("qkv", "out", "sums")} | {"lengths": "*i64", "ids": "*i64"}
    types |= dict.fromkeys(("cos", "sin", "values", "keys_held", "values_held"), "*bf16")
    yield f"attention D={D}", attend_kernel, types, sizes, options
    types = {"logits": "*fp32", "seeds": "*i32", "picked": "*fp64", "temperature": "fp32"}
    yield "choice", choose_kernel, types, {"TOP_K": 50, "NOISE": True, "BLOCK": 4096}, {"num_warps": 16}

# %%
#| export kernel_step
"""A decode step of a few rows through the kernels of kernels/step.py: the same result as Decoder's."""

import torch
from torch import Tensor

from nanochat_lib.decoder import Decoder
from nanochat_lib.fused import SOFTCAP
from nanochat_lib.kernels import step
from nanochat_lib.slots import Slots

# %%
#| export kernel_step
class KernelStep:
    """Decoder's step in five kernels a layer, for up to MOST_ROWS rows without shared beginnings; and `choose`."""

    choose = staticmethod(step.choose)

    def __init__(self, decoder: Decoder):
        self.decoder, self.config = decoder, decoder.config
        self.windows, D = decoder.look.windows, decoder.config.head_dim
        self.possible = 32 <= D <= 256 and D & (D - 1) == 0 and decoder.config.n_embd <= 4096

    def suits(self, slots: Slots, B: int) -> bool:
        return self.possible and B <= step.MOST_ROWS and slots.members is None

    def __call__(self, slots: Slots, B: int) -> Tensor:
        """Logits (B, vocab) float32 after the tokens slots.ids, whose keys and values are now the rows' last."""
        wte, head, gate, strength, backout = self.decoder.top
        model, ids, lengths = self.decoder.model, slots.ids[:B], slots.lengths[:B]
        x = x0 = step.embed(ids, wte, gate, strength, slots.previous[:B])
        for number, layer in enumerate(self.decoder.layers):
            stream = torch.empty_like(x0)
            qkv = step.norm_product(x, layer.qkv, x0, layer.mix, stream)
            parts, sums = step.attend(qkv, lengths, ids, model.cos, model.sin, layer.values, slots.tails[number],
                                      self.config.n_head, self.windows[number])
            step.add_product(stream, parts, layer.proj, sums)
            x = step.add_product(stream, step.norm_product(stream, layer.fc, squared_relu=True), layer.out)
            if number == self.config.n_layer // 2:
                halfway = x
        return step.norm_product(x, head[:self.config.vocab_size], halfway, backout, cap=SOFTCAP)

# %%
#| export graphs
"""Decode steps recorded once and replayed: on a GPU, a step of hundreds of kernels becomes one launch."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat_lib.attention import HAVE_TRITON
from nanochat_lib.decoder import Decoder, Place
from nanochat_lib.gpt import GPT
from nanochat_lib.sampling import pick
from nanochat_lib.slots import Slots

# %%
#| export graphs
def notice(what: str, error: Exception) -> None:
    """Say in one line what is missing."""
    print(f"engine: {what}: {(str(error).splitlines() or [repr(error)])[0]}", file=sys.stderr, flush=True)


def compiled_for_rows(function: Callable) -> Callable:
    """torch.compile of a function of (x, y, …, place), a row for each line: once for one row, once for any number."""
    compiled = torch.compile(function)

    def run(x: Tensor, y: Tensor, *others):
        for tensor in (x, y, *next((each for each in others if isinstance(each, Place)), ())):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(x, y, *others)

    return run

# %%
#| export graphs
CHOICES = 32  # recorded choices of a token that are kept: a setting of a batch of 256 rows takes 20, one for each size


class GraphedDecoder:
    """A Decoder on a GPU whose steps are recorded as CUDA graphs, for batches of 1, 2, 4, 8, 16, 32, 48… rows.

    Rows beyond the batch run along and write into free slots. `fuse`: a few rows take KernelStep; for more,
    torch.compile makes one kernel of what stands between two matrix products. `record` = False runs the same steps
    without graphs.
    """

    def __init__(self, model: GPT, fuse: bool = True, record: bool = True):
        self.decoder, self.record, self.slots = Decoder(model), record, None
        self.forget()
        self.refresh, self.plain = self.decoder.refresh, (self.decoder.project, self.decoder.finish)
        self.decoder.static, self.fused, self.unsure, self.kernels = True, fuse, fuse, None
        if fuse:
            self.decoder.project, self.decoder.finish = map(compiled_for_rows, self.plain)
        if fuse and HAVE_TRITON and model.lm_head.weight.is_cuda:
            from nanochat_lib.kernel_step import KernelStep

            self.kernels = KernelStep(self.decoder)

    def forget(self) -> None:
        """Let go of all recordings: of steps by (size, alone), of choices by (size, alone, *settings)."""
        self.graphs, self.choices, self.seeds = {}, {}, None  # the choice used last stands at the end

    @staticmethod
    def padded(B: int, rows: int) -> int:
        """The batch size whose graph serves B rows."""
        return min(rows, 1 << (B - 1).bit_length() if B <= 16 else -(-B // 16) * 16)

    def __call__(self, slots: Slots, B: int) -> Tensor:
        """As Decoder's: logits (B, vocab)."""
        size = self.padded(B, slots.rows)
        slots.inputs[:3, B:size] = 0
        slots.owners[B:size] = slots.prefixes  # no shared beginning
        if slots is not self.slots:  # a graph is bound to the memory it was recorded with
            self.slots = slots
            self.forget()
        if not self.record or (slots.members is not None and self.decoder.look.kernel is None):
            return self.run(slots, size)[:B]
        return self.replay(self.graphs, (size, slots.members is None), lambda: self.run(slots, size))[:B]

    def pick(self, logits: Tensor, seeds: Tensor, settings: tuple) -> Tensor:
        """As sampling.pick, recorded too where the logits are a recorded step's."""
        step = next((key for key, (_, made) in self.graphs.items() if made.data_ptr() == logits.data_ptr()), None)
        if step is None or not self.record:
            return self.choose(logits, seeds, *settings)
        whole, key = self.graphs[step][1], (*step, *settings)  # the logits of padded rows too
        if self.seeds is None:
            self.seeds = seeds.new_zeros(self.slots.rows)
        held = self.seeds
        held[:len(seeds)] = seeds
        if key in self.choices:
            self.choices[key] = self.choices.pop(key)
        elif len(self.choices) == CHOICES:  # clients may send any setting
            del self.choices[next(iter(self.choices))]
        return self.replay(self.choices, key, lambda: self.choose(whole, held[:len(whole)], *settings))[:, :len(seeds)]

    def choose(self, logits: Tensor, seeds: Tensor, temperature: float, top_k: int | None,
               top_p: float | None) -> Tensor:
        """As sampling.pick, in one kernel where that can."""
        if self.kernels and (top_p is None or top_p >= 1):
            try:
                return self.kernels.choose(logits.contiguous(), seeds, temperature, top_k)
            except Exception as error:
                notice("without kernels of its own", error)
                self.kernels = None
        return pick(logits, seeds, temperature, top_k, top_p)

    def replay(self, made: dict[tuple, tuple], key: tuple, step: Callable[[], Tensor]) -> Tensor:
        """The result of a step: recorded in `made` at first, replayed from then on. The result stays at its place."""
        if key not in made:
            self.unsure = self.fused  # a new size may be compiled anew
            try:
                made[key] = self.capture(step)
            except Exception as error:  # a driver or an operation that cannot: slower, and right
                self.record, self.decoder.look.kernel = False, None  # which of them failed is not known
                notice("without CUDA graphs", error)
                return step()
        graph, result = made[key]
        graph.replay()
        return result

    def capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step. It runs before, so that all is compiled; the embedding before smear is put back each time."""
        previous, stream = self.slots.previous.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(), step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = step()
        finally:
            self.slots.previous.copy_(previous)
        return graph, result

    def run(self, slots: Slots, size: int) -> Tensor:
        """A step; without fused kernels from now on, if they cannot be made here."""
        previous = slots.previous.clone() if self.unsure else None
        step = self.kernels if self.kernels and self.kernels.suits(slots, size) else self.decoder
        try:
            logits = step(slots, size)
        except Exception as error:
            if not self.unsure:
                raise
            notice("without fused kernels", error)
            self.fused, self.kernels = False, None
            self.decoder.project, self.decoder.finish = self.plain
            slots.previous.copy_(previous)
            logits = self.decoder(slots, size)
        self.unsure = False
        return logits

# %% [markdown]
# ### On a CPU: the price of an operation
#
# A step of a small model is some 100 operations on a few hundred numbers each. PyTorch takes a few microseconds to
# start one (it looks up device, dtype, layout, gradients), NumPy a fraction of that. For a single row on a CPU, a chat
# on a laptop, the engine therefore has the step once more in NumPy: the same weights, the same slots, the formulas of
# lesson 04.

# %%
#| export numpy_step
"""One decode step of one row on a CPU, in NumPy: for a small model several times as fast as through PyTorch."""

import numpy as np
import torch

from nanochat_lib.fused import SOFTCAP
from nanochat_lib.gpt import GPT, SMEAR_CHANNELS, VALUE_CHANNELS, window_sizes
from nanochat_lib.slots import Slots

# %%
#| export numpy_step
EPSILON = np.float32(torch.finfo(torch.float32).eps)  # that of F.rms_norm


def norm(x: np.ndarray) -> np.ndarray:
    """RMS norm of x (C,)."""
    return x * (1 / np.sqrt(x.dot(x) / np.float32(len(x)) + EPSILON))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

# %%
#| export numpy_step
class NumpyStep:
    """GPT.forward for one token of one row, float32 on the CPU. It reads the model's own memory: it sees training."""

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

    def __call__(self, slots: Slots) -> torch.Tensor:
        """Logits (1, V) after the token slots.ids[0], which row 0 holds afterwards."""
        w, (token, length, offset, place) = self.weights, slots.inputs[:, 0].tolist()
        x = norm(w["transformer.wte.weight"][token])
        previous = slots.previous[0].numpy()
        gate = w["smear_lambda"] * sigmoid(w["smear_gate.weight"].dot(x[:SMEAR_CHANNELS]))
        x0 = x + gate * previous
        previous[:], x = x, x0
        tails, head = slots.tails[:, :, 0].numpy(), None  # (layer, 2, kv head, position, head dim)
        if offset:
            head = slots.heads[:, :, place, :, :offset].numpy()
        for layer, (c_q, c_k, c_v, c_proj, c_fc, c_out, ve_gate) in enumerate(self.layers):
            x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * x0
            h = norm(x)
            v = c_v.dot(h).reshape(self.config.n_kv_head, -1)
            if ve_gate is not None:
                ve = w[f"value_embeds.{layer}.weight"][token].reshape(v.shape)
                v = v + (3 * sigmoid(ve_gate.dot(h[:VALUE_CHANNELS])))[:, None] * ve
            q, k = self.turn(np.concatenate((c_q.dot(h), c_k.dot(h))), length + offset)
            tails[layer, 0, :, length], tails[layer, 1, :, length] = k, v
            first = length + offset - self.windows[layer]  # the first position in sight
            parts = [tails[layer, :, :, max(0, first - offset):length + 1]]
            if max(0, first) < offset:
                parts.append(head[layer, :, :, max(0, first):])
            x = x + c_proj.dot(self.look_back(q, parts))
            x = x + c_out.dot(np.square(np.maximum(c_fc.dot(norm(x)), 0)))
            if layer == self.config.n_layer // 2:
                halfway = x
        logits = w["lm_head.weight"][:self.config.vocab_size].dot(norm(x - w["backout_lambda"] * halfway))
        return torch.from_numpy(np.tanh(logits / np.float32(SOFTCAP)) * np.float32(SOFTCAP))[None]

    def turn(self, qk: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries (kv head, queries of it, head dim), keys (kv head, head dim), turned by their position and normed."""
        config, half = self.config, self.config.head_dim // 2
        qk, cos, sin = qk.reshape(-1, 2, half), self.cos[position], self.sin[position]
        turned = np.concatenate((qk[:, 0] * cos + qk[:, 1] * sin, qk[:, 1] * cos - qk[:, 0] * sin), axis=1)
        size = np.einsum("hd,hd->h", turned, turned) / np.float32(2 * half) + EPSILON
        turned *= (np.float32(1.2) / np.sqrt(size))[:, None]
        return turned[:config.n_head].reshape(config.n_kv_head, -1, 2 * half), turned[config.n_head:]

    @staticmethod
    def look_back(q: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        """Attention over parts (2, kv head, positions, head dim) → (C,). Scores are bounded (see lookback.look_back)."""
        q = q * np.float32(q.shape[-1] ** -0.5)
        total = weight = 0
        for keys, values in parts:
            scores = np.exp(np.matmul(q, keys.transpose(0, 2, 1)))
            total, weight = total + np.matmul(scores, values), weight + scores.sum(axis=-1, keepdims=True)
        return (total / weight).ravel()

# %%
with torch.inference_mode():
    slots.feed(ids=np.array([int(sequence[0, 26])]), lengths=np.array([6]), offsets=np.array([20]))
    logits = NumpyStep(model)(slots)
    assert torch.allclose(logits[0], model(sequence[:, :27])[0, -1], atol=1e-4)

# %% [markdown]
# The runner picks the fastest of these, and owns the memory: a quarter of what is free, or what it is given.

# %%
#| export runner
"""The model's side of an engine: prefill, decode, sampling, and the memory they work in."""

import contextlib

import psutil
import torch

from nanochat_lib.common import NanochatError
from nanochat_lib.decoder import Decoder
from nanochat_lib.fused import softcap
from nanochat_lib.gpt import GPT
from nanochat_lib.graphs import GraphedDecoder
from nanochat_lib.kv_cache import KVCache, cache_bytes
from nanochat_lib.numpy_step import NumpyStep
from nanochat_lib.sampling import pick
from nanochat_lib.slots import Slots

# %%
#| export runner
class Runner:
    """Runs a model for batches, in the fastest way its device has.

    `memory`: most bytes of cache (default: a quarter of what is free).
    """

    def __init__(self, model: GPT, memory: int | None = None):
        self.model, self.config, self.memory = model, model.config, memory
        self.device = model.lm_head.weight.device
        self.decoder = (GraphedDecoder if self.device.type == "cuda" else Decoder)(model)
        self.numpy_step = NumpyStep(model) if NumpyStep.suits(model) else None
        self.spare: Slots | None = None  # of the last batch: the next one is often of the same size

    def on_device(self) -> contextlib.AbstractContextManager:
        """Triton and CUDA graphs take the thread's current GPU, so a replica on another one says which."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def read(self, tokens: torch.Tensor, cache: KVCache, last: torch.Tensor) -> torch.Tensor:
        """Prefill: feed tokens (B, T) to the cache; returns the logits (B, V) after each row's token `last` (B,)."""
        x = self.model.hidden(tokens.to(self.device, non_blocking=True), cache)
        x = x[torch.arange(len(x), device=x.device), last]
        return softcap(self.model.lm_head(x)[:, :self.config.vocab_size])

    def decode(self, slots: Slots, B: int) -> torch.Tensor:
        """Feed each of the first B rows its coming token; returns the logits (B, V) after it."""
        if self.numpy_step and B == 1:
            return self.numpy_step(slots)
        return self.decoder(slots, B)

    def pick(self, logits: torch.Tensor, seeds: torch.Tensor, settings: tuple) -> torch.Tensor:
        """Tokens and log-probabilities (2, B) of rows sampled alike."""
        recorded = isinstance(self.decoder, GraphedDecoder)
        return self.decoder.pick(logits, seeds, settings) if recorded else pick(logits, seeds, *settings)

    def refresh(self) -> None:
        """A batch begins: take over weights that were trained meanwhile."""
        self.decoder.refresh()

    def rows_that_fit(self, capacity: int, taken: int = 0) -> int:
        """Rows of `capacity` positions that the memory holds beside `taken` bytes. NanochatError if none."""
        cuda, row = self.device.type == "cuda", cache_bytes(self.config, 1, capacity, self.model.dtype.itemsize)
        free = torch.cuda.mem_get_info(self.device)[0] if cuda else psutil.virtual_memory().available
        memory = free // 4 if self.memory is None else self.memory
        if row > memory - taken:
            raise NanochatError(f"a row of {capacity} positions takes {row / 1e6:,.1f} MB of cache, and "
                                f"{(memory - taken) / 1e6:,.1f} MB are there for it: ask for fewer tokens, or give the "
                                "engine more memory")
        return (memory - taken) // row

    def slots(self, rows: int, capacity: int, prefixes: int, prefix_capacity: int) -> Slots:
        """Memory for a batch: as many rows, and places for shared beginnings, as are asked for and fit."""
        whole = self.rows_that_fit(capacity)
        most = whole * capacity // (2 * prefix_capacity) if whole > 1 else 0  # half of the memory: a row is left
        prefixes = min(prefixes, most)
        taken = cache_bytes(self.config, prefixes, prefix_capacity, self.model.dtype.itemsize)
        shape = min(rows, self.rows_that_fit(capacity, taken)), capacity, prefixes, prefix_capacity
        slots, self.spare = self.spare, None
        if slots is None or (slots.rows, slots.capacity, slots.prefixes, slots.prefix_capacity) != shape:
            slots = Slots(self.model, *shape)
        slots.clear()
        return slots

# %% [markdown]
# ## Rows that come and go
#
# Prompts enter the slots several at a time: similar lengths together, so that little is padding, and shared beginnings
# first.

# %%
#| export prefill
"""Prompts into the slots of a batch: several in one forward pass, common beginnings only once."""

from collections.abc import Iterator

import torch

from nanochat_lib.kv_cache import KVCache
from nanochat_lib.request import Request
from nanochat_lib.runner import Runner
from nanochat_lib.slots import Slots

# %%
#| export prefill
Text = tuple[int, ...]
MOST = 8192  # positions that the cache of one forward may have
ENOUGH = 1024  # positions from where on padding costs more than a new forward


def chunks(texts: list[tuple[Text, list[Request]]]) -> Iterator[list[tuple[Text, list[Request]]]]:
    """Texts of similar length, to be read together: each with the requests that want it behind what they share."""
    chunk: list = []
    shared = 0  # the longest beginning, which the cache of a chunk holds once for each text
    for text, requests in sorted(texts, key=lambda text: len(text[0])):
        ahead = max((request.shared or 0 for request in requests), default=0)
        positions, shared = len(chunk) * len(text), max(shared, ahead)
        full = (len(chunk) + 1) * (shared + len(text)) > MOST
        if chunk and (full or positions > ENOUGH and len(text) > 1.25 * len(chunk[0][0])):
            yield chunk
            chunk, shared = [], ahead
        chunk.append((text, requests))
    if chunk:
        yield chunk


def read(runner: Runner, cache: KVCache, texts: list[Text]) -> torch.Tensor:
    """Feed texts, sorted by length and padded on the right, to the cache's rows; returns logits (B, V) after each."""
    lengths = [len(text) for text in texts]
    padded = torch.tensor([text + (0,) * (lengths[-1] - len(text)) for text in texts])
    ends = torch.tensor(lengths, device=runner.device)
    cache.counts = None if lengths[0] == lengths[-1] else ends
    return runner.read(padded, cache, ends - 1)


def by_text(requests: list[Request]) -> list[tuple[Text, list[Request]]]:
    """Each distinct prompt with the requests for it."""
    found: dict[Text, list[Request]] = {}
    for request in requests:
        found.setdefault(tuple(request.prompt), []).append(request)
    return list(found.items())

# %%
#| export prefill
def prefill(runner: Runner, slots: Slots, at: int, joining: list[Request],
            fresh: list[Text]) -> Iterator[tuple[list[Request], torch.Tensor]]:
    """Read the prompts of `joining` and the `fresh` beginnings; requests come in the order of their rows, from `at` on.

    Yields (requests, logits (n, V)) whenever some are ready.
    """
    alone = by_text([request for request in joining if not request.shared])
    for chunk in chunks(alone + [(head, []) for head in fresh]):
        cache = KVCache(runner.config, len(chunk), len(chunk[-1][0]))
        cache.resize([0] * len(chunk), runner.device)
        logits = read(runner, cache, [text for text, _ in chunk])
        rows = [row for row, (_, requests) in enumerate(chunk) for _ in requests]
        for row, (text, requests) in enumerate(chunk):
            if not requests:
                slots.keep_head(slots.known[text], cache, row, len(text), logits[row])
        if rows:
            slots.keep_tails(at, cache, rows, 0, len(chunk[rows[-1]][0]))  # beginnings may be longer
            yield [request for _, requests in chunk for request in requests], logits[rows]
            at += len(rows)
    whole = [request for request in joining if request.shared == len(request.prompt)]
    if whole:
        places = [slots.known[tuple(request.prompt)] for request in whole]
        slots.stand(at, places)
        slots.previous[at:at + len(whole)] = slots.head_previous[places]
        yield whole, slots.head_logits[places]
        at += len(whole)
    rest = by_text([request for request in joining if 0 < (request.shared or 0) < len(request.prompt)])
    for chunk in chunks([(text[requests[0].shared:], requests) for text, requests in rest]):
        shared = [requests[0].shared for _, requests in chunk]
        places = [slots.known[tuple(requests[0].prompt[:length])] for (_, requests), length in zip(chunk, shared)]
        cache = KVCache(runner.config, len(chunk), max(shared) + len(chunk[-1][0]))
        slots.fill(cache, places, shared)
        cache.resize(shared, runner.device)
        logits = read(runner, cache, [text for text, _ in chunk])
        for row, ((text, requests), place) in enumerate(zip(chunk, places)):
            slots.stand(at, [place] * len(requests))
            slots.keep_tails(at, cache, [row] * len(requests), shared[row], shared[row] + len(text))
            yield requests, logits[[row] * len(requests)]
            at += len(requests)

# %% [markdown]
# Who may join? In order of arrival, while rows are free and the beginnings they need have a place.

# %%
#| export admission
"""Who may join a batch now, and in which place: the order of arrival, within fixed memory."""

from collections import deque

from nanochat_lib.request import Completion, Request
from nanochat_lib.sharing import plan
from nanochat_lib.slots import Slots

# %%
#| export admission
def room(request: Request, context: int) -> int:
    """How many tokens the context and the wish of a request allow; the last one needs no place in the cache."""
    left = context + 1 - len(request.prompt)
    return left if request.max_tokens is None else min(left, request.max_tokens)


def has_place(request: Request, slots: Slots, context: int, fresh: list[tuple[int, ...]]) -> bool:
    """Claim a place for the beginning a request shares; without one it stands alone, if its row has room for it all."""
    if not request.shared:
        return True
    here = slots.claim(head := tuple(request.prompt[:request.shared]))
    if here is None and len(request.prompt) + room(request, context) <= slots.capacity + 1:
        request.shared = 0
    elif here is False:
        fresh.append(head)
    return here is not None or not request.shared


def admit(waiting: deque[Request], slots: Slots, free: int, context: int) -> tuple[list[Request], ...]:
    """Take from `waiting` who may join now, at most `free`: (finished, joining, fresh).

    Finished are those whose prompt leaves no room for a token; fresh are shared beginnings that are to be read.
    """
    finished, joining, fresh = [], [], []
    plan(waiting, slots.known, slots.prefix_capacity if slots.prefixes else 0)
    while waiting and len(joining) < free:
        request = waiting[0]
        if room(request, context) <= 0:
            request.completion = Completion([], [], [], "length" if request.max_tokens == 0 else "context")
            finished.append(request)
        elif has_place(request, slots, context, fresh):
            joining.append(request)
        else:
            break  # until a beginning is no longer in use
        waiting.popleft()
    return finished, joining, fresh

# %% [markdown]
# One step of a batch: let waiting requests join, sample every row, note the tokens, let the tools speak, drop what is
# finished, run the model on the rest. The host waits for the device once per step, for the chosen tokens. A finished
# row leaves a hole; the last row moves into it, so the batch stays dense.

# %%
#| export batch
"""A running batch: requests join when there is room, leave when finished, and may call the calculator."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanochat_lib.admission import admit, room
from nanochat_lib.common import NanochatError
from nanochat_lib.notes import Notes
from nanochat_lib.prefill import prefill
from nanochat_lib.request import Completion, Request, Token
from nanochat_lib.slots import Slots

if TYPE_CHECKING:
    from nanochat_lib.engine import Engine

# %%
#| export batch
class Batch:
    """Requests wait, join when there is room, leave when finished. One `step` is one token for each running row."""

    def __init__(self, engine: "Engine", slots: Slots, refill: float = 0.0):
        self.engine, self.runner, self.slots = engine, engine.runner, slots
        self.context = engine.model.config.sequence_len
        self.refill = max(1, int(refill * slots.rows))  # rows that must be free before new ones join: larger prefills
        self.notes = Notes(slots.rows, slots.capacity + 1)
        self.running = self.notes.running  # row i of the slots serves running[i]
        self.waiting: deque[Request] = deque()
        self.cancelled: set[Request] = set()
        self.logits: torch.Tensor | None = None  # (B, V) for the coming token of each running row
        self.groups: list | None = None  # (settings, rows) of rows sampled alike; None: to be found

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, request: Request) -> None:
        """Wait for room. NanochatError for a prompt that would not fit into an empty batch."""
        if self.slots.capacity < request.tail() and len(request.prompt) <= self.context:
            raise NanochatError(f"the prompt has {len(request.prompt)} tokens, a row of this batch "
                                f"{self.slots.capacity}: ask the engine for a batch of larger rows")
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Let go of a request at the next step; its completion is what it has until then."""
        self.cancelled.add(request)

    def step(self) -> list[Request]:
        """One more token for every running row, after letting waiting ones join; returns the requests finished now."""
        with torch.inference_mode(), self.runner.on_device():
            return self.take_step()

    def take_step(self) -> list[Request]:
        """What `step` does, once the device is the engine's."""
        finished = self.drop_cancelled() if self.cancelled else []
        if self.waiting and (len(self.notes.free) >= self.refill or not self.running):
            done, joining, fresh = admit(self.waiting, self.slots, len(self.notes.free), self.context)
            finished += done
            if joining:
                self.join(joining, fresh)
            elif not (self.running or finished):
                raise NanochatError(f"a request shares {self.waiting[0].shared} tokens of its prompt, and this batch "
                                    "has no place for them: ask for a batch with `prefixes`, or set `shared` to 0")
        if self.running:
            finished += self.drop(self.settle(*self.choose()))
        if self.running:
            self.slots.feed(*self.notes.inputs())
            self.logits = self.runner.decode(self.slots, len(self.running))
        return finished

    def join(self, joining: list[Request], fresh: list[tuple[int, ...]]) -> None:
        """Prefill requests and the beginnings they share; they are the batch's last rows."""
        if not self.running:
            self.runner.refresh()
        for requests, logits in prefill(self.runner, self.slots, len(self.running), joining, fresh):
            self.logits = torch.cat([self.logits, logits]) if self.running else logits
            for request in requests:
                self.notes.join(request, min(room(request, self.context), self.slots.capacity + 1 - request.tail()))
        self.groups = None
        self.slots.group(len(self.running))

    def choose(self) -> tuple[np.ndarray, np.ndarray]:
        """Sample every running row: tokens and log-probabilities (B,), on the host. The only wait for the device."""
        if self.groups is None:
            alike: dict[tuple, list[int]] = {}
            for row, request in enumerate(self.running):
                alike.setdefault(request.settings, []).append(row)
            self.groups = [(settings, torch.tensor(rows, device=self.runner.device))
                           for settings, rows in alike.items()]
        seeds = torch.from_numpy(self.notes.seeds()).to(self.runner.device, non_blocking=True)
        if len(self.groups) == 1:
            picked = self.runner.pick(self.logits, seeds, self.groups[0][0])
        else:
            picked = torch.empty(2, len(seeds), dtype=torch.float64, device=self.runner.device)
            for settings, rows in self.groups:
                picked[:, rows] = self.runner.pick(self.logits[rows], seeds[rows], settings)
        tokens, logprobs = picked.cpu().numpy()
        return tokens.astype(np.int64), logprobs

    def settle(self, tokens: np.ndarray, logprobs: np.ndarray) -> dict[int, str]:
        """Note the tokens and tell the watchers; returns {row: finish reason} of ended rows."""
        tokens, logprobs, forced = self.notes.write(tokens, logprobs)
        ended = self.notes.ended(self.engine, tokens, forced)
        for row, request in enumerate(self.running):
            if request.watch:
                top = ()
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
        for row, reason in ended.items():
            self.running[row].completion = self.notes.completion(row, reason)
            self.slots.leave(row)
        holes = [row for row in ended if row < keep]
        movers = [row for row in range(keep, len(self.running)) if row not in ended]
        self.slots.move(movers, holes)
        if holes:
            self.logits[holes] = self.logits[movers]
        self.notes.leave(list(ended), movers, holes)
        self.logits, self.groups = self.logits[:keep], None
        self.slots.group(keep)
        return finished

# %% [markdown]
# ## The engine
#
# What remains is a face for each use: `generate_many` for reinforcement learning and evaluation, `stream` for a chat,
# `generate` and `generate_batch` for one prompt.

# %%
#| export
"""Fast generation from a model: streams, batches, samples, with a calculator in the loop."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nanochat_lib.admission import room
from nanochat_lib.batch import Batch
from nanochat_lib.common import NanochatError, progress as progress_bar
from nanochat_lib.gpt import GPT
from nanochat_lib.request import Completion, Request, Token
from nanochat_lib.runner import Runner
from nanochat_lib.sharing import plan
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
    """Generates with a model: streams, batches, samples, tools. `memory`: most bytes of cache (see Runner)."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, memory: int | None = None):
        self.model, self.tokenizer, self.runner = model, tokenizer, Runner(model, memory)
        special = tokenizer.encode_special
        self.assistant_end = special("<|assistant_end|>")
        self.stops = {self.assistant_end, special("<|bos|>")}
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.notable = np.zeros(max(model.config.vocab_size, tokenizer.get_vocab_size()), bool)
        self.notable[[*self.stops, self.python_start, self.python_end]] = True

    def answer_call(self, expression: list[int]) -> list[int]:
        """The tokens a tool call puts into the stream: the result between output markers, or none without a result."""
        result = calculate(self.tokenizer.decode(expression))
        return [] if result is None else [self.output_start, *self.tokenizer.encode(result), self.output_end]

    def rows_that_fit(self, capacity: int) -> int:
        """How many rows of `capacity` positions fit into memory. NanochatError if none does."""
        return self.runner.rows_that_fit(capacity)

    def batch(self, rows: int, capacity: int | None = None, refill: float = 0.0, prefixes: int | None = None,
              prefix_capacity: int | None = None) -> Batch:
        """An empty batch of at most `rows` rows of `capacity` positions (default and most: the model's context), and of
        `prefixes` beginnings that rows may share (default: one for four rows); fewer if memory does not allow them.

        An answer ends with the reason "length" where its row ends, even if it was allowed more tokens.
        """
        context = self.model.config.sequence_len
        prefixes = rows // 4 if prefixes is None else prefixes
        capacity, prefix_capacity = (min(positions or context, context) for positions in (capacity, prefix_capacity))
        slots = self.runner.slots(rows, capacity, prefixes, prefix_capacity)
        return Batch(self, slots, refill)

    def batch_of(self, requests: list[Request], rows: int = 256) -> Batch:
        """A batch with rows just large enough for these requests, which wait in it."""
        context = self.model.config.sequence_len
        plan(requests)
        fitting = [request for request in requests if len(request.prompt) <= context]
        heads = {tuple(request.prompt[:request.shared]) for request in fitting if request.shared}
        capacity = max((request.tail() + room(request, context) - 1 for request in fitting), default=1)
        prefix_capacity = max(map(len, heads), default=1)
        step = 128 if self.runner.device.type == "cuda" else 16  # sizes that recur: slots and graphs are used again
        capacity, prefix_capacity = (-(-max(positions, 1) // step) * step for positions in (capacity, prefix_capacity))
        batch = self.batch(max(1, min(rows, len(requests))), capacity, 1 / 8, min(len(heads), rows), prefix_capacity)
        if heads and not batch.slots.prefixes:  # too little memory for beginnings: each row holds all of its prompt
            for request in requests:
                request.shared = 0
            return self.batch_of(requests, rows)
        for request in sorted(requests, key=lambda request: len(request.prompt)):
            batch.add(request)
        return batch

    @contextlib.contextmanager
    def lent(self, requests: list[Request], rows: int = 256) -> Iterator[Batch]:
        """A batch of these requests. In the end its memory, with the steps recorded there, is kept for the next one."""
        batch = self.batch_of(requests, rows)
        try:
            yield batch
        finally:
            self.runner.spare = batch.slots

    def run(self, requests: list[Request], rows: int = 256, progress: bool = False) -> None:
        """Complete all requests, `rows` at a time: the general form of what follows."""
        bar = progress_bar(total=len(requests), desc="answers") if progress else contextlib.nullcontext()
        with bar as told, self.lent(requests, rows) as batch:
            while batch:
                finished = batch.step()
                if told is not None:
                    told.update(len(finished))

    def generate_many(self, prompts: list[list[int]], num_samples: int = 1, max_tokens: int | None = None,
                      temperature: float = 1.0, top_k: int | None = None, seed: int = 42, top_p: float | None = None,
                      rows: int = 256, progress: bool = False) -> list[list[Completion]]:
        """`num_samples` completions of every prompt, [prompt][sample], all in one batch that refills as rows finish."""
        requests = [[Request(prompt, max_tokens, temperature, top_k, top_p, seed, number)
                     for number in range(num_samples)] for prompt in prompts]
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
        said: list[tuple[int, Token]] = []
        requests = [Request(tokens, max_tokens, temperature, top_k, None, seed, number,
                            watch=lambda token, number=number: said.append((number, token)))
                    for number in range(num_samples)]
        with self.lent(requests, num_samples) as batch:
            while batch:
                batch.step()
                column, mask = [self.assistant_end] * num_samples, [0] * num_samples
                for number, token in said:
                    column[number], mask[number] = token.id, int(not token.forced)
                if said:
                    yield column, mask
                said.clear()

    def stream(self, tokens: list[int], max_tokens: int | None = None, temperature: float = 1.0,
               top_k: int | None = None, seed: int = 42, top_p: float | None = None, top: int = 0) -> Iterator[Token]:
        """Yield the tokens of one answer as they come, each with the text it completes; `top` alternatives on demand.

        Stop iterating (or close the generator) to stop. NanochatError if the prompt leaves no room in the context.
        """
        said: list[Token] = []
        request = Request(tokens, max_tokens, temperature, top_k, top_p, seed, watch=said.append, top=top)
        speller = Speller(self.tokenizer)
        with self.lent([request]) as batch:
            while batch:
                batch.step()
                for token in said:
                    yield replace(token, text=speller.read(token.id, last=token.finish_reason is not None))
                said.clear()
        if request.completion.finish_reason == "context" and not request.completion.tokens:
            context = self.model.config.sequence_len
            raise NanochatError(f"the prompt has {len(tokens)} tokens, the context {context}: shorten it")

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
# And the timeline: twelve requests on four rows. Each colour is a request; compare with batches of four that wait for
# their slowest.

# %%
requests = [Request([65 + i] * (4 + i), max_tokens=budget, temperature=0.0)
            for i, budget in enumerate((30, 6, 12, 9, 22, 5, 14, 8, 26, 7, 10, 16))]
engine.notable[:] = False  # for the picture, only the budget ends an answer
batch, timeline = engine.batch(rows=4), []
for request in requests:
    batch.add(request)
while batch:
    before = set(zip(batch.notes.lines.tolist(), batch.running))
    batch.step()  # some leave, some join
    timeline.append(before | set(zip(batch.notes.lines.tolist(), batch.running)))
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
# And what sharing saves. Sixteen answers to each of four questions that begin with the same instructions; memory is
# what the rows of the batch and the shared beginnings take:

# %%
rules = list(range(32, 112))
questions = [rules + [112 + i] * 4 for i in range(4)]
wishes = [Request(question, 24, sample=number) for question in questions for number in range(16)]
sharing = engine.batch_of(wishes).slots
alone = [Request(question, 24, sample=number, shared=0) for question in questions for number in range(16)]
apart = engine.batch_of(alone).slots
for name, slots in (("shared", sharing), ("apart", apart)):
    size = (slots.tails.nbytes + slots.heads.nbytes) / 1e6
    print(f"{name:6}: {slots.rows} rows of {slots.capacity} positions, "
          f"{slots.prefixes} beginnings of {slots.prefix_capacity}: {size:.1f} MB")
engine.run(wishes)
engine.run(alone)
assert [wish.completion for wish in wishes] != [] and all(
    a.completion.tokens == b.completion.tokens for a, b in zip(wishes, alone))

# %% [markdown]
# ## How fast?
#
# `python -m nanochat_lib.scripts.infer_bench` measures what the cache and the batch bring, in interleaved rounds, and
# how near decoding comes to the bound set by memory: a token cannot be faster than reading the weights and the cache
# once.

# %%
#| export scripts/infer_bench
"""How fast a model generates: cache against recomputation, one batch against one by one, and the memory bound.

    python -m nanochat_lib.scripts.infer_bench                   # laptop-sized model, random weights
    python -m nanochat_lib.scripts.infer_bench --source sft      # a trained one
    python -m nanochat_lib.scripts.infer_bench --depth 12 --aspect-ratio 64 --head-dim 128 --max-seq-len 2048 \\
        --vocab-size 32768                                       # on a GPU
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat_lib.checkpoint import load_model
from nanochat_lib.common import pick_device, print0, run_cli
from nanochat_lib.engine import Engine
from nanochat_lib.gpt import GPTConfig, build_model, window_sizes
from nanochat_lib.kv_cache import cache_bytes
from nanochat_lib.request import Request
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
    head_dim: int = 64
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
    """Bytes per second this device reads from memory, measured on 1 GiB (256 MiB on a CPU)."""
    block = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    read = {"read": lambda: block.sum() is None or block.nbytes}
    medians(read, 1, device)
    return medians(read, 5, device)["read"]


def verdict(ratio: float, target: float) -> str:
    return f"{ratio:.1f}× (target {target:g}×: {'reached' if ratio >= target else 'not reached'})"

# %%
#| export scripts/infer_bench
def load(settings: Settings, device: torch.device) -> Engine:
    """The checkpoint, or a model of random weights; nothing ends an answer early: all rounds have the same work."""
    if settings.source:
        model, tokenizer, _ = load_model(settings.source, device, "eval", settings.model_tag, settings.step)
    else:
        heads = -(-settings.depth * settings.aspect_ratio // settings.head_dim)
        config = GPTConfig(settings.max_seq_len, settings.vocab_size, settings.depth, heads, heads,
                           heads * settings.head_dim, "SSSL")
        torch.manual_seed(0)
        model, tokenizer = build_model(config, device).eval(), Tokenizer([bytes([byte]) for byte in range(256)])
    engine = Engine(model, tokenizer)
    engine.notable[:] = False
    return engine

# %%
#| export scripts/infer_bench
class Bench:
    """The contests, each on the same engine."""

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, torch.device(pick_device(settings.device_type))
        self.engine, self.dice = load(settings, self.device), random.Random(0)
        self.config = self.engine.model.config

    def prompt(self, length: int) -> list[int]:
        return [self.dice.randrange(256) for _ in range(length)]

    def contest(self, **contestants: Callable[[], int]) -> dict[str, float]:
        for run in contestants.values():
            run()  # the first time everything is slower
        return medians(contestants, self.settings.repeats, self.device)

    def complete(self, requests: list[Request], rows: int) -> int:
        self.engine.run(requests, rows)
        return sum(len(request.completion.tokens) for request in requests)

    def one_row(self) -> None:
        """A chat's speed near the end of the context, against reading it all again, and against memory."""
        engine, config, new = self.engine, self.config, 8
        full = self.prompt(config.sequence_len - 4 * new)
        batch = engine.batch_of([Request(full, temperature=0.0)])
        batch.step()

        def cached() -> int:  # the same places again and again
            batch.notes.counts[:] = 1
            for _ in range(2 * new):
                batch.step()
            return 2 * new

        model, size = engine.model, engine.model.dtype.itemsize
        rates = self.contest(cached=cached, recomputing=lambda: len(list(model.generate(full, new, temperature=0.0))))
        print0(f"one row at {len(full)} tokens: {rates['cached']:,.0f} tokens/s with the cache, "
               f"{rates['recomputing']:,.0f} without: " + verdict(rates["cached"] / rates["recomputing"], 10))
        weights = sum(p.numel() for p in (*model.transformer.h.parameters(), *model.lm_head.parameters()))
        seen = sum(min(window, len(full)) for window in window_sizes(config)) // config.n_layer  # on average
        moved, speed = size * weights + cache_bytes(config, 1, seen, size), bandwidth(self.device)
        share = moved * rates["cached"] / speed
        target = f" (target 50 %: {'reached' if share >= 0.5 else 'not reached'})" if self.device.type == "cuda" else ""
        print0(f"each token reads {moved / 1e6:.1f} MB, and this memory {speed / 1e9:,.0f} GB/s: {share:.0%} of its "
               f"bandwidth{target}")

    def mixed(self) -> None:
        """Requests of mixed lengths, all at once against one after another."""
        room, count = self.config.sequence_len - self.settings.max_new_tokens, self.settings.requests
        wishes = [(self.prompt(self.dice.randint(1, room // 2)), self.dice.randint(1, self.settings.max_new_tokens))
                  for _ in range(count)]

        def run(rows: int) -> int:
            return self.complete([Request(*wish) for wish in wishes], rows)

        rates = self.contest(batched=lambda: run(256), alone=lambda: run(1))
        print0(f"{count} mixed requests: {rates['batched']:,.0f} tokens/s batched, {rates['alone']:,.0f} one by one: "
               + verdict(rates["batched"] / rates["alone"], 6))

    def samples(self) -> None:
        """A step of reinforcement learning: several answers to each of several questions."""
        room, count = self.config.sequence_len - self.settings.max_new_tokens, self.settings.questions
        asked = [self.prompt(self.dice.randint(room // 4, room // 2)) for _ in range(count)]

        def ask(prompts: list[list[int]]) -> int:
            answers = self.engine.generate_many(prompts, count, self.settings.max_new_tokens, top_k=50)
            return sum(len(answer.tokens) for samples in answers for answer in samples)

        rates = self.contest(together=lambda: ask(asked), apart=lambda: sum(ask([one]) for one in asked))
        print0(f"{count} samples × {count} questions: {rates['together']:,.0f} tokens/s in one call, "
               f"{rates['apart']:,.0f} question by question: " + verdict(rates["together"] / rates["apart"], 2.5))

# %%
#| export scripts/infer_bench
#| cli infer_bench
def infer_bench(settings: Settings) -> None:
    """Measure generation: the cache, the batch, the memory bound."""
    bench = Bench(settings)
    print0(f"{bench.config.n_layer} layers of width {bench.config.n_embd}, "
           f"{bench.engine.model.num_parameters():,} parameters, context {bench.config.sequence_len}, "
           f"{bench.device.type}, {torch.get_num_threads()} threads")
    bench.one_row()
    bench.mixed()
    bench.samples()

# %%
# NBVAL_IGNORE_OUTPUT
infer_bench(Settings(repeats=1, requests=16, questions=4, max_new_tokens=16, device_type="cpu"))

# %% [markdown]
# A model this small is not bound by memory on a CPU but by the hundreds of little operations of a step, each of which
# has a fixed price. Alone, a row takes the NumPy step, whose operations cost little; in a batch PyTorch's are
# shared. So a few short requests gain little, and many long ones much. With a larger model the second line comes nearer
# to 100 %.
#
# ## Exercises
#
# In [exercises/08_engine](../exercises/08_engine.ipynb):
#
# 1. `sample`: temperature and top-k.
# 2. `cache_bytes`: what a cache costs, and which context fits.
# 3. `calculate`: a calculator on Python's syntax tree.
# 4. `look_back`: attention over two places, put together.
# 5. `continuous_steps`: how many steps a batch needs whose rows come and go.
# 6. Measure: where does a batch stop paying?
#
# **Next:** [09 · Chat](09_sft.ipynb) turns a base model into one that answers.
