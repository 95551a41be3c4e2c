"""Settings outside their range are errors and not another behaviour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bdprune import registry
from bdprune.errors import OptionError
from bdprune.loops import FineTuneSettings, RecoverSettings, UnlearnSettings
from bdprune.loops.implicit import ImplicitSettings
from bdprune.purifiers.anp import ANP
from bdprune.purifiers.fine_tuning import FineTuning
from bdprune.purifiers.ft_sam import FTSAM
from bdprune.purifiers.rnp import RNP
from bdprune.purifiers.trigger_pruning import TriggerPruning


@pytest.mark.parametrize(
    "make",
    [
        lambda: FineTuneSettings(schedule="cosin"),  # type: ignore[arg-type]
        lambda: FineTuneSettings(epochs=0),
        lambda: FineTuneSettings(lr=-1.0),
        lambda: FineTuneSettings(padding=-1),
        lambda: FineTuneSettings(nesterov=True, momentum=0.0),
        lambda: RecoverSettings(batch_size=0),
        lambda: RecoverSettings(lr=float("nan")),
        lambda: UnlearnSettings(max_epochs=0),
        lambda: UnlearnSettings(stop_on="step"),  # type: ignore[arg-type]
        lambda: ImplicitSettings(rounds=0),
        lambda: RNP(depth="halfway"),  # type: ignore[arg-type]
        lambda: RNP(step=0.0),
        lambda: ANP(step=-0.1),
        lambda: FTSAM(rho=-1.0),
        lambda: FTSAM(smoothing=2.0),
        lambda: FineTuning(ways=(2.0,)),
        lambda: FineTuning(ways=()),
        lambda: TriggerPruning(layers="lasst"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_out_of_range_is_one_clear_error(make: Callable[[], Any]) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert caught.value.hint


def test_an_unknown_choice_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match="The setting depth of RNP is 'halfway'") as caught:
        registry.purifier("rnp", depth="halfway")
    assert caught.value.hint == "Give one of 'end', 'half_way'."


def test_a_group_of_settings_may_be_a_mapping_as_results_record_it() -> None:
    made: Any = registry.purifier("rnp", fine_tuning={"epochs": 2, "milestones": [1]})
    assert made.fine_tuning == FineTuneSettings(lr=0.005, epochs=2, milestones=(1,))
    paper: Any = registry.purifier("rnp", "paper", unlearning={"lr": 0.02})
    assert paper.unlearning == UnlearnSettings(
        lr=0.02, momentum=0.9, weight_decay=5e-2, stop_accuracy=0.1, stop_on="epoch", small_data=0, retries=0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fine_tuning": {"epoch": 2}}, "fine_tuning of 'rnp' has no epoch"),
        ({"fine_tuning": {"epochs": "two"}}, "fine_tuning of 'rnp' is wrong"),
        ({"max_drop": {"a": 1}}, "max_drop of the purifier 'rnp' is no group of settings"),
    ],
)
def test_a_mapping_that_fits_no_group_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        registry.purifier("rnp", **settings)
