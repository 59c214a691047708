"""Lesson 07: pretraining runs of seconds: to the end, resumed, on two processes, and when things are missing."""

import json
import os
import shutil
import socket
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import tyro
from conftest import QUIET, ROOT
from small_run import FLAGS, SMALL, data, losses, same, weights, write_shard  # noqa: F401

from nanochat_lib import checkup, pretraining
from nanochat_lib.budget import Machine
from nanochat_lib.checkpoint import checkpoint_directory, load_model, load_optimizer, read_meta, steps_in
from nanochat_lib.common import NanochatError, Runtime, read_json
from nanochat_lib.pretraining import BaseTrain
from nanochat_lib.scripts.base_eval import BaseEval, base_eval
from nanochat_lib.scripts.base_train import base_train
from nanochat_lib.tokenizer import load_tokenizer
from nanochat_lib.training import LossScaler, LossWatch, accumulate, check_weights, compiled, divide_batch, set_rates


def test_a_run_from_start_to_end(data, base_dir, capsys):
    base_train(BaseTrain(**SMALL, data_dir=data))
    assert steps_in(checkpoint_directory("base", "d2")) == [4, 8, 12]
    result = read_json(base_dir / "report" / "result_base.json")
    assert [step for step, _ in result["bpb_curve"]] == [0, 6, 12]
    assert result["bpb"] < result["bpb_start"] and result["tokens"] == 12 * 256 and result["steps"] == 12
    assert result["peak_memory_gib"] > 0 and result["tok_per_sec"] > 0 and result["parameters"] > 0
    assert sorted(losses()) == list(range(12))
    lines = [json.loads(line) for line in
             (checkpoint_directory("base", "d2") / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "tok_per_sec"} <= set(next(line for line in lines if "loss" in line))
    assert not any("mfu" in line for line in lines)  # the peak of a CPU is not known: left out, not 0
    assert max(line["lr"] for line in lines if "lr" in line) == pytest.approx(0.02 * (256 / 2**19) ** 0.5)  # left warm-up
    assert "validation bits per byte" in capsys.readouterr().out
    meta = read_meta(checkpoint_directory("base", "d2"), 12)
    assert meta["settings"]["depth"] == 2 and meta["model_config"]["n_layer"] == 2 and len(meta["loader"]) == 1


def test_resumed_from_any_checkpoint_a_run_is_bit_for_bit_the_same(data):
    base_train(BaseTrain(**SMALL, data_dir=data, model_tag="whole"))
    settings = BaseTrain(**SMALL, data_dir=data)
    stop_at = pretraining.Run.train_step
    for stop in (5, 9):  # a fault in the middle, twice
        def broken(run, bar):
            if run.step == stop:
                raise KeyboardInterrupt
            stop_at(run, bar)

        settings.resume = True
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretraining.Run, "train_step", broken)
            base_train(settings)
    base_train(settings)
    assert losses() == losses("whole") and same(weights(), weights("whole"))
    settings.resume, settings.resume_from_step = False, 4
    base_train(settings)
    assert losses() == losses("whole") and same(weights(), weights("whole"))
    settings.resume_from_step = 5
    with pytest.raises(NanochatError, match="no checkpoint of step 5"):
        base_train(settings)
    settings.resume, settings.resume_from_step, settings.num_iterations = True, -1, 8
    with pytest.raises(NanochatError, match="step 12 in .* is past the end of this run of 8 steps.*--num-iterations"):
        base_train(settings)


