"""From evidence to a verdict.

Detectors that call themselves decisive give the verdict and the label; the others corroborate or disagree. Nothing is
ever called clean unless a decisive detector ran on clean data that the model handles well. Evidence that is near its
threshold, or that has limits of its own, says so in a finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.analysis import Sanity
from bdprune.methods import Detector
from bdprune.record import Evidence, Finding, Severity, Verdict

_ATLAS = ("AML.T0018.000", "AML.T0043.004")  # Poison AI Model; Insert Backdoor Trigger


@dataclass(frozen=True)
class Judgement:
    """The verdict on one model; ``risk`` is in [0, 1] and None where nothing could be judged."""

    verdict: Verdict
    risk: float | None
    target_label: int | None
    findings: tuple[Finding, ...]


def judge(detectors: Sequence[Detector], evidence: Sequence[Evidence], sanity: Sanity | None) -> Judgement:
    """The verdict that the evidence allows.

    Args:
        detectors: that ran.
        evidence: of each; a score that is not finite says nothing.
        sanity: how the model does on the clean data; None when there were none.
    """
    valid = [one for one in evidence if one.valid]
    flagged = [one for one in valid if one.flagged]
    ids = {one.id for one in detectors if one.decisive and sanity is not None}
    decisive = [one for one in valid if one.detector in ids]
    findings = tuple(_finding(one, detectors) for one in flagged)
    if sanity is not None and not sanity.ok:
        return _inconclusive(f"{sanity.message} {sanity.suggestion}".rstrip(), findings)
    if not decisive and flagged:
        return Judgement("suspicious", _risk(flagged), _agreed_label(flagged), findings)
    if not decisive or (not flagged and len(valid) < len(evidence)):
        return _inconclusive(_silence(detectors, evidence, sanity), findings)
    reasons = [one.not_applicable for one in decisive]
    if all(reasons) and all(one in decisive for one in flagged):
        return _inconclusive(reasons[0], findings)
    leading = [one for one in decisive if one.flagged]
    if leading:
        return _of_flagged(leading, flagged, valid, findings)
    reserves = tuple(reserve for one in decisive for reserve in _reserve(one))
    verdict: Verdict = "suspicious" if flagged else "clean"
    return Judgement(verdict, _risk(valid), _agreed_label(flagged), (*findings, *reserves))


def evidence_risk(one: Evidence) -> float:
    """Risk in [0, 1] that one detector alone sees: a half at its threshold, rising with the ratio to the fourth."""
    if not one.threshold or not one.score or one.threshold <= 0 or one.score <= 0:
        return float(one.flagged)
    ratio = min(one.score / one.threshold, 10.0) ** 4
    return ratio / (1 + ratio)


def _of_flagged(
    leading: Sequence[Evidence], flagged: Sequence[Evidence], valid: Sequence[Evidence], findings: tuple[Finding, ...]
) -> Judgement:
    """The verdict where a decisive detector flags the model: backdoored if there is one label that nobody disputes."""
    label = _agreed_label(leading)
    if label is None:
        return Judgement("suspicious", _risk(valid), _agreed_label(flagged), findings)
    rivals = [one for one in flagged if one.target_label not in (None, label)]
    if rivals:
        return Judgement("suspicious", _risk(valid), label, (*findings, _disagreement(leading, rivals)))
    return Judgement("backdoored", _risk(leading), label, (*findings, *_confirmation(flagged, label)))


def _risk(evidence: Sequence[Evidence]) -> float:
    return max(map(evidence_risk, evidence))


def _agreed_label(flagged: Sequence[Evidence]) -> int | None:
    labels = {one.target_label for one in flagged} - {None}
    return labels.pop() if len(labels) == 1 else None


def _silence(detectors: Sequence[Detector], evidence: Sequence[Evidence], sanity: Sanity | None) -> str:
    if sanity is None:
        return "No clean data was given: only data-free detectors ran, and their silence proves nothing."
    spoiled = [one for one in evidence if not one.valid]
    if spoiled:
        why = "".join(f" {one.error}" for one in spoiled if one.error)
        return f"No finite score from {', '.join(one.detector for one in spoiled)}.{why}"
    ran = ", ".join(one.id for one in detectors) or "None"
    return f"No detector ran whose silence proves anything ({ran})."


def _inconclusive(message: str, findings: tuple[Finding, ...]) -> Judgement:
    reason = Finding(rule_id="BD000", severity="medium", message=message)
    return Judgement("inconclusive", None, None, (reason, *findings))


def _finding(one: Evidence, detectors: Sequence[Detector]) -> Finding:
    detector = next(other for other in detectors if other.id == one.detector)
    severity: Severity = "high" if detector.decisive else "medium"
    label = "" if one.target_label is None else f" and points to label {one.target_label}"
    message = f"{one.detector} scores {one.score:.4g}, above its threshold of {one.threshold:.4g}{label}."
    message = " ".join([message, *one.remarks, *_limits(one)])
    return Finding(rule_id=detector.rule.id, severity=severity, message=message, atlas=_ATLAS)


def _limits(one: Evidence) -> list[str]:
    return [*one.limits, *([one.not_applicable] if one.not_applicable else [])]


def _reserve(one: Evidence) -> tuple[Finding, ...]:
    """What takes confidence from a score below the threshold: that it is near, and the limits of the evidence."""
    if not one.near and not _limits(one):
        return ()
    message = " ".join([*one.remarks, *_limits(one)])
    return (Finding(rule_id="BD000", severity="low" if one.near else "info", message=message),)


def _disagreement(leading: Sequence[Evidence], rivals: Sequence[Evidence]) -> Finding:
    says = ", ".join(f"{one.detector} says {one.target_label}" for one in leading if one.target_label is not None)
    others = ", ".join(
        str(label) for label in sorted({one.target_label for one in rivals if one.target_label is not None})
    )
    message = f"The detectors disagree on the target label: {says}, others say {others}."
    return Finding(rule_id="BD000", severity="medium", message=message)


def _confirmation(flagged: Sequence[Evidence], label: int) -> tuple[Finding, ...]:
    count = len({one.detector for one in flagged})
    if count < 2:
        return ()
    message = f"Backdoor to label {label}: {count} detectors see it independently."
    return (Finding(rule_id="BD101", severity="critical", message=message, atlas=_ATLAS),)
