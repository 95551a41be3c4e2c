"""From evidence to a verdict.

The unlearning detector leads: it gives the verdict and the label. The others corroborate or disagree. Nothing is ever
called clean unless the leading detector ran on clean data that the model handles well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.data.sanity import Sanity
from bdprune.detect.base import Evidence
from bdprune.scan.result import Finding, Severity, Verdict

LEADER = "bdprune.unlearning"
RULES = {LEADER: "BD030", "bdprune.lipschitz": "BD020", "bdprune.suspiciousness": "BD020"}

_ATLAS = ("AML.T0018.000", "AML.T0043.004")  # Poison AI Model; Insert Backdoor Trigger


@dataclass(frozen=True)
class Judgement:
    """The verdict on one model; ``risk`` is in [0, 1] and None where nothing could be judged."""

    verdict: Verdict
    risk: float | None
    target_label: int | None
    findings: tuple[Finding, ...]


def judge(evidence: Sequence[Evidence], sanity: Sanity | None) -> Judgement:
    """The verdict that the evidence allows.

    Args:
        evidence: of every detector that ran; a score that is not finite says nothing.
        sanity: how the model does on the clean data; None when there were none.
    """
    heard = [one for one in evidence if _is_heard(one)]
    flagged = [one for one in heard if one.flagged]
    leader = next((one for one in heard if one.detector == LEADER), None) if sanity is not None else None
    findings = tuple(map(_finding, flagged))
    if sanity is not None and not sanity.ok:
        return _inconclusive(f"{sanity.message} {sanity.suggestion}".rstrip(), findings)
    if leader is None:
        if flagged:
            return Judgement("suspicious", _risk(flagged), _agreed_label(flagged), findings)
        return _inconclusive(_silence(evidence, sanity), findings)
    if not flagged and len(heard) < len(evidence):
        return _inconclusive(_silence(evidence, sanity), findings)
    if not leader.flagged:
        return Judgement("suspicious" if flagged else "clean", _risk(heard), _agreed_label(flagged), findings)
    label = leader.target_label
    rivals = {one.target_label for one in flagged} - {None, label}
    if label is None:
        return Judgement("suspicious", _risk(heard), _agreed_label(flagged), findings)
    if rivals:
        return Judgement("suspicious", _risk(heard), label, (*findings, _disagreement(label, rivals)))
    return Judgement("backdoored", _risk([leader]), label, (*findings, *_confirmation(flagged, label)))


def evidence_risk(one: Evidence) -> float:
    """Risk in [0, 1] that one detector alone sees: a half at its threshold, rising with the ratio to the fourth."""
    if one.threshold <= 0 or one.score <= 0:
        return float(one.flagged)
    ratio = min(one.score / one.threshold, 10.0) ** 4
    return ratio / (1 + ratio)


def _is_heard(one: Evidence) -> bool:
    return math.isfinite(one.score) and math.isfinite(one.threshold)


def _risk(heard: Sequence[Evidence]) -> float:
    return max(map(evidence_risk, heard))


def _agreed_label(flagged: Sequence[Evidence]) -> int | None:
    labels = {one.target_label for one in flagged} - {None}
    return labels.pop() if len(labels) == 1 else None


def _silence(evidence: Sequence[Evidence], sanity: Sanity | None) -> str:
    if sanity is None:
        return "No clean data was given: only data-free detectors ran, and their silence proves nothing."
    spoiled = [one for one in evidence if not _is_heard(one)]
    if spoiled:
        why = "".join(f" {one.details['error']}" for one in spoiled if "error" in one.details)
        return f"No finite score from {', '.join(one.detector for one in spoiled)}.{why}"
    return f"{LEADER} did not run, and the silence of the others proves nothing."


def _inconclusive(message: str, findings: tuple[Finding, ...]) -> Judgement:
    return Judgement(
        "inconclusive", None, None, (Finding(rule_id="BD000", severity="medium", message=message), *findings)
    )


def _finding(one: Evidence) -> Finding:
    severity: Severity = "high" if one.detector == LEADER else "medium"
    label = "" if one.target_label is None else f" and points to label {one.target_label}"
    message = f"{one.detector} scores {one.score:.4g}, above its threshold of {one.threshold:.4g}{label}."
    return Finding(rule_id=RULES.get(one.detector, "BD020"), severity=severity, message=message, atlas=_ATLAS)


def _disagreement(label: int | None, rivals: set[int | None]) -> Finding:
    others = ", ".join(str(rival) for rival in sorted(rival for rival in rivals if rival is not None))
    message = f"The detectors disagree on the target label: {LEADER} says {label}, others say {others}."
    return Finding(rule_id="BD000", severity="medium", message=message)


def _confirmation(flagged: Sequence[Evidence], label: int | None) -> tuple[Finding, ...]:
    count = len({one.detector for one in flagged})
    if count < 2:
        return ()
    named = "" if label is None else f" to label {label}"
    message = f"Backdoor{named}: {count} detectors see it independently."
    return (Finding(rule_id="BD101", severity="critical", message=message, atlas=_ATLAS),)
