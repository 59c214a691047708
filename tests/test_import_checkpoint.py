"""Lesson 07: checkpoints in nanochat's format, made here, become ours: the same logits, the same optimizer state."""

import json
import os
import pickle
from dataclasses import asdict

import pytest
import torch

from nanochat_lib.checkpoint import checkpoint_directory, load_model, load_optimizer, read_meta
from nanochat_lib.common import NanochatError
from nanochat_lib.optim import owned_rows
from nanochat_lib.scripts.import_checkpoint import ImportCheckpoint, import_checkpoint


class Hostile:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def rank_state(optimizer, rank, ranks):
    """What one rank of nanochat's optimizer saves: torch's layout, moments of its rows, stacks padded and dealt."""
    state, groups, index = {}, [], 0
    for place, group in enumerate(optimizer.param_groups):
        own = optimizer.state_of(place)
        numbers = list(range(index, index + len(group["params"])))
        groups.append({"kind": group["kind"], "lr": group["lr"], "params": numbers})
        if group["kind"] == "muon":
            chunk = -(-len(numbers) // ranks)
            parts = [torch.cat((own[key][0], own[key][0].new_zeros(chunk * ranks - len(numbers), *own[key][0].shape[1:])))
                     for key in ("first", "second")]
            state[index] = {name: part[rank * chunk:(rank + 1) * chunk].clone()
                            for name, part in zip(("momentum_buffer", "second_momentum_buffer"), parts)}
        else:
            for number, param, first, second in zip(numbers, group["params"], own["first"], own["second"]):
                rows = slice(*owned_rows(param.size(0), rank, ranks)) if param.numel() >= 1024 else slice(None)
                state[number] = {"step": own["step"], "exp_avg": first[rows].clone(), "exp_avg_sq": second[rows].clone()}
        index += len(numbers)
    return {"state": state, "param_groups": groups}


@pytest.fixture
def theirs(tmp_path, make_model, tokenizer, base_dir):
    """theirs(ranks) → (folder of a nanochat checkpoint of step 600, its model, its optimizer)."""

    def make(ranks=2, prefix="", **changes):
        model = make_model(vocab_size=tokenizer.get_vocab_size(), **changes).train()
        optimizer, ids = model.setup_optimizer(), torch.arange(33)[None] % 300
        for _ in range(2):
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
        folder = tmp_path / "nanochat" / "base_checkpoints" / "d3"
        folder.mkdir(parents=True)
        torch.save({prefix + name: value for name, value in model.state_dict().items()}, folder / "model_000600.pt")
        for rank in range(ranks):
            torch.save(rank_state(optimizer, rank, ranks), folder / f"optim_000600_rank{rank}.pt")
        meta = {"step": 600, "val_bpb": 1.5, "model_config": asdict(model.config), "device_batch_size": 4,
                "user_config": {"depth": 3, "matrix_lr": 0.03, "device_batch_size": 4}, "total_batch_size": 4096,
                "dataloader_state_dict": {"pq_idx": 0, "rg_idx": 3, "epoch": 1}}
        (folder / "meta_000600.json").write_text(json.dumps(meta))
        place = folder.parents[1] / "tokenizer"
        place.mkdir()
        (place / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
        torch.save(tokenizer.token_bytes().int(), place / "token_bytes.pt")
        return folder, model, optimizer

    return make


@pytest.mark.parametrize("ranks, prefix", [(1, "_orig_mod."), (2, ""), (3, "")])
def test_logits_and_optimizer_state_are_the_same(theirs, tokenizer, ranks, prefix, capsys):
    folder, model, optimizer = theirs(ranks, prefix)
    import_checkpoint(ImportCheckpoint(str(folder)))
    assert "without the optimizer" not in capsys.readouterr().out
    again, read, meta = load_model("base", "cpu")
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        assert torch.equal(again(ids), model.eval()(ids))
    assert read.fingerprint == tokenizer.fingerprint == meta["tokenizer"] and meta["step"] == 600
    assert meta["settings"]["matrix_lr"] == 0.03 and meta["total_batch_size"] == 4096 and meta["imported"]["val_bpb"] == 1.5
    other = again.setup_optimizer()
    load_optimizer(checkpoint_directory("base", "d3"), 600, other)
    expected, got = optimizer.checkpoint_state(), other.checkpoint_state()
    assert all(torch.equal(expected[name], got[name]) for name in expected if not name.endswith(".step"))
    assert got["lm_head.step"] == 2 and any(value.abs().sum() > 0 for value in got.values())


def test_a_hostile_pickle_is_refused_and_not_run(theirs, tmp_path):
    folder, *_ = theirs()
    harm = tmp_path / "harm"
    for path in (folder / "model_000600.pt", folder.parents[1] / "tokenizer" / "tokenizer.pkl"):
        good = path.read_bytes()
        for hostile in (pickle.dumps(Hostile(harm)), None):
            if hostile is None:
                torch.save({"lm_head.weight": Hostile(harm)}, path)
            else:
                path.write_bytes(hostile)
            with pytest.raises(NanochatError, match=path.name):
                import_checkpoint(ImportCheckpoint(str(folder)))
            assert not harm.exists()
        path.write_bytes(good)
    assert not checkpoint_directory("base", "d3").exists()


def test_without_its_optimizer_state_a_model_is_imported_too(theirs, capsys):
    folder, *_ = theirs(2)
    (folder / "optim_000600_rank1.pt").unlink()  # half of it is no state
    import_checkpoint(ImportCheckpoint(str(folder)))
    assert "without the optimizer's state" in capsys.readouterr().out
    assert load_model("base", "cpu")[2]["step"] == 600


def test_in_place_the_source_is_left_alone(theirs, monkeypatch):
    folder, *_ = theirs()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder.parents[1]))
    with pytest.raises(NanochatError, match=rf"checkpoint of nanochat: run .*import_checkpoint {folder}"):
        load_model("base", "cpu")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    import_checkpoint(ImportCheckpoint(str(folder)))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert read_meta(checkpoint_directory("base", "d3_nanochat"), 600)["step"] == 600
    assert load_model("base", "cpu", model_tag="d3_nanochat")[2]["step"] == 600


