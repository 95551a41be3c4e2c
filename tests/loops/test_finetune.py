from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.errors import TrainingError
from bdprune.loops.finetune import FineTuneSettings, KeptPruned, TuningObjective, fine_tune
from bdprune.model.edit.pruning import MODES, PruneMode, prune
from bdprune.runtime.evaluate import clean_accuracy

PRUNED = {"0": [1, 3], "3": [0]}
SETTINGS = FineTuneSettings(epochs=2, padding=0)


@pytest.mark.parametrize("mode", MODES)
def test_pruned_filters_stay_pruned(bright: Any, mode: PruneMode) -> None:
    tuned = fine_tune(prune(bright.model, PRUNED, mode), bright.data, SETTINGS, KeptPruned(PRUNED, mode))
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
    tuned = fine_tune(damaged, bright.data, replace(SETTINGS, epochs=6), KeptPruned(most, "zero_gamma_beta"))
    assert torch.equal(damaged.network.get_parameter("0.weight"), before)
    images, labels = bright.data.images, bright.data.labels
    assert clean_accuracy(tuned.module, images, labels) > clean_accuracy(damaged.module, images, labels)
    assert not tuned.network.training


def test_few_images_leave_running_statistics_unchanged(bright: Any) -> None:
    few = bright.data.subset(torch.arange(30))
    kept = fine_tune(bright.model, few, SETTINGS)
    moved = fine_tune(bright.model, few, replace(SETTINGS, small_data=0))
    reference = bright.model.network.get_buffer("1.running_mean")
    assert torch.equal(kept.network.get_buffer("1.running_mean"), reference)
    assert not torch.equal(moved.network.get_buffer("1.running_mean"), reference)


def test_learning_rates_follow_the_schedule() -> None:
    settings = FineTuneSettings(lr=0.1, epochs=4)
    assert [settings.rate(epoch) for epoch in range(4)] == [0.1] * 4
    falling = [replace(settings, schedule="cosine").rate(epoch) for epoch in range(4)]
    assert falling == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-4)
    steps = replace(settings, schedule="steps", milestones=(1, 3))
    assert [steps.rate(epoch) for epoch in range(4)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_an_objective_changes_the_loss_and_the_parameters(bright: Any) -> None:
    class Nothing(TuningObjective):
        def start(self, module: nn.Module) -> None:
            self.module, self.steps = module, 0

        def backward(self, run: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = 0 * run(images).sum()
            loss.backward()
            return loss.detach()

        def after_step(self) -> None:
            self.steps += 1

    nothing = Nothing()
    settings = replace(SETTINGS, weight_decay=0, small_data=10_000)
    tuned = fine_tune(bright.model, bright.data, settings, objective=nothing)
    assert nothing.steps == 2 * -(-len(bright.data) // 64)
    state = tuned.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bright.model.network.state_dict().items())


def test_a_clipped_gradient_moves_the_weights_less(bright: Any) -> None:
    plain = fine_tune(bright.model, bright.data, SETTINGS)
    clipped = fine_tune(bright.model, bright.data, replace(SETTINGS, clip=1e-4))

    def moved(model: Any) -> float:
        pairs = zip(model.network.parameters(), bright.model.network.parameters(), strict=True)
        return sum((a - b).norm().item() for a, b in pairs)

    assert moved(clipped) < moved(plain)


def test_a_loss_that_is_not_finite_is_an_error(bright: Any) -> None:
    with pytest.raises(TrainingError, match="The loss of the fine-tuning is nan"):
        fine_tune(bright.model, bright.data, replace(SETTINGS, lr=1e30))
