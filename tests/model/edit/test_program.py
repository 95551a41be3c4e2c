import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.architectures import build
from bdprune.model.edit.program import Program


class Residual(nn.Module):
    """Overwrites its own shortcut, which is part of the state before ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        shortcut = self.first(images)
        return shortcut.add_(self.second(shortcut)).mean((2, 3))  # type: ignore[no-any-return]


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


class Functional(nn.Module):
    """Reads a weight without calling the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.conv.weight).mean((2, 3))


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_program_continues_from_every_layer_with_the_same_bits() -> None:
    network = build("resnet18_cifar", 10, width=4).eval()
    program = Program(network)
    expected = network(images())
    places = {program.first_read(parameter) for parameter in network.parameters()}
    logits, states = program.run(images(), keep=places - {None})
    assert torch.equal(logits, expected)
    assert len(states) == len(places) == 20 + 20 + 1
    for state in states:
        assert state.intact
        assert torch.equal(program.run(images(), state)[0], expected)


@torch.no_grad()
def test_a_program_uses_the_current_parameters() -> None:
    network = build("resnet18_cifar", 10, width=4).eval()
    program = Program(network)
    gamma = network.get_parameter("layer3.0.bn2.weight")
    place = program.first_read(gamma)
    assert place is not None
    _, (state,) = program.run(images(), keep=[place])
    gamma[:4] = 0
    assert torch.equal(program.run(images(), state)[0], network(images()))
    assert len(state.values) == 2  # the conv's output and the block's input, which the shortcut still reads
    assert state.nbytes == 4 * 2 * (16 * 8 * 8 + 8 * 16 * 16)


@torch.no_grad()
def test_an_overwritten_state_is_detected() -> None:
    network = Residual().eval()
    program = Program(network)
    place = program.first_read(network.second.weight)
    assert place is not None
    logits, (state,) = program.run(images(), keep=[place])
    assert torch.equal(logits, network(images()))
    assert not state.intact


def test_weights_that_are_read_without_their_module_are_found() -> None:
    network = Functional()
    program = Program(network)
    assert program.first_read(network.conv.weight) is not None
    assert network.conv.bias is not None
    assert program.first_read(network.conv.bias) is None


def test_a_forward_pass_that_depends_on_values_has_no_program() -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        Program(Branching())