def test_what_does_not_fit_is_one_line(theirs, tmp_path, base_dir, tokenizer):
    from nanochat_lib.tokenizer import Tokenizer

    def refused(match, folder, **changes):
        with pytest.raises(NanochatError, match=match):
            import_checkpoint(ImportCheckpoint(str(folder), **changes))

    refused("no checkpoint of nanochat", tmp_path)
    folder, *_ = theirs()
    refused("there are 600", folder, step=7)
    refused("stage 'bass' is unknown", folder, stage="bass")
    refused("tok_train", folder, tokenizer=str(tmp_path))
    weights = torch.load(folder / "model_000600.pt")
    torch.save({**weights, "smear_gate.weight": torch.zeros(1, 3)}, folder / "model_000600.pt")
    refused(r"another kind of model: smear_gate.weight is \(1, 3\), not \(1, 24\) \(1 such\)", folder)
    torch.save(weights, folder / "model_000600.pt")
    meta = json.loads((folder / "meta_000600.json").read_text())
    (folder / "meta_000600.json").write_text(json.dumps({**meta, "model_config": {"rope": 1}}))
    refused("describes no model of this kind", folder)
    (folder / "meta_000600.json").write_text(json.dumps(meta))
    (base_dir / "tokenizer" / "tokenizer.json").unlink()
    Tokenizer.train_from_iterator(iter(["quite another text, my dear " * 9]), 280).save(base_dir / "tokenizer")
    refused("set NANOCHAT_BASE_DIR", folder)
    tokenizer.save(base_dir / "tokenizer")
    import_checkpoint(ImportCheckpoint(str(folder)))
    refused("give another --model-tag", folder)


def test_as_a_command(theirs, run_module):
    folder, *_ = theirs()
    done = run_module("nanochat_lib.scripts.import_checkpoint", folder, "--model-tag", "mine")
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr
    assert read_meta(checkpoint_directory("base", "mine"), 600)["imported"]["dataloader_state_dict"]["rg_idx"] == 3
