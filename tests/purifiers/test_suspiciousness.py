from collections.abc import Callable
from typing import Any

import pytest
import torch

from bdprune.analysis import Case
from bdprune.loops.finetune import FineTuneSettings
from bdprune.methods import shifted_views
from bdprune.model.edit.pruning import prune
from bdprune.purifiers.suspiciousness import SuspiciousnessPruning, outlying
from bdprune.runtime.evaluate import clean_accuracy


def test_filters_above_mean_plus_mu_std_are_pruned() -> None:
    scores = {"a": torch.tensor([1.0] * 19 + [9.0]), "b": torch.ones(20)}
    assert outlying(scores, 3.0, 0.1) == {"a": [19]}
    # A lone outlier among n has z = (n - 1) / sqrt(n), here 4.248.
    assert outlying(scores, 4.2, 0.1) == {"a": [19]}
    assert outlying(scores, 4.3, 0.1) == {}


def test_a_capped_share_of_a_layer_has_the_highest_scores() -> None:
    scores = {"a": torch.tensor([0.0] * 16 + [5.0, 8.0, 7.0, 6.0])}
    assert outlying(scores, 0.5, 0.1) == {"a": [17, 18]}
    assert outlying(scores, 0.5, 0.01) == {"a": [17]}
    assert outlying(scores, 0.5, 1.0) == {"a": [16, 17, 18, 19]}


@pytest.mark.parametrize("per_class", [1, 4, 40])
def test_few_images_suffice(bright: Any, per_class: int) -> None:
    data = bright.data.sample(per_class, torch.Generator().manual_seed(0))
    method = SuspiciousnessPruning(mu=1.0, fine_tuning=FineTuneSettings(epochs=2, padding=0))
    result = method(Case(bright.model, data))
    assert result.pruned and result.change == "pruned and retrained"
    for name, norm in (("0", "1"), ("3", "4")):
        index = result.pruned.get(name, [])
        assert len(index) <= 1
        assert not result.model.network.get_parameter(f"{norm}.weight")[index].any()
        assert not result.model.network.get_parameter(f"{norm}.bias")[index].any()
    assert result.accuracy_after > 0.9
    assert all(torch.isfinite(p).all() for p in result.model.network.parameters())


def test_without_fine_tuning_only_pruned_filters_change(bright: Any) -> None:
    result = SuspiciousnessPruning(mu=1.0, fine_tuning=None)(Case(bright.model, bright.data.subset(torch.arange(30))))
    assert torch.equal(result.model.network.get_parameter("8.weight"), bright.model.network.get_parameter("8.weight"))
    changed = {
        name
        for name, parameter in bright.model.network.named_parameters()
        if not torch.equal(parameter, result.model.network.get_parameter(name))
    }
    assert changed and result.change == "pruned"
    assert changed <= {"1.weight", "1.bias", "4.weight", "4.bias"}


def fake_predictions(labels: torch.Tensor, lost: Callable[[int], int]) -> type:
    """Predictions whose first images are wrong in every view: ``lost`` gives their number for the pruned filters."""

    class Fake:
        def __init__(
            self, model: Any, sets: list[torch.Tensor], prunings: list[dict[str, list[int]]], mode: str
        ) -> None:
            self.views, self.prunings = len(sets[0]) // len(labels), prunings

        def predict(self, step: int, index: int) -> torch.Tensor:
            predicted = labels.clone()
            predicted[: lost(sum(map(len, self.prunings[step].values())))] = -1
            return predicted.repeat(self.views)

    return Fake


