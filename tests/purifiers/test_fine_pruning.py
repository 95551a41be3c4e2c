"""Fine-pruning: the ranking, the stopping rule, the guard after the fine-tuning, and the published settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.errors import ArchitectureError, DataError, OptionError
from bdprune.loops.finetune import FineTuneSettings
from bdprune.methods import Purifier
from bdprune.methods.held_out import hold_out
from bdprune.model.edit.pruning import prune
from bdprune.model.handle import Model
from bdprune.purifiers import fine_pruning
from bdprune.purifiers.fine_pruning import FinePruning, mean_activations
from bdprune.purifiers.suspiciousness import SuspiciousnessPruning
from bdprune.runtime.evaluate import clean_accuracy

QUICK = FinePruning(fine_tuning=FineTuneSettings(lr=0.01, epochs=2, padding=0))


def ranked(bright: Any, images: torch.Tensor) -> list[int]:
    """Channels of the last conv by their mean activation."""
    maps = bright.model.network[:6](images)
    return torch.argsort(maps.mean((0, 2, 3)), stable=True).tolist()


def test_the_activation_is_the_mean_of_the_rectified_map_after_the_norm(bright: Any) -> None:
    images = bright.data.images[:50]
    first, last = (mean_activations(bright.model, images, group) for group in bright.model.groups)
    network = bright.model.network
    torch.testing.assert_close(first, network[:3](images).mean((0, 2, 3)).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, network[:6](images).mean((0, 2, 3)).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prune_drop", [0.0, 0.1, 0.4])
def test_the_least_active_channels_are_pruned_until_the_accuracy_falls(bright: Any, prune_drop: float) -> None:
    method = replace(QUICK, prune_drop=prune_drop, max_drop=1.0, fine_tuning=None)
    result = method(Case(bright.model, bright.data))
    rest, held = hold_out(bright.data, 0.3, 0)
    order, count = ranked(bright, rest.images), 0
    before = clean_accuracy(bright.model.module, held.images, held.labels)
    for more in range(1, 13):
        module = prune(bright.model, {"3": order[:more]}, "zero_gamma_beta").module
        if before - clean_accuracy(module, held.images, held.labels) > prune_drop:
            break
        count = more
    assert result.pruned.get("3", []) == sorted(order[:count])
    assert result.change == ("pruned" if count else "nothing")


def test_an_accuracy_can_be_the_limit(bright: Any) -> None:
    one = replace(QUICK, least_accuracy=0.6, max_drop=1.0, fine_tuning=None)(Case(bright.model, bright.data))
    other = replace(QUICK, least_accuracy=0.99, max_drop=1.0, fine_tuning=None)(Case(bright.model, bright.data))
    assert one.accuracy_after >= 0.6 and one.curve[-1].clean_accuracy < 0.6
    assert len(other.pruned.get("3", [])) <= len(one.pruned["3"])


def test_pruned_channels_stay_pruned_in_the_fine_tuning(bright: Any) -> None:
    result = replace(QUICK, regained_drop=1.0)(Case(bright.model, bright.data))
    index = result.pruned["3"]
    assert result.change == "pruned and retrained" and result.selection.endswith("then fine-tuned")
    assert not result.model.network.get_parameter("4.weight")[index].any()
    assert not result.model.network.get_parameter("4.bias")[index].any()
    assert not torch.equal(
        result.model.network.get_parameter("8.weight"), bright.model.network.get_parameter("8.weight")
    )


def test_a_fine_tuning_that_ruins_the_network_is_not_used(bright: Any) -> None:
    ruinous = FineTuneSettings(lr=50.0, epochs=1, padding=0, clip=1.0)
    result = replace(QUICK, fine_tuning=ruinous, max_drop=0.02)(Case(bright.model, bright.data))
    assert result.change in ("pruned", "nothing")
    assert result.accuracy_before - result.accuracy_after <= 0.02


def test_nothing_is_pruned_if_one_channel_costs_too_much(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    result = replace(QUICK, prune_drop=-1.0, fine_tuning=None)(Case(bright.model, bright.data))
    assert result.change == "nothing" and result.selection.startswith("nothing is pruned: one channel of 3 costs too")
    assert all(torch.equal(value, before[name]) for name, value in result.model.network.state_dict().items())


def test_if_nothing_may_be_pruned_the_network_is_fine_tuned(bright: Any) -> None:
    """Nothing happened to a network below the accuracy of the preset ``paper``, and the reason given was wrong."""
    result = replace(QUICK, prune_drop=-1.0, max_drop=-1.0, regained_drop=1.0)(Case(bright.model, bright.data))
    assert result.change == "retrained" and result.selection.endswith("; fine-tuned")


def test_settings_that_are_no_shares_are_errors() -> None:
    for wrong in ({"max_drop": float("nan")}, {"regained_drop": 2.0}, {"least_accuracy": -0.1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            FinePruning(**wrong)


def test_another_layer_can_be_pruned(bright: Any) -> None:
    method = replace(QUICK, layer="0", prune_drop=1.0, max_drop=1.0, fine_tuning=None)
    assert set(method(Case(bright.model, bright.data)).pruned) == {"0"}
    with pytest.raises(OptionError, match="no conv 'layer9'"):
        replace(QUICK, layer="layer9")(Case(bright.model, bright.data))


def test_a_network_without_convs_and_too_few_images_are_errors(bright: Any) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    with pytest.raises(ArchitectureError, match="no conv to prune"):
        QUICK(Case(Model(network, "linear", 3, (3, 8, 8)), bright.data))
    with pytest.raises(DataError, match="leave none to hold out"):
        QUICK(Case(bright.model, bright.data.subset(torch.arange(3))))


def test_presets_have_the_published_settings() -> None:
    paper: Any = FinePruning.preset("paper")
    assert (paper.least_accuracy, paper.layer, paper.regained_drop) == (0.8, None, 1.0)
    assert FinePruning.preset("robust") == FinePruning()


class Functional(nn.Module):
    """Uses the weight of its last conv without calling the conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.conv2d(self.first(images).relu(), self.last.weight, self.last.bias, padding=1)
        return self.head(maps.relu().mean((2, 3)))


