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
# # 05 · The optimizer
#
# *How do weights learn, on one device and on many?* — 35 minutes, less than one of them computing.
#
# The loss says how wrong the model is; its gradient says, for each weight, which way is less wrong. An optimizer
# turns that into a step. How well it does so decides how many tokens a run needs, and so what it costs. We go from
# plain gradient descent to AdamW, from there to Muon, which moves whole matrices, and then share the work among the
# GPUs of a machine.

# %%
#| default_exp optim

# %%
#| export
"""AdamW for tables and scalars, Muon for the matrices of the blocks; on one process, or sharded over many."""


import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat_lib.common import NanochatError
from nanochat_lib.compiling import on_gpu_compiled
from nanochat_lib.muon import muon_step, second_moment_like

# %%
import matplotlib.pyplot as plt

from nanochat_lib.gpt import GPT, GPTConfig
from nanochat_lib.world_facts import World
from nanochat_lib.world_text import documents

# %% [markdown]
# ## From a slope to a step
#
# Take the smallest loss that makes trouble: a valley 50 times steeper across than along. The rate that gradient
# descent can stand is set by the steep direction (here anything above 2/50 blows up); along the valley it then
# crawls. Momentum sums past gradients, older ones less: what keeps changing sign cancels, what stays adds up. Adam also
# divides each weight's step by the size its gradients usually have.

# %%
curvature = torch.tensor([1.0, 50.0])


def descend(update, steps=40):
    """Path (steps + 1, 2) of w from (-1.8, 0.6) on the loss ½ Σ curvature · w²; update(w, gradient, step) moves w."""
    w, path = torch.tensor([-1.8, 0.6]), []
    for step in range(steps + 1):
        path.append(w.clone())
        update(w, curvature * w, step + 1)
    return torch.stack(path)


velocity = torch.zeros(2)


def momentum_update(w, gradient, step):
    velocity.mul_(0.8).add_(gradient)
    w.sub_(velocity, alpha=0.012)


plain = descend(lambda w, gradient, step: w.sub_(gradient, alpha=0.036))
momentum = descend(momentum_update)

# %% [markdown]
# AdamW's step, written for many tensors at once (`_foreach` runs one kernel over a list where it can). Weight decay
# pulls weights towards zero directly, not through the gradient: that is the W. Our `eps` will be tiny: even a weight
# with gradients of 1e-9 moves.

# %%
#| export
def adamw_step(weights: list[torch.Tensor], gradients: list[torch.Tensor], first: list[torch.Tensor],
               second: list[torch.Tensor], step: int, lr: float, betas: tuple[float, float], eps: float,
               weight_decay: float) -> None:
    """One AdamW step (arXiv 1711.05101) on lists of tensors, in place; `first` and `second` are the running moments.

    `step` counts from 1. Moments and gradients are float32; weights may be bfloat16.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    scale = torch._foreach_div(second, 1 - beta2**step)  # both moments start at 0: undo that bias
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, eps)
    updates = torch._foreach_div(first, scale)
    if weight_decay:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-lr / (1 - beta1**step))

# %% [markdown]
# Nine passes over the tensors, and a vocabulary's tables are most of a small model: the step waits for memory ten times.
# So large tensors get one pass: on a GPU a compiler makes it of the formula; on a CPU PyTorch has it built in for
# float32, and weights in bfloat16 are widened piece by piece, each piece small enough to stay in the cache.

# %%
#| export compiling
"""torch.compile for single formulas, where there is a GPU and a compiler for it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_lib.common import print0

NO_COMPILER: list[str] = []  # why the GPU of this machine goes without


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def on_gpu_compiled(function: Callable, x: Tensor, *args: Any) -> Any:
    """function(x, *args), on a GPU through torch.compile, where that works: one pass over memory instead of many."""
    if x.is_cuda and not NO_COMPILER:
        try:
            return compiled(function)(x, *args)
        except Exception as error:
            NO_COMPILER.append((str(error).splitlines() or [repr(error)])[0])
            print0(f"{function.__name__} is not compiled ({NO_COMPILER[0][:150]}): going on without")
    return function(x, *args)

