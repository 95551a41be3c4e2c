"""A stack of models against G separate runs: the same seeds, the same trajectories and masks."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bdprune
from bdprune.analysis.lipschitz import channel_lipschitz
from bdprune.errors import OptionError, TrainingError
from bdprune.loops import together
from bdprune.loops.recovery import Recovered, RecoverSettings, recover
from bdprune.loops.sweep import sweep_thresholds
from bdprune.loops.together import recover_together, unlearn_together
from bdprune.loops.unlearning import Unlearned, UnlearnSettings, unlearn
from bdprune.model.edit.stacked import StackedNetwork
from bdprune.model.handle import Model
from bdprune.runtime import paths
from bdprune.runtime.watch import LateWatch

from ..helpers import siblings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trials are kept where no other test and no user's cache is."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    return tmp_path / "paths.json"


def forced(path: paths.Way) -> paths.PathChoice:
    return paths.PathChoice(path, "cpu", "forced")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32 on a GPU too, and has the same bits in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def assert_same_unlearning(mine: Unlearned | TrainingError, alone: Unlearned) -> None:
    assert isinstance(mine, Unlearned)
    assert (mine.lr, mine.stopped, mine.steps_per_epoch) == (alone.lr, alone.stopped, alone.steps_per_epoch)
    assert [step.votes for step in mine.trajectory] == [step.votes for step in alone.trajectory]
    for ours, theirs in zip(mine.trajectory, alone.trajectory, strict=True):
        assert (ours.accuracy, ours.wrong_votes, ours.label_counts) == (
            theirs.accuracy,
            theirs.wrong_votes,
            theirs.label_counts,
        )
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3, abs=1e-4)
    state = alone.model.network.state_dict()
    for name, value in mine.model.network.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)


SETTINGS: dict[str, dict[str, Any]] = {
    "batch": {"lr": 0.02},
    "epoch": {"lr": 0.015, "stop_on": "epoch", "max_epochs": 8},
    "milestones": {"lr": 0.02, "stop_on": "epoch", "milestones": (1, 2)},
    "share": {"lr": 0.02, "stop_share": 0.6},
    "lowered": {"lr": 0.2, "min_steps": 6},
    "raised": {"lr": 1e-4, "max_epochs": 2, "raises": 1},
    "few images": {"lr": 0.02, "small_data": 1000, "max_epochs": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_unlearning_together_is_unlearning_one_after_another(bright: Any, name: str, device: str) -> None:
    settings = UnlearnSettings(**{"batch_size": 50, "max_epochs": 6, "padding": 1, **SETTINGS[name]})
    models = siblings(bright.model, device=device)
    together = unlearn_together(models, bright.data, settings, seed=3)
    for model, mine in zip(models, together, strict=True):
        assert_same_unlearning(mine, unlearn(model, bright.data, settings, seed=3))
    lengths = {len(mine.trajectory) for mine in together if isinstance(mine, Unlearned)}
    assert name not in ("batch", "epoch") or len(lengths) > 1, "the models should stop at different steps"


@dataclass
class Arrived:
    """A mark that the device has come past."""

    def query(self) -> bool:
        return True


@pytest.mark.parametrize("name", SETTINGS)
def test_an_epoch_after_all_have_stopped_changes_nothing(
    bright: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = UnlearnSettings(**{"batch_size": 50, "max_epochs": 6, "padding": 1, **SETTINGS[name]})
    run = partial(unlearn_together, siblings(bright.model), bright.data, settings, seed=3)
    tries: list[Any] = []
    epoch = together._Ascent.epoch
    monkeypatch.setattr(together._Ascent, "epoch", lambda *args: tries.append(args[0]) or epoch(*args))
    at_once, needed = run(), list(Counter(tries).values())
    tries.clear()
    monkeypatch.setattr(together, "watch_on", lambda device: LateWatch(torch.zeros(2, dtype=torch.bool), Arrived))
    late, spent = run(), list(Counter(tries).values())
    assert spent == [min(epochs + 1, settings.max_epochs) for epochs in needed]
    for ours, theirs in zip(late, at_once, strict=True):
        assert isinstance(ours, Unlearned) and isinstance(theirs, Unlearned)
        assert replace(ours, model=theirs.model) == theirs
        state = theirs.model.network.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in ours.model.network.state_dict().items())


def broken(model: Model) -> Model:
    """A copy whose loss is not a number."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        next(network.parameters())[0] = float("nan")
    return model.with_network(network)


def test_a_model_that_breaks_down_stays_alone_with_it(bright: Any) -> None:
    settings = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1, retries=1)
    models = [bright.model, broken(bright.model), siblings(bright.model)[1]]
    together = unlearn_together(models, bright.data, settings)
    assert isinstance(together[1], TrainingError) and "learning rate 0.002" in str(together[1])
    for index in (0, 2):
        assert_same_unlearning(together[index], unlearn(models[index], bright.data, settings))
    recovered = recover_together(models, bright.data, RecoverSettings(batch_size=50, epochs=1, padding=1))
    assert isinstance(recovered[1], TrainingError) and "in step 1" in str(recovered[1])
    assert isinstance(recovered[0], Recovered) and isinstance(recovered[2], Recovered)


