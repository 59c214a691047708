"""A base directory with everything chat_sft needs, made in a second: the world's tasks, a tokenizer, a tiny base model."""

import torch

from nanochat_lib.checkpoint import checkpoint_directory, save_checkpoint
from nanochat_lib.common import Runtime, base_dir
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.world import World
from nanochat_lib.world_tasks import write_tasks

BASE_SETTINGS = dict(device_batch_size=8, total_batch_size=-1, embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02,
                     scalar_lr=0.5)


def make_base(tokenizer, sequence_len=128, total_batch_size=1024, tag="d2"):
    """Write tokenizer, world tasks and a base checkpoint of step 7 (momenta not zero) under base_dir()."""
    tokenizer.save(base_dir() / "tokenizer")
    if not (base_dir() / "world").exists():
        write_tasks(World(1), base_dir() / "world" / "tasks")
    torch.manual_seed(0)
    model = build_model(GPTConfig(sequence_len, tokenizer.get_vocab_size(), 2, 2, 2, 32), "cpu")
    optimizer = model.setup_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    meta = {"tokenizer": tokenizer.fingerprint, "settings": BASE_SETTINGS, "total_batch_size": total_batch_size}
    save_checkpoint(checkpoint_directory("base", tag), 7, model, optimizer, meta, Runtime(torch.device("cpu")))
    return model
