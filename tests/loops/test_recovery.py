"""Recovery of one model, bit for bit like a plain loop, and of several models in the same steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.errors import TrainingError
from bdprune.loops import recovery
from bdprune.loops.recovery import Recovered, RecoverSettings, recover, recover_stack
from bdprune.loops.unlearning import UnlearnSettings, unlearn
from bdprune.model.edit.stacked import StackedNetwork
from bdprune.runtime.evaluate import clean_accuracy

from ..helpers import broken, siblings
from . import plain

pytestmark = pytest.mark.usefixtures("exact")

SETTINGS = RecoverSettings(batch_size=60, epochs=10, padding=0)
MANY: dict[str, dict[str, Any]] = {
    "batch statistics": {"small_data": 0},
    "running statistics": {"small_data": 1000},
    "a scaled loss": {"loss_scale": 0.2},
    "two shapes of batch": {"batch_size": 37},
}


def settings_of(name: str) -> RecoverSettings:
    return RecoverSettings(**{"batch_size": 50, "epochs": 3, "padding": 1, **MANY[name]})


def state(model: Any) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])


def assert_same(mine: Recovered | TrainingError, alone: Recovered) -> None:
    assert isinstance(mine, Recovered)
    assert mine.losses == pytest.approx(alone.losses, rel=1e-4)
    for name, mask in alone.masks.items():
        torch.testing.assert_close(mine.masks[name], mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MANY)
def test_one_model_recovers_bit_for_bit_like_a_plain_loop(bright: Any, name: str) -> None:
    model = siblings(bright.model)[1]
    found = recover(model, bright.data, settings_of(name), seed=5, precision="float32")
    masks, losses = plain.recover(model, bright.data, settings_of(name), seed=5)
    assert list(found.losses) == losses
    assert all(torch.equal(mask, masks[key]) for key, mask in found.masks.items())
    assert any((mask < 1).any() for mask in masks.values())


@pytest.mark.parametrize("name", MANY)
def test_several_models_recover_as_each_alone(bright: Any, name: str, device: str) -> None:
    models = siblings(bright.model, device=device)
    for model, mine in zip(models, recover_stack(models, bright.data, settings_of(name), seed=5), strict=True):
        assert_same(mine, recover(model, bright.data, settings_of(name), seed=5))


def test_a_model_given_several_times_is_stored_once(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StackedNetwork] = []

    def noted(models: list[Any], **options: Any) -> StackedNetwork:
        made.append(StackedNetwork(models, **options))
        return made[-1]

    monkeypatch.setattr(recovery, "StackedNetwork", noted)
    settings = RecoverSettings(batch_size=50, epochs=2, padding=1)
    alone = recover(bright.model, bright.data, settings, seed=5)
    for mine in recover_stack([bright.model] * 3, bright.data, settings, seed=5):
        assert_same(mine, alone)
    (stack,) = made
    assert all(len(value) == 3 and value.stride(0) == 0 for value in stack.parameters())


def test_masks_stay_in_the_unit_interval_and_restore_the_task(bright: Any) -> None:
    settings = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=60, padding=0, max_epochs=40)
    unlearned = unlearn(bright.model, bright.data, settings).model
    before = state(unlearned)
    alone, stacked = recover(unlearned, bright.data, SETTINGS), recover_stack([unlearned] * 2, bright.data, SETTINGS)
    for recovered in (alone, *stacked):
        assert isinstance(recovered, Recovered)
        assert torch.equal(state(unlearned), before)
        assert list(recovered.masks) == [group.name for group in bright.model.groups]
        masks = torch.cat(list(recovered.masks.values()))
        assert masks.shape == (24,)
        assert masks.min() >= 0
        assert masks.max() <= 1
        assert (masks < 1).any()
        assert recovered.losses[-1] < 0.8 * recovered.losses[0]
        assert len(recovered.losses) == 10 * 4


def test_a_good_model_needs_no_mask(bright: Any) -> None:
    masks = recover(bright.model, bright.data, replace(SETTINGS, epochs=2)).masks
    assert torch.cat(list(masks.values())).min() > 0.8
    assert clean_accuracy(bright.model.module, bright.data.images, bright.data.labels) > 0.99


def test_the_loss_scale_scales_the_steps_and_not_the_reported_loss(bright: Any) -> None:
    full = recover(bright.model, bright.data, replace(SETTINGS, epochs=1))
    none = recover(bright.model, bright.data, replace(SETTINGS, epochs=1, loss_scale=1e-12))
    assert full.losses[0] == pytest.approx(none.losses[0], rel=1e-5)
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in none.masks.values())


def test_a_non_finite_loss_is_an_error_of_that_model_only(bright: Any) -> None:
    with pytest.raises(TrainingError, match="step 1"):
        recover(broken(bright.model), bright.data, SETTINGS)
    models = [bright.model, broken(bright.model), siblings(bright.model)[1]]
    first, wrong, last = recover_stack(models, bright.data, replace(SETTINGS, epochs=1))
    assert isinstance(wrong, TrainingError) and "in step 1" in str(wrong)
    assert isinstance(first, Recovered) and isinstance(last, Recovered)


def test_on_a_cpu_recovery_ends_when_no_loss_is_finite(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    mean_losses = recovery.mean_losses
    monkeypatch.setattr(recovery, "mean_losses", lambda *args: steps.append(1) or mean_losses(*args))
    assert isinstance(recover_stack([broken(bright.model)] * 2, bright.data, SETTINGS)[0], TrainingError)
    assert len(steps) == 1
