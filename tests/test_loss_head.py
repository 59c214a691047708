"""The loss head: all of loss_cases.py on this machine's CPU, and what it holds."""

import pytest
import torch
from loss_cases import *  # noqa: F401, F403
from loss_cases import make

from nanochat_lib import loss as module
from nanochat_lib.loss import head_loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_by_finite_differences(reduction):
    x, weight, targets = (tensor.double() if tensor.is_floating_point() else tensor for tensor in make(5, 9, 3))
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: head_loss(x, weight, targets, reduction=reduction), inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_all_logits(monkeypatch, reduction):
    """Neither kept for backward nor made on the way: the largest is a chunk."""
    monkeypatch.setattr(module, "CHUNK", {"cpu": 128 * 4096, "cuda": 1})
    x, weight, targets = make(512, 4096, 32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t))
            return result

    with Watch():  # inside the operators, and what goes in and out of them
        module.in_chunks(x, weight, targets, 4096, 15.0, True)
        head_loss(x.requires_grad_(), weight.requires_grad_(), targets, reduction=reduction).sum().backward()
    assert 128 * 4096 in sizes and max(sizes) == 128 * 4096


def test_a_kernel_that_fails_is_left_for_good(monkeypatch, capsys):
    from nanochat_lib.kernels import loss_head

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(module, "NO_KERNEL", [])
    monkeypatch.setattr(loss_head, "softcap_loss_", lambda *args: 1 / 0)
    for _ in range(2):
        logits, losses = torch.randn(4, 7), torch.empty(4)
        module.loss_(logits.clone().as_subclass(OnGPU), torch.tensor([0, 1, -1, 6]), losses, 15.0, False)
        assert losses[0] > 0 and losses[2] == 0
    assert capsys.readouterr().err.count("\n") == 1 and "division by zero" in module.NO_KERNEL[0]
    module.NO_KERNEL.clear()


def test_chunks_cover_every_token_once(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", {"cpu": 1 << 20, "cuda": 1 << 27})
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for N, V, device in ((0, 5, cpu), (1, 1 << 21, cpu), (1000, 1024, cpu), (1025, 1024, cpu), (16384, 32768, cuda),
                         (5000, 65, cuda)):
        parts = module.chunks(N, V, device)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(N))
        assert all((part.stop - part.start) * V <= max(module.limit(device), 128 * V) for part in parts)
    assert len(module.chunks(16384, 32768, cuda)) == 4
