"""Scans in stacks: the same results as separate scans, in order, even if one model fails."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bdprune.analysis import Analysis, Case
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.errors import BdpruneError, BudgetError, OptionError, TrainingError
from bdprune.fleet.executors import stack as stacks
from bdprune.fleet.executors.stack import StackOptions
from bdprune.fleet.scans import scan, scan_many
from bdprune.loops.unlearning import UnlearnSettings
from bdprune.methods import Detector, Steps
from bdprune.model.handle import Model
from bdprune.ops import Choice
from bdprune.record import Evidence, Needs, Result, Sign
from bdprune.runtime.memory import footprint, weight_bytes

from ...helpers import siblings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stores trials apart from other tests and from the user's cache."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuned.json"


LEADER = "x.leader"
QUIET = "inconclusive"
"""The verdict on a model without a finding: one detector does not suffice for ``clean``."""

NEEDS_NONE = Needs(images="none", minimum=0)
BLOWN = TrainingError("It blew up.", "Do not.")


@dataclass(eq=False)
class Bias(Analysis[float]):
    """The first bias of a model; records the calls."""

    detector: Stackable

    def compute(self, case: Case) -> float:
        self.detector.asked.append([score := bias_of(case.model)])
        if score == self.detector.spoiled:
            raise BLOWN
        return score

    def compute_stack(self, cases: Sequence[Case]) -> list[float | BdpruneError]:
        self.detector.asked.append([bias_of(case.model) for case in cases])
        if self.detector.raises:
            raise self.detector.raises
        found = [BLOWN if score == self.detector.spoiled else score for score in self.detector.asked[-1]]
        return found[1:] if self.detector.short else found


@dataclass(eq=False)
class Stackable(Detector):
    """Scores a model by its first bias; records the calls. Its batch size is ``images``."""

    asked: list[list[float]] = field(default_factory=list)
    raises: Exception | None = None
    spoiled: float | None = None
    short: bool = False
    images: int = 0

    id = LEADER
    title = "the first bias"
    sign = "collapse"

    def __post_init__(self) -> None:
        self.bias = Bias(self)

    @property
    def batch_size(self) -> int:
        return self.images

    def steps(self, case: Case) -> Steps:
        score = yield self.bias
        return self.evidence(score, 0.5, target_label=1, details={"score": score}, params={})


@dataclass
class Alone(Detector):
    """A plug-in without stacks that fails with an unexpected error on one model."""

    spoiled: float | None = None
    id = "x.alone"
    title = "nothing"
    needs = NEEDS_NONE

    def __call__(self, case: Case) -> Evidence:
        if bias_of(case.model) == self.spoiled:
            raise ZeroDivisionError("division by zero")
        return self.evidence(0.1, 0.5)


def bias_of(model: Model) -> float:
    return round(float(list(model.network.parameters())[-1].detach()[0]), 3)


def tiny_models(tiny: Any, *biases: float) -> list[Path]:
    """Files of the tiny network whose last layer has this first bias: too small to change the predictions."""
    found = []
    for index, bias in enumerate(biases):
        state = copy.deepcopy(tiny.module.state_dict())
        state["head.bias"][0] = bias
        found.append(tiny.folder / f"model{index}.pth")
        torch.save(state, found[-1])
    return found


def many(tiny: Any, sources: Sequence[Any], detectors: Sequence[Any], **options: Any) -> list[Result]:
    settings = {"arch": tiny.arch, "input_shape": tiny.input_shape, "stack": 3} | options
    return list(scan_many(sources, tiny.data, detectors=detectors, **settings))


def scores(results: Sequence[Result]) -> list[Any]:
    return [one.detectors[0].score if one.detectors else one.error for one in results]


def test_stacks_are_filled_in_order_and_the_rest_runs_at_the_end(tiny: Any) -> None:
    detector = Stackable()
    results = many(tiny, tiny_models(tiny, 0.1, 0.2, 0.6, 0.3, 0.7), [detector])
    assert detector.asked == [[0.1, 0.2, 0.6], [0.3, 0.7]]
    assert scores(results) == [0.1, 0.2, 0.6, 0.3, 0.7]
    assert [one.verdict for one in results] == [QUIET, QUIET, "suspicious", QUIET, "suspicious"]
    assert [one.detectors[0].details["stack"] for one in results] == [3, 3, 3, 2, 2]
    assert all(Path(one.name).name == f"model{index}.pth" for index, one in enumerate(results))


def test_a_stack_of_1_and_an_odd_model_run_one_at_a_time(tiny: Any) -> None:
    detector = Stackable()
    files = tiny_models(tiny, 0.1, 0.2)
    many(tiny, files, [detector], stack=1)
    assert detector.asked == [[0.1], [0.2]]
    detector.asked.clear()
    many(tiny, files[:1], [detector])
    assert detector.asked == [[0.1]]


def test_models_of_another_kind_fill_their_own_stack(tiny: Any) -> None:
    files = tiny_models(tiny, 0.1, 0.2, 0.3)
    wide = [widened(tiny, 0.4), widened(tiny, 0.5)]
    detector = Stackable()
    models = [load(tiny, files[0]), wide[0], load(tiny, files[1]), wide[1], load(tiny, files[2])]
    results = many(tiny, models, [detector], arch=None, input_shape=None)
    assert scores(results) == [0.1, 0.4, 0.2, 0.5, 0.3]
    assert sorted(detector.asked) == [[0.1, 0.2, 0.3], [0.4, 0.5]]


def load(tiny: Any, path: Path) -> Model:
    from bdprune.model.loading import load as read

    return read(path, arch=tiny.arch, input_shape=(3, 8, 8))


def widened(tiny: Any, bias: float) -> Model:
    """The tiny network with one more filter, whose weights are 0."""
    network = copy.deepcopy(tiny.module)
    network.conv, network.norm, network.head = torch.nn.Conv2d(3, 9, 1, bias=False), torch.nn.BatchNorm2d(9), None
    network.head = torch.nn.Linear(9, 3)
    with torch.no_grad():
        network.conv.weight.zero_()
        network.conv.weight[:8] = tiny.module.conv.weight
        network.head.weight.zero_()
        network.head.weight[:, :8] = tiny.module.head.weight
        network.head.bias.copy_(torch.tensor([bias, 0, 0]))
    return Model(network.eval(), "wide", 3, tiny.input_shape)


def test_a_file_without_a_model_keeps_its_place_and_does_not_affect_the_others(tiny: Any) -> None:
    bad = tiny.folder / "bad.pth"
    bad.write_bytes(b"nonsense")
    first, second = tiny_models(tiny, 0.1, 0.6)
    detector = Stackable()
    results = many(tiny, [first, bad, second], [detector])
    assert [one.verdict for one in results] == [QUIET, "error", "suspicious"]
    assert detector.asked == [[0.1, 0.6]]


def test_an_error_of_one_model_is_recorded_in_its_evidence(tiny: Any) -> None:
    detector = Stackable(spoiled=0.2)
    results = many(tiny, tiny_models(tiny, 0.1, 0.2, 0.6), [detector])
    assert [one.verdict for one in results] == [QUIET, "inconclusive", "suspicious"]
    assert results[1].detectors[0].error == "It blew up. Do not."
    assert len(detector.asked) == 1


@pytest.mark.parametrize(
    "detector", [Stackable(raises=RuntimeError("out of memory")), Stackable(short=True)], ids=["raises", "short"]
)
def test_a_stack_that_fails_is_scanned_one_by_one(tiny: Any, detector: Stackable) -> None:
    detector.asked.clear()
    detector.spoiled = 0.2
    results = many(tiny, tiny_models(tiny, 0.1, 0.2, 0.6), [detector])
    assert [one.verdict for one in results] == [QUIET, "inconclusive", "suspicious"]
    assert detector.asked == [[0.1, 0.2, 0.6], [0.1], [0.2], [0.6]]
    assert not any("stack" in one.detectors[0].details for one in results)


def test_a_bug_on_one_model_is_recorded_in_its_result(tiny: Any) -> None:
    results = many(tiny, tiny_models(tiny, 0.1, 0.2, 0.6), [Stackable(), Alone(spoiled=0.2)])
    assert [one.verdict for one in results] == [QUIET, "inconclusive", "suspicious"]
    assert "division by zero" in results[1].detectors[1].error and not results[0].detectors[1].error
    assert [one.detector for one in results[0].detectors] == [LEADER, "x.alone"]


def test_a_network_that_differs_from_its_layers_is_scanned_alone(tiny: Any) -> None:
    class Louder(type(tiny.module)):  # type: ignore[misc]
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * self.loud

    models = []
    for loud in (1, 2):
        network = Louder().eval()
        network.load_state_dict(tiny.module.state_dict())
        network.loud = loud
        models.append(Model(network, "louder", 3, tiny.input_shape))
    detector = Stackable(images=20)
    many(tiny, models, [detector], arch=None, input_shape=None)
    assert detector.asked == [[0.0], [0.0]]


def test_an_option_that_one_model_lacks_does_not_stop_the_others(tiny: Any) -> None:
    first, second = (load(tiny, file) for file in tiny_models(tiny, 0.1, 0.6))
    odd = torch.nn.Conv2d(3, 3, 1)  # a module without an input shape
    settings: dict[str, Any] = {"arch": tiny.arch, "detectors": [Stackable()], "stack": 3}
    results = list(scan_many([first, odd, second], tiny.data, **settings))
    assert [one.verdict for one in results] == [QUIET, "error", "suspicious"]
    assert results[1].error and "needs an input shape" in results[1].error.message


def test_a_model_that_waits_too_long_is_scanned_in_a_smaller_stack(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_READ_AHEAD", 1)
    detector = Stackable()
    models = [load(tiny, file) for file in tiny_models(tiny, 0.1, 0.2, 0.3, 0.4)]
    stream = scan_many([widened(tiny, 0.5), *models], tiny.data, detectors=[detector], stack=3)
    assert next(stream).detectors[0].score == 0.5
    assert detector.asked[-1] == [0.5]
    assert [one.detectors[0].score for one in stream] == [0.1, 0.2, 0.3, 0.4]


def test_memory_limits_running_and_waiting_models(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Stackable(images=30)
    files = tiny_models(tiny, 0.1, 0.2, 0.3, 0.4)
    two = 2 * 2 * footprint(load(tiny, files[0]), 30)
    many(tiny, files, [detector], stack=StackOptions(9, two))
    assert detector.asked == [[0.1, 0.2], [0.3, 0.4]]
    detector.asked.clear()
    many(tiny, files, [detector], stack=StackOptions(9, 1))
    assert detector.asked == [[0.1], [0.2], [0.3], [0.4]]
    detector.asked.clear()
    monkeypatch.setattr(stacks, "footprint", lambda model, batch: 1)
    budget = 2 * int(2.5 * weight_bytes(load(tiny, files[0])))
    many(tiny, files, [detector], stack=StackOptions(9, budget))
    assert detector.asked == [[0.1, 0.2, 0.3], [0.4]]


def test_the_memory_estimate_grows_with_the_batch_and_covers_the_kept_maps(bright: Any) -> None:
    none, small, large = (footprint(bright.model, batch) for batch in (0, 10, 20))
    weights = weight_bytes(bright.model)
    assert none == 2 * weights and small > 8 * weights
    # A map of 12 channels on 8x8 pixels in float32 is kept by each of two norms and two rectifiers.
    assert large - small >= 10 * 4 * 12 * 64 * 4


@pytest.mark.parametrize(("winner", "asked"), [("stack", [[0.1, 0.2]]), ("loop", [[0.1], [0.2]])])
def test_auto_follows_a_trial_and_does_not_wait_if_the_loop_is_faster(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, winner: str, asked: list[list[float]]
) -> None:
    tried: list[tuple[int, int]] = []

    def choose(models: Sequence[Model], images: torch.Tensor) -> Choice:
        tried.append((len(models), len(images)))
        return Choice("stack", winner, "cpu", "forced")

    monkeypatch.setattr(stacks, "stack_or_loop", choose)
    detector = Stackable(images=20)
    seen: list[float | None] = []
    files = tiny_models(tiny, 0.1, 0.2)

    def taken() -> Any:
        for file in files:
            yield file
            seen.append(detector.asked[-1][0] if detector.asked else None)

    stream = scan_many(taken(), tiny.data, detectors=[detector], arch=tiny.arch, input_shape=tiny.input_shape)
    assert [one.detectors[0].score for one in stream] == [0.1, 0.2]
    assert detector.asked == asked
    assert tried == ([(2, 20), (2, 20)] if winner == "stack" else [(2, 20)])
    assert seen == ([None, None] if winner == "stack" else [0.1, 0.2]), "if the loop is faster, nothing is read ahead"


def test_auto_without_a_trial_scans_one_after_another_on_a_cpu(tiny: Any) -> None:
    detector = Stackable()
    many(tiny, tiny_models(tiny, 0.1, 0.2), [detector], stack="auto")
    assert detector.asked == [[0.1], [0.2]]


def test_progress_shows_stacks(tiny: Any) -> None:
    stages: list[str] = []
    many(tiny, tiny_models(tiny, 0.1, 0.2), [Stackable(), Alone()], progress=stages.append)
    opened, alone = ["loading", "checking the clean data"], ["running detector x.alone (2 of 2)"] * 2
    assert stages == [*opened, *opened, f"running detector {LEADER} on 2 models", *alone]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stack": 0}, "at least 1 model, not 0"),
        ({"stack": "many"}, "at least 1 model, not many"),
        ({"stack": -1}, "at least 1 model, not -1"),
        ({"stack": 2, "timeout": 0}, "timeout of 0 seconds"),
    ],
)
def test_invalid_stack_options_are_errors_before_anything_is_read(
    tiny: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        scan_many([tiny.path], tiny.data, **options)


def test_stacks_without_memory_are_an_error() -> None:
    with pytest.raises(OptionError, match="at least 1 byte of memory, not 0"):
        StackOptions(memory=0)


def test_real_detectors_give_the_same_evidence_in_a_stack(
    bright: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    unlearning = UnlearnSettings(lr=0.02, batch_size=50, max_epochs=6, padding=1, min_steps=6)
    detectors = [UnlearningDetector(unlearning, seed=3), LipschitzDetector()]
    assert all(one.takes_stacks() for one in detectors)
    models = siblings(bright.model, 4, scale=0.02)
    stacked = list(scan_many(models, bright.data, detectors=detectors, stack=4, seed=3, device=device))
    again = list(scan_many(models, bright.data, detectors=detectors, stack=4, seed=3, device=device))
    assert [without_times(one) for one in stacked] == [without_times(one) for one in again]
    for model, mine in zip(models, stacked, strict=True):
        alone = scan(model, bright.data, detectors=detectors, seed=3, device=device)
        assert (mine.verdict, mine.target_label) == (alone.verdict, alone.target_label)
        for ours, theirs in zip(mine.detectors, alone.detectors, strict=True):
            assert ours.details["stack"] == 4
            assert ours.score == pytest.approx(theirs.score, abs=1e-6)
            assert (ours.flagged, ours.target_label, ours.params) == (
                theirs.flagged,
                theirs.target_label,
                theirs.params,
            )
    lengths = {len(one.detectors[0].details["trajectory"]) for one in stacked}
    assert len(lengths) > 1, "the models should stop at different steps"


def without_times(result: Result) -> Result:
    detectors = tuple(msgspec.structs.replace(one, seconds=0.0) for one in result.detectors)
    return msgspec.structs.replace(result, seconds=0.0, started="", detectors=detectors)


@dataclass(eq=False)
class Seen(Stackable):
    """A detector of any kind."""

    id: str = "x.seen"
    sign: Sign = "collapse"


def test_a_model_that_is_sure_leaves_the_stack(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: tuple[Sign, ...] = ("collapse", "trigger", "pruning")
    detectors = [Seen(id=f"x.{sign}", sign=sign) for sign in kinds]
    monkeypatch.setattr("bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: detectors)
    files = tiny_models(tiny, 0.1, 0.6, 0.2)
    found = list(scan_many(files, tiny.data, arch=tiny.arch, input_shape=tiny.input_shape, stack=3))
    assert [one.verdict for one in found] == ["clean", "backdoored", "clean"]
    assert [one.not_run for one in found] == [(), ("x.pruning",), ()]
    assert [one.asked for one in detectors] == [[[0.1, 0.6, 0.2]], [[0.1, 0.6, 0.2]], [[0.1, 0.2]]]


def test_a_stack_has_the_time_of_its_models(tiny: Any) -> None:
    given: list[float] = []

    @dataclass(eq=False)
    class Timed(Stackable):
        def steps(self, case: Case) -> Steps:
            given.append(case.budget.remaining)
            return super().steps(case)

    many(tiny, tiny_models(tiny, 0.1, 0.2, 0.3), [Timed()], budget=1000)
    assert len(given) == 3 and all(2900 < seconds < 3000 for seconds in given)


def test_a_stack_whose_time_ends_is_not_run(tiny: Any) -> None:
    late = Stackable(raises=BudgetError("The time of the budget is up."))
    found = many(tiny, tiny_models(tiny, 0.1, 0.2), [late, Alone()])
    assert late.asked == [[0.1, 0.2]], "it does not run again on each model"
    assert [one.not_run for one in found] == [(LEADER,)] * 2
    assert all("x.leader (the time of the budget is up)" in one.findings[-1].message for one in found)
