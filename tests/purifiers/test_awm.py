"""Adversarial weight masking: the choice of the strength, its guard, and the published settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.analysis import Case
from bdprune.errors import DataError
from bdprune.loops.soft_mask import SoftMaskSettings, soft_masks
from bdprune.methods.held_out import hold_out, views_drop
from bdprune.purifiers.awm import AWM

QUICK = AWM(SoftMaskSettings(epochs=4, passes=1, batch_size=60, padding=0, lr=0.05))


def state(model: Any) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])


@pytest.mark.parametrize("max_drop", [0.0, 0.02, 1.0])
def test_the_largest_strength_within_the_limit_is_taken(bright: Any, max_drop: float) -> None:
    method = replace(QUICK, max_drop=max_drop)
    result = method(Case(bright.model, bright.data))
    rest, held = hold_out(bright.data, 0.3, 0)
    masked = soft_masks(bright.model, rest, method.masking)
    fits = [
        step
        for step in range(1, 11)
        if views_drop(bright.model, masked.model(step / 10), held, method.seed) <= max_drop + 1e-6
    ]
    assert torch.equal(state(result.model), state(masked.model(max(fits) / 10) if fits else bright.model))
    assert result.change == ("retrained" if fits else "nothing") and result.pruned == {}
    assert f"masks at {max(fits)}0% of their strength" in result.selection or not fits


def test_nothing_changes_if_every_strength_costs_too_much(bright: Any) -> None:
    result = replace(QUICK, max_drop=-1.0)(Case(bright.model, bright.data))
    assert result.change == "nothing" and torch.equal(state(result.model), state(bright.model))
    assert result.selection.startswith("nothing is changed: the masks at every strength cost more than -100 points")


def test_weights_shrink_and_keep_their_sign(bright: Any) -> None:
    result = replace(QUICK, max_drop=1.0)(Case(bright.model, bright.data))
    for name in ("0.weight", "3.weight"):
        before, after = (model.network.get_parameter(name).detach() for model in (bright.model, result.model))
        assert (after.abs() <= before.abs()).all() and (after * before >= 0).all()
        assert not torch.equal(before, after)


def test_one_image_of_each_class_needs_the_setting_without_held_out_images(bright: Any) -> None:
    case = Case(bright.model, bright.data.subset(torch.arange(3)))
    with pytest.raises(DataError, match="leave none to hold out"):
        QUICK(case)
    result = replace(QUICK, held_out=0.0, max_drop=1.0)(case)
    assert result.change == "retrained" and "on which the masks were learned" in result.selection


def test_the_same_seed_gives_the_same_repair(bright: Any) -> None:
    one, two = (QUICK(Case(bright.model, bright.data)) for _ in range(2))
    assert torch.equal(state(one.model), state(two.model)) and one.selection == two.selection


def test_presets_have_the_published_settings() -> None:
    paper: Any = AWM.preset("paper")
    one_shot: Any = AWM.preset("one_shot")
    masking = paper.masking
    assert (masking.epochs, masking.passes, masking.batch_size, masking.lr) == (20, 5, 128, 0.01)
    assert (masking.alpha, masking.sparsity, masking.radius, masking.attack_lr) == (0.9, 1e-8, 1000, 10)
    assert (one_shot.masking.batch_size, one_shot.masking.alpha, one_shot.masking.radius) == (32, 0.99, 100)
    assert (one_shot.masking.copies, one_shot.held_out) == (10, 0)
    assert AWM.preset("robust") == AWM()
