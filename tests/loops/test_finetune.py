from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.model.edit.pruning import MODES, PruneMode, prune
from bdprune.runtime.evaluate import clean_accuracy

PRUNED = {"0": [1, 3], "3": [0]}
SETTINGS = FineTuneSettings(epochs=2, padding=0)


@pytest.mark.parametrize("mode", MODES)
def test_pruned_filters_stay_pruned(bright: Any, mode: PruneMode) -> None:
    tuned = fine_tune(prune(bright.model, PRUNED, mode), bright.data, SETTINGS, PRUNED, mode)
    gamma, beta = (tuned.network.get_parameter(name) for name in ("1.weight", "1.bias"))
    assert gamma[PRUNED["0"]].tolist() == [0, 0]
    assert (gamma != 0).sum() == 10
    assert (beta[PRUNED["0"]] == 0).all() == (mode != "zero_gamma")
    if mode == "weights":
        assert not tuned.network.get_parameter("3.weight")[0].any()


def test_fine_tuning_restores_accuracy_and_leaves_its_input_unchanged(bright: Any) -> None:
    most = {"3": list(range(10))}
    damaged = prune(bright.model, most, "zero_gamma_beta")
    before = damaged.network.get_parameter("0.weight").clone()
    tuned = fine_tune(damaged, bright.data, replace(SETTINGS, epochs=6), most, "zero_gamma_beta")
    assert torch.equal(damaged.network.get_parameter("0.weight"), before)
    images, labels = bright.data.images, bright.data.labels
    assert clean_accuracy(tuned.module, images, labels) > clean_accuracy(damaged.module, images, labels)
    assert not tuned.network.training


def test_few_images_leave_running_statistics_unchanged(bright: Any) -> None:
    few = bright.data.subset(torch.arange(30))
    kept = fine_tune(bright.model, few, SETTINGS, {}, "zero_gamma")
    moved = fine_tune(bright.model, few, replace(SETTINGS, small_data=0), {}, "zero_gamma")
    reference = bright.model.network.get_buffer("1.running_mean")
    assert torch.equal(kept.network.get_buffer("1.running_mean"), reference)
    assert not torch.equal(moved.network.get_buffer("1.running_mean"), reference)
