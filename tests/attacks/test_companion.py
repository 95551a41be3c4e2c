import copy

import torch
from torch import nn

from bdprune.attacks.base import unpoisoned
from bdprune.attacks.companion import Companion, draw_apart, quota, running_statistics

from .helpers import setting
from .toy import network, weights


def pair() -> tuple[nn.Module, nn.Module]:
    """A network, and a module that is trained along with it and feeds it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 2)


def test_following_takes_one_step_of_adam_in_every_backward_pass() -> None:
    ours, net = pair()
    expected, inputs = copy.deepcopy(ours), torch.rand(5, 4)
    companion = Companion(ours, 0.1, (0.5, 0.9))
    companion.follow()
    adam = torch.optim.Adam(expected.parameters(), 0.05, (0.5, 0.9))
    for _ in range(3):
        companion.pace(0.5)
        # It runs twice in one pass, like the generator of an attack.
        (net(ours(inputs)) + net(ours(inputs.square()))).square().sum().backward()
        adam.zero_grad()
        (net(expected(inputs)) + net(expected(inputs.square()))).square().sum().backward()
        adam.step()
    assert torch.equal(weights(ours), weights(expected))
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_descending_gives_nothing_else_a_gradient() -> None:
    ours, net = pair()
    before, inputs = weights(ours), torch.rand(5, 4)
    losses = []
    companion = Companion(ours, 0.01)
    for _ in range(20):
        loss = net(ours(inputs)).square().sum()
        losses.append(loss.item())
        companion.descend(loss)
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(weights(ours), before)
    assert all(parameter.grad is None for parameter in (*net.parameters(), *ours.parameters()))


def test_a_companion_continues_from_its_saved_state() -> None:
    ours, net = pair()
    inputs, companion = torch.rand(5, 4), Companion(ours, 0.01)
    assert companion.state_dict() == {}
    companion.descend(net(ours(inputs)).sum())
    twin = copy.deepcopy(ours)
    resumed = Companion(twin, 0.01)
    resumed.load_state_dict(copy.deepcopy(companion.state_dict()))
    for one, module in ((companion, ours), (resumed, twin)):
        one.descend(net(module(inputs)).square().sum())
    assert torch.equal(weights(ours), weights(twin))


def test_running_statistics_are_used_unchanged_and_restored() -> None:
    net, images = network().train(), torch.rand(8, 3, 16, 16)
    net[4].eval()
    net[1].running_mean.fill_(0.3)
    before, expected = weights(net), copy.deepcopy(net).eval()(images)
    with running_statistics(net):
        assert torch.equal(net(images), expected)
    assert torch.equal(weights(net), before)
    assert [net[1].training, net[4].training, net.training] == [True, False, True]


def test_unpoisoned_is_a_copy_without_poison() -> None:
    given = setting()
    same = unpoisoned(given)
    assert torch.equal(same.images, given.images)
    assert torch.equal(same.labels, given.labels)
    assert (len(same.triggered), len(same.covers)) == (0, 0)
    same.images.zero_()
    assert given.images.any()


def test_quotas_add_up_to_the_share() -> None:
    assert [quota(step, 0.1, 20) for step in range(5)] == [2] * 5
    assert [quota(step, 0.1, 128) for step in range(5)] == [12, 13, 13, 13, 13]
    assert sum(quota(step, 0.005, 128) for step in range(1000)) == 640
    assert {quota(step, 0.005, 128) for step in range(1000)} == {0, 1}
    assert quota(3, 0.0, 128) == 0
    assert quota(3, 1.0, 128) == 128


def test_separately_drawn_indices_are_disjoint() -> None:
    used, held = draw_apart(100, 30, 20, torch.Generator())
    assert (len(used), len(held)) == (30, 20)
    assert len(set(used.tolist()) | set(held.tolist())) == 50
    used, held = draw_apart(10, 10, 1000, torch.Generator())
    assert (len(used), len(held)) == (5, 5)