def test_mu_is_lowered_until_the_clean_accuracy_falls(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test sets the accuracy for each number of pruned filters; the rule must stop where it falls."""
    data = bright.data.subset(torch.arange(100))
    scores = {"0": torch.cat([torch.zeros(60), torch.linspace(1, 9, 20)])}
    allowed = 8

    fake = fake_predictions(data.labels, lambda pruned: 0 if pruned < allowed else 40)
    monkeypatch.setattr("bdprune.purifiers.suspiciousness.PrunedPredictions", fake)
    mu, curve = SuspiciousnessPruning(max_share=1.0)._choose(bright.model, data, scores)
    assert [point.threshold for point in curve] == sorted(point.threshold for point in curve)
    assert curve[0].filters_pruned >= allowed > curve[1].filters_pruned
    assert curve[0].clean_accuracy == pytest.approx(0.6)
    assert mu == curve[1].threshold


@pytest.mark.parametrize(("lost", "fits"), [(2, True), (3, True), (5, False)])
def test_the_drop_may_exceed_the_limit_by_one_standard_error(
    bright: Any, monkeypatch: pytest.MonkeyPatch, lost: int, fits: bool
) -> None:
    """Of 100 images, 3 lost are 3 points with an error of 1.7, 5 lost are 5 points with one of 2.2."""
    data = bright.data.subset(torch.arange(100))
    fake = fake_predictions(data.labels, lambda pruned: lost if pruned else 0)
    monkeypatch.setattr("bdprune.purifiers.suspiciousness.PrunedPredictions", fake)
    scores = {"0": torch.linspace(0, 1, 40) ** 8}
    mu, _ = SuspiciousnessPruning()._choose(bright.model, data, scores)
    assert (mu == mu) == fits


def test_accuracies_equal_plain_pruning(bright: Any) -> None:
    method = SuspiciousnessPruning(max_share=0.5, max_drop=1.0)
    data = bright.data.subset(torch.arange(60))
    scores = method.score(bright.model, data)
    mu, curve = method._choose(bright.model, data, scores)
    assert mu == 1.0
    assert len({point.filters_pruned for point in curve}) > 2
    views, labels = shifted_views(data, 8, method.seed), data.labels.repeat(8)
    for point in curve:
        module = prune(bright.model, outlying(scores, point.threshold, 0.5), method.mode).module
        assert point.clean_accuracy == pytest.approx(clean_accuracy(module, views, labels), abs=1e-6)


def test_nothing_is_pruned_if_every_mu_costs_too_much(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.purifiers.suspiciousness._LADDER", (-1.0,))
    data = bright.data.subset(torch.arange(60))
    result = SuspiciousnessPruning(max_share=1.0)(Case(bright.model, data))
    assert result.pruned == {}
    assert result.threshold != result.threshold
    assert "nothing is pruned" in result.selection and result.change == "nothing"
    for name, value in bright.model.network.state_dict().items():
        assert torch.equal(value, result.model.network.state_dict()[name])


def test_few_images_use_small_steps(bright: Any) -> None:
    method = SuspiciousnessPruning(mu=1.0)
    rates = [tuning.lr for tuning in map(method._small_steps, (10, 100, 1000)) if tuning]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3])
    assert SuspiciousnessPruning(fine_tuning=None)._small_steps(10) is None


def test_views_start_with_the_images_and_are_reproducible(bright: Any) -> None:
    data = bright.data.subset(torch.arange(8))
    views = shifted_views(data, 3, seed=1)
    assert views.shape == (24, *data.images.shape[1:])
    assert torch.equal(views[:8], data.images)
    assert not torch.equal(views[8:16], data.images)
    assert torch.equal(views, shifted_views(data, 3, seed=1))
    assert not torch.equal(views, shifted_views(data, 3, seed=2))


def test_a_fine_tuning_that_harms_its_own_images_is_left_out(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(model: Any, *args: object) -> Any:
        ruined = model.clone()
        with torch.no_grad():
            ruined.network.get_parameter("8.bias")[0] += 100
        return ruined

    monkeypatch.setattr("bdprune.purifiers.suspiciousness.fine_tune", ruin)
    result = SuspiciousnessPruning(mu=1.0)(Case(bright.model, bright.data))
    plain = SuspiciousnessPruning(mu=1.0, fine_tuning=None)(Case(bright.model, bright.data))
    assert result.change == "pruned" and "the fine-tuning is left out, because it costs 6" in result.selection
    states = result.model.network.state_dict(), plain.model.network.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
