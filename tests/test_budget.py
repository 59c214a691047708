"""Lesson 07: what a run takes, against what is really allocated."""

import pytest
import torch

from nanochat_lib import budget
from nanochat_lib.budget import CHIPS, Machine, describe_budget, fitting_batch, memory_of, optimizer_bytes, peak_flops
from nanochat_lib.common import NanochatError
from nanochat_lib.gpt import GPTConfig, build_model
from nanochat_lib.optim import Shard, parameter_groups
from nanochat_lib.scaling import on_meta, recipe


def test_optimizer_state_is_counted_as_it_is_allocated(make_model):
    model = make_model(n_embd=128, n_layer=5)
    optimizer = model.setup_optimizer()
    state = [optimizer.state_of(place) for place in range(len(optimizer.param_groups))]
    assert optimizer_bytes(model, 1) == sum(t.nbytes for each in state for key in ("first", "second") for t in each[key])
    for ranks in (2, 3, 8):  # the first rank holds most
        moments = 0
        for group in parameter_groups(model):
            stack = group["kind"] == "muon"
            for params in [group["params"]] if stack else [[p] for p in group["params"]]:
                shape = Shard(params, stack, 0, ranks).local_shape
                numel = torch.empty(shape, device="meta").numel()
                moments += 4 * (numel + shape[0] * max(shape[1:])) if stack else 8 * numel
        assert optimizer_bytes(model, ranks) == moments


def kept_for_backward(layers: int, width: int = 256, rows: int = 2, length: int = 256) -> tuple[int, int]:
    """(bytes of the tensors that autograd keeps of a forward pass, weights left out; tokens)."""
    model = build_model(GPTConfig(length, 512, layers, width // 128, width // 128, width, "SSSL"), "cpu").train()
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # the storage is kept too, lest its address be used again
        return tensor

    ids = torch.randint(0, 512, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids, ids)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values()), rows * length


def test_activations_are_those_that_autograd_keeps():
    (small, tokens), (large, _) = kept_for_backward(4), kept_for_backward(8)
    numbers = (large - small) / 4 / tokens / 256 / 4  # of float32, per layer, token and channel
    assert numbers == pytest.approx(budget.LAYER_NUMBERS, rel=0.1)


def test_weights_by_hand():
    dial = recipe(12)
    tables = 7 * 32768 * 768  # wte and six tables of value embeddings, in two bytes
    memory = memory_of(dial, 32, 8)
    assert memory["weights"] == memory["gradients"] == 2 * tables + 4 * (dial.parameters - tables)
    assert memory_of(dial, 32, 1)["optimizer state"] == pytest.approx(8 * memory["optimizer state"], rel=0.05)
    assert memory["total"] == 2 * memory["weights"] + memory["optimizer state"] + max(
        memory["activations"], memory["optimizer step"])
    assert sum(p.numel() for p in on_meta(dial.config).parameters()) == dial.parameters


def test_hours_and_dollars_follow_from_the_assumptions():
    dial = recipe(24, target_param_data_ratio=8)
    words = describe_budget(dial, 16, Machine())
    hours = dial.flops / (8 * 989e12 * 0.45) / 3600
    assert f"about {hours:.2f} h at 45% of 989 TFLOP/s" in words["time"]
    assert f"about {hours * 24:.2f} dollars at 3 a GPU hour" in words["price"]
    other = describe_budget(dial, 16, Machine(gpus=4, chip="B200", mfu=0.3, dollars_per_gpu_hour=5.5))
    assert f"{dial.flops / (4 * 2250e12 * 0.3) / 3600:.2f} h at 30% of 2250" in other["time"] and "of 4 B200" in other["memory"]


def test_a_batch_that_does_not_fit_is_halved():
    dial = recipe(24)
    rows = fitting_batch(dial, 64, 8, 80e9)
    assert 0 < rows < 64 and memory_of(dial, rows, 8)["total"] <= 80e9 < memory_of(dial, 2 * rows, 8)["total"]
    assert f"it fits with --device-batch-size {rows}" in describe_budget(dial, 64, Machine(chip="A100"))["memory"]
    assert "does not fit" in describe_budget(recipe(48), 32, Machine(chip="L4"))["memory"]


def test_unknown_machines_are_named():
    for changes, match in [({"chip": "H900"}, "H900 is unknown: choose .*H200"), ({"gpus": 0}, "--gpus 0"), ({"mfu": 45}, "--mfu 45")]:
        with pytest.raises(NanochatError, match=match):
            Machine(**changes)


@pytest.mark.parametrize("name, chip", [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
                                        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
                                        ("NVIDIA GB200", "GB200"), ("NVIDIA L40S", "L40S"), ("NVIDIA L40", None), ("NVIDIA L4", "L4"), ("NVIDIA Tesla K80", None)])
def test_the_peak_of_a_chip(monkeypatch, name, chip):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (CHIPS[chip][0] if chip else 0.0)
    assert peak_flops(torch.device("cpu")) == 0.0