def test_no_epoch_is_no_step(bright: Any) -> None:
    (none,) = unlearn_together([bright.model], bright.data, UnlearnSettings(max_epochs=0))
    assert isinstance(none, TrainingError) and "not finite" in str(none)


def test_a_step_that_would_not_be_finite_is_taken_back(bright: Any) -> None:
    settings = UnlearnSettings(lr=1e30, batch_size=50, max_epochs=2, padding=1, retries=0)
    models = siblings(bright.model, 2)
    together = unlearn_together(models, bright.data, settings)
    for model, mine in zip(models, together, strict=True):
        try:
            alone = unlearn(model, bright.data, settings)
        except TrainingError as error:
            assert isinstance(mine, TrainingError) and str(mine) == str(error)
        else:
            assert isinstance(mine, Unlearned)
            assert len(mine.trajectory) == len(alone.trajectory) and not mine.stopped
            assert all(value.isfinite().all() for value in mine.model.network.state_dict().values())


def test_a_stack_of_one_is_the_model_alone(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1, retries=0)
    alone = unlearn(bright.model, bright.data, settings, seed=3)
    monkeypatch.setattr("bdprune.loops.unlearning._runs_as_stack", lambda model: True)
    assert_same_unlearning(unlearn(bright.model, bright.data, settings, seed=3), alone)
    with pytest.raises(TrainingError, match="not finite at learning rate"):
        unlearn(broken(bright.model), bright.data, settings)


@pytest.mark.parametrize("small_data", [0, 1000], ids=["batch_statistics", "running_statistics"])
def test_recovery_together_is_recovery_one_after_another(bright: Any, small_data: int, device: str) -> None:
    settings = RecoverSettings(batch_size=50, epochs=3, padding=1, loss_scale=0.2, small_data=small_data)
    models = siblings(bright.model, device=device)
    for model, mine in zip(models, recover_together(models, bright.data, settings, seed=5), strict=True):
        alone = recover(model, bright.data, settings, seed=5)
        assert isinstance(mine, Recovered)
        assert mine.losses == pytest.approx(alone.losses, rel=1e-4)
        for name, mask in alone.masks.items():
            torch.testing.assert_close(mine.masks[name], mask, rtol=1e-4, atol=1e-5)


def test_recovery_of_one_model_given_often_holds_its_weights_once(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StackedNetwork] = []

    def noted(models: list[Model], **options: Any) -> StackedNetwork:
        made.append(StackedNetwork(models, **options))
        return made[-1]

    monkeypatch.setattr(together, "StackedNetwork", noted)
    settings = RecoverSettings(batch_size=50, epochs=2, padding=1)
    alone = recover(bright.model, bright.data, settings, seed=5)
    for mine in recover_together([bright.model] * 3, bright.data, settings, seed=5):
        assert isinstance(mine, Recovered) and mine.losses == pytest.approx(alone.losses, rel=1e-4)
        for name, mask in alone.masks.items():
            torch.testing.assert_close(mine.masks[name], mask, rtol=1e-4, atol=1e-5)
    assert all(len(value) == 3 and value.stride(0) == 0 for value in made[0].parameters())


@pytest.mark.parametrize("path", ["stack", "loop"])
def test_every_method_of_a_stack_does_what_separate_runs_do(
    bright: Any, path: paths.Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdprune.analysis.stacks.choose", lambda models, images: forced(path))
    models = siblings(bright.model)
    stack = bdprune.stack(models)
    assert len(stack) == 3
    for scores, model in zip(stack.scores(), models, strict=True):
        alone = channel_lipschitz(model)
        assert all(torch.equal(scores[name], alone[name]) for name in alone) and scores.keys() == alone.keys()
    unlearning = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1)
    unlearned = stack.unlearn(bright.data, unlearning, seed=1)
    for model, mine in zip(models, unlearned, strict=True):
        assert_same_unlearning(mine, unlearn(model, bright.data, unlearning, seed=1))
    recovery = RecoverSettings(batch_size=50, epochs=1, padding=1)
    recovered = bdprune.stack([mine.model for mine in unlearned]).recover(bright.data, recovery, seed=1)
    masks = [mine.masks for mine in recovered]
    thresholds = [0.2, 0.6, 0.95]
    for model, mask, mine in zip(models, masks, stack.sweep(masks, [bright.data], thresholds, 0.1), strict=True):
        assert mine == sweep_thresholds(model, mask, [bright.data], thresholds, 0.1, "zero_gamma")


