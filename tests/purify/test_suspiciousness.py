from typing import Any

import pytest
import torch

from bdprune.purify.suspiciousness import SuspiciousnessPruning, outlying
from bdprune.training.finetune import FineTuneSettings


def test_prunes_what_is_above_mean_plus_mu_std() -> None:
    scores = {"a": torch.tensor([1.0] * 19 + [9.0]), "b": torch.ones(20)}
    assert outlying(scores, 3.0, 0.1) == {"a": [19]}
    # A lone outlier among n has z = (n - 1) / sqrt(n), here 4.248.
    assert outlying(scores, 4.2, 0.1) == {"a": [19]}
    assert outlying(scores, 4.3, 0.1) == {}


def test_share_of_a_layer_is_capped_at_the_highest_scores() -> None:
    scores = {"a": torch.tensor([0.0] * 16 + [5.0, 8.0, 7.0, 6.0])}
    assert outlying(scores, 0.5, 0.1) == {"a": [17, 18]}
    assert outlying(scores, 0.5, 0.01) == {"a": [17]}
    assert outlying(scores, 0.5, 1.0) == {"a": [16, 17, 18, 19]}


@pytest.mark.parametrize("per_class", [1, 4, 40])
def test_works_with_few_images(bright: Any, per_class: int) -> None:
    data = bright.data.sample(per_class, torch.Generator().manual_seed(0))
    method = SuspiciousnessPruning(mu=1.0, fine_tuning=FineTuneSettings(epochs=2, padding=0))
    result = method(bright.model, data)
    assert result.pruned
    for name, norm in (("0", "1"), ("3", "4")):
        index = result.pruned.get(name, [])
        assert len(index) <= 1
        assert not result.model.network.get_parameter(f"{norm}.weight")[index].any()
        assert not result.model.network.get_parameter(f"{norm}.bias")[index].any()
    assert result.accuracy_after > 0.9
    assert all(torch.isfinite(p).all() for p in result.model.network.parameters())


def test_without_fine_tuning_only_pruned_filters_change(bright: Any) -> None:
    result = SuspiciousnessPruning(mu=1.0, fine_tuning=None)(bright.model, bright.data.subset(torch.arange(30)))
    assert torch.equal(result.model.network.get_parameter("8.weight"), bright.model.network.get_parameter("8.weight"))
    changed = {
        name
        for name, parameter in bright.model.network.named_parameters()
        if not torch.equal(parameter, result.model.network.get_parameter(name))
    }
    assert changed
    assert changed <= {"1.weight", "1.bias", "4.weight", "4.bias"}
