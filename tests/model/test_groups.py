"""Which norm consumes which conv, compared with a list written by hand, for known architectures and unusual graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import ArchitectureError
from bdprune.model import groups as groups_module
from bdprune.model.architectures import REGISTRY, build
from bdprune.model.architectures.resnet import ResNet18Cifar
from bdprune.model.architectures.vgg import Head
from bdprune.model.groups import FilterGroup, NormSlice, groups_of, last_group, trace_groups


def traced(name: str, size: int | None = None, **settings: Any) -> dict[str, FilterGroup]:
    entry = REGISTRY[name]
    size = size or (32 if entry.input_size == 32 else 64)
    network = build(name, 5, **{"width": max(entry.width // 8, 1), **settings})
    groups = trace_groups(network, (3, size, size))
    assert [group.name for group in groups] == [group.conv for group in groups]
    for group in groups:
        assert group.num_filters == network.get_submodule(group.conv).out_channels  # type: ignore[union-attr]
    return {group.name: group for group in groups}


def pairs(groups: dict[str, FilterGroup]) -> dict[str, str | None]:
    """Each conv with the norm that carries its mask."""
    assert all(group.norm is None or group.norm.start == 0 for group in groups.values())
    return {name: group.norm.name if group.norm else None for name, group in groups.items()}


def basic(stages: list[int], shortcut: str | None, first: int = 1) -> dict[str, str | None]:
    """The expected pairs of networks with basic blocks; ``first`` is the first stage (from 0) with a conv shortcut."""
    truth: dict[str, str | None] = {"conv1": "bn1"}
    for stage, depth in enumerate(stages):
        for block in range(depth):
            at = f"layer{stage + 1}.{block}"
            truth |= {f"{at}.conv1": f"{at}.bn1", f"{at}.conv2": f"{at}.bn2"}
            if shortcut and block == 0 and stage >= first:
                truth[f"{at}.{shortcut}.0"] = f"{at}.{shortcut}.1"
    return truth


@pytest.mark.parametrize(
    ("name", "settings", "truth"),
    [
        ("resnet18_cifar", {}, basic([2, 2, 2, 2], "shortcut")),
        ("resnet34_imagenet", {}, basic([3, 4, 6, 3], "downsample")),
        ("resnet20_cifar", {}, basic([3, 3, 3], None)),
        ("resnet32_cifar", {"pad": False}, basic([5, 5, 5], "shortcut")),
    ],
)
def test_post_activation_residual_networks(name: str, settings: dict[str, Any], truth: dict[str, str | None]) -> None:
    found = pairs(traced(name, **settings))
    assert found == truth


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet34_imagenet", "resnet50_cifar", "preact_resnet18"])
def test_the_last_conv_is_not_that_of_a_shortcut(name: str) -> None:
    found = traced(name)
    parallel = {one for one, group in found.items() if group.is_parallel}
    shortcuts = {one for one in found if "shortcut" in one or "downsample" in one}
    assert parallel == (shortcuts if "preact" not in name else set())
    assert last_group(list(found.values())).name.endswith("conv3" if "50" in name else "conv2")


def test_the_last_conv_of_a_stage_of_one_block_is_in_the_block() -> None:
    network = build("resnet18_cifar", 5, width=8)
    del network.layer4[1]  # type: ignore[operator, union-attr]
    groups = trace_groups(network, (3, 32, 32))
    assert groups[-1].name == "layer4.0.shortcut.0"
    assert last_group(groups).name == "layer4.0.conv2"


def test_the_last_conv_may_be_the_only_one() -> None:
    groups = trace_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5)), (3, 8, 8))
    assert last_group(groups).name == "0" and not groups[0].is_parallel


def test_resnet18_has_4800_maskable_channels() -> None:
    """The number of rows in the log published with RNP."""
    groups = trace_groups(build("resnet18_cifar", 10), (3, 32, 32))
    assert sum(group.num_filters for group in groups if group.norm) == 4800


def test_bottlenecks_pair_each_conv_with_its_norm() -> None:
    found = pairs(traced("resnet50_cifar"))
    truth: dict[str, str | None] = {"conv1": "bn1"}
    for stage, depth in enumerate([3, 4, 6, 3], 1):
        for block in range(depth):
            at = f"layer{stage}.{block}"
            truth |= {f"{at}.conv{index}": f"{at}.bn{index}" for index in (1, 2, 3)}
        truth[f"layer{stage}.0.shortcut.0"] = f"layer{stage}.0.shortcut.1"
    assert found == truth


def test_pre_activation_pairs_only_the_first_conv_of_a_block_with_its_second_norm() -> None:
    groups = traced("preact_resnet18")
    truth: dict[str, str | None] = {"conv1": None}
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            truth |= {f"{at}.conv1": f"{at}.bn2", f"{at}.conv2": None}
        if stage > 1:
            truth[f"layer{stage}.0.shortcut.0"] = None
    assert pairs(groups) == truth
    # The stem feeds a norm and also the shortcut; the sum has no norm of its own.
    assert groups["conv1"].norms == (NormSlice("layer1.0.bn1", 0),) and not groups["conv1"].exclusive
    assert groups["layer1.0.conv2"].norms == ()


@pytest.mark.parametrize(("biased", "block"), [(False, "block{}.layer"), (True, "layer{}")])
def test_wide_networks(biased: bool, block: str) -> None:
    found = pairs(traced("wrn_16_2", biased=biased))
    # If the first shortcut starts after the first norm, only that norm consumes the stem.
    truth: dict[str, str | None] = {"conv1": None if biased else "block1.layer.0.bn1"}
    for stage in (1, 2, 3):
        for index in range(2):
            at = f"{block.format(stage)}.{index}"
            truth |= {f"{at}.conv1": f"{at}.bn2", f"{at}.conv2": None}
        truth[f"{block.format(stage)}.0.{'shortcut.0' if biased else 'convShortcut'}"] = None
    assert found == truth


def test_sequential_networks_pair_neighbours() -> None:
    assert pairs(traced("ibau_cnn", width=4)) == {f"features.{i}": f"features.{i + 1}" for i in (0, 3, 8, 11, 16, 19)}
    norms = {0: 2, 3: 5, 8: 10, 11: 13, 16: 18, 19: 21}
    assert pairs(traced("elu_norm_cnn", width=4)) == {f"features.{i}": f"features.{norms[i]}" for i in norms}
    vgg = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    assert pairs(traced("vgg16_bn_cifar")) == {f"features.{i}": f"features.{i + 1}" for i in vgg}
    assert pairs(traced("vgg16_bn", head=Head((0, 3, 6), 8, 7))) == {f"features.{i}": f"features.{i + 1}" for i in vgg}


def test_depthwise_convs_of_mobilenets() -> None:
    groups = traced("mobilenet_v2_cifar")
    assert all(group.norm for group in groups.values()) and len(groups) == 57
    assert pairs(groups)["layers.3.conv2"] == "layers.3.bn2"
    assert pairs(groups)["layers.0.shortcut.0"] == "layers.0.shortcut.1"
    found = pairs(traced("mobilenet_v2"))
    assert len(found) == 52
    assert found["features.1.conv.0.0"] == "features.1.conv.0.1" and found["features.1.conv.1"] == "features.1.conv.2"
    assert found["features.9.conv.1.0"] == "features.9.conv.1.1" and found["features.9.conv.2"] == "features.9.conv.3"


def test_gates_of_efficientnet_have_no_norm() -> None:
    groups = traced("efficientnet_b0")
    gates = {name for name in groups if name.endswith(("fc1", "fc2"))}
    assert len(groups) == 81 and len(gates) == 32
    assert all((group.norm is None) == (name in gates) for name, group in groups.items())
    assert pairs(groups)["features.4.1.block.3.0"] == "features.4.1.block.3.1"
    small = traced("efficientnet_b0_cifar")
    assert "layers.0.conv1" not in small  # it exists but never runs
    assert pairs(small)["layers.0.conv2"] == "layers.0.bn2" and pairs(small)["layers.5.se.se1"] is None


@pytest.mark.parametrize("dotted", [False, True])
def test_concatenation_gives_every_consumer_with_its_offset(dotted: bool) -> None:
    groups = traced("densenet121", width=4, dotted=dotted)
    norm, conv = (("norm.1", "norm.2"), "conv.2") if dotted else (("norm1", "norm2"), "conv2")
    block = "features.denseblock1.denselayer"
    assert groups["features.conv0"].norm == NormSlice("features.norm0", 0)
    assert groups[f"{block}1.{conv[:-1]}1"].norm == NormSlice(f"{block}1.{norm[1]}", 0)
    # Layer 3 appends channels 8 + 2 * 4 ... of layers 4, 5 and 6 and of the transition.
    assert groups[f"{block}3.{conv}"].norms == (
        *(NormSlice(f"{block}{layer}.{norm[0]}", 16) for layer in (4, 5, 6)),
        NormSlice("features.transition1.norm", 16),
    )
    assert groups[f"{block}3.{conv}"].norm is None
    assert groups[f"{block}6.{conv}"].norm == NormSlice("features.transition1.norm", 28)
    assert groups[
        "features.denseblock4.denselayer16.conv2" if not dotted else "features.denseblock4.denselayer16.conv.2"
    ].norm


def test_concatenation_may_put_new_channels_first() -> None:
    groups = traced("densenet121_cifar")
    assert groups["dense1.0.conv2"].norms[:2] == (NormSlice("dense1.1.bn1", 0), NormSlice("dense1.2.bn1", 4))
    assert groups["dense4.15.conv2"].norm == NormSlice("bn", 0)


class Net(nn.Module):
    """A network whose forward pass is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def conv(inputs: int = 3, outputs: int = 4, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


def only(network: nn.Module) -> dict[str, FilterGroup]:
    return {group.name: group for group in trace_groups(network, (3, 8, 8))}


def logits(x: Tensor) -> Tensor:
    return x.mean((2, 3))


CHANNELWISE: list[Callable[[Tensor], Tensor]] = [
    functional.relu,
    lambda x: functional.relu(x, inplace=True),
    functional.elu,
    functional.leaky_relu,
    functional.gelu,
    functional.silu,
    functional.mish,
    functional.hardswish,
    functional.relu6,
    functional.softplus,
    torch.tanh,
    lambda x: functional.dropout(x, 0.5, False),
    lambda x: functional.max_pool2d(x, 2),
    lambda x: functional.avg_pool2d(x, 2),
    lambda x: functional.adaptive_avg_pool2d(x, 1),
    lambda x: functional.adaptive_avg_pool2d(x, 3),
    lambda x: functional.adaptive_max_pool2d(x, 3),
    lambda x: functional.pad(x, (1, 1, 1, 1)),
    lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: functional.interpolate(x, scale_factor=2),
    lambda x: x[:, :, ::2, 1:],
    lambda x: 2 * x + 1,
    lambda x: x.double().float(),
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: functional.prelu(x, torch.full((4,), 0.1)),
    lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
    lambda x: torch.cat(x.chunk(2, 1), 1),
    lambda x: torch.cat(x.split([1, 3], -3), -3),
]


@pytest.mark.parametrize("between", CHANNELWISE)
def test_channelwise_operators_keep_the_pair(between: Callable[[Tensor], Tensor]) -> None:
    network = Net(lambda net, x: logits(net.bn(between(net.conv(x)))), conv=conv(), bn=nn.BatchNorm2d(4))
    assert only(network)["conv"].norm == NormSlice("bn", 0)


MIXING: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.flip(1),
    lambda x: x.transpose(2, 3).softmax(1),
    lambda x: x + x.roll(1, 1),
    lambda x: x * x.mean((2, 3), keepdim=True),
    lambda x: x.reshape(2, 2, 2, 8, 8).transpose(1, 2).reshape(2, 4, 8, 8),
    lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1))[:, :4],
    lambda x: functional.layer_norm(x, x.shape[1:]),
    lambda x: x[:, ::2].repeat(1, 2, 1, 1),
    lambda x: x.cumsum(1),
]