# %%
#| export
LARGE = 2**20  # elements of a tensor that no cache holds
PIECE = 2**17  # elements for each thread: five float32 tensors of them fit the last cache


def adamw_formula(w: torch.Tensor, g: torch.Tensor, first: torch.Tensor, second: torch.Tensor, numbers: torch.Tensor,
                  beta1: float, beta2: float, eps: float) -> None:
    """`adamw_step` of one tensor, for a compiler; numbers: what changes from step to step, else it compiles again."""
    kept, rate, correction = numbers.unbind()
    g = g.float()
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    w.copy_(w * kept - rate * first / ((second * correction).sqrt() + eps))


def adamw_pieces(tensors: list[torch.Tensor], step: int, lr: float, betas: tuple[float, float], eps: float,
                 weight_decay: float) -> None:
    """`adamw_step` of one large tensor on a CPU; tensors: weights, gradient, first and second moment."""
    settings = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay, amsgrad=False,
                    maximize=False)
    count = torch.tensor(float(step))
    for w, g, m, v in zip(*(tensor.view(-1).split(PIECE * torch.get_num_threads()) for tensor in tensors)):
        wide = w.float()  # w itself if it is float32
        torch._fused_adamw_([wide], [g.float()], [m], [v], [], [count], **settings)
        if wide is not w:
            w.copy_(wide)


def fast_adamw(weights: list[torch.Tensor], gradients: list[torch.Tensor], first: list[torch.Tensor],
               second: list[torch.Tensor], step: int, lr: float, betas: tuple[float, float], eps: float,
               weight_decay: float) -> None:
    """`adamw_step`, in one pass over memory where tensors are large; gradients of any dtype."""
    device, settings = weights[0].device, (step, lr, betas, eps, weight_decay)
    if weights[0].numel() < LARGE or device.type not in ("cpu", "cuda"):
        return adamw_step(weights, [gradient.float() for gradient in gradients], first, second, *settings)
    numbers = (1 - lr * weight_decay, lr / (1 - betas[0]**step), 1 / (1 - betas[1]**step))
    numbers = torch.tensor(numbers, device=device)
    for w, g, m, v in zip(weights, gradients, first, second):
        if device.type == "cuda":
            on_gpu_compiled(adamw_formula, w, g, m, v, numbers, *betas, eps)
        else:
            adamw_pieces([w, g.contiguous(), m, v], *settings)

# %%
first, second = torch.zeros(2), torch.zeros(2)
adam = descend(lambda w, gradient, step: adamw_step([w], [gradient], [first], [second], step, 0.15, (0.8, 0.95),
                                                    1e-10, 0.0))

grid = torch.meshgrid(torch.linspace(-2, 0.5, 200), torch.linspace(-0.7, 0.7, 200), indexing="xy")
height = sum(c * g**2 / 2 for c, g in zip(curvature, grid))
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True, layout="constrained")
for ax, (name, path) in zip(axes, {"gradient descent": plain, "momentum": momentum, "AdamW": adam}.items()):
    ax.contour(*grid, height, levels=[0.02, 0.2, 0.8, 2, 4, 8, 12], colors="0.8", linewidths=0.8)
    ax.plot(*path.T, ".-", markersize=4, linewidth=1)
    ax.set(title=f"{name}: loss {(curvature * path[-1]**2 / 2).sum():.3f} after 40 steps", xlabel="weight 1 (flat)")
    ax.title.set_fontsize(10)
_ = axes[0].set_ylabel("weight 2 (steep)")

# %% [markdown]
# The same numbers as `torch.optim.AdamW`, on random gradients:

# %%
torch.manual_seed(0)
ours = torch.randn(5, 3)
theirs = torch.nn.Parameter(ours.clone())
reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
first, second = torch.zeros(5, 3), torch.zeros(5, 3)
for step in range(1, 6):
    theirs.grad = torch.randn(5, 3)
    adamw_step([ours], [theirs.grad], [first], [second], step, 0.1, (0.8, 0.95), 1e-10, 0.1)
    reference.step()
assert torch.allclose(ours, theirs, atol=1e-6)

