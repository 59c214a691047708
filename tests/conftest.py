"""Fixtures that every test file may use."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
os.environ.update(QUIET)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout; without it a test is skipped, but in CI that is a failure."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        reason = f"no {folder.relative_to(ROOT.parent)} beside the checkout"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return folder


@pytest.fixture
def base_dir(tmp_path, monkeypatch) -> Path:
    """A fresh $NANOCHAT_BASE_DIR."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture
def late_copies(monkeypatch):
    """A background saver that is slow to copy: who trains on without waiting saves weights of a later step."""
    from nanochat_lib.saver import HostCopy

    monkeypatch.setattr(HostCopy, "_copy", lambda copy, real=HostCopy._copy: (time.sleep(0.2), real(copy)))


@pytest.fixture
def run_module():
    """run_module("nanochat_lib.scripts.base_train", "--depth", 1, nproc=2, env={…}) → CompletedProcess, never raising."""

    def run(name, *args, nproc=1, env=None, timeout=240):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
        command = [sys.executable, *launch, "-m", name, *map(str, args)]
        return subprocess.run(command, env={**os.environ, **QUIET, **(env or {})}, cwd=ROOT, text=True,
                              capture_output=True, timeout=timeout)

    return run


TEXTS = ["Anna lives in Oakham and keeps a cat.", "3 pies at 4 pence each cost 12 pence.\n\nThank you, said Ben.",
         "In spring the miller's daughter sells apples at the market."] * 20


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 300 + 9 tokens trained on a few sentences."""
    from nanochat_lib.tokenizer import Tokenizer

    return Tokenizer.train_from_iterator(iter(TEXTS), 309)


@pytest.fixture(scope="session")
def make_model():
    """make_model(seed=0, **config changes) → tiny GPT in eval mode with every parameter random and non-zero."""
    import torch

    from nanochat_lib.gpt import GPT, GPTConfig

    def make(seed=0, **changes):
        config = dict(sequence_len=64, vocab_size=309, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")
        torch.manual_seed(seed)
        model = GPT(GPTConfig(**{**config, **changes}))
        model.init_weights()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make