@pytest.mark.timeout(900)
def test_two_processes_train_one_model_and_the_same_as_one(data, base_dir, run_module):
    """Each row is one document, so both runs see the same 8 rows a step: as 2 micro-batches, or on 2 ranks."""
    base_train(BaseTrain(**{**SMALL, "num_iterations": 6}, data_dir=data, model_tag="one"))
    flags = [*FLAGS, "--num-iterations=6", f"--data-dir={data}", "--model-tag=two"]
    run = run_module("nanochat_lib.scripts.base_train", *flags, nproc=2)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("step     0/6") == 1  # one voice
    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    assert same(weights("two", 6), weights("one", 6), atol=1e-5)
    assert read_json(base_dir / "report" / "result_base.json")["tokens"] == 6 * 256
    states = []
    for tag in ("one", "two"):  # the optimizer's state, saved by two, is that of one
        optimizer = load_model("base", "cpu", model_tag=tag)[0].setup_optimizer()
        load_optimizer(checkpoint_directory("base", tag), 4, optimizer)
        states.append(optimizer.checkpoint_state())
    assert same(*states, atol=1e-5) and any(value.abs().sum() > 0 for value in states[0].values())
    base_train(BaseTrain(**SMALL, data_dir=data, model_tag="two", resume=True))  # two become one
    assert sorted(losses("two")) == list(range(12))


