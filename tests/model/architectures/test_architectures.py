"""Parameter counts compared with published ones, and the parameter names of published checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bdprune.errors import OptionError
from bdprune.model.architectures import REGISTRY, build
from bdprune.model.architectures.resnet import PadShortcut, ResNet18Cifar
from bdprune.model.architectures.spec import rounded

# With 10 classes for CIFAR and 1,000 for ImageNet, as stated by the papers, torchvision or the original code.
PUBLISHED = {
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "resnet18_imagenet": 11_689_512,
    "resnet34_imagenet": 21_797_672,
    "resnet50_imagenet": 25_557_032,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "resnet110_cifar": 1_727_962,
    "preact_resnet18": 11_171_146,
    "wrn_16_1": 175_066,
    "wrn_28_10": 36_479_194,
    "wrn_40_2": 2_243_546,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "vgg16_bn_cifar": 14_728_266,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v2_cifar": 2_296_922,
    "efficientnet_b0": 5_288_548,
    "densenet121": 7_978_856,
    "densenet121_cifar": 6_956_298,
    "ibau_cnn": 308_394,
}


def on_meta(name: str, **settings: object) -> nn.Module:
    with torch.device("meta"):
        return build(name, 1000 if REGISTRY[name].input_size == 224 else 10, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name: str) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == PUBLISHED[name]


def test_resnet20_with_conv_shortcuts_has_the_published_parameters() -> None:
    network = on_meta("resnet20_cifar", pad=False, shortcut="downsample", head="fc")
    assert sum(parameter.numel() for parameter in network.parameters()) == 272_474


@pytest.mark.parametrize("name", REGISTRY)
def test_a_network_gives_one_logit_per_class(name: str) -> None:
    size = REGISTRY[name].input_size
    network = on_meta(name, in_channels=1).eval()
    assert network(torch.zeros(2, 1, size, size, device="meta")).shape == (2, 1000 if size == 224 else 10)


def test_resnet18_keeps_names_and_the_order_of_random_numbers() -> None:
    """Seeded trainings depend on both: names and order."""
    network = build("resnet18_cifar", 10, width=4)
    torch.manual_seed(5)
    first = ResNet18Cifar(10, 3, 4)
    torch.manual_seed(5)
    stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
    assert torch.equal(first.conv1.weight, stem.weight)
    names = list(network.state_dict())
    assert names[:2] == ["conv1.weight", "bn1.weight"] and names[-2:] == ["linear.weight", "linear.bias"]
    block = [name.removeprefix("layer2.0.") for name in names if name.startswith("layer2.0.")]
    weights = [name for name in block if name.endswith("weight")]
    kinds = ["conv1", "bn1", "conv2", "bn2", "shortcut.0", "shortcut.1"]
    assert weights == [f"{kind}.weight" for kind in kinds]


def test_pad_shortcut_subsamples_and_pads_both_sides() -> None:
    x = torch.arange(2 * 16.0).reshape(1, 2, 4, 4)
    y = PadShortcut(2, 4, 2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 1].tolist() == [[0.0, 2.0], [8.0, 10.0]] and y[0, 2].tolist() == [[16.0, 18.0], [24.0, 26.0]]
    assert not y[0, [0, 3]].any()


def test_spellings_change_names_only() -> None:
    torch.manual_seed(0)
    plain = build("resnet18_cifar", 10, width=4).eval()
    torch.manual_seed(0)
    spelled = build("resnet18_cifar", 10, width=4, shortcut="downsample", head="fc").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain(x), spelled(x))
    assert "layer2.0.downsample.0.weight" in spelled.state_dict() and "fc.bias" in spelled.state_dict()


def test_channels_are_rounded_to_multiples_of_8_without_losing_a_tenth() -> None:
    assert [rounded(channels) for channels in (3, 12, 16, 18, 24.5, 33.6)] == [8, 16, 16, 24, 24, 32]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'resnet19'.*resnet18_cifar"):
        build("resnet19", 10)


def test_a_norm_follows_the_last_stage_of_a_pre_activation_network() -> None:
    torch.manual_seed(0)
    network = build("preact_resnet18", 4, width=2, last_norm="bn").eval()
    bare = build("preact_resnet18", 4, width=2).eval()
    bare.load_state_dict({name: t for name, t in network.state_dict().items() if not name.startswith("bn.")})
    maps: list[torch.Tensor] = []
    bare.get_submodule("layer4").register_forward_hook(lambda *call: maps.append(call[2]))
    x = torch.rand(2, 3, 32, 32)
    bare(x)
    features = torch.relu(maps[0] / (1 + 1e-5) ** 0.5).mean((2, 3))  # a fresh norm divides by sqrt(1 + eps)
    assert torch.allclose(network(x), bare.get_submodule("linear")(features), atol=1e-6)
