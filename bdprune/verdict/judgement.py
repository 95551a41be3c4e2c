"""Derives the verdict from the evidence.

Evidence is of several kinds (:data:`bdprune.record.SIGNS`). Two of the strong kinds that name the same label make a
model ``backdoored``; any other finding makes it ``suspicious``, except evidence that only supports another one. A small
collapse only supports if the filters that unlearning changes most lead to another label. These filters alone count only
if few clean networks have such scores as a whole. The verdict is ``clean`` only
if detectors looked for a trigger and for a collapse, completely and on clean data on which the model is accurate, and
nothing was found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import msgspec

from bdprune.analysis import Sanity
from bdprune.methods import Detector
from bdprune.record import NEEDED, SIGNS, STRONG, Evidence, Finding, Severity, Sign, Verdict, some
from bdprune.verdict.rules import ATLAS, CONFIRMED, NATURAL, NOT_JUDGED, UNUSUAL

FEW_CLEAN = 0.05
"""A model that looks more suspicious than all but this share of clean networks is not called clean."""

_COMMON_COLLAPSE = 3.5
"""A lead of so many times its threshold is beyond the collapses of clean networks (docs/evaluation/calibration.md)."""

FEW_WITH_ONE_SIGN = 0.1
"""The same for a model whose only sign is unlearned filters that can be raised and pruned, which is a weak one."""

MOVED_FILTERS = "bdprune.moved_filters"

_UNCONFIRMED = (
    "Some clean networks fall onto one label, too, while they unlearn, and the filters that unlearning changes most do "
    "not lead to this label. So it counts only if evidence of another kind names the same label."
)

_LONE = (
    "It is the only sign, and as a whole the scores are no higher than those of many clean networks. So it counts only "
    "beside other evidence."
)

_Kinds = Mapping[Sign, Sequence[Evidence]]
"""Flagged evidence by its kind, the strong kinds only."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one model; ``risk`` is in [0, 1], or None if the model could not be judged.

    ``targets`` holds the labels if there are several; ``target_label`` is then None. ``without_lone`` is the verdict if
    the only sign, a weak one, does not count; None if there is no such sign.
    """

    verdict: Verdict
    risk: float | None
    target_label: int | None
    findings: tuple[Finding, ...]
    targets: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    without_lone: Judgement | None = None


def judge(detectors: Sequence[Detector], evidence: Sequence[Evidence], sanity: Sanity | None) -> Judgement:
    """The verdict that follows from the evidence.

    Args:
        detectors: the detectors that ran.
        evidence: the evidence of each; a score that is not finite does not count.
        sanity: the check of the model on the clean data; None without clean data.
    """
    signs: dict[str, Sign] = {one.id: one.sign for one in detectors}
    valid = _weighed([one for one in evidence if one.valid], signs)
    findings = tuple(_finding(one, detectors) for one in valid if one.flagged)
    if sanity is not None and not sanity.ok:
        return _inconclusive(f"{sanity.message} {sanity.suggestion}".rstrip(), findings)
    counted = [one for one in valid if one.flagged and not one.natural]
    alone = [one for one in counted if not one.supporting]
    kinds = {} if sanity is None else _kinds(alone, signs)
    direct = _kinds([one for one in counted if one.supporting in ("", _UNCONFIRMED)], signs)
    agreeing = _agreeing(direct) if kinds else {}
    agreeing = agreeing or (_agreeing(_kinds(counted, signs)) if len(kinds) == 1 else {})
    if agreeing:
        return _backdoored(agreeing, findings)
    if any(not one.not_applicable for one in alone):
        found = _suspicious(alone, kinds, (*findings, *_reserves(valid, signs)))
        lone = {one.detector for one in alone} == {MOVED_FILTERS}
        return replace(found, without_lone=judge(detectors, _without_lone(evidence), sanity)) if lone else found
    if sanity is not None and _agreeing(_kinds(counted, signs)):
        return _suspicious(counted, _kinds(counted, signs), findings)
    return _of_silence(detectors, evidence, signs, sanity, findings)


def _without_lone(evidence: Sequence[Evidence]) -> list[Evidence]:
    return [
        msgspec.structs.replace(one, supporting=_LONE) if one.detector == MOVED_FILTERS else one for one in evidence
    ]


def with_p_value(
    judgement: Judgement, p_value: float | None, evidence: Sequence[Evidence], rank: float | None = None
) -> Judgement:
    """The verdict in view of clean networks.

    ``clean`` becomes ``suspicious`` if few of them look as suspicious. A weak sign that is the only one does not count
    if many of them do.

    Args:
        judgement: of the evidence alone.
        p_value: of the model among clean networks like it; None if it is unknown.
        evidence: of all detectors; the verdict names the label of evidence that only supports.
        rank: the p-value among the clean networks of all architectures; None if it is unknown.
    """
    if judgement.without_lone is not None and rank is not None and rank > FEW_WITH_ONE_SIGN:
        return judgement.without_lone
    if judgement.verdict != "clean" or p_value is None or p_value > FEW_CLEAN:
        return judgement
    message = (
        "No evidence counts by itself, but as a whole the scores are higher than those of nearly all clean networks "
        f"(p-value {p_value:.3f})."
    )
    finding = Finding(rule_id=UNUSUAL.id, severity="medium", message=message, atlas=tuple(ATLAS))
    label = _only(_labels(one for one in evidence if one.flagged and one.valid))
    return replace(judgement, verdict="suspicious", target_label=label, findings=(finding, *judgement.findings))


def _weighed(valid: Sequence[Evidence], signs: Mapping[str, Sign]) -> list[Evidence]:
    """The evidence, in which a collapse is only supporting if it is small and unlearned filters lead elsewhere.

    Clean networks collapse, too. On networks with a backdoor for all labels, the filters that unlearning changes most
    lead to the same label as the collapse.
    """
    ranked = [one.label_scores for one in valid if one.detector == MOVED_FILTERS and any(one.label_scores)]
    others = {_leader(scores) for scores in ranked}
    return [
        msgspec.structs.replace(one, supporting=_UNCONFIRMED)
        if signs[one.detector] == "collapse" and one.flagged and others and _is_common(one) and not one.labels & others
        else one
        for one in valid
    ]


def _leader(scores: Sequence[float | None]) -> int:
    known = [-math.inf if score is None else score for score in scores]
    return known.index(max(known))


def _is_common(one: Evidence) -> bool:
    assert one.score is not None and one.threshold is not None
    return one.score <= _COMMON_COLLAPSE * one.threshold


def _agreeing(kinds: _Kinds) -> _Kinds:
    """The kinds if at least two of them name the same labels; else none."""
    return kinds if _common_labels(kinds) else {}


def _backdoored(kinds: _Kinds, findings: tuple[Finding, ...]) -> Judgement:
    """The verdict of kinds that name the same labels."""
    common = _common_labels(kinds)
    seen = [one for found in kinds.values() for one in found if one.labels & common]
    found = (*findings, _confirmation(kinds, common))
    return Judgement("backdoored", _risk(seen), _only(common), found, _several(common), _sources(seen))


def evidence_risk(one: Evidence) -> float:
    """Risk in [0, 1] from one detector: 0.5 at its threshold, rising with the fourth power of score / threshold."""
    if not one.threshold or not one.score or one.threshold <= 0 or one.score <= 0:
        return float(one.flagged)
    ratio = min(one.score / one.threshold, 10.0) ** 4
    return ratio / (1 + ratio)


def _kinds(counted: Sequence[Evidence], signs: Mapping[str, Sign]) -> _Kinds:
    """The flagged evidence of each strong kind; a detector that does not work on such networks does not count."""
    usable = [one for one in counted if not one.not_applicable]
    found = {sign: [one for one in usable if signs[one.detector] == sign] for sign in STRONG}
    return {sign: seen for sign, seen in found.items() if seen}


def _labels(seen: Iterable[Evidence]) -> frozenset[int]:
    return _union(one.labels for one in seen)


def _common_labels(kinds: _Kinds) -> frozenset[int]:
    """The labels that most kinds name, at least two; empty if there are none, or if these kinds share no label.

    Of kinds that all name several labels it takes all: each sees only some of the targets of an all-to-all backdoor.
    """
    named = [labels for labels in map(_labels, kinds.values()) if labels]
    votes = Counter(label for labels in named for label in labels)
    most = max(votes.values(), default=0)
    if most < 2:
        return frozenset()
    agreeing = [labels for labels in named if any(votes[label] == most for label in labels)]
    common = reduce(frozenset.intersection, agreeing)
    return _union(agreeing) if common and all(len(labels) > 1 for labels in agreeing) else common


def _union(named: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*named)


def _only(labels: frozenset[int]) -> int | None:
    return next(iter(labels)) if len(labels) == 1 else None


def _several(labels: frozenset[int]) -> tuple[int, ...]:
    return tuple(sorted(labels)) if len(labels) > 1 else ()


def _sources(seen: Sequence[Evidence]) -> tuple[int, ...]:
    return tuple(sorted({label for one in seen for label in one.sources}))


def _risk(evidence: Sequence[Evidence]) -> float:
    return max(map(evidence_risk, evidence))


def _suspicious(counted: Sequence[Evidence], kinds: _Kinds, findings: tuple[Finding, ...]) -> Judgement:
    """The verdict of flagged evidence that does not suffice; it names all labels of the strong kinds, if there are any.

    Without strong evidence it names a label only if the other detectors do not disagree on it.
    """
    strong = [one for seen in kinds.values() for one in seen if one.labels]
    labels = _labels(strong or counted)
    several = _several(labels) if strong else ()
    reasons = (_insufficient(kinds),) if kinds else ()
    found = (*findings, *reasons)
    return Judgement("suspicious", _risk(counted), _only(labels), found, several, _sources(strong or counted))


def _of_silence(
    detectors: Sequence[Detector],
    evidence: Sequence[Evidence],
    signs: Mapping[str, Sign],
    sanity: Sanity | None,
    findings: tuple[Finding, ...],
) -> Judgement:
    """The verdict if nothing counts as a finding: clean if everything that is needed for it was looked at."""
    valid = _weighed([one for one in evidence if one.valid], signs)
    if sanity is None:
        what = "No clean data was given, so only data-free detectors ran. They cannot show that a model is clean."
        return _inconclusive(what, findings)
    if len(valid) < len(evidence):
        return _inconclusive(_failed(evidence), findings)
    missing = [reason for sign in NEEDED if (reason := _missing(sign, valid, signs))]
    if missing or any(one.flagged and one.not_applicable for one in valid):
        ran = ", ".join(one.id for one in detectors) or "none"
        what = " ".join(missing) or next(one.not_applicable for one in valid if one.flagged and one.not_applicable)
        return _inconclusive(f"{what} So the model cannot be called clean (detectors: {ran}).", findings)
    quiet = [one for one in valid if not (one.natural or one.supporting)]
    return Judgement("clean", _risk(quiet) if quiet else 0.0, None, (*findings, *_reserves(valid, signs)))


def _missing(sign: Sign, valid: Sequence[Evidence], signs: Mapping[str, Sign]) -> str:
    """Why nobody knows whether there is evidence of this kind, in a sentence; empty if a detector looked for it."""
    looked = [one for one in valid if signs[one.detector] == sign and one.supporting in ("", _UNCONFIRMED)]
    if not looked:
        return f"No detector looked for {SIGNS[sign]}."
    if any(not one.not_applicable and not one.unseen for one in looked):
        return ""
    return next(one.not_applicable or _about_unseen(one) for one in looked)


def _about_unseen(one: Evidence) -> str:
    return f"{one.detector} did not look at {some(one.unseen)}."


def _failed(evidence: Sequence[Evidence]) -> str:
    spoiled = [one for one in evidence if not one.valid]
    why = "".join(f" {one.error}" for one in spoiled if one.error)
    return f"No finite score from {', '.join(one.detector for one in spoiled)}.{why}"


def _inconclusive(message: str, findings: tuple[Finding, ...]) -> Judgement:
    reason = Finding(rule_id=NOT_JUDGED.id, severity="medium", message=message)
    return Judgement("inconclusive", None, None, (reason, *findings))


def _finding(one: Evidence, detectors: Sequence[Detector]) -> Finding:
    """The finding of flagged evidence."""
    detector = next(other for other in detectors if other.id == one.detector)
    points = f" and points to {_in_words(one.labels)}" if one.labels else ""
    origin = f" from images of {_in_words(frozenset(one.sources))}" if one.sources else ""
    message = f"{one.detector} scores {one.score:.4g}, above its threshold of {one.threshold:.4g}{points}{origin}."
    if one.supporting:
        message = " ".join([message, *one.remarks, one.supporting, *_limits(one)])
        return Finding(rule_id=detector.rule.id, severity="low", message=message)
    if one.natural:
        message = " ".join([one.natural, message, *one.remarks, *_limits(one)])
        return Finding(rule_id=NATURAL.id, severity="low", message=message)
    severity: Severity = "high" if detector.sign in STRONG else "medium"
    message = " ".join([message, *one.remarks, *_limits(one)])
    return Finding(rule_id=detector.rule.id, severity=severity, message=message, atlas=tuple(ATLAS))


def _in_words(labels: frozenset[int]) -> str:
    return f"label{'s' if len(labels) > 1 else ''} {some([str(label) for label in sorted(labels)], most=10)}"


def _limits(one: Evidence) -> list[str]:
    unseen = [_about_unseen(one)] if one.unseen else []
    return [*one.limits, *unseen, *([one.not_applicable] if one.not_applicable else [])]


def _reserves(valid: Sequence[Evidence], signs: Mapping[str, Sign]) -> list[Finding]:
    """A finding for each strong detector whose score below the threshold is uncertain: it is near, or has limits."""
    quiet = [one for one in valid if not one.flagged and signs[one.detector] in STRONG]
    return [
        Finding(
            rule_id=NOT_JUDGED.id,
            severity="low" if one.near else "info",
            message=" ".join([*one.remarks, *_limits(one)]),
        )
        for one in quiet
        if one.near or _limits(one)
    ]


def _insufficient(kinds: _Kinds) -> Finding:
    """Why strong evidence does not make the model backdoored."""
    found = "; ".join(f"{SIGNS[sign]} ({_named(seen)})" for sign, seen in kinds.items())
    message = f"A verdict of backdoored needs two kinds of evidence that name the same label. This model has: {found}."
    return Finding(rule_id=NOT_JUDGED.id, severity="medium" if len(kinds) > 1 else "info", message=message)


def _named(seen: Sequence[Evidence]) -> str:
    labels = _labels(seen)
    return _in_words(labels) if labels else "no label"


def _confirmation(kinds: _Kinds, common: frozenset[int]) -> Finding:
    named = {sign: seen for sign, seen in kinds.items() if _labels(seen) & common}
    found = "; ".join(f"{SIGNS[sign]} ({some([one.detector for one in seen])})" for sign, seen in named.items())
    message = f"Backdoor to {_in_words(common)}: {len(named)} independent kinds of evidence agree: {found}."
    return Finding(rule_id=CONFIRMED.id, severity="critical", message=message, atlas=tuple(ATLAS))
