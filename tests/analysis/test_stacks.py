"""A stack of models compared with separate runs: the same seeds, the same trajectories, masks and sweeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bdprune
from bdprune.analysis.lipschitz import channel_lipschitz
from bdprune.errors import OptionError, TrainingError
from bdprune.loops.recovery import RecoverSettings, recover
from bdprune.loops.sweeping import SweepSettings, sweep
from bdprune.loops.unlearning import Unlearned, UnlearnSettings, unlearn
from bdprune.ops import Choice

from ..helpers import broken, siblings


@pytest.fixture
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stacks run by the variant that is the fixture's parameter."""
    choice = Choice("stack", request.param, "cpu", "forced")
    monkeypatch.setattr("bdprune.analysis.stacks.stack_or_loop", lambda models, images: choice)
    return choice.winner


@pytest.mark.parametrize("variant", ["stack", "loop"], indirect=True)
def test_every_method_of_a_stack_equals_separate_runs(bright: Any, variant: str) -> None:
    models = siblings(bright.model)
    stack = bdprune.stack(models)
    assert len(stack) == 3 and stack.variant(bright.data).winner == variant
    for scores, model in zip(stack.scores(), models, strict=True):
        alone = channel_lipschitz(model)
        assert all(torch.equal(scores[name], alone[name]) for name in alone) and scores.keys() == alone.keys()
    unlearning = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1)
    recovery = RecoverSettings(batch_size=50, epochs=1, padding=1)
    unlearned = stack.unlearn(bright.data, unlearning, seed=1)
    recovered = bdprune.stack([mine.model for mine in unlearned]).recover(bright.data, recovery, seed=1)  # type: ignore[union-attr]
    for model, mine, masks in zip(models, unlearned, recovered, strict=True):
        theirs = unlearn(model, bright.data, unlearning, seed=1)
        assert isinstance(mine, Unlearned) and (mine.lr, mine.stopped) == (theirs.lr, theirs.stopped)
        assert [step.votes for step in mine.trajectory] == [step.votes for step in theirs.trajectory]
        alone = recover(mine.model, bright.data, recovery, seed=1).masks
        for name, mask in masks.masks.items():  # type: ignore[union-attr]
            torch.testing.assert_close(mask, alone[name], rtol=1e-4, atol=1e-5)
    masks = [mine.masks for mine in recovered]  # type: ignore[union-attr]
    args = ([bright.data], SweepSettings([0.2, 0.6, 0.95], 0.1))
    assert stack.sweep(masks, *args) == [sweep(one, mask, *args) for one, mask in zip(models, masks, strict=True)]


@pytest.mark.parametrize("variant", ["loop"], indirect=True)
def test_a_loop_gives_the_bits_and_errors_of_separate_runs(bright: Any, variant: str) -> None:
    settings = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=2, padding=1, retries=0)
    first, second = bdprune.stack([bright.model, broken(bright.model)]).unlearn(bright.data, settings)
    alone = unlearn(bright.model, bright.data, settings)
    state = alone.model.network.state_dict()
    assert isinstance(first, Unlearned) and first.trajectory == alone.trajectory
    assert all(torch.equal(value, state[name]) for name, value in first.model.network.state_dict().items())
    assert isinstance(second, TrainingError)


def test_empty_stacks_and_wrong_masks_are_errors(bright: Any) -> None:
    with pytest.raises(OptionError, match="at least 1 model, not 0"):
        bdprune.stack([])
    with pytest.raises(OptionError, match="1 masks for 2 models"):
        bdprune.stack([bright.model, bright.model]).sweep([{}], [bright.data], SweepSettings([0.5], 0.1))
