"""What test_optim runs on one process or several: a small GPT trained for some steps, its optimizer saved on the way.

    python -m tests.optim_worker OUT [LOAD]

trains on a fixed global batch, half a batch per rank if there are two. Fresh, it takes 2 steps, saves into OUT/half,
takes 2 more; with LOAD it goes on from that folder with those 2. Ends with the weights in OUT/weights.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nanochat_lib.common import start, stop
from nanochat_lib.gpt import GPT, GPTConfig
from nanochat_lib.optim import MuonAdamW, parameter_groups


def train(out: Path, load: Path | None = None, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Weights after step 4, by name."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=100, n_layer=3, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    # in float32 some gradients are mere rounding, and Adam would take a step of full size from their sign
    model.double().dtype = torch.float64
    odd = torch.nn.Parameter(torch.randn(1027, 3))  # more rows than 1,024 elements, and not even
    extra = dict(kind="adamw", name="odd", params=[odd], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = MuonAdamW([*parameter_groups(model, weight_decay=0.1), extra])
    if load:
        saved = torch.load(load / "weights.pt")
        odd.data.copy_(saved.pop("odd"))
        model.load_state_dict(saved)
        state = optimizer.checkpoint_state()
        dcp.load(state, checkpoint_id=load)
        optimizer.load_checkpoint_state(state)
    for step in range(2 if load else 0, 4):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 100, (8, 17), generator=generator)
        slope = torch.randn(2, 1027, 3, generator=generator)
        mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[mine, :-1].contiguous(), tokens[mine, 1:].contiguous())
        (loss + (odd * (slope.mean(0) if world_size == 1 else slope[rank])).sum()).backward()
        optimizer.step()
        weights = {**model.state_dict(), "odd": odd.data}
        if step == 1:
            dcp.save(optimizer.checkpoint_state(), checkpoint_id=out / "half")
            if rank == 0:
                torch.save(weights, out / "half" / "weights.pt")
    return {name: tensor.clone() for name, tensor in weights.items()}


if __name__ == "__main__":
    runtime = start("cpu")
    folder = Path(sys.argv[1])
    weights = train(folder, Path(sys.argv[2]) if sys.argv[2:] else None, runtime.rank, runtime.world_size)
    everyone = [None] * runtime.world_size
    dist.all_gather_object(everyone, {name: tensor.double().sum().item() for name, tensor in weights.items()})
    assert all(sums == everyone[0] for sums in everyone), "ranks hold different weights"
    if runtime.is_main:
        torch.save(weights, folder / "weights.pt")
    stop()
