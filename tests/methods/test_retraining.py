from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import DataError
from bdprune.methods import Phases
from bdprune.methods.held_out import hold_out, views_drop
from bdprune.methods.retraining import Retraining, between
from bdprune.model import Model


@dataclass(frozen=True)
class Spoiler(Retraining):
    """Adds a constant to the logit of one label."""

    amount: float = 100.0

    id = "test.spoiler"
    title = "spoils the head"

    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        model = case.model.clone()
        with phase("spoil"), torch.no_grad():
            model.network.get_parameter("8.bias")[0] += self.amount
        return model


def _bias(model: Model) -> float:
    return float(model.network.get_parameter("8.bias").detach()[0])


def test_a_harmless_retraining_is_kept_whole(bright: Any) -> None:
    result = Spoiler(amount=1e-4)(Case(bright.model, bright.data))
    assert _bias(result.model) == pytest.approx(_bias(bright.model) + 1e-4)
    assert result.change == "retrained" and set(result.seconds) == {"spoil", "choose"}
    assert result.selection.endswith("at most 4 points on views of 72 held-out images")


def test_the_original_is_kept_if_every_part_costs_too_much(bright: Any) -> None:
    result = Spoiler(amount=1e6)(Case(bright.model, bright.data))
    assert result.change == "nothing" and result.selection.startswith("nothing is changed: no part of the way")
    state = bright.model.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.model.network.state_dict().items())
    assert result.model.network is not bright.model.network
    assert result.accuracy_after == result.accuracy_before


def test_the_farthest_part_within_the_limit_is_taken(bright: Any) -> None:
    method = Spoiler(amount=5.0, max_drop=0.2)
    result = method(Case(bright.model, bright.data))
    _, held = hold_out(bright.data, method.held_out, method.seed)

    def drop(way: float) -> float:
        spoiled = method.retrain(Case(bright.model), bright.data, Phases())
        part = between(bright.model, spoiled, way)
        return views_drop(bright.model, part, held, method.seed)

    chosen = max(way for way in method.ways if drop(way) <= 0.2)
    assert 0 < chosen < 1 and drop(1.0) > 0.2
    assert _bias(result.model) == pytest.approx(_bias(bright.model) + 5 * chosen, rel=1e-4)
    assert f"{chosen:.0%} of the way" in result.selection


def test_the_settings_of_papers_retrain_whatever_it_costs(bright: Any) -> None:
    result = Spoiler(amount=1e6, **Retraining.PUBLISHED)(Case(bright.model, bright.data))
    assert result.change == "retrained" and result.accuracy_after < 0.5


def test_a_part_of_the_way_mixes_weights_and_statistics_and_leaves_its_inputs(bright: Any) -> None:
    other = bright.model.clone()
    with torch.no_grad():
        for value in other.network.state_dict().values():
            value.add_(1)
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    mixed, whole = (between(bright.model, other, way).network.state_dict() for way in (0.25, 1.0))
    start = bright.model.network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in other.network.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in whole.items())
    torch.testing.assert_close(mixed["0.weight"], start["0.weight"] + 0.25)
    torch.testing.assert_close(mixed["1.running_var"], start["1.running_var"] + 0.25)
    assert mixed["1.num_batches_tracked"] == before["1.num_batches_tracked"]


def test_one_image_of_each_class_is_an_error(bright: Any) -> None:
    one = bright.data.sample(1, torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="leave none"):
        Spoiler()(Case(bright.model, one))


def test_a_tied_weight_is_mixed_once() -> None:
    def tied(value: float) -> Model:
        layer = nn.Linear(2, 2, bias=False)
        nn.init.constant_(layer.weight, value)
        return Model(nn.Sequential(layer, layer), "tied", 2, (1, 1, 2))

    mixed = between(tied(0.0), tied(1.0), 0.5).network.state_dict()
    assert {float(value.mean()) for value in mixed.values()} == {0.5} and len(mixed) == 2
