"""Recognises every architecture from its own state dict, in random sizes and naming schemes; errors if none fits."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bdprune.errors import ArchitectureError, OptionError
from bdprune.model.architectures import REGISTRY, build
from bdprune.model.architectures.vgg import Head
from bdprune.model.recognise import KnownMatcher, Recognised, shapes_of

SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ("resnet18_cifar", {"shortcut": "downsample", "head": "fc"}),
    ("resnet34_cifar", {"shortcut": "shortcut", "head": "classifier"}),
    ("resnet50_imagenet", {"shortcut": "shortcut", "head": "linear"}),
    ("resnet20_cifar", {"pad": False, "shortcut": "downsample", "head": "fc"}),
    ("resnet56_cifar", {"pad": False}),
    ("preact_resnet18", {"shortcut": "downsample", "head": "fc"}),
    ("preact_resnet18", {"last_norm": "bn"}),
    ("wrn_16_1", {"biased": True, "head": "linear"}),
    ("wrn_28_10", {"biased": True, "head": "linear"}),
    ("vgg16_bn_cifar", {"head": Head((0, 3, 6), 32)}),
    ("vgg13_bn_cifar", {"head": Head((1, 4, 6), 16), "bias": False}),
    ("vgg11_bn", {"head": Head((0, 3, 6), 64, 7)}),
    ("mobilenet_v2_cifar", {"head": "fc"}),
    ("densenet121", {"dotted": True}),
    ("ibau_cnn", {"input_size": 64}),
    ("elu_norm_cnn", {"input_size": 64}),
    ("plain_cnn", {"input_size": 64}),
]


def recognise(shapes: Mapping[str, tuple[int, ...]], arch: str | None = None) -> Recognised:
    """The architecture whose state dict has exactly these names and shapes."""
    matcher = KnownMatcher(arch)
    found = matcher(shapes, extras=False)
    if found is None:
        raise matcher.explain(shapes)
    return found


def shapes(name: str, **settings: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(build(name, **settings).state_dict())


@pytest.mark.parametrize("name", REGISTRY)
def test_each_architecture_is_recognised_in_random_sizes(name: str) -> None:
    draw = random.Random(name)
    for _ in range(2):
        settings = {"num_classes": draw.randint(2, 200), "in_channels": draw.choice([1, 3, 4])}
        width = draw.choice([8, 16, 24, 48]) if not name.startswith("vgg") else draw.choice([8, 16])
        found = recognise(shapes(name, **settings, width=width))
        assert (found.name, found.settings["num_classes"], found.settings["in_channels"]) == (name, *settings.values())
        assert found.settings["width"] == width and found.input_size == REGISTRY[name].input_size


@pytest.mark.parametrize(("name", "spelled"), SPELLINGS)
def test_other_spellings_are_recognised(name: str, spelled: dict[str, Any]) -> None:
    expected = shapes(name, num_classes=7, **spelled)
    found = recognise(expected)
    assert found.name == name and found.settings["num_classes"] == 7
    assert shapes_of(KnownMatcher().build(found).network.state_dict()) == expected


def test_the_image_size_of_the_ibau_network_follows_from_its_last_layer() -> None:
    assert recognise(shapes("ibau_cnn", num_classes=3, input_size=48)).input_size == 48


def test_missing_counters_of_old_torch_do_not_matter() -> None:
    found = {
        name: shape for name, shape in shapes("resnet20_cifar", num_classes=10).items() if "num_batches" not in name
    }
    assert recognise(found).name == "resnet20_cifar"


def test_a_wrong_shape_is_named_with_the_nearest_architectures() -> None:
    found = shapes("resnet18_cifar", num_classes=10, width=8) | {"layer3.1.conv1.weight": (32, 31, 3, 3)}
    with pytest.raises(ArchitectureError) as caught:
        recognise(found)
    message = caught.value.message
    assert "resnet18_cifar (99% of the tensors agree: 'layer3.1.conv1.weight'" in message
    assert "(32, 31, 3, 3) instead of (32, 32, 3, 3)" in message
    assert message.count("of the tensors agree") == 3 and "--arch" in caught.value.hint


def test_missing_and_unknown_names_are_listed() -> None:
    found = shapes("vgg11_bn_cifar", num_classes=10)
    del found["features.4.bias"]
    found["extra.weight"] = (3, 3)
    with pytest.raises(ArchitectureError) as caught:
        recognise(found, "vgg11_bn_cifar")
    assert "not a vgg11_bn_cifar" in caught.value.message
    assert "'features.4.bias' is missing" in caught.value.message
    assert "'extra.weight' (3, 3) is not part of it" in caught.value.message


def test_another_architecture_than_the_requested_one_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="The checkpoint is not a resnet34_cifar"):
        recognise(shapes("resnet18_cifar", num_classes=10), "resnet34_cifar")
    with pytest.raises(OptionError, match="resnet35"):
        recognise({}, "resnet35")


def test_names_without_a_match_are_one_clear_error() -> None:
    for found in ({}, {"weight": (0, 0)}, {"conv1.weight": (1 << 40, 3, 3, 3), "linear.weight": (10, 0)}):
        with pytest.raises(ArchitectureError):
            recognise(found)


def test_a_width_too_large_for_any_tensor_is_an_error() -> None:
    found = shapes("resnet18_cifar", num_classes=10) | {"conv1.weight": (1 << 40, 3, 3, 3)}
    with pytest.raises(ArchitectureError):
        recognise(found)


def test_names_with_control_characters_are_escaped() -> None:
    with pytest.raises(ArchitectureError) as caught:
        recognise({"\x1b[31mconv.weight\ud800": (1, 1, 1, 1)}, "ibau_cnn")
    assert "\x1b" not in caught.value.message
    caught.value.message.encode()


def test_two_fits_are_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        REGISTRY, "twin", REGISTRY["ibau_cnn"].__class__(**{**vars(REGISTRY["ibau_cnn"]), "name": "twin"})
    )
    with pytest.raises(ArchitectureError, match="fits several architectures: ibau_cnn, twin"):
        recognise(shapes("ibau_cnn", num_classes=10))


def test_unknown_names_are_shown_instead_of_distant_candidates() -> None:
    with pytest.raises(ArchitectureError) as caught:
        recognise({"encoder.weight": (2, 2)})
    assert "nothing in common" in caught.value.message and "'encoder.weight' (2, 2)" in caught.value.message
