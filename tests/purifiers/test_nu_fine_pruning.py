"""Fine-pruning on the unlearned network: what it ranks, and what it shares with fine-pruning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bdprune.analysis import Case, Unlearning, with_own_statistics
from bdprune.loops.finetune import FineTuneSettings
from bdprune.loops.unlearning import UnlearnSettings
from bdprune.methods.held_out import hold_out
from bdprune.purifiers.nu_fine_pruning import NUFinePruning

QUICK = NUFinePruning(
    fine_tuning=FineTuneSettings(lr=0.01, epochs=2, padding=0),
    unlearning=UnlearnSettings(lr=0.05, weight_decay=0, batch_size=30, padding=0, max_epochs=10),
    depth="end",
)


@pytest.mark.parametrize("depth", ["end", "half_way"])
def test_the_channels_that_unlearning_raises_most_are_pruned_first(bright: Any, depth: Any) -> None:
    method = replace(QUICK, depth=depth, prune_drop=0.3, max_drop=1.0, fine_tuning=None)
    case = Case(bright.model, bright.data)
    result = method(case)
    rest, _ = hold_out(bright.data, 0.3, 0)
    found = case.with_data(rest).get(Unlearning(method.unlearning, 0, method.precision))
    unlearned = with_own_statistics((found.half_way if depth == "half_way" else None) or found.model, rest.images)
    before, after = (model.network[:6](rest.images).mean((0, 2, 3)) for model in (bright.model, unlearned))
    rise = (after / after.mean() - before / before.mean()).detach()
    torch.testing.assert_close(result.masks["3"].float(), -rise, rtol=1e-3, atol=1e-4)
    count = len(result.pruned.get("3", []))
    assert result.pruned.get("3", []) == sorted(torch.argsort(result.masks["3"])[:count].tolist())
    assert count and set(result.pruned) == {"3"}


def test_it_prunes_the_given_network_and_never_changes_it(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    result = replace(QUICK, prune_drop=0.3, max_drop=1.0, fine_tuning=None)(Case(bright.model, bright.data))
    now = result.model.network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in bright.model.network.state_dict().items())
    assert {name for name in now if not torch.equal(now[name], before[name])} <= {"4.weight", "4.bias"}


def test_the_unlearned_network_of_the_case_is_reused(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(bright.model, bright.data)
    first = QUICK(case)
    monkeypatch.setattr("bdprune.analysis.unlearned.unlearn", lambda *args: pytest.fail("unlearned again"))
    assert replace(QUICK, max_drop=0.5)(case).masks["3"].equal(first.masks["3"])


def test_the_guard_is_that_of_fine_pruning(bright: Any) -> None:
    result = replace(QUICK, prune_drop=-1.0, fine_tuning=None)(Case(bright.model, bright.data))
    assert result.change == "nothing" and result.method == "bdprune.nu_fine_pruning"


def test_presets_have_the_published_settings() -> None:
    paper: Any = NUFinePruning.preset("paper")
    assert (paper.unlearning.lr, paper.unlearning.weight_decay, paper.unlearning.max_epochs) == (0.01, 5e-2, 20)
    assert (paper.unlearning.stop_accuracy, paper.depth, paper.least_accuracy) == (0.1, "end", 0.8)
    assert NUFinePruning.preset("robust") == NUFinePruning()