@pytest.mark.parametrize("between", MIXING)
def test_operators_that_mix_channels_end_the_pair(between: Callable[[Tensor], Tensor]) -> None:
    network = Net(lambda net, x: logits(net.bn(between(net.conv(x)))), conv=conv(), bn=nn.BatchNorm2d(4))
    assert only(network)["conv"].norm is None


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of every pixel, as in ConvNeXt."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), LayerNorm2d(4)])
def test_norms_with_statistics_of_each_image_carry_the_mask(norm: nn.Module) -> None:
    network = Net(lambda net, x: logits(functional.relu(net.norm(net.conv(x)))), conv=conv(), norm=norm)
    assert only(network) == {"conv": FilterGroup("conv", "conv", 4, (NormSlice("norm", 0),), True)}


def test_such_a_norm_with_another_input_carries_no_mask() -> None:
    network = Net(lambda net, x: logits(net.norm(net.conv(x) + x[:, :1])), conv=conv(), norm=nn.GroupNorm(2, 4))
    assert only(network)["conv"].norm is None


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 4, affine=False),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.LayerNorm((4, 8, 8)),
        nn.Identity(),
        nn.LocalResponseNorm(2),
    ],
)
def test_other_norms_carry_no_mask(norm: nn.Module) -> None:
    network = Net(lambda net, x: logits(net.norm(net.conv(x))), conv=conv(), norm=norm)
    assert only(network) == {"conv": FilterGroup("conv", "conv", 4, (), False)}


