"""The checks of detectors find errors, and name the failed check."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bdprune.analysis.case import Case
from bdprune.analysis.lipschitz import Lipschitz
from bdprune.methods.base import Detector
from bdprune.record.evidence import Evidence
from bdprune.record.method import Needs
from bdprune.testing.detectors import check_detector, detector_checks


@dataclass(frozen=True)
class Quiet(Detector):
    """Passes all checks, except for the effects of ``act``."""

    act: Callable[[Case], Any] = field(default=lambda case: None)
    score: float = 0.0

    id = "example.quiet"
    title = "nothing"
    needs = Needs(images="labelled")
    limits = "It looks at nothing."

    def __call__(self, case: Case) -> Evidence:
        self.check(case)
        done = self.act(case)
        return done if isinstance(done, Evidence) else self.evidence(self.score, 1.0, params={})


def _ascend(case: Case) -> None:
    next(case.model.network.parameters()).data.add_(1e-6)


def _darken(case: Case) -> None:
    case.images.images.mul_(0.5)


def _scale(case: Case) -> None:
    next(iter(case.get(Lipschitz()).values())).mul_(2)


BROKEN: dict[str, tuple[Callable[[Case], Any], str]] = {
    "trains the model": (_ascend, "changed 0.weight of the input model"),
    "changes the images": (_darken, "changed the clean images"),
    "changes an analysis": (_scale, "changed shared analyses"),
    "draws at random": (
        lambda case: Quiet().evidence(float(torch.rand(())), 1.0, params={}),
        "give different results",
    ),
    "names another detector": (
        lambda case: Evidence(detector="other", score=0.0, threshold=1.0, flagged=False),
        "names 'other', not 'example.quiet'",
    ),
    "flags below its threshold": (
        lambda case: Evidence(detector="example.quiet", score=0.0, threshold=1.0, flagged=True),
        "exactly if its score is above",
    ),
    "names a label on the sly": (
        lambda case: Quiet().evidence(2.0, 1.0, params={}, target_label=1),
        "the class has label = False",
    ),
    "names several labels on the sly": (
        lambda case: Quiet().evidence(2.0, 1.0, params={}, targets=(1, 2)),
        "the class has label = False",
    ),
    "has a p-value that cannot be": (
        lambda case: Quiet().evidence(0.0, 1.0, params={}, p_value=2.0),
        "raised ValidationError",
    ),
    "breaks down on grey images": (
        lambda case: case.images.images[:, 1].sum() if case.model.input_shape[0] == 3 else 1 / 0,
        "raised ZeroDivisionError",
    ),
}


@pytest.mark.parametrize(("act", "said"), BROKEN.values(), ids=BROKEN)
def test_the_failed_check_is_named(act: Callable[[Case], Any], said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_detector(Quiet(act))


def test_passed_checks_and_reasons_of_skipped_checks_are_reported() -> None:
    report = check_detector(Quiet)
    assert report["finds a planted backdoor"] == "skipped: It looks at nothing."
    assert report["describes itself"] == "passed"
    assert list(report) == [name for name, _ in detector_checks(Quiet)]


class Boastful(Quiet):
    """Claims that it finds backdoors."""

    limits = ""


@pytest.mark.parametrize(("score", "said"), [(0.0, "misses the planted backdoor"), (2.0, "flags a clean network")])
def test_a_detector_without_limits_must_distinguish_the_planted_networks(score: float, said: str) -> None:
    checks = dict(detector_checks(Boastful(score=score)))
    with pytest.raises(AssertionError, match=said):
        checks["finds a planted backdoor"]()
        checks["does not flag the clean twin"]()


class Greedy(Quiet):
    """Uses images although it declares that it needs none."""

    needs = Needs(images="none", minimum=0)

    def __call__(self, case: Case) -> Evidence:
        return self.evidence(0.0 if case.data is None else float(case.images.images.mean()), 1.0, params={})


class Hungry(Quiet):
    """Takes fewer images than it declares to need."""

    needs = Needs(minimum=50)

    def __call__(self, case: Case) -> Evidence:
        return self.evidence(0.0, 1.0, params={})


class Vague(Quiet):
    """Gives evidence of an unknown kind."""

    sign = "feeling"  # type: ignore[assignment]


class Eager(Quiet):
    """Runs at an unknown budget."""

    level = "always"  # type: ignore[assignment]


@pytest.mark.parametrize(("kind", "said"), [(Vague, "Unknown sign 'feeling'"), (Eager, "Unknown level 'always'")])
def test_unknown_kinds_of_evidence_and_budgets_are_named(kind: type[Detector], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_detector(kind)


@pytest.mark.parametrize(
    ("kind", "said"), [(Greedy, "declares images: 'none'"), (Hungry, "needs 50 images, but takes 10")]
)
def test_the_declared_needs_of_a_detector_are_checked(kind: type[Detector], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_detector(kind)
