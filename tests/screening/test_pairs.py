"""bdprune.screening.pairs: the guesses, and what is left out."""

from __future__ import annotations

import pytest

from bdprune.model.architectures import build
from bdprune.model.groups import trace_groups
from bdprune.screening.pairs import norms_of_convolutions

Shapes = dict[str, tuple[int, ...]]
NAMES = (
    "resnet18_cifar",
    "resnet50_cifar",
    "resnet20_cifar",
    "vgg11_bn_cifar",
    "mobilenet_v2_cifar",
    "elu_norm_cnn",
    "plain_cnn",
)


def conv(name: str, filters: int, channels: int = 3) -> Shapes:
    return {f"{name}.weight": (filters, channels, 3, 3)}


def norm(name: str, channels: int, running: bool = True) -> Shapes:
    learned: Shapes = {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    return learned | ({f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)} if running else {})


@pytest.mark.parametrize("name", NAMES)
def test_the_pairs_of_known_networks_are_those_of_their_trace(name: str) -> None:
    network = build(name, 10).eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    traced = {one.conv: one.norms[0].name for one in trace_groups(network, (3, 32, 32)) if one.norms}
    assert norms_of_convolutions(shapes) == traced
    assert norms_of_convolutions(dict(sorted(shapes.items()))) == traced  # as safetensors sorts them


def test_a_network_whose_norms_come_first() -> None:
    network = build("preact_resnet18", 10).eval()
    shapes = {key: tuple(value.shape) for key, value in sorted(network.state_dict().items())}
    traced = {one.conv: one.norms[0].name for one in trace_groups(network, (3, 32, 32)) if one.norms}
    assert norms_of_convolutions(shapes) == {name: one for name, one in traced.items() if name != "conv1"}


def test_numbered_modules_pair_with_the_next_one_with_tensors() -> None:
    shapes = conv("f.0", 8) | norm("f.2", 8) | conv("f.9", 8) | conv("f.10", 8) | norm("f.11", 8) | norm("f.12", 8)
    assert norms_of_convolutions(shapes) == {"f.0": "f.2", "f.10": "f.11"}
    assert norms_of_convolutions(conv("0", 8) | norm("1", 8)) == {"0": "1"}


@pytest.mark.parametrize(
    ("one", "other"), [("conv", "bn"), ("conv3", "norm3"), ("a.conv_dw", "a.bn_dw"), ("x.conv2", "x.batchnorm2")]
)
def test_names_pair(one: str, other: str) -> None:
    assert norms_of_convolutions(conv(one, 8) | norm(other, 8)) == {one: other}


def test_what_does_not_fit_is_left_out() -> None:
    assert norms_of_convolutions(conv("conv1", 8) | norm("bn1", 16)) == {}
    assert norms_of_convolutions(conv("conv1", 8) | norm("bn1", 8, running=False)) == {}  # a group norm
    assert norms_of_convolutions(conv("a.conv1", 8) | norm("b.bn1", 8)) == {}
    assert norms_of_convolutions(conv("stem", 8) | norm("bn", 8)) == {}
    assert norms_of_convolutions({"weight": (8, 3, 3, 3)}) == {}
    assert norms_of_convolutions({}) == {}


def test_numbers_beyond_all_bounds_do_no_harm() -> None:
    huge = "9" * 5000
    assert norms_of_convolutions(conv(f"f.{huge}", 8) | conv(f"conv{huge}", 8) | norm("bn1", 8)) == {}