def test_order_of_declaration_does_not_matter() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return logits(net.b(net.second(functional.relu(net.a(net.first(x))))))

    modules = {"b": nn.BatchNorm2d(4), "second": conv(4), "a": nn.BatchNorm2d(4), "first": conv()}
    assert pairs(only(Net(forward, **modules))) == {"first": "a", "second": "b"}


def test_norm_called_through_its_parameters() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        bn = net.bn
        y = functional.batch_norm(net.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return logits(y)

    assert pairs(only(Net(forward, conv=conv(), bn=nn.BatchNorm2d(4)))) == {"conv": "bn"}


def test_a_conv_used_twice_keeps_its_norm_if_the_norm_is_the_same() -> None:
    def same(net: Any, x: Tensor) -> Tensor:
        return logits(net.bn(net.conv(net.bn(net.conv(x)))))

    def two(net: Any, x: Tensor) -> Tensor:
        return logits(net.other(net.conv(net.bn(net.conv(x)))))

    modules = {"conv": conv(3, 3), "bn": nn.BatchNorm2d(3), "other": nn.BatchNorm2d(3)}
    assert pairs(only(Net(same, **modules))) == {"conv": "bn"}
    group = only(Net(two, **modules))["conv"]
    assert group.norms == (NormSlice("bn", 0), NormSlice("other", 0)) and group.norm is None


def test_norm_used_twice_belongs_to_neither_conv() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return logits(net.bn(net.b(net.bn(net.a(x)))))

    groups = only(Net(forward, a=conv(), b=conv(4), bn=nn.BatchNorm2d(4)))
    assert [group.norms for group in groups.values()] == [(NormSlice("bn", 0),)] * 2
    assert pairs(groups) == {"a": None, "b": None}


def test_a_conv_with_other_consumers_is_not_exclusive_to_its_norm() -> None:
    def skip(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        return logits(net.bn(y) + y)

    def returned(net: Any, x: Tensor) -> Any:
        y = net.conv(x)
        return logits(net.bn(y)), y

    for forward in (skip, returned):
        group = only(Net(forward, conv=conv(), bn=nn.BatchNorm2d(4)))["conv"]
        assert group.norms == (NormSlice("bn", 0),) and not group.exclusive and group.norm is None


def test_a_norm_over_half_of_the_filters_does_not_belong_to_the_conv() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return logits(net.bn(net.conv(x)[:, 2:]))

    group = only(Net(forward, conv=conv(), bn=nn.BatchNorm2d(2)))["conv"]
    assert group.norms == () and not group.exclusive


def test_concatenation_of_conv_and_image_under_one_norm() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return logits(net.bn(torch.cat([x, net.a(x), net.b(x)], 1)))

    groups = only(Net(forward, a=conv(), b=conv(3, 2), bn=nn.BatchNorm2d(9)))
    assert groups["a"].norm == NormSlice("bn", 3) and groups["b"].norm == NormSlice("bn", 7)


def test_grouped_and_depthwise_convs() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return logits(net.b2(net.deep(net.b1(net.grouped(x)))))

    modules = {"grouped": conv(3, 6, groups=3), "b1": nn.BatchNorm2d(6)}
    modules |= {"deep": conv(6, 12, groups=6), "b2": nn.BatchNorm2d(12)}
    groups = only(Net(forward, **modules))
    assert pairs(groups) == {"grouped": "b1", "deep": "b2"}
    assert [group.num_filters for group in groups.values()] == [6, 12]


def test_a_batch_norm_after_pooling_and_flattening_belongs_to_the_conv() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.bn(functional.adaptive_avg_pool2d(net.conv(x), 1).flatten(1))  # type: ignore[no-any-return]

    assert pairs(only(Net(forward, conv=conv(), bn=nn.BatchNorm1d(4)))) == {"conv": "bn"}


def test_flattening_of_a_map_ends_the_pair() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.bn(net.conv(x).flatten(1))  # type: ignore[no-any-return]

    assert pairs(only(Net(forward, conv=conv(), bn=nn.BatchNorm1d(256)))) == {"conv": None}


@pytest.mark.parametrize("training", [False, True])
def test_tracing_changes_nothing(fingerprint: Callable[[nn.Module], str], training: bool) -> None:
    network = build("mobilenet_v2_cifar", 3, width=8).train(training)
    before = fingerprint(network)
    trace_groups(network, (3, 32, 32))
    assert fingerprint(network) == before


def test_wrong_images_are_one_clear_error(small_network: nn.Module) -> None:
    with pytest.raises(ArchitectureError, match=r"cannot take images of shape \(3, 20, 20\)"):
        trace_groups(small_network, (3, 20, 20))


def test_built_in_networks_are_traced_once_per_shape_and_others_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []

    def trace(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[FilterGroup, ...]:
        traced.append(network)
        return trace_groups(network, input_shape)

    monkeypatch.setattr(groups_module, "trace_groups", trace)
    monkeypatch.setattr(groups_module, "_traced", {})
    narrow, wide = (ResNet18Cifar(10, width=width).eval() for width in (8, 10))
    for network in (narrow, ResNet18Cifar(10, width=8).eval(), wide):
        assert groups_of(network, (3, 32, 32)) == trace_groups(network, (3, 32, 32))
    assert traced == [narrow, wide]
    narrow.bn1 = nn.Identity()
    assert groups_of(narrow, (3, 32, 32))[0].norms == ()

    class Own(ResNet18Cifar):
        pass

    own = [Own(10, width=8).eval() for _ in range(2)]
    for network in own:
        groups_of(network, (3, 32, 32))
    assert traced[3:] == own
