"""Pruning by channel Lipschitz constants, with and without clean images."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from bdprune.analysis import Case
from bdprune.methods import shifted_views
from bdprune.model.edit.pruning import prune
from bdprune.model.handle import Model
from bdprune.purifiers.clp import CLP
from bdprune.runtime.evaluate import clean_accuracy


def with_outlier(bright: Any, layer: str = "0", filter: int = 4, factor: float = 50.0) -> Model:
    """The model with one strong filter, which is the only one above 3 standard deviations."""
    network = copy.deepcopy(bright.model.network)
    with torch.no_grad():
        network.get_parameter(f"{layer}.weight")[filter] *= factor
    return Model(network, "bright", 3, (3, 8, 8))


def by_hand(network: Any, conv: str, norm: str) -> torch.Tensor:
    """Largest singular value of every filter times the gain of its norm, as a z-score in the layer."""
    weight, bn = network.get_parameter(f"{conv}.weight"), network.get_submodule(norm)
    largest = torch.linalg.svdvals(weight.detach().flatten(2))[:, 0]
    score = largest * bn.weight.detach().abs() / (bn.running_var + bn.eps).sqrt()
    return (score - score.mean()) / score.std()


def test_without_images_the_published_number_decides(bright: Any) -> None:
    model = with_outlier(bright)
    expected = {
        name: index
        for name, norm in (("0", "1"), ("3", "4"))
        if (index := (by_hand(model.network, name, norm) > 3).nonzero().flatten().tolist())
    }
    result = CLP()(Case(model))
    assert result.pruned == expected == {"0": [4]}
    assert result.change == "pruned" and result.threshold == 3.0 and result.curve == ()
    assert math.isnan(result.accuracy_before) and math.isnan(result.accuracy_after)
    assert result.model.network.get_parameter("1.weight")[4] == 0 == result.model.network.get_parameter("1.bias")[4]


@pytest.mark.parametrize("u", [1.0, 1.5, 2.0])
def test_a_given_number_prunes_what_a_plain_computation_prunes(bright: Any, u: float) -> None:
    result = CLP(u=u, max_drop=0.0)(Case(bright.model, bright.data))
    for name, norm in (("0", "1"), ("3", "4")):
        above = (by_hand(bright.model.network, name, norm) > u).nonzero().flatten().tolist()
        assert result.pruned.get(name, []) == above
    assert result.accuracy_before == clean_accuracy(bright.model.module, bright.data.images, bright.data.labels)


@pytest.mark.parametrize("max_drop", [0.0, 0.02, 0.2, 1.0])
def test_with_images_the_number_is_the_lowest_before_the_first_that_costs_too_much(
    bright: Any, max_drop: float
) -> None:
    model, data = with_outlier(bright), bright.data.subset(torch.arange(100))
    images, labels = shifted_views(data, 5, 0), data.labels.repeat(5)
    before, expected = clean_accuracy(model.module, images, labels), math.nan
    for step in range(17):
        u = 5 - step / 4
        pruned = {
            name: (by_hand(model.network, name, norm) > u).nonzero().flatten().tolist()
            for name, norm in (("0", "1"), ("3", "4"))
        }
        if before - clean_accuracy(prune(model, pruned, "zero_gamma_beta").module, images, labels) > max_drop:
            break
        expected = u
    result = CLP(max_drop=max_drop)(Case(model, data))
    assert result.threshold == expected
    assert [point.threshold for point in result.curve] == sorted(point.threshold for point in result.curve)


def test_nothing_is_pruned_if_every_number_costs_too_much(bright: Any) -> None:
    result = CLP(max_drop=-1.0)(Case(bright.model, bright.data))
    assert result.change == "nothing" and result.pruned == {} and math.isnan(result.threshold)
    assert result.selection.startswith("nothing is pruned: every number of standard deviations costs more than -100")


def test_a_layer_without_outliers_is_reported(bright: Any) -> None:
    result = CLP(u=9.0)(Case(bright.model))
    assert result.change == "nothing" and result.selection.startswith("nothing is pruned: no filter has a")


def test_few_images_and_the_same_seed_give_the_same_repair(bright: Any) -> None:
    data = bright.data.subset(torch.arange(10))
    one, two = (CLP(seed=3)(Case(with_outlier(bright), data)) for _ in range(2))
    assert one.pruned == two.pruned and one.curve == two.curve


def test_presets_have_the_published_settings() -> None:
    paper: Any = CLP.preset("paper")
    assert (paper.u, paper.mode) == (3.0, "zero_gamma_beta")
    assert CLP.preset("robust") == CLP()