# %% [markdown]
# ## A matrix is not a bag of numbers
#
# Adam scales each weight alone, whatever its neighbours do. But a layer computes W·x: what counts is what a change of
# W does to vectors. Look at a real gradient, of a small GPT on letters of our world, through its singular values: how
# strongly it pulls in each of its independent directions.

# %%
text = "\n\n".join(documents(World(1), 400)).encode()
letters = torch.tensor(list(text))


def small_gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights()
    return model


def batch_of(step, rows=16, length=64):
    starts = torch.randint(len(letters) - length - 1, (rows,), generator=torch.Generator().manual_seed(step))
    rows = letters[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


model = small_gpt()
warm = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(30):
    warm.zero_grad()
    model(*batch_of(step)).backward()
    warm.step()
gradient = model.transformer.h[0].mlp.c_fc.weight.grad.clone()  # (256, 64)
values = torch.linalg.svdvals(gradient)
share = values.square().cumsum(0) / values.square().sum()
assert share[2] > 0.9  # of the squared length lies in three of 64 directions

# %% [markdown]
# Three of 64 directions have more than nine tenths of the pull; rare but useful ones get next to nothing. **Muon**
# (Jordan, 2024) gives every direction the same: it replaces the gradient U·S·Vᵀ by U·Vᵀ, the nearest orthogonal
# matrix. An SVD per step would be far too slow. But a polynomial p(X) = a·X + b·XXᵀX + c·(XXᵀ)²X changes singular
# values only, each s to a·s + b·s³ + c·s⁵, and needs nothing but matrix products, the thing GPUs do best. Applied a
# few times, with the right coefficients, it sends everything between 0.001 and 1 to about 1.
#
# Which coefficients are best? Those whose largest error on the interval at hand is smallest (minimax), and after each
# step the interval is another: that is **Polar Express**. The best quintic touches its error bound four times with
# alternating sign, which Remez' algorithm finds by solving four equations again and again.

# %%
def best_quintic(low, high):
    """(a, b, c) of the odd quintic nearest to 1 on [low, high]."""
    points = torch.tensor([low, (3 * low + high) / 4, (low + 3 * high) / 4, high], dtype=torch.float64)
    for _ in range(100):
        signs = torch.tensor([1, -1, 1, -1], dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(torch.stack([points, points**3, points**5, signs], 1),
                                            torch.ones(4, dtype=torch.float64))
        root = (9 * b**2 - 20 * a * c).sqrt()  # p'(x) = 0: where the error is largest now
        points[1], points[2] = ((-3 * b - root) / (10 * c)).sqrt(), ((-3 * b + root) / (10 * c)).sqrt()
    return torch.stack([a, b, c])


def express(steps=5, low=1e-3, safety=2e-2, cushion=2e-2):
    """Coefficients for singular values in [low, 1]. safety: room for rounding; the lower end is at least cushion · high."""
    found, high, powers = [], 1.0, torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    for step in range(steps):
        p = best_quintic(max(low, cushion * high), high)
        if cushion * high > low:  # centre the error on the whole interval again
            p *= 2 / sum((p * x**powers).sum() for x in (low, high))
        if step < steps - 1:
            p /= (1 + safety) ** powers
        found.append(p.tolist())
        low = float((p * low**powers).sum())
        high = 2 - low  # a minimax polynomial errs as much above 1 as below
    return found

# %%
#| export muon
"""Muon's step: singular vectors of the momentum, all of one length, by matrix products alone."""

import torch

from nanochat_lib.common import compute_dtype
from nanochat_lib.compiling import on_gpu_compiled

# p(x) = a·x + b·x³ + c·x⁵, one after the other: 5 steps, safety 2e-2, cushion 2e-2 (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(matrices: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(N, rows, cols) → the same singular vectors, every singular value near 1 (arXiv 2505.16932).

    Only matrix products, on the shorter side; in bfloat16 where that is `dtype` (the compute dtype), else in float32.
    """
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = matrices / (1.01 * norm).clamp_min(1e-30)
    if (dtype or compute_dtype(matrices.device)) == torch.bfloat16:
        x = x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        odd = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·XXᵀ + c·(XXᵀ)²
        x = torch.baddbmm(x, x, odd, beta=a) if tall else torch.baddbmm(x, odd, x, beta=a)
    return x.to(matrices.dtype)

# %% [markdown]
# The numbers in the library are what our few lines find. Its input is divided by 1.01 times its norm, so that no
# singular value is above 1. Values down to a thousandth of the norm become about 1, and weaker ones grow about a
# thousandfold.

# %%
difference = torch.tensor(express(), dtype=torch.float64) - torch.tensor(POLAR_EXPRESS, dtype=torch.float64)
assert difference.abs().max() < 1e-9

x = torch.logspace(-4, 0, 400)
after = torch.linalg.svdvals(polar_express(gradient[None])[0])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
y = x.clone()
for step, (a, b, c) in enumerate(POLAR_EXPRESS, 1):
    y = a * y + b * y**3 + c * y**5
    left.semilogx(x, y, color=plt.cm.viridis(step / 6), label=f"after {step}")
left.set(xlabel="singular value before (norm 1)", ylabel="after", title="five polynomials")
left.legend(fontsize=8)
right.semilogy(values / (1.01 * gradient.norm()), "o", markersize=3, label="gradient of c_fc")
right.semilogy(after, "o", markersize=3, label="after Polar Express")
right.set(xlabel="direction (64 in all)", ylabel="singular value", title="a real gradient")
_ = right.legend(fontsize=8)

# %% [markdown]
# ## Three refinements and a decay
#
# - **MuonEq**: before the polynomial, every row gets the mean norm of the rows, so that a few loud neurons do not set
#   the scale.
# - **Muon+**: afterwards the Frobenius norm is set to what an orthogonal matrix has; what five steps left over goes.
# - **NorMuon**: an orthogonal matrix may still move some neurons more than others, step after step. As Adam does for
#   each weight, keep a running mean square, here of each row (of a wide matrix: of each column), divide by its root,
#   and give the whole matrix its norm back.
# - **Cautious weight decay**: decay only weights that the step shrinks anyway; where the step wants a weight to grow,
#   do not pull against it.

# %%
#| export muon
def equalize_rows(matrices: torch.Tensor) -> torch.Tensor:
    """MuonEq (arXiv 2603.28254): every row of a matrix gets the mean norm of its rows. (N, rows, cols)."""
    norms = matrices.norm(dim=-1, keepdim=True)
    return matrices * (norms.mean(-2, keepdim=True) / norms.clamp_min(1e-30))


def set_norm(matrices: torch.Tensor) -> torch.Tensor:
    """Muon+ (arXiv 2602.21545): Frobenius norm √min(rows, cols), what a perfectly orthogonal matrix has."""
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    return matrices * (min(matrices.shape[-2:]) ** 0.5 / norm.clamp_min(1e-30))


def second_moment_like(matrices: torch.Tensor) -> torch.Tensor:
    """Zeros for NorMuon's running variance: one number per row of tall matrices, per column of wide ones."""
    count, rows, cols = matrices.shape
    return matrices.new_zeros((count, rows, 1) if rows >= cols else (count, 1, cols))


def reduce_variance(updates: torch.Tensor, second: torch.Tensor, beta2: float) -> torch.Tensor:
    """NorMuon (arXiv 2510.05491): divide by the running root mean square over the shorter side, keep the whole norm."""
    mean_square = updates.square().mean(-1 if second.size(-1) == 1 else -2, keepdim=True)  # shaped like second
    second.lerp_(mean_square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    before = mean_square.sum((-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum((-2, -1), keepdim=True)
    return updates * (scale * (before / after.clamp_min(1e-30)).sqrt())

# %%
#| export muon
def direction(gradients: torch.Tensor, second: torch.Tensor, beta2: float, dtype: torch.dtype) -> torch.Tensor:
    """Where matrices (N, rows, cols) go, each of norm √min(rows, cols); `second` is updated in place."""
    return reduce_variance(set_norm(polar_express(equalize_rows(gradients), dtype)), second, beta2)


def muon_step(weights: torch.Tensor, gradients: torch.Tensor, momentum_buffer: torch.Tensor, second: torch.Tensor,
              lr: float, momentum: float, beta2: float, weight_decay: float) -> None:
    """One Muon step on a stack of matrices (N, rows, cols) of one shape, in place on weights and both buffers.

    Nesterov momentum → MuonEq → Polar Express → Muon+ → NorMuon → cautious weight decay (arXiv 2510.12402).
    """
    rate = lr * max(1.0, weights.size(-2) / weights.size(-1)) ** 0.5
    momentum_buffer.lerp_(gradients, 1 - momentum)
    dtype = compute_dtype(weights.device)
    updates = on_gpu_compiled(direction, gradients.lerp(momentum_buffer, momentum), second, beta2, dtype)
    if weight_decay:  # only where the step pulls a weight towards zero anyway
        updates = updates.addcmul(weights, updates * weights >= 0, value=weight_decay)
    weights.sub_(updates, alpha=rate)

# %%
weights, momentum_buffer = torch.zeros(1, 256, 64), torch.zeros(1, 256, 64)
second = second_moment_like(weights)
for step in range(8):
    model.zero_grad()
    model(*batch_of(100 + step)).backward()
    before = weights.clone()
    g = model.transformer.h[0].mlp.c_fc.weight.grad[None]
    muon_step(weights, g, momentum_buffer, second, lr=0.02, momentum=0.9, beta2=0.9, weight_decay=0.0)
moved = (weights - before)[0].norm(dim=1)
orthogonal = polar_express(momentum_buffer)[0].norm(dim=1)

figure, ax = plt.subplots(figsize=(10, 2.6), layout="constrained")
for name, norms in {"gradient": g[0].norm(dim=1), "orthogonalized": orthogonal, "Muon's whole step": moved}.items():
    ax.plot((norms / norms.mean()).sort(descending=True).values, label=name)
ax.set(xlabel="neuron of c_fc, sorted", ylabel="length of its step\n(1 = mean)",
       title="how much each of 256 neurons moves")
_ = ax.legend(fontsize=8)

# %% [markdown]
# ## Sharing the work
#
# Eight GPUs train one model: each reads its own part of the batch, so gradients must be averaged. The usual way (DDP)
# gives every GPU the whole gradient, and each then does the whole optimizer's work, the same eight times, with eight
# copies of its state. We deal it out instead (ZeRO-2, arXiv 1910.02054): a rank receives the mean gradient of *its*
# rows only (reduce-scatter), holds state for these, updates them, and sends them to all (all-gather). That sends as
# much as DDP's all-reduce, and state and arithmetic are divided by the number of ranks.
#
# A row of an embedding can be updated alone. Muon needs whole matrices, so there a "row" is one matrix of a stack of
# equal shape. Where the numbers do not divide, the last ranks get less, and what is sent is padded.

# %%
#| export
SMALL = 1024  # tensors of fewer elements are not worth sharding
# torch 2.13 renamed both
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def owned_rows(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one-past-last row that `rank` updates, of a tensor of `rows` rows; the last ranks may get none."""
    chunk = -(-rows // world_size)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero rows until there are `rows` of them."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - tensor.size(0))) if tensor.size(0) < rows else tensor

# %%
#| export
class Shard:
    """One tensor as one rank sees it: the rows are dealt to the ranks, each updates its own and gathers the others'.

    `stack`: the tensor is several matrices of one shape, and a row is a whole matrix. A tensor of fewer than
    1,024 elements is updated whole by every rank. On one process a shard is the whole, and nothing is sent.
    """

    def __init__(self, params: list[torch.Tensor], stack: bool, rank: int = 0, world_size: int = 1):
        self.params, self.stack, self.rank, self.world_size = params, stack, rank, world_size
        self.shape = (len(params), *params[0].shape) if stack else tuple(params[0].shape)
        self.split = self.world_size > 1 and (stack or params[0].numel() >= SMALL)
        if self.split:
            self.start, self.stop = owned_rows(self.shape[0], self.rank, self.world_size)
            self.chunk = -(-self.shape[0] // self.world_size)
        self.work = self.sent = self.received = None  # of the communication under way

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.shape[1:]) if self.split else self.shape

    def reduce(self) -> None:
        """Phase 1: start summing the gradient over all ranks, each rank receiving its own rows."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        whole = torch.stack(gradients) if self.stack else gradients[0]
        self.received = whole
        if self.split:
            self.sent = pad_rows(whole, self.chunk * self.world_size).contiguous()
            self.received = whole.new_empty(self.chunk, *self.shape[1:])
            self.work = reduce_scatter(self.received, self.sent, async_op=True)
        elif self.world_size > 1:
            self.received = whole.clone()
            self.work = dist.all_reduce(self.received, async_op=True)

    def gradient(self) -> torch.Tensor:
        """Phase 2: the mean gradient of this rank's rows; on several ranks float32."""
        if self.work:
            self.work.wait()
        mine = self.received[: self.stop - self.start] if self.split else self.received
        self.work = self.sent = self.received = None
        return mine.float() / self.world_size if self.world_size > 1 else mine

    def weights(self) -> torch.Tensor:
        """This rank's rows of the weights: a view of the parameter, or a new stack."""
        if self.stack:
            mine = self.params[self.start:self.stop] if self.split else self.params
            return torch.stack(mine) if mine else self.params[0].new_empty(self.local_shape)
        return self.params[0].detach()[self.start:self.stop] if self.split else self.params[0].detach()

    def gather(self, mine: torch.Tensor) -> None:
        """End of phase 2: start sending this rank's new rows to all."""
        self.received = mine
        if self.split:
            self.sent = pad_rows(mine, self.chunk).contiguous()
            self.received = mine.new_empty(self.chunk * self.world_size, *self.shape[1:])
            self.work = all_gather(self.received, self.sent, async_op=True)

    def finish(self) -> None:
        """Phase 3: put the new rows of all ranks into the parameters."""
        if self.work:
            self.work.wait()
        if self.stack:
            torch._foreach_copy_(self.params, list(self.received[: self.shape[0]].unbind()))
        elif self.split:
            self.params[0].copy_(self.received[: self.shape[0]])
        self.work = self.sent = self.received = None

    def as_checkpoint(self, local: torch.Tensor) -> torch.Tensor:
        """State of this rank's rows as a tensor that knows the whole: a DTensor if sharded. Shares its memory."""
        if not self.split:
            return local
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard as OnRows

        shape = torch.Size((self.shape[0], *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        mesh = init_device_mesh(local.device.type, (self.world_size,))
        return DTensor.from_local(local, mesh, [OnRows(0)], run_check=False, shape=shape, stride=stride)

# %%
#| export
def parameter_groups(model: torch.nn.Module, unembedding_lr: float = 0.008, embedding_lr: float = 0.3,
                     matrix_lr: float = 0.02, weight_decay: float = 0.0, scalar_lr: float = 0.5) -> list[dict]:
    """The groups of a GPT: Muon for every matrix of the blocks, by shape; AdamW for the rest.

    The rates are those of a model 768 wide; of lm_head and the embeddings they are scaled by √(768/n_embd).
    """
    width = (768 / model.config.n_embd) ** 0.5

    def adamw(name, params, lr, betas, weight_decay):
        return dict(kind="adamw", name=name, params=list(params), lr=lr, betas=betas, eps=1e-10,
                    weight_decay=weight_decay)

    smear_backout = [*model.smear_gate.parameters(), model.smear_lambda, model.backout_lambda]
    groups = [
        adamw("lm_head", model.lm_head.parameters(), unembedding_lr * width, (0.8, 0.96), 0.01),
        adamw("wte", model.transformer.wte.parameters(), embedding_lr * width, (0.8, 0.995), 0.001),
        adamw("value_embeds", model.value_embeds.parameters(), 0.5 * embedding_lr * width, (0.8, 0.995), 0.01),
        adamw("resid_lambdas", [model.resid_lambdas], 0.01 * scalar_lr, (0.8, 0.95), 0.05),
        adamw("x0_lambdas", [model.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0),
        adamw("smear_backout", smear_backout, 0.2, (0.8, 0.95), 0.0),
    ]
    by_shape: dict[tuple, list] = {}
    for matrix in model.transformer.h.parameters():
        by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
    for (rows, cols), matrices in sorted(by_shape.items()):
        groups.append(dict(kind="muon", name=f"muon_{rows}x{cols}", params=matrices, lr=matrix_lr, momentum=0.95,
                           beta2=0.9, weight_decay=weight_decay))
    return groups

# %% [markdown]
# Who owns what when four ranks train the laptop's model (depth 4, width 128)? One bar is one tensor or stack; black
# lines part the slices.

# %%
laptop = GPT(GPTConfig(sequence_len=256, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=128))
bars, whole, largest = [], 0, [0] * 4
for group in parameter_groups(laptop):
    for number, part in enumerate([group["params"]] if group["kind"] == "muon" else [[p] for p in group["params"]]):
        shards = [Shard(part, group["kind"] == "muon", rank, 4) for rank in range(4)]
        sizes = [torch.Size(shard.local_shape).numel() for shard in shards]
        bars.append((f"{group['name']} {tuple(shards[0].shape)}", sizes if shards[0].split else [0] * 4))
        whole += sum(p.numel() for p in part)
        largest = [total + size for total, size in zip(largest, sizes)]

figure, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
for place, (name, sizes) in enumerate(bars):
    left = 0
    for rank, size in enumerate(sizes):
        part = size / sum(sizes) if any(sizes) else 0.25
        ax.barh(place, part, left=left, color=f"C{rank}" if any(sizes) else "0.85", edgecolor="black", linewidth=0.8)
        left += part
ax.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
ax.invert_yaxis()
ax.set(xlabel="part of the tensor (colour: rank 0–3; grey: small, updated whole by every rank)", xlim=(0, 1))
print(f"{whole:,} parameters; the ranks hold state for {', '.join(f'{n:,}' for n in largest)} of them")

# %% [markdown]
# The optimizer itself then reads like its description. Three phases, so that the network works while the GPU does:
# all reductions are started at once, each group is updated when its own has arrived and its gather is started, and at
# the end we wait for the gathers.
#
# Its state goes into checkpoints as tensors that know their whole (DTensors), so that a run begun on eight GPUs can
# go on on two.

# %%
#| export
class MuonAdamW(torch.optim.Optimizer):
    """AdamW and Muon in one; on several processes gradients are averaged and state is sharded (ZeRO-2), without DDP.

    Groups are dicts: kind="adamw" with params, lr, betas, eps, weight_decay; kind="muon" with params of one shape,
    lr, momentum, beta2, weight_decay. Both may have a name, which state is saved under. Change group["lr"] at will:
    group["initial_lr"] keeps the first. A missing gradient counts as 0.
    """

    def __init__(self, param_groups: list[dict]):
        super().__init__(param_groups, defaults={})
        place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.shards: list[list[Shard]] = []
        for index, group in enumerate(self.param_groups):
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("name", f"group{index}")
            if group["kind"] not in ("adamw", "muon"):
                raise NanochatError(f"optimizer group {group['name']}: kind {group['kind']!r} is not adamw or muon")
            muon = group["kind"] == "muon"
            if muon and (group["params"][0].dim() != 2 or len({p.shape for p in group["params"]}) > 1):
                raise NanochatError(f"optimizer group {group['name']}: Muon takes matrices, all of one shape")
            self.shards.append([Shard(group["params"], True, *place)] if muon else
                               [Shard([p], False, *place) for p in group["params"]])
        self.buffers = [None] * len(self.shards)

    def state_of(self, index: int) -> dict:
        """State of a group, allocated when first asked for: lists `first` and `second` by shard, and the step count."""
        if self.buffers[index] is None:
            first = [torch.zeros(s.local_shape, device=s.params[0].device) for s in self.shards[index]]
            muon = self.param_groups[index]["kind"] == "muon"
            second = [second_moment_like(buffer) if muon else torch.zeros_like(buffer) for buffer in first]
            self.buffers[index] = {"step": 0, "first": first, "second": second}
        return self.buffers[index]

    @torch.no_grad()
    def step(self) -> None:
        """One step, in three phases, so that one group's arithmetic hides another's communication."""
        for shards in self.shards:
            for shard in shards:
                shard.reduce()
        for index, (group, shards) in enumerate(zip(self.param_groups, self.shards)):
            state = self.state_of(index)
            state["step"] += 1
            gradients, weights = [s.gradient() for s in shards], [s.weights() for s in shards]
            if group["kind"] == "adamw":
                fast_adamw(weights, gradients, state["first"], state["second"], state["step"],
                           group["lr"], group["betas"], group["eps"], group["weight_decay"])
            elif len(weights[0]):
                muon_step(weights[0], gradients[0].float(), state["first"][0], state["second"][0],
                          group["lr"], group["momentum"], group["beta2"], group["weight_decay"])
            for shard, mine in zip(shards, weights):
                shard.gather(mine)
        for shards in self.shards:
            for shard in shards:
                shard.finish()

    def checkpoint_state(self) -> dict[str, torch.Tensor]:
        """The whole state, flat, for torch.distributed.checkpoint: sharing memory, complete before the first step too.

        On several ranks sharded tensors are DTensors, so that a checkpoint can be read by another number of ranks.
        """
        flat = {}
        for index, (group, shards) in enumerate(zip(self.param_groups, self.shards)):
            state = self.state_of(index)
            flat[f"{group['name']}.step"] = torch.tensor(state["step"])
            for part in ("first", "second"):
                for number, (shard, local) in enumerate(zip(shards, state[part])):
                    flat[f"{group['name']}.{number}.{part}"] = shard.as_checkpoint(local)
        return flat

    @torch.no_grad()
    def load_checkpoint_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state from `checkpoint_state`, of this layout or (plain tensors) of a single process."""
        for index, (group, shards) in enumerate(zip(self.param_groups, self.shards)):
            own = self.state_of(index)
            try:
                own["step"] = int(state[f"{group['name']}.step"])
                for part in ("first", "second"):
                    for number, (shard, local) in enumerate(zip(shards, own[part])):
                        saved = state[f"{group['name']}.{number}.{part}"]
                        if hasattr(saved, "to_local"):
                            saved = saved.to_local()
                        elif shard.split:
                            saved = saved[shard.start:shard.stop]
                        local.copy_(saved)
            except (KeyError, RuntimeError) as error:
                raise NanochatError(f"optimizer state does not fit this model at {group['name']} ({error}): "
                                    "start from weights alone, or train the checkpoint anew") from None

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.checkpoint_state()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.load_checkpoint_state(state)

# %% [markdown]
# ## Does it pay?
#
# The same model and batches, 80 steps: AdamW for everything against Muon for the matrices. In the second run only the
# blocks' matrices changed hands.

# %%
def train(groups_of, steps=80):
    model = small_gpt()
    optimizer, losses = MuonAdamW(groups_of(model)), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*batch_of(1000 + step))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min((step + 1) / 10, 2 * (1 - step / steps), 1)
        optimizer.step()
        losses.append(loss.item())
    return losses


def only_adamw(model, lr=3e-3):
    groups = parameter_groups(model, 0.004, 0.05, scalar_lr=0.1)
    adamw = dict(kind="adamw", lr=lr, betas=(0.9, 0.95), eps=1e-10)
    return [{**group, **adamw} if group["kind"] == "muon" else group for group in groups]


runs = {"AdamW for the matrices": train(only_adamw),
        "Muon for the matrices": train(lambda model: parameter_groups(model, 0.004, 0.05, scalar_lr=0.1))}
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for name, losses in runs.items():
    ax.plot(torch.tensor(losses).unfold(0, 8, 1).mean(-1), label=name)
ax.set(xlabel="step (1,024 letters each)", ylabel="loss (nats per letter)")
_ = ax.legend()
assert sum(runs["Muon for the matrices"][-20:]) < sum(runs["AdamW for the matrices"][-20:])

# %% [markdown]
# Is that fair? Only if AdamW's rate is a good one: change `lr` above and see whether it catches up.
#
# `tests/test_optim.py` tests that two processes with half a batch each end with the weights of one with the whole (to
# 1e-5), and that a checkpoint goes from one process to two and back; it runs on a laptop, over gloo.
#
# ## Exercises
#
# In [05_optimizer](../exercises/05_optimizer.ipynb):
# 1. `adamw_step`: both moments, bias correction, decoupled decay.
# 2. `polar_express`: orthogonal by products alone.
# 3. `owned_rows`: who updates what.
# 4. Explore: how far does one step go when the gradient is a thousand times too large?
#
# **Next:** [06 · Evaluation](06_evaluation.ipynb)
