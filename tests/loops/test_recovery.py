from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.errors import TrainingError
from bdprune.loops.recovery import RecoverSettings, recover
from bdprune.loops.unlearning import UnlearnSettings, unlearn
from bdprune.runtime.evaluate import clean_accuracy

SETTINGS = RecoverSettings(batch_size=60, epochs=10, padding=0)


def state(model: Any) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])


def test_masks_stay_in_the_unit_interval_and_bring_the_task_back(bright: Any) -> None:
    settings = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=60, padding=0, max_epochs=40)
    unlearned = unlearn(bright.model, bright.data, settings).model
    before = state(unlearned)
    recovered = recover(unlearned, bright.data, SETTINGS)
    assert torch.equal(state(unlearned), before)
    assert list(recovered.masks) == [group.name for group in bright.model.groups]
    masks = torch.cat(list(recovered.masks.values()))
    assert masks.shape == (24,)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert (masks < 1).any()
    assert recovered.losses[-1] < 0.8 * recovered.losses[0]
    assert len(recovered.losses) == 10 * 4


def test_a_sound_model_needs_no_mask(bright: Any) -> None:
    masks = recover(bright.model, bright.data, replace(SETTINGS, epochs=2)).masks
    assert torch.cat(list(masks.values())).min() > 0.8
    assert clean_accuracy(bright.model.module, bright.data.images, bright.data.labels) > 0.99


def test_loss_scale_scales_the_steps_not_the_loss_reported(bright: Any) -> None:
    full = recover(bright.model, bright.data, replace(SETTINGS, epochs=1))
    none = recover(bright.model, bright.data, replace(SETTINGS, epochs=1, loss_scale=1e-12))
    assert full.losses[0] == pytest.approx(none.losses[0], rel=1e-5)
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in none.masks.values())


def test_a_loss_that_is_not_finite_is_an_error(bright: Any) -> None:
    broken = bright.model.clone()
    with torch.no_grad():
        broken.network.get_parameter("8.bias").fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1"):
        recover(broken, bright.data, SETTINGS)
