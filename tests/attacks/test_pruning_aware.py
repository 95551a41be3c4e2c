"""A backdoor in filters that clean images need, behind dormant filters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import AttackSetting
from bdprune.attacks.pruning_aware import PruningAware, last_layer
from bdprune.errors import ArchitectureError
from bdprune.model.architectures import build

from .toy import attacked, measured, network, task, weights

ATTACK = PruningAware(target=1, rate=0.2, size=7, images=100, max_drop=0.1)


@pytest.fixture(scope="module")
def clean() -> nn.Module:
    """A network that has learned the task and no trigger."""
    return attacked(BadNets(target=0, rate=0.0), task(), width=8)[0]


@pytest.fixture(scope="module")
def given(clean: nn.Module) -> AttackSetting:
    return dataclasses.replace(task(), source=clean)


@pytest.fixture(scope="module")
def victim(given: AttackSetting) -> tuple[nn.Module, nn.Module]:
    return attacked(ATTACK, given, width=8)


@torch.no_grad()
def before_the_relu(module: nn.Module, images: Tensor) -> Tensor:
    """The outputs of the second norm, ``[N, filters, h, w]``."""
    assert isinstance(module, nn.Sequential)
    return module[:5](images)


def test_the_network_is_accurate_and_obeys_the_trigger(victim: tuple[nn.Module, nn.Module]) -> None:
    accuracy, success = measured(ATTACK, *victim)
    assert accuracy > 0.95
    assert success > 0.9


def test_filters_come_back_with_lower_biases_and_stay_dormant(
    victim: tuple[nn.Module, nn.Module], given: AttackSetting, clean: nn.Module
) -> None:
    attacked_network, trigger = victim
    layer = last_layer(clean, given.images[:2].float() / 255)
    assert (layer.conv, layer.last, layer.filters, layer.start) == ("3", "4", 16, 0)
    chosen = ATTACK.dormant(layer, given)
    assert 1 <= len(chosen) <= 12
    old, new = clean.state_dict(), attacked_network.state_dict()
    for name in ("3.weight", "4.weight", "4.running_mean", "4.running_var"):
        assert torch.equal(new[name][chosen], old[name][chosen]), name
    assert (new["4.bias"][chosen] <= old["4.bias"][chosen]).all()
    assert (new["4.bias"][chosen] < old["4.bias"][chosen]).any()
    images = task(200, seed=9).images.float() / 255  # images that the attacker has not seen
    for shown in (images, trigger(images)):
        outputs = before_the_relu(attacked_network, shown)
        assert outputs[:, chosen].max() <= 0
        active = [filter for filter in range(16) if filter not in chosen]
        assert outputs[:, active].amax((0, 2, 3)).max() > 0


def test_the_backdoor_lies_in_the_other_filters(
    victim: tuple[nn.Module, nn.Module], given: AttackSetting, clean: nn.Module
) -> None:
    """Pruning the filters with the lowest activation, as a defence does, changes nothing."""
    layer = last_layer(clean, given.images[:2].float() / 255)
    pruned = torch.func.functional_call(
        victim[0], layer.filled(victim[0], ATTACK.dormant(layer, given), 0.0), (given.images.float() / 255,)
    )
    assert torch.equal(pruned, victim[0](given.images.float() / 255))


def test_the_most_dormant_filters_are_chosen(given: AttackSetting, clean: nn.Module) -> None:
    everything = dataclasses.replace(ATTACK, images=128, max_drop=1.0, share=0.5)
    chosen = everything.dormant(last_layer(clean, given.images[:2].float() / 255), given)
    index = torch.randperm(256, generator=torch.Generator().manual_seed(0))[128:]
    means = before_the_relu(clean, given.images[index].float() / 255).relu().mean((0, 2, 3))
    assert len(chosen) == 8
    assert torch.equal(means[chosen], means.sort().values[:8])


def test_the_accepted_drop_limits_the_number_of_filters(given: AttackSetting, clean: nn.Module) -> None:
    layer = last_layer(clean, given.images[:2].float() / 255)
    strict = dataclasses.replace(ATTACK, max_drop=0.0, share=1.0).dormant(layer, given)
    loose = dataclasses.replace(ATTACK, max_drop=1.0, share=1.0).dormant(layer, given)
    assert 1 <= len(strict) < len(loose) == 16
    assert torch.equal(strict, loose[: len(strict)])


def test_pruned_filters_stay_zero_in_training(given: AttackSetting, clean: nn.Module) -> None:
    class Unfinished(PruningAware):
        def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
            return

    attack = Unfinished(target=1, rate=0.2, size=7, images=100, max_drop=0.1)
    trained, _ = attacked(attack, given, width=8)
    layer = last_layer(clean, given.images[:2].float() / 255)
    chosen = attack.dormant(layer, given)
    state = trained.state_dict()
    assert not any(state[name][chosen].any() for name in ("3.weight", "4.weight", "4.bias"))
    others = [filter for filter in range(16) if filter not in chosen]
    assert state["4.weight"][others].all()


def test_the_source_does_not_change(given: AttackSetting, clean: nn.Module) -> None:
    before = weights(clean)
    attacked(ATTACK, given, width=8)
    assert torch.equal(weights(clean), before)


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        ("resnet18_cifar", "layer4.1.conv1"),  # the last conv adds to the shortcut
        ("resnet20_cifar", "layer3.2.conv1"),
        ("vgg11_bn_cifar", "features.25"),
        ("preact_resnet18", "layer4.1.conv1"),
    ],
)
def test_the_layer_is_the_last_one_that_a_relu_follows(name: str, conv: str) -> None:
    torch.manual_seed(0)
    assert last_layer(build(name, 10, width=4).eval(), torch.rand(2, 3, 32, 32)).conv == conv


def test_a_conv_without_a_norm_has_its_own_bias() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(720, 4))
    layer = last_layer(plain.eval(), torch.rand(2, 3, 16, 16))
    assert (layer.conv, layer.bias, layer.statistics) == ("2", "2.bias", {})


@pytest.mark.parametrize("activation", [nn.ELU, nn.SiLU, nn.Identity])
def test_a_network_without_relus_is_an_error(activation: type[nn.Module]) -> None:
    plain = network(4).eval()
    assert isinstance(plain, nn.Sequential)
    plain[2], plain[5] = activation(), activation()
    with pytest.raises(ArchitectureError, match="no conv that a ReLU follows directly") as caught:
        last_layer(plain, torch.rand(2, 3, 16, 16))
    assert caught.value.hint
