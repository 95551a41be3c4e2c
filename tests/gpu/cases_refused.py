"""The stand-in device rejects the same operations as a GPU; the other tests on ``gpu`` depend on this."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "sum of both places": lambda x: x + torch.ones(2, 3),
    "indices of the GPU into the CPU": lambda x: torch.ones(6)[x.long()],
    "values of the CPU put into the GPU": lambda x: x.index_put_((torch.tensor([0]),), torch.ones(3)),
    "scalar of the GPU added to one of the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "scalars of both places in a row": lambda x: torch.stack([x.sum(), torch.zeros(())]),
    "weights of the CPU": lambda x: functional.linear(x, torch.ones(2, 3)),
    "convolution on the CPU": lambda x: functional.conv2d(x[None, None], torch.ones(1, 1, 1, 1)),
    "batch norm on the CPU": lambda x: nn.BatchNorm1d(3)(x),
    "loss with labels of the CPU": lambda x: functional.cross_entropy(x, torch.tensor([0, 1])),
    "generator of the CPU": lambda x: x.normal_(generator=torch.Generator()),
    "permutation by a generator of the CPU": lambda x: torch.randperm(3, generator=torch.Generator(), device=x.device),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mixing_devices_is_an_error(name: str, gpu: torch.device) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device"):
        MISTAKES[name](torch.ones(2, 3, device=gpu))


def test_operations_that_a_gpu_allows_are_allowed(gpu: torch.device) -> None:
    x = torch.arange(6.0).view(2, 3).to(gpu)
    assert (x * torch.tensor(2.0)).sum().item() == 30
    assert torch.equal(x[torch.tensor([1])].cpu(), torch.tensor([[3.0, 4.0, 5.0]]))
    x[torch.tensor([0]), 1] = 7
    assert x.cpu().copy_(x).tolist() == [[0, 7, 2], [3, 4, 5]]


def test_a_step_on_the_device_equals_a_step_on_the_cpu(gpu: torch.device) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    here = nn.Sequential(*layers)
    there = copy.deepcopy(here).to(gpu)
    for network in (here, there):
        device = next(network.parameters()).device
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(network(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    for one, two in zip(here.state_dict().values(), there.state_dict().values(), strict=True):
        assert two.device == gpu
        assert torch.allclose(one, two.cpu(), atol=1e-3)


def test_autocast_casts_as_on_a_gpu(gpu: torch.device) -> None:
    x = torch.ones(2, 3, device=gpu)
    with torch.autocast(gpu.type, torch.bfloat16):
        y = functional.linear(x, torch.ones(2, 3, device=gpu))
        assert y.dtype == torch.bfloat16
        assert y.softmax(1).dtype == torch.cat([x, y], 1).dtype == torch.float32
        with torch.autocast(gpu.type, enabled=False):
            assert functional.linear(x, x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(x, x).dtype == torch.float32
