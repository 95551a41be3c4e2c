"""What every detector promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import msgspec

from bdprune.analysis import Case, Memo
from bdprune.errors import BdpruneError
from bdprune.fleet import scan_many
from bdprune.methods import Detector, examine_stack
from bdprune.record import Evidence
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

_NO_STACK = "The detector takes no stacks."
_NEAR = 0.05
"""Scores of one model alone and in a stack may differ by so much: sums are taken in another order, step by step."""


def check_detector(detector: type[Detector] | Detector) -> dict[str, str]:
    """Holds a detector to all that detectors promise.

    It trains two small networks in a few seconds, once a process.

    Args:
        detector: a class, which is taken with its default settings, or an instance.

    Returns:
        Each check by its name: ``passed``, or ``skipped: `` and the reason.

    Raises:
        AssertionError: a promise is broken; the text says which.

    Example:
        >>> from bdprune.testing import check_detector
        >>> check_detector(type(detector("lipschitz")))["finds a planted backdoor"]
        'skipped: It sees backdoors that sit in one loud filter; most are spread over several and stay below its ...'
    """
    return reported(detector_checks(detector))


def detector_checks(detector: type[Detector] | Detector) -> Iterator[tuple[str, Check]]:
    """The checks one by one, for a test framework: a name, and what to call (see :data:`bdprune.testing.Check`)."""
    return asserted(_checks(instance(detector)))


def _checks(method: Detector) -> Iterator[tuple[str, Check]]:
    yield from shared_checks(Trial(method, _facts))
    yield "gives evidence that travels", partial(_travels, method)
    yield "says the same in a stack", partial(_is_the_same_in_a_stack, method)
    yield "says the same in a scan of a stack", partial(_is_the_same_in_a_scan, method)
    yield "finds a planted backdoor", partial(_finds, method)
    yield "spares a clean twin", partial(_spares, method)


def _facts(evidence: Evidence) -> object:
    return msgspec.structs.replace(evidence.tidy(), seconds=0.0)


def _travels(detector: Detector) -> str:
    case = small_case(detector, Memo())
    evidence = detector(case)
    assert isinstance(evidence, Evidence), f"The detector gives {type(evidence).__name__}, not Evidence."
    assert evidence.detector == detector.id, f"The evidence names {evidence.detector!r}, not {detector.id!r}."
    check_json(evidence.tidy())
    if evidence.valid:
        above = evidence.score > evidence.threshold  # type: ignore[operator]
        assert evidence.flagged == above, "Evidence is flagged exactly where the score is above the threshold."
    named = evidence.target_label
    assert named is None or type(detector).label, "It names a label, though its class says that it does not."
    assert len(evidence.label_scores) in (0, case.model.num_classes), "There is not one label score for each label."
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
        assert isinstance(one, Evidence), f"The detector breaks down on a stack: {one}"
        assert (one.flagged, one.target_label) == (alone.flagged, alone.target_label) or alone.near, (
            "The detector says something else of a model in a stack than of the model alone."
        )
        assert one.valid == alone.valid, "The detector has a score for a model alone or in a stack, and not for both."
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
    assert spared.valid, f"It has no score of a sound network on {len(world.data)} clean images."
    assert not spared.flagged, f"It flags a clean network: score {spared.score}, threshold {spared.threshold}."
    return ""
