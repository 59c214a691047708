"""Pretraining runs of seconds, for the tests of base_train: settings, data, and what a run leaves behind."""

import itertools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from nanochat_lib.checkpoint import checkpoint_directory

T = 32
SMALL = dict(depth=2, aspect_ratio=16, head_dim=16, max_seq_len=T, device_batch_size=4, total_batch_size=256, save_every=4,
             num_iterations=12, eval_every=6, eval_tokens=256, core_metric_every=-1, sample_every=-1, device_type="cpu")
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def write_shard(folder, number, groups):
    folder.mkdir(exist_ok=True)
    with pq.ParquetWriter(folder / f"shard_{number:05d}.parquet", pa.schema([("text", pa.string())])) as writer:
        for group in groups:
            writer.write_table(pa.table({"text": group}))


@pytest.fixture
def data(base_dir, tokenizer):
    """A base directory with a tokenizer; the folder of a little text, in which each document is one row of T tokens."""
    tokenizer.save(base_dir / "tokenizer")
    rng, folder = random.Random(0), base_dir / "shards"
    letters = [chr(code) for code in range(33, 127)]
    strings = ("".join(rng.choices(letters, weights=range(1, 95), k=T + 2)) for _ in range(10**6))
    rows = list(itertools.islice((text for text in strings if len(tokenizer.encode(text)) == T), 160))
    write_shard(folder, 0, [rows[i:i + 4] for i in range(0, 128, 4)])
    write_shard(folder, 1, [rows[128:144], rows[144:]])
    return str(folder)


def losses(tag="d2"):
    """{step: loss} as metrics.jsonl has them; a step logged twice is a fault."""
    lines = map(json.loads, (checkpoint_directory("base", tag) / "metrics.jsonl").read_text().splitlines())
    pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def weights(tag="d2", step=12):
    return load_file(checkpoint_directory("base", tag) / f"model_{step:06d}.safetensors")


def same(left, right, atol=0.0):
    return all(torch.allclose(left[name], right[name], rtol=0, atol=atol) for name in left)