def test_loop_gives_the_bits_and_errors_of_separate_runs(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.analysis.stacks.choose", lambda models, images: forced("loop"))
    settings = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=2, padding=1, retries=0)
    first, second = bdprune.stack([bright.model, broken(bright.model)]).unlearn(bright.data, settings)
    alone = unlearn(bright.model, bright.data, settings)
    state = alone.model.network.state_dict()
    assert isinstance(first, Unlearned) and first.trajectory == alone.trajectory
    assert all(torch.equal(value, state[name]) for name, value in first.model.network.state_dict().items())
    assert isinstance(second, TrainingError)


def test_empty_stacks_and_wrong_masks_are_refused(bright: Any) -> None:
    with pytest.raises(OptionError, match="no models"):
        bdprune.stack([])
    with pytest.raises(OptionError, match="1 masks for 2 models"):
        bdprune.stack([bright.model, bright.model]).sweep([{}], [bright.data], [0.5], 0.1)


def times(stack: float, loop: float) -> Any:
    """A clock that gives each way its seconds."""
    return lambda device, rounds, *runs: [(run(), seconds)[1] for run, seconds in zip(runs, (stack, loop), strict=True)]


@pytest.mark.parametrize(("seconds", "path"), [((0.5, 1.0), "stack"), ((1.0, 1.0), "loop"), ((2.0, 1.0), "loop")])
def test_the_faster_way_is_taken_and_kept(
    bright: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], path: str
) -> None:
    monkeypatch.setattr(paths, "least_seconds", times(*seconds))
    models, images = siblings(bright.model), bright.data.images[:20]
    choice = paths.choose(models, images)
    assert (choice.path, choice.stack_seconds, choice.loop_seconds) == (path, *seconds)
    assert choice in list(paths.KEPT.read().values())
    monkeypatch.setattr(paths, "least_seconds", times(1.0, 0.0))
    assert paths.choose(models, images) == choice, "kept choices need no trial"
    assert paths.choose(models, images[:10]).loop_seconds == 0.0, "another shape needs one"
    assert len(json.loads(cache.read_text())) == (3 if path == "stack" else 2)


def test_a_cpu_tries_two_models_on_a_few_images_before_all_of_them(
    bright: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, images = siblings(bright.model, 5), bright.data.images[:20]
    monkeypatch.setattr(paths, "least_seconds", times(1.0, 1.0))
    assert "2 x bright, " in paths.choose(models, images).shape and len(paths.KEPT.read()) == 1
    monkeypatch.setattr(paths, "why_not", None)
    assert "2 x bright, " in paths.choose(models, images).shape, "a loop that is kept is all there is to look at"
    monkeypatch.undo()
    monkeypatch.setenv("BDPRUNE_CACHE", str(cache.parent / "other"))
    monkeypatch.setattr(paths, "least_seconds", times(0.5, 1.0))
    assert "4 x bright, " in paths.choose(models, images).shape, "five go by four"


def test_models_that_are_no_stack_say_nothing_of_others_of_their_shape(
    bright: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = bright.data.images[:20]
    monkeypatch.setattr(paths, "least_seconds", times(0.5, 1.0))
    assert "does more" in paths.choose([bright.model, broken(bright.model)], images).reason
    assert not cache.exists()
    assert paths.choose(siblings(bright.model, 2), images).path == "stack"
    assert "does more" in paths.choose([bright.model, broken(bright.model)], images).reason


def test_real_trial_measures_both_ways(bright: Any) -> None:
    choice = paths.choose(siblings(bright.model), bright.data.images[:20])
    assert choice.stack_seconds and choice.loop_seconds
    assert choice.path == ("stack" if choice.stack_seconds <= 0.9 * choice.loop_seconds else "loop")


def test_one_model_and_unlike_models_need_no_trial(bright: Any, cache: Path) -> None:
    assert "one model" in paths.choose([bright.model], bright.data.images[:4]).reason
    other = Model(torch.nn.Conv2d(3, 3, 1), "conv", 3, (3, 8, 8))
    assert "is no bright" in paths.choose([bright.model, other], bright.data.images[:4]).reason
    assert not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"path": "x"}}', '{"a": {"path": "loop", "b": 1}}'])
def test_a_cache_that_is_not_ours_counts_as_empty(cache: Path, text: str) -> None:
    cache.write_text(text)
    assert list(paths.KEPT.read().values()) == []


def test_a_cache_that_cannot_be_written_lasts_as_long_as_the_process(
    bright: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("BDPRUNE_CACHE", str(cache.parent / "file"))
    monkeypatch.setattr(paths, "least_seconds", times(1.0, 1.0))
    choice = paths.choose(siblings(bright.model), bright.data.images[:4])
    monkeypatch.setattr(paths, "least_seconds", None)
    assert choice.path == "loop" and paths.choose(siblings(bright.model), bright.data.images[:4]) == choice
    assert list(paths.KEPT.read().values()) == []
    paths.KEPT.forget()
    with pytest.raises(TypeError, match="not callable"):
        paths.choose(siblings(bright.model), bright.data.images[:4])
