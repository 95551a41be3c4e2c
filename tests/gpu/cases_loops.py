"""The loops on a GPU, or on a device that rejects the same operations as a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bdprune.loops import (
    FineTuneSettings,
    KeptPruned,
    Recovered,
    RecoverSettings,
    SweepSettings,
    Unlearned,
    UnlearnSettings,
    fine_tune,
    recover_stack,
    sweep_stack,
    unlearn_stack,
)
from bdprune.runtime import PRECISIONS, stack_or_loop

from ..helpers import siblings

pytestmark = pytest.mark.usefixtures("gpu", "bfloat16")  # before anything is trained


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_loops_run_on_one_model_and_on_several(gpu: torch.device, bright: Any, count: int, precision: Any) -> None:
    models = siblings(bright.model, count, device=str(gpu))
    unlearning = UnlearnSettings(batch_size=50, max_epochs=2, padding=1, milestones=(1,))
    recovery = RecoverSettings(batch_size=50, epochs=1, padding=1)
    unlearned = unlearn_stack(models, bright.data, unlearning, 0, precision)
    assert all(isinstance(one, Unlearned) and one.trajectory for one in unlearned)
    recovered = recover_stack([one.model for one in unlearned], bright.data, recovery, 0, precision)  # type: ignore[union-attr]
    assert all(isinstance(one, Recovered) for one in recovered)
    masks = [one.masks for one in recovered]  # type: ignore[union-attr]
    for variant in (None, "stack", "loop"):
        settings = SweepSettings([0.5, 0.9, 0.99], 1.0, stop_early=False, variant=variant)
        assert len(sweep_stack(models, masks, [bright.data], settings, precision)) == count
    tuning = FineTuneSettings(epochs=1)
    assert fine_tune(models[0], bright.data, tuning, KeptPruned({"0": [1]}), 0, precision).device.type == gpu.type
    assert stack_or_loop(models, bright.data.images[:20]).winner in ("stack", "loop")
