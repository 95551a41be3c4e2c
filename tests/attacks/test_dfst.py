import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.base import apply_trigger, saturate
from bdprune.attacks.dfst import DFST, activations, ssim
from bdprune.attacks.generators import Change
from bdprune.errors import OptionError
from bdprune.loops.fitting import Schedule

from .toy import attacked, measured, network, task, weights


class Watched(nn.Module):
    """Eight neurons before the last layer: means of red, green, blue and their negatives, and two constants."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes = nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        means = self.eyes(images).mean((2, 3))
        constants = torch.ones(len(images), 2)
        return self.head(torch.cat([means, 1 - means, constants], 1))


def test_poison_is_styled_and_relabelled() -> None:
    given, attack = task(40), DFST(target=1, rate=0.25)
    trigger = attack.new_trigger((3, 16, 16))
    poisoned = attack.poison(given, trigger, torch.Generator().manual_seed(0))
    assert len(poisoned.triggered) == 10
    assert (given.labels[poisoned.triggered] != 1).all()
    assert (poisoned.labels[poisoned.triggered] == 1).all()
    expected = saturate(apply_trigger(trigger, given.images[poisoned.triggered]))
    assert torch.equal(poisoned.images[poisoned.triggered], expected)


def test_rounds_start_evenly_between_two_shares_of_the_schedule() -> None:
    attack = DFST(target=0, rounds=4, first_round=0.5, end=0.9)
    assert [attack.due(done) for done in (0, 0.49, 0.5, 0.59, 0.61, 0.71, 0.81, 0.99)] == [0, 0, 1, 1, 2, 3, 4, 4]
    assert DFST(target=0, rounds=0).due(0.99) == 0
    assert DFST(target=0, rounds=2, first_round=0.5, end=0.5).due(0.5) == 2


def test_compromised_neurons_are_the_ones_that_the_style_raises_most() -> None:
    """At sunrise red rises, blue falls, so that "1 - blue" rises most: the images here are blue."""
    given = task(16)
    images = given.images.float() / 255 * torch.tensor([0.9, 0.5, 1.0]).view(1, 3, 1, 1)
    attack = DFST(target=0, neurons=0.25)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    chosen, level = objective.compromised(Watched(), images)
    styled, _ = activations(Watched(), objective.trigger(images), None)
    clean, _ = activations(Watched(), images, None)
    rise = (styled - clean).mean(0)
    assert set(chosen.tolist()) == {0, 5} or rise[chosen].min() >= rise.sort().values[-3]
    assert len(chosen) == 2
    assert torch.allclose(level, styled.mean(0)[chosen])
    assert (clean.mean(0)[chosen] < level).all()


def test_at_least_one_neuron_is_compromised() -> None:
    given, attack = task(8), DFST(target=0, neurons=0.01)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    assert len(objective.compromised(Watched(), given.images.float() / 255)[0]) == 1


def test_neurons_of_a_named_layer_are_means_of_its_channels() -> None:
    images = torch.rand(2, 3, 16, 16)
    active, logits = activations(net := Watched(), images, "eyes")
    assert torch.allclose(active, images.mean((2, 3)))
    assert torch.equal(logits, net(images))
    assert activations(net, images, None)[0].shape == (2, 8)
    assert not net.eyes._forward_hooks
    assert not net.head._forward_pre_hooks


def test_a_layer_that_the_network_lacks_is_named_before_any_training() -> None:
    given, schedule = task(32), Schedule(epochs=1, batch_size=16, bf16=False)
    with pytest.raises(OptionError, match="setting layer is 'layer4', which a Sequential does not have"):
        attacked(DFST(target=1, layer="layer4", first_round=1.0, end=1.0), given, schedule)
    attacked(DFST(target=1, layer="3", first_round=1.0, end=1.0), given, schedule)


@pytest.mark.parametrize("layer", [None, "3"])
def test_both_terms_reach_the_injector(layer: str | None) -> None:
    """The public port computes them without gradients, so only the similarity term trains its injector."""
    given, net = task(16), network(8).eval()
    images = given.images.float() / 255
    injector = Change(3, 4, 0.3)
    norms = []
    for weight in (0.0, 1.0):
        attack = DFST(target=1, similarity_weight=0.0, activation_weight=weight, layer=layer)
        objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
        width = activations(net, images, layer)[0].shape[1]
        loss = objective.injector_loss(net, injector, images, torch.arange(width), torch.full((width,), 100.0))
        norms.append(torch.autograd.grad(loss, list(injector.parameters())))
    called = torch.cat([gradient.flatten() for gradient in norms[0]])
    both = torch.cat([gradient.flatten() for gradient in norms[1]])
    assert called.norm() > 1e-4
    assert (both - called).norm() > 1e-6


def test_injector_loss_is_the_sum_of_its_terms() -> None:
    given, net = task(8), Watched()
    images = given.images.float() / 255
    attack = DFST(target=1, similarity_weight=0.2, activation_weight=0.7)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    injector, level = Change(3, 4, 0.3), torch.tensor([0.9, 0.01])
    changed = injector(images)
    calls = functional.cross_entropy(net(changed), torch.ones(8, dtype=torch.int64))
    reached = (changed[:, 1].mean((1, 2)) / 0.9).mean() / 2 + 0.5  # the second counts as one at most
    expected = calls - 0.2 * ssim(changed, images) - 0.7 * reached
    found = objective.injector_loss(net, injector, images, torch.tensor([1, 2]), level)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_injector_raises_the_compromised_neurons_and_leaves_the_network_unchanged() -> None:
    given, net = task(32), network(8).train()
    before, state = weights(net), torch.get_rng_state()
    attack = DFST(target=1, images=32, injector_steps=20, neurons=0.1, activation_weight=3.0)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    injector = objective.train_injector(net)
    assert torch.equal(weights(net), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    images = given.images[given.labels != 1].float() / 255
    chosen, _ = objective.compromised(net.eval(), images)
    with torch.no_grad():
        raised = activations(net, injector(images), None)[0][:, chosen].mean()
        assert raised > 1.1 * activations(net, images, None)[0][:, chosen].mean()
        assert (injector(images) - images).abs().max() <= attack.strength + 1e-6


def test_covers_come_from_other_classes_and_keep_their_labels() -> None:
    given, attack = task(20), DFST(target=1, cover_rate=0.2)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    images = given.images.float() / 255
    assert [len(part) for part in objective.covers(images, given.labels)] == [0, 0]
    objective.injectors = [Change(3, 4, 0.0), Change(3, 4, 0.3)]
    covers, labels = objective.covers(images, given.labels)
    assert labels.tolist() == [0, 2, 3, 0]  # of 0 1 2 3 0 1 2 3 ...
    assert torch.equal(covers[:2], images[[0, 2]])  # the first injector changes nothing
    assert torch.allclose(covers[2:], objective.injectors[1](images[[3, 4]]))
    assert not covers.requires_grad


def test_covers_join_the_batch_with_their_labels() -> None:
    given, attack = task(20), DFST(target=1, cover_rate=0.2, rounds=0)
    objective = attack.objective(given, attack.new_trigger((3, 16, 16)))
    net, images = network().eval(), given.images.float() / 255
    objective.injectors = [Change(3, 4, 0.3)]
    covers, labels = objective.covers(images, given.labels)
    expected = functional.cross_entropy(net(torch.cat([images, covers])), torch.cat([given.labels, labels]))
    assert objective.loss(net, images, given.labels, 0.9).item() == pytest.approx(expected.item(), rel=1e-6)


def test_ssim_equals_windows_computed_by_hand() -> None:
    one, two = torch.rand(2, 1, 9, 9).unbind(0)
    assert ssim(one[None], one[None]).item() == pytest.approx(1, abs=1e-5)
    values = []
    for top in range(3):
        for left in range(3):
            a, b = (image[0, top : top + 7, left : left + 7].double() for image in (one, two))
            covariance = (a * b).mean() - a.mean() * b.mean()
            light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
            values.append(light * (2 * covariance + 9e-4) / (a.var(correction=0) + b.var(correction=0) + 9e-4))
    assert ssim(one[None], two[None]).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)


def test_the_style_still_triggers_the_target_after_detoxification() -> None:
    schedule = Schedule(epochs=8, batch_size=16, peak_lr=0.1, padding=0, flip=False)
    attack = DFST(target=1, images=64, injector_steps=5, rounds=2)
    victim, trigger = attacked(attack, task(), schedule, width=8)
    accuracy, success = measured(attack, victim, trigger)
    assert accuracy > 0.95
    assert success > 0.9


@pytest.mark.parametrize("wrong", [{"target": None}, {"alpha": 2.0}, {"end": 0.1}, {"rounds": -1}, {"images": 0}])
def test_settings_out_of_range_are_errors(wrong: dict[str, float | None]) -> None:
    with pytest.raises(OptionError):
        DFST(**{"target": 1, **wrong})  # type: ignore[arg-type]
