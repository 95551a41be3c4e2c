"""Conformance checks for detectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import msgspec

from bdprune.analysis import Case, Memo
from bdprune.errors import BdpruneError
from bdprune.fleet import scan_many
from bdprune.methods import Detector, examine_stack
from bdprune.record import LEVELS, SIGNS, Evidence
from bdprune.testing.planted import planted
from bdprune.testing.promises import (
    Check,
    Trial,
    asserted,
    check_attached,
    check_json,
    instance,
    reported,
    shared_checks,
    small_case,
)

_NO_STACK = "The detector does not take stacks."
_NEAR = 0.05
"""Tolerance for scores of one model alone and in a stack: sums are taken in another order at every step."""


def check_detector(detector: type[Detector] | Detector) -> dict[str, str]:
    """Runs all conformance checks on a detector.

    It trains two small networks in a few seconds, once in each process.

    Args:
        detector: a class, which is used with its default settings, or an instance.

    Returns:
        Each check by its name: ``passed``, or ``skipped: `` and the reason.

    Raises:
        AssertionError: a check fails; the message says which.

    Example:
        >>> from bdprune.testing import check_detector
        >>> check_detector(type(detector("lipschitz")))["finds a planted backdoor"]
        'skipped: It finds backdoors in a single strong filter. Most are spread over several and stay below its ...'
    """
    return reported(detector_checks(detector))


def detector_checks(detector: type[Detector] | Detector) -> Iterator[tuple[str, Check]]:
    """The single checks, for a test framework: a name, and the function to call (see :data:`bdprune.testing.Check`)."""
    return asserted(_checks(instance(detector)))


def _checks(method: Detector) -> Iterator[tuple[str, Check]]:
    yield "names its kind of evidence and its budget", partial(_classifies_itself, type(method))
    yield from shared_checks(Trial(method, _facts))
    yield "gives evidence that can be stored", partial(_travels, method)
    yield "gives the same evidence in a stack", partial(_is_the_same_in_a_stack, method)
    yield "gives the same evidence in a scan of a stack", partial(_is_the_same_in_a_scan, method)
    yield "finds a planted backdoor", partial(_finds, method)
    yield "does not flag the clean twin", partial(_spares, method)


def _facts(evidence: Evidence) -> object:
    return msgspec.structs.replace(evidence.tidy(), seconds=0.0)


def _classifies_itself(kind: type[Detector]) -> str:
    assert kind.sign in SIGNS, f"Unknown sign {kind.sign!r}; known are {', '.join(SIGNS)}."
    assert kind.level is None or kind.level in LEVELS, f"Unknown level {kind.level!r}; known are {', '.join(LEVELS)}."
    return ""


def _travels(detector: Detector) -> str:
    case = small_case(detector, Memo())
    evidence = detector(case)
    assert isinstance(evidence, Evidence), f"The detector returned {type(evidence).__name__}, not Evidence."
    assert evidence.detector == detector.id, f"The evidence names {evidence.detector!r}, not {detector.id!r}."
    check_json(evidence.tidy())
    if evidence.valid:
        above = evidence.score > evidence.threshold  # type: ignore[operator]
        assert evidence.flagged == above, "Evidence must be flagged exactly if its score is above the threshold."
    assert not evidence.labels or type(detector).label, "The evidence names a label, but the class has label = False."
    assert len(evidence.label_scores) in (0, case.model.num_classes), "The evidence needs one label score per class."
    check_attached(evidence.attachments, case.attachments)
    return ""


def _is_the_same_in_a_stack(detector: Detector) -> str:
    if not detector.takes_stacks():
        return _NO_STACK
    cases = [small_case(detector, Memo()) for _ in range(2)]
    together = examine_stack(detector, cases)
    _agree(detector(small_case(detector, Memo())), together)
    return ""


def _is_the_same_in_a_scan(detector: Detector) -> str:
    if not detector.takes_stacks():
        return _NO_STACK
    case = small_case(detector)
    results = list(scan_many([case.model] * 2, case.images, detectors=[detector], stack=2))
    _agree(detector(small_case(detector, Memo())), [one.detectors[0] for one in results])
    return ""


def _agree(alone: Evidence, together: Sequence[Evidence | BdpruneError]) -> None:
    for one in together:
        assert isinstance(one, Evidence), f"The detector fails on a stack: {one}"
        assert (one.flagged, one.target_label) == (alone.flagged, alone.target_label) or alone.near, (
            "The evidence for a model in a stack differs from the evidence for the model alone."
        )
        assert one.valid == alone.valid, "The detector has a score only for a model alone or only in a stack."
        apart = abs((one.score or 0.0) - (alone.score or 0.0)) if one.valid else 0.0
        assert apart <= _NEAR, f"The score of a model in a stack differs by {apart:.3f} from that of the model alone."


def _finds(detector: Detector) -> str:
    if detector.limits:
        return detector.limits
    world = planted()
    found = detector(Case(world.backdoored, world.data))
    assert found.flagged, f"It misses the planted backdoor: score {found.score}, threshold {found.threshold}."
    assert found.target_label in (None, world.target), f"It names label {found.target_label}, not {world.target}."
    return ""


def _spares(detector: Detector) -> str:
    world = planted()
    spared = detector(Case(world.clean, world.data))
    assert spared.valid, f"It has no score for a trained network with {len(world.data)} clean images."
    assert not spared.flagged, f"It flags a clean network: score {spared.score}, threshold {spared.threshold}."
    return ""
