"""Whether models run as a stack or one after another: by a stored trial, and checked for the given models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.model.handle import Model
from bdprune.ops import kept_choices, tuner
from bdprune.runtime import stacking
from bdprune.runtime.graph import WARM_UPS
from bdprune.runtime.stacking import stack_or_loop

from ..helpers import broken, siblings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stores trials apart from other tests and from the user's cache."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("BDPRUNE_TUNE", raising=False)
    return tmp_path / "tuned.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Sets the seconds of both variants."""

    def fixed(*seconds: float) -> None:
        def least_seconds(
            device: torch.device, rounds: int, *runs: Callable[[], object], timer: Any
        ) -> Sequence[float]:
            return [(run(), one)[1] for run, one in zip(runs, seconds, strict=True)]

        monkeypatch.setattr(tuner, "least_seconds", least_seconds)

    return fixed


@pytest.mark.parametrize(("seconds", "winner"), [((0.5, 1.0), "stack"), ((1.0, 1.0), "loop"), ((2.0, 1.0), "loop")])
def test_the_faster_variant_is_used_and_stored(
    bright: Any, timed: Callable[..., None], seconds: tuple[float, float], winner: str
) -> None:
    timed(*seconds)
    models, images = siblings(bright.model), bright.data.images[:20]
    choice = stack_or_loop(models, images)
    assert (choice.winner, tuple(choice.seconds.values())) == (winner, seconds)
    assert choice in kept_choices()
    timed(1.0, 0.0)
    assert stack_or_loop(models, images) == choice, "stored choices need no trial"
    assert stack_or_loop(models, images[:10]).seconds["loop"] == 0.0, "another shape needs a trial"
    assert len(kept_choices()) == (3 if winner == "stack" else 2)


def test_on_a_cpu_two_models_on_few_images_are_tried_first(
    bright: Any, cache: Path, timed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, images = siblings(bright.model, 5), bright.data.images[:20]
    timed(1.0, 1.0)
    assert "2 x bright, " in stack_or_loop(models, images).shape and len(kept_choices()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(stacking, "why_not", None)
        assert "2 x bright, " in stack_or_loop(models, images).shape, "a stored loop needs no further trial"
    monkeypatch.setenv("BDPRUNE_CACHE", str(cache.parent / "other"))
    timed(0.5, 1.0)
    assert "4 x bright, " in stack_or_loop(models, images).shape, "a trial of four models decides for five"


def test_models_that_cannot_be_stacked_do_not_decide_for_others_of_their_shape(
    bright: Any, cache: Path, timed: Callable[..., None]
) -> None:
    images = bright.data.images[:20]
    timed(0.5, 1.0)
    assert "does more" in stack_or_loop([bright.model, broken(bright.model)], images).reason
    assert not cache.exists()
    assert stack_or_loop(siblings(bright.model, 2), images).winner == "stack"
    assert "does more" in stack_or_loop([bright.model, broken(bright.model)], images).reason


def test_real_trial_measures_both_variants(bright: Any) -> None:
    choice = stack_or_loop(siblings(bright.model), bright.data.images[:20])
    assert choice.seconds["stack"] and choice.seconds["loop"]
    assert choice.winner == ("stack" if choice.seconds["stack"] <= 0.9 * choice.seconds["loop"] else "loop")


def test_one_model_and_different_models_need_no_trial(bright: Any, cache: Path) -> None:
    assert "one model" in stack_or_loop([bright.model], bright.data.images[:4]).reason
    other = Model(torch.nn.Conv2d(3, 3, 1), "conv", 3, (3, 8, 8))
    assert "is not a bright" in stack_or_loop([bright.model, other], bright.data.images[:4]).reason
    assert not cache.exists()


@pytest.mark.parametrize("winner", ["stack", "loop"])
def test_the_environment_decides_unless_models_cannot_be_stacked(
    bright: Any, winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BDPRUNE_TUNE", f"stack={winner}")
    images = bright.data.images[:20]
    assert stack_or_loop(siblings(bright.model), images).winner == winner
    assert stack_or_loop([bright.model, broken(bright.model)], images).winner == "loop"


def test_networks_of_equal_size_but_other_shapes_are_tried_separately(bright: Any) -> None:
    network = torch.nn.Sequential(*bright.model.network[:3], torch.nn.Conv2d(12, 12, 3), *bright.model.network[4:])
    assert stacking.describe(bright.model) == stacking.describe(siblings(bright.model)[1])
    assert stacking.describe(bright.model.with_network(network)) != stacking.describe(bright.model)


def test_the_warm_up_round_of_a_trial_records_the_graph(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[object] = []
    monkeypatch.setattr(stacking, "_pass", lambda module, images: passes.append(module) or ())
    monkeypatch.setattr(stacking, "recorder_for", lambda device: "a recorder")
    monkeypatch.setattr(stacking, "Captured", lambda step, recorder: step)
    stacked = stacking.StackedNetwork(siblings(bright.model, 2))
    for variant, modules in zip(stacking._passes(stacked, bright.data.images[:4]).values(), (1, 2), strict=True):
        passes.clear()
        variant()
        assert len(passes) == modules * (WARM_UPS + 1)
        variant()
        assert len(passes) == modules * (WARM_UPS + 2)
