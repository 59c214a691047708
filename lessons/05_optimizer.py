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
# *How do weights learn, on one device and on many?* — 30 minutes, less than one of them computing.

# %%
#| default_exp optim

# %%
#| export
"""The optimizer: AdamW for tables and scalars, Muon for the matrices of the blocks, on one process or sharded over many."""

# %%
#| export
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat_lib.common import NanochatError, compute_dtype

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

# %%
#| export
# p(x) = a·x + b·x³ + c·x⁵, one after the other: 5 steps, safety 2e-2, cushion 2e-2 (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, cols) → the same singular vectors, every singular value near 1 (arXiv 2505.16932).

    Only matrix products, on the shorter side; in bfloat16 where that is the compute dtype, else in float32.
    """
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = matrices / (1.01 * norm).clamp_min(1e-30)
    if compute_dtype(matrices.device) == torch.bfloat16:
        x = x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        odd = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·XXᵀ + c·(XXᵀ)²
        x = torch.baddbmm(x, x, odd, beta=a) if tall else torch.baddbmm(x, odd, x, beta=a)
    return x.to(matrices.dtype)

# %%
#| export
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
#| export
def muon_step(weights: torch.Tensor, gradients: torch.Tensor, momentum_buffer: torch.Tensor, second: torch.Tensor,
              lr: float, momentum: float, beta2: float, weight_decay: float) -> None:
    """One Muon step on a stack of matrices (N, rows, cols) of one shape, in place on weights and both buffers.

    Nesterov momentum → MuonEq → Polar Express → Muon+ → NorMuon → cautious weight decay (arXiv 2510.12402).
    """
    rate = lr * max(1.0, weights.size(-2) / weights.size(-1)) ** 0.5
    momentum_buffer.lerp_(gradients, 1 - momentum)
    updates = polar_express(equalize_rows(gradients.lerp(momentum_buffer, momentum)))
    updates = reduce_variance(set_norm(updates), second, beta2)
    if weight_decay:  # only where the step pulls a weight towards zero anyway
        updates = updates.addcmul(weights, updates * weights >= 0, value=weight_decay)
    weights.sub_(updates, alpha=rate)

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
    """One tensor as this rank sees it: its rows are dealt to the ranks, each updates its own and gathers the others'.

    `stack`: the tensor is several matrices of one shape stacked, and a row is a matrix. Tensors under 1,024
    elements are updated whole by every rank. On one process a shard is the whole and nothing is sent.
    """

    def __init__(self, params: list[torch.Tensor], stack: bool):
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.params, self.stack = params, stack
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
        """Phase 2: the mean gradient of this rank's rows, float32."""
        if self.work:
            self.work.wait()
        mine = self.received[: self.stop - self.start] if self.split else self.received
        self.work = self.sent = self.received = None
        return mine.float() / self.world_size if self.world_size > 1 else mine.float()

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
class MuonAdamW(torch.optim.Optimizer):
    """AdamW and Muon in one; on several processes gradients are averaged and state is sharded (ZeRO-2), without DDP.

    Groups are dicts: kind="adamw" with params, lr, betas, eps, weight_decay; kind="muon" with params of one shape, lr,
    momentum, beta2, weight_decay. Change group["lr"] at will; group["initial_lr"] keeps the first. A missing gradient is 0.
    """

    def __init__(self, param_groups: list[dict]):
        super().__init__(param_groups, defaults={})
        self.shards: list[list[Shard]] = []
        for index, group in enumerate(self.param_groups):
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("name", f"group{index}")
            if group["kind"] not in ("adamw", "muon"):
                raise NanochatError(f"optimizer group {group['name']}: kind {group['kind']!r} is not adamw or muon")
            muon = group["kind"] == "muon"
            if muon and (group["params"][0].dim() != 2 or len({p.shape for p in group["params"]}) > 1):
                raise NanochatError(f"optimizer group {group['name']}: Muon takes matrices, all of one shape")
            self.shards.append([Shard(group["params"], True)] if muon else [Shard([p], False) for p in group["params"]])
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
                adamw_step(weights, gradients, state["first"], state["second"], state["step"],
                           group["lr"], group["betas"], group["eps"], group["weight_decay"])
            elif len(weights[0]):
                muon_step(weights[0], gradients[0], state["first"][0], state["second"][0],
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

# %%
#| export
def parameter_groups(model: torch.nn.Module, unembedding_lr: float = 0.008, embedding_lr: float = 0.3,
                     matrix_lr: float = 0.02, weight_decay: float = 0.0, scalar_lr: float = 0.5) -> list[dict]:
    """The groups of a GPT: Muon for every matrix of the blocks, by shape; AdamW for the rest, rates × √(768/n_embd)."""
    width = (768 / model.config.n_embd) ** 0.5

    def adamw(name, params, lr, betas, weight_decay):
        return dict(kind="adamw", name=name, params=list(params), lr=lr, betas=betas, eps=1e-10, weight_decay=weight_decay)

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