def test_an_evaluation_that_cannot_run_does_not_cost_the_run(data, base_dir, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base_train(BaseTrain(**{**SMALL, "num_iterations": 2, "core_metric_every": 1, "sample_every": 2}, data_dir=data))
    assert "could not run" in capsys.readouterr().out and steps_in(checkpoint_directory("base", "d2")) == [2]
    assert (base_dir / "report" / "result_base.json").exists()


def test_what_differs_from_the_checkpoint_is_said(data, capsys):
    base_train(BaseTrain(**{**SMALL, "num_iterations": 4}, data_dir=data))
    base_train(BaseTrain(**{**SMALL, "num_iterations": 5, "matrix_lr": 0.01}, data_dir=data, resume=True))
    said = capsys.readouterr().out
    assert "--matrix-lr: 0.02 in the checkpoint, 0.01 from now on" in said and "--depth:" not in said
    write_shard(Path(data), 2, [["more text"] * 400])  # as a download that goes on: no other data
    base_train(BaseTrain(**{**SMALL, "num_iterations": 6}, data_dir=data, resume=True))
    write_shard(Path(data), 0, [["another text"] * 400])
    with pytest.raises(NanochatError, match="is not the data of the checkpoint, which had 2 files"):
        base_train(BaseTrain(**{**SMALL, "num_iterations": 7}, data_dir=data, resume=True))


def test_an_evaluation_that_one_of_two_processes_cannot_run_does_not_cost_the_run(data, base_dir, run_module):
    flags = [*FLAGS, "--num-iterations=4", "--core-metric-every=2", f"--data-dir={data}"]
    run = run_module("tests.half_evaluation", *flags, nproc=2)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("could not run, training is not affected: the disk of rank 1") == 2
    assert steps_in(checkpoint_directory("base", "d2"))[-1] == 4


def test_saved_before_evaluated(data, monkeypatch):
    def evaluate(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkup, "evaluate_core", evaluate)
    with pytest.raises(KeyboardInterrupt):
        base_train(BaseTrain(**{**SMALL, "num_iterations": 4, "core_metric_every": 4}, data_dir=data))
    assert steps_in(checkpoint_directory("base", "d2")) == [4]


def test_a_loss_that_is_no_number_stops_the_run(data, monkeypatch):
    real, calls = pretraining.accumulate, []

    def poisoned(*args):
        calls.append(0)
        return float("nan") if len(calls) == 7 else real(*args)

    monkeypatch.setattr(pretraining, "accumulate", poisoned)
    with pytest.raises(NanochatError, match=r"nan at step 6.*step 4 in .*--resume-from-step=4.*lm_head"):
        base_train(BaseTrain(**SMALL, data_dir=data))
    with torch.no_grad(), pytest.raises(NanochatError, match="lm_head.weight is not finite at step 4"):  # nor is it saved
        model = load_model("base", "cpu", model_tag="d2")[0]
        model.lm_head.weight[0, 0] = float("inf")
        check_weights(model, 4, checkpoint_directory("base", "d2"))


def test_an_exploding_loss_stops_the_run(make_model, tmp_path):
    optimizer = make_model().setup_optimizer()
    for step in (100, 200):
        (tmp_path / f"meta_000{step}.json").write_text("{}")
    watch, step = LossWatch(32768, patience=10), 0
    for step in range(150):  # down from ln(32768) = 10.4, with noise and one spike that passes
        watch.check(10.4 - 0.05 * step + (5 if step == 60 else 0.3 * (step % 2)), step, optimizer, tmp_path)
    watch = LossWatch(32768, json.loads(json.dumps(watch.state())), patience=10)  # as after a resume
    with pytest.raises(NanochatError, match=r"exploded: above 6.\d+ for 10 steps, after a best of 3.\d+, 9.00 at step 204"
                                            r".*step 100 in .*norms of the gradients: lm_head 0, .*muon"):
        for step in range(150, 300):
            watch.check(3.0 if step < 195 else 9.0, step, optimizer, tmp_path)
    with pytest.raises(NanochatError, match="above 11.40 for 10 steps.*there is no checkpoint yet"):
        for step in range(10):
            LossWatch(32768, {"best": None, "recent": None, "bad": step}, 10).check(12.0, step, optimizer, tmp_path / "none")


def test_eval_tokens_under_a_batch_are_rounded_up(data, base_dir, capsys):
    base_train(BaseTrain(**{**SMALL, "num_iterations": 1, "eval_tokens": 5}, data_dir=data))
    assert "--eval-tokens 5 is less than a batch" in capsys.readouterr().out
    assert 0 < read_json(base_dir / "report" / "result_base.json")["bpb"] < 20


def test_the_default_evaluation_is_sized_to_run_and_machine(data, capsys):
    base_train(BaseTrain(**{**SMALL, "num_iterations": 30, "eval_tokens": pretraining.EVAL_TOKENS, "eval_every": 30,
                            "save_every": -1}, data_dir=data))
    said = capsys.readouterr().out.split("evaluating on ")[1].split(" tokens")[0]
    assert 0 < int(said.replace(",", "")) <= 30 * 256 // 10


@pytest.mark.parametrize("match, changes", [
    ("give 224", {"total_batch_size": 250}), ("depth 0", {"depth": 0}), ("SX", {"window_pattern": "SX"}),
    ("--head-dim 0", {"head_dim": 0}), ("even size", {"head_dim": 17}), ("--aspect-ratio -1", {"aspect_ratio": -1}),
    ("--device-batch-size 0: it must be at least 1", {"device_batch_size": 0}), ("--max-seq-len 0", {"max_seq_len": 0}),
    ("--num-iterations 0", {"num_iterations": 0}), ("--total-batch-size 0", {"total_batch_size": 0}),
    ("--save-every 0", {"save_every": 0}), ("--keep-last 0", {"keep_last": 0}), ("--warmup-steps -1", {"warmup_steps": -1}),
    ("--warmdown-ratio 2", {"warmdown_ratio": 2.0}), ("--final-lr-frac 7", {"final_lr_frac": 7.0}),
    ("--eval-tokens 0", {"eval_tokens": 0}), ("0 steps", {"num_iterations": -1, "target_flops": 1.0}),
    ("--target-param-data-ratio 0", {"num_iterations": -1, "target_param_data_ratio": 0.0}),
    ("--fp8 cannot run: it needs a CUDA device", {"fp8": True}), ("rowwise is unknown: choose tensorwise", {"fp8_recipe": "rowwise"}),
    ("give 224", {"total_batch_size": 250, "dry_run": True, "plan": Machine(gpus=1)}),
    ("exclude each other", {"compile": True, "no_compile": True}), ("not on this machine", {"device_type": "abacus"}),
    ("no checkpoint of step 5 in .*there are none", {"resume_from_step": 5})])
def test_impossible_settings_are_one_line(data, base_dir, match, changes):
    with pytest.raises(NanochatError, match=match) as error:
        base_train(BaseTrain(**{**SMALL, "data_dir": data, **changes}))
    assert "\n" not in str(error.value) and not (base_dir / "base_checkpoints").exists()  # before any work


def test_a_named_run_without_wandb_stops_before_the_former_run_is_set_aside(data, base_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(NanochatError, match="--run needs wandb"):
        base_train(BaseTrain(**SMALL, data_dir=data, run="x"))
    assert not (base_dir / "base_checkpoints").exists()


def test_an_unknown_flag_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(BaseTrain, args=["--dept=4"])
    assert stop.value.code == 2 and "--dept" in capsys.readouterr().err


def test_what_is_missing_is_one_line(data, base_dir, tmp_path, monkeypatch):
    def refused(match, **changes):
        with pytest.raises(NanochatError, match=match):
            base_train(BaseTrain(**{**SMALL, "data_dir": data, **changes}))

    (tmp_path / "empty").mkdir()
    refused("no parquet shards", data_dir=str(tmp_path / "empty"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "bf16")
    refused("bf16.*bfloat16, float16, float32")
    monkeypatch.delenv("NANOCHAT_DTYPE")
    shutil.rmtree(base_dir / "tokenizer")
    refused("tok_train")
    assert not (base_dir / "base_checkpoints").exists()


def test_more_ranks_than_documents_is_one_line(data, base_dir, tmp_path, monkeypatch):
    write_shard(tmp_path / "few", 0, [["Anna lives in Oakham."] * 2])
    write_shard(tmp_path / "few", 1, [["Ben keeps a cat."] * 5])
    runtime = Runtime(torch.device("cpu"), 0, 0, 4)
    settings = BaseTrain(**{**SMALL, "data_dir": str(tmp_path / "few")})
    tokenizer = load_tokenizer()
    with pytest.raises(NanochatError, match="2 documents in .* for 4 processes"):
        pretraining.Run(settings, runtime, tokenizer, pretraining.recipe_of(settings, tokenizer.get_vocab_size()))
    assert not (base_dir / "base_checkpoints").exists()


def test_live(data, monkeypatch, capsys):
    """A line of metrics a step, with time left and (where the peak is known) MFU; the same to Weights & Biases."""
    sent, fake = [], types.ModuleType("wandb")
    fake.init = lambda **about: sent.append(about) or types.SimpleNamespace(log=sent.append, finish=lambda: sent.append("end"))
    fake.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(pretraining, "peak_flops", lambda device: 1e9)
    base_train(BaseTrain(**{**SMALL, "run": "mine", "sample_every": 6, "keep_last": 1}, data_dir=data))
    lines = [json.loads(line) for line in
             (checkpoint_directory("base", "d2") / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all({"loss", "lr", "tok_per_sec", "mfu", "eta_seconds", "epoch"} <= set(line) for line in steps)
    assert all(line["mfu"] > 0 for line in steps) and steps[-1]["eta_seconds"] == 0
    assert sent[0]["name"] == "mine" and sent[0]["config"]["depth"] == 2 and sent[-1] == "end"
    assert [{"step": line["step"], "loss": line["loss"]} for line in steps] == [
        {"step": line["step"], "loss": line["loss"]} for line in sent[1:-1] if "loss" in line]
    said = capsys.readouterr().out
    assert "minutes left" in said and "The capital of France is" in said and "for which training stopped" in said
    assert steps_in(checkpoint_directory("base", "d2")) == [12]


@pytest.mark.timeout(900)
def test_a_run_of_one_process_goes_on_over_two_nodes(data, base_dir):
    """Two launchers of torchrun that find each other, as on two machines; local rank 0 on both."""
    base_train(BaseTrain(**{**SMALL, "num_iterations": 4}, data_dir=data))
    before = weights(step=4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}",
                               "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "-m",
                               "nanochat_lib.scripts.base_train", *FLAGS, f"--data-dir={data}", "--num-iterations=8", "--resume"],
                              cwd=ROOT, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
             for node in (0, 1)]
    said = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "going on from step 4" in said[0][0] and not said[1][0].strip()  # one voice
    assert sorted(losses()) == list(range(8)) and not same(before, weights(step=8))


def test_one_shard_is_split(base_dir, tokenizer, tmp_path, capsys):
    tokenizer.save(base_dir / "tokenizer")
    write_shard(tmp_path / "one", 0, [["Anna lives in Oakham."] * 40])
    base_train(BaseTrain(**{**SMALL, "num_iterations": 2}, data_dir=str(tmp_path / "one")))
    assert "validation split" in capsys.readouterr().out


def test_another_model_or_tokenizer_is_not_resumed(data, base_dir):
    from nanochat_lib.tokenizer import Tokenizer

    settings = {**SMALL, "num_iterations": 4, "resume": True, "data_dir": data, "model_tag": "m"}
    base_train(BaseTrain(**settings))
    with pytest.raises(NanochatError, match="other settings"):
        base_train(BaseTrain(**{**settings, "depth": 3}))
    path = checkpoint_directory("base", "m") / "meta_000004.json"
    meta = read_json(path)
    path.write_text(json.dumps({name: value for name, value in meta.items() if name not in ("loop", "loader")}))
    with pytest.raises(NanochatError, match="was imported.*chat_sft"):
        base_train(BaseTrain(**settings))
    path.write_text(json.dumps(meta))
    Tokenizer.train_from_iterator(iter(["quite another text, my dear " * 9]), 280).save(base_dir / "tokenizer")
    with pytest.raises(NanochatError, match="was trained with tokenizer"):
        base_train(BaseTrain(**settings))


def test_a_fresh_start_keeps_the_former_run_aside(data):
    for _ in range(2):
        base_train(BaseTrain(**{**SMALL, "num_iterations": 4}, data_dir=data))
    assert steps_in(checkpoint_directory("base", "d2.old1")) == steps_in(checkpoint_directory("base", "d2")) == [4]


def test_float16(data, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    base_train(BaseTrain(**{**SMALL, "num_iterations": 10}, data_dir=data))
    seen = losses()
    assert seen[9] < seen[0] and read_meta(checkpoint_directory("base", "d2"), 10)["scaler"]["good_steps"] > 0


def test_loss_scaling_skips_a_step_that_overflowed(make_model):
    model = make_model().train()
    optimizer, scaler = model.setup_optimizer(), LossScaler(torch.float16)
    ids = torch.arange(34)[None] % 300
    batches = iter([(ids[:, :-1], ids[:, 1:])] * 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accumulate(model, batches, 1, scaler)
    model.lm_head.weight.grad[0, 0] = float("inf")
    assert not scaler.step(optimizer) and same(before, model.state_dict()) and scaler.scale == 2**15
    model.zero_grad(set_to_none=True)
    accumulate(model, batches, 2, scaler)
    assert scaler.step(optimizer) and not same(before, model.state_dict())
    assert LossScaler(torch.float16, scaler.state()).state() == {"scale": 2.0**15, "good_steps": 1}
    with pytest.raises(NanochatError, match="not finite at any scale of the loss"):
        for _ in range(100):
            model.lm_head.weight.grad[0, 0] = float("nan")
            scaler.step(optimizer)


def test_accumulated_gradients_are_those_of_the_whole_batch(make_model):
    model, off = make_model().train(), LossScaler(torch.float32)
    ids = torch.randint(0, 300, (6, 33), generator=torch.Generator().manual_seed(0))
    whole = accumulate(model, iter([(ids[:, :-1], ids[:, 1:])]), 1, off)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = accumulate(model, iter([(part[:, :-1], part[:, 1:]) for part in ids.chunk(3)]), 3, off)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert all(torch.allclose(p.grad, grad, atol=1e-5) for p, grad in zip(model.parameters(), expected))


def test_rates_reach_every_group(make_model):
    optimizer = make_model().setup_optimizer(weight_decay=0.2)
    for _ in range(2):  # from the first values each time
        set_rates(optimizer, 0.5, momentum=0.9, weight_decay=0.25)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5 * group["initial_lr"]
        if group["kind"] == "muon":
            assert group["momentum"] == 0.9 and group["weight_decay"] == pytest.approx(0.05)


@pytest.mark.parametrize("total, rows, ranks, expected", [(8192, 32, 1, (32, 1)), (8192, 32, 2, (16, 1)),
                                                          (8192, 12, 1, (8, 4)), (256, 8, 1, (1, 1))])
def test_the_batch_is_divided(total, rows, ranks, expected):
    assert divide_batch(total, rows, 256, ranks) == expected


def test_without_a_compiler_training_goes_on(make_model, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nmuch more")

    model, ids = make_model().train(), torch.zeros(1, 8, dtype=torch.long)
    monkeypatch.setattr(torch, "compile", missing)
    assert compiled(model, (ids, ids), True, 1e9) is model
    assert "No working C++ compiler found): going on without it" in capsys.readouterr().out
    assert compiled(model, (ids, ids), None, 1e9) is model and not capsys.readouterr().out  # too short to pay


def test_dry_run_prints_the_recipe_and_what_it_takes(base_dir, capsys):
    flags = ("--depth=24", "--target-param-data-ratio=8", "--device-batch-size=16", "--dry-run", "--fp8", "--mfu=0.5",
             "--dollars-per-gpu-hour=2.5", "--gpus=16")
    base_train(tyro.cli(BaseTrain, args=flags))
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "depth 24" in said["model"] and "5,568 steps of 1,048,576" in said["tokens"] and "FLOPs" in said
    assert "on each of 16 H100" in said["memory"] and "optimizer state" in said["of"]
    assert "50% of 989" in said["time"] and "2.5 a GPU hour" in said["price"] and not (base_dir / "base_checkpoints").exists()


def test_base_eval(data, base_dir, capsys, monkeypatch):
    base_train(BaseTrain(**{**SMALL, "num_iterations": 2}, data_dir=data))
    bundle = base_dir / "bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text("icl_tasks:\n- {label: world_ab, dataset_uri: ab.jsonl, num_fewshot: [1], "
                                      "icl_task_type: language_modeling}\n")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nworld_ab,0\n")
    (bundle / "eval_data" / "ab.jsonl").write_text('{"context": "Anna keeps a", "continuation": "cat"}\n' * 3)
    base_eval(BaseEval(data_dir=data, eval_bundle=str(bundle), split_tokens=5, device_type="cpu"))
    result = read_json(base_dir / "report" / "result_base_eval.json")
    assert result["results"].keys() == result["centered_results"].keys() == {"world_ab"} and "core_metric" in result
    assert set(result["bpb"]) == {"train", "val"} and result["samples"][0].startswith("Anna keeps a")
    assert (base_dir / "base_eval" / "base_model_000002.csv").read_text().splitlines()[0] == "Task,Accuracy,Centered"
    assert "less than a batch" in capsys.readouterr().out
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base_eval(BaseEval(data_dir=data, split_tokens=256, device_type="cpu"))  # no bundle: the rest is done
    assert "left out: core" in capsys.readouterr().out
    assert "core_metric" not in read_json(base_dir / "report" / "result_base_eval.json")
    for settings, match in [(BaseEval(eval="core"), "nothing could be"), (BaseEval(eval="bqb"), "core, bpb, sample"),
                            (BaseEval(model_tag="d9"), "base_train")]:
        with pytest.raises(NanochatError, match=match):
            base_eval(settings)


def test_real_text(base_dir, shared_data, tokenizer):
    tokenizer.save(base_dir / "tokenizer")
    base_train(BaseTrain(**{**SMALL, "num_iterations": 40, "eval_every": 20, "save_every": -1},
                         data_dir=str(shared_data / "public_domain_text")))
    curve = read_json(base_dir / "report" / "result_base.json")["bpb_curve"]
    assert curve[-1][1] < curve[0][1] - 0.3