@pytest.mark.parametrize("method", [QUICK, SuspiciousnessPruning()])
def test_a_conv_that_is_not_called_is_named(bright: Any, method: Purifier) -> None:
    model = Model(Functional(), "functional", 3, (3, 8, 8))
    with pytest.raises(ArchitectureError, match="uses the weight of last without calling this conv"):
        method(Case(model, bright.data))


def test_the_same_pruning_is_fine_tuned_once_and_its_own_limit_is_named(
    bright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def tuned(model: Model, data: Any, settings: Any, pruned: Any, *more: Any) -> Model:
        tried.append(sum(map(len, pruned.filters.values())))
        return model

    monkeypatch.setattr(fine_pruning, "fine_tune", tuned)
    monkeypatch.setattr(fine_pruning, "views_drop", lambda *args: 1.0 if len(tried) == 1 else 0.0)
    both = replace(QUICK, prune_drop=0.4, max_drop=0.0)(Case(bright.model, bright.data))
    assert len(tried) == 2 and tried[0] > tried[1]
    assert "cost at most 0 points" in both.selection
    tried.clear()
    same = replace(QUICK, prune_drop=0.4, max_drop=0.4)(Case(bright.model, bright.data))
    assert len(tried) == 1 and "cost at most 40 points" in same.selection
    narrow = replace(QUICK, prune_drop=0.0, max_drop=0.4)(Case(bright.model, bright.data))
    assert "cost at most 0 points" in narrow.selection
    exact = replace(QUICK, least_accuracy=0.99, max_drop=0.4)(Case(bright.model, bright.data))
    assert "leave an accuracy of at least 0.99" in exact.selection
