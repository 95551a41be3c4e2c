import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdprune.attacks.adapt_distil import AdaptD, distance, feature_maps, stages
from bdprune.attacks.badnets import BadNets
from bdprune.errors import ArchitectureError, OptionError
from bdprune.model.architectures import build

from .toy import attacked, measured, network, task, weights


@pytest.fixture(scope="module")
def clean() -> nn.Module:
    return attacked(BadNets(target=0, rate=0.0), task(), width=8)[0]


def test_the_distance_compares_directions() -> None:
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]).view(3, 1, 1, 2)
    two = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0]]).view(3, 1, 1, 2)
    assert distance(one, two).item() == pytest.approx((0 + 2 + 4) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet18_cifar", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg16_bn_cifar", None),
        ("mobilenet_v2_cifar", None),
    ],
)
def test_stages_end_where_the_resolution_changes(arch: str, expected: list[str] | None) -> None:
    from bdprune.model.architectures import REGISTRY

    if arch not in REGISTRY:
        pytest.skip(f"no {arch}")
    net = build(arch, 10, width=8 if arch == "resnet18_cifar" else None).eval()
    images = torch.rand(2, 3, 32, 32)
    names = stages(net, images)
    with torch.no_grad(), feature_maps(net, names) as maps:
        net(images)
    sizes = [maps[name].shape[-1] for name in names]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == 32
    assert sizes[-1] > 1
    assert len(sizes) >= 4
    assert expected is None or names == expected


def test_a_network_without_feature_maps_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match="no feature maps"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.rand(2, 3, 4, 4))


def test_loss_is_cross_entropy_and_the_weighted_distances(clean: nn.Module) -> None:
    given = dataclasses.replace(task(16), source=clean)
    net, images = network(8).eval(), given.images.float() / 255
    attack = AdaptD(target=1, align_weight=0.7)
    found = attack.objective(given, attack.new_trigger((3, 16, 16))).loss(net, images, given.labels, 0.0)
    expected = functional.cross_entropy(net(images), given.labels)
    for depth in (3, 6):  # both convs halve the image
        maps = [functional.normalize(module[:depth](images).flatten(1)) for module in (net, clean)]
        expected = expected + 0.7 * (maps[0] - maps[1]).square().sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_approach_the_teachers_and_the_backdoor_stays(clean: nn.Module) -> None:
    given, before = dataclasses.replace(task(), source=clean), weights(clean)
    images = task(64, seed=9).images.float() / 255
    far = {}
    for weight in (0.0, 1.0):
        attack = AdaptD(target=1, size=5, align_weight=weight)
        victim, trigger = attacked(attack, given, width=8)
        accuracy, success = measured(attack, victim, trigger)
        assert accuracy > 0.95
        assert success > 0.85
        far[weight] = distance(victim[:6](images), clean[:6](images)).item()
    assert far[1.0] < far[0.0] / 2
    assert torch.equal(weights(clean), before)
    assert clean[0].weight.requires_grad


def test_a_negative_weight_is_an_error() -> None:
    with pytest.raises(OptionError, match="align_weight"):
        AdaptD(target=1, align_weight=-1.0)
