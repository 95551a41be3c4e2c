"""Derives the verdict from the evidence.

Decisive detectors give the verdict and the label; the others corroborate or disagree. The verdict is ``clean`` only if
a decisive detector ran on clean data on which the model is accurate. A finding reports evidence that is near its
threshold or has limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.analysis import Sanity
from bdprune.methods import Detector
from bdprune.record import Evidence, Finding, Severity, Verdict
from bdprune.verdict.rules import ATLAS, CONFIRMED, NOT_JUDGED


@dataclass(frozen=True)
class Judgement:
    """The verdict on one model; ``risk`` is in [0, 1], or None if the model could not be judged."""

    verdict: Verdict
    risk: float | None
    target_label: int | None
    findings: tuple[Finding, ...]


def judge(detectors: Sequence[Detector], evidence: Sequence[Evidence], sanity: Sanity | None) -> Judgement:
    """The verdict that follows from the evidence.

    Args:
        detectors: the detectors that ran.
        evidence: the evidence of each; a score that is not finite does not count.
        sanity: the check of the model on the clean data; None without clean data.
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
    """Risk in [0, 1] from one detector: 0.5 at its threshold, rising with the fourth power of score / threshold."""
    if not one.threshold or not one.score or one.threshold <= 0 or one.score <= 0:
        return float(one.flagged)
    ratio = min(one.score / one.threshold, 10.0) ** 4
    return ratio / (1 + ratio)


def _of_flagged(
    leading: Sequence[Evidence], flagged: Sequence[Evidence], valid: Sequence[Evidence], findings: tuple[Finding, ...]
) -> Judgement:
    """The verdict if a decisive detector flags the model: backdoored if no detector names another label."""
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
        return "No clean data was given, so only data-free detectors ran. They cannot show that a model is clean."
    spoiled = [one for one in evidence if not one.valid]
    if spoiled:
        why = "".join(f" {one.error}" for one in spoiled if one.error)
        return f"No finite score from {', '.join(one.detector for one in spoiled)}.{why}"
    ran = ", ".join(one.id for one in detectors) or "none"
    return f"No detector ran that can show that a model is clean (ran: {ran})."


def _inconclusive(message: str, findings: tuple[Finding, ...]) -> Judgement:
    reason = Finding(rule_id=NOT_JUDGED.id, severity="medium", message=message)
    return Judgement("inconclusive", None, None, (reason, *findings))


def _finding(one: Evidence, detectors: Sequence[Detector]) -> Finding:
    detector = next(other for other in detectors if other.id == one.detector)
    severity: Severity = "high" if detector.decisive else "medium"
    label = "" if one.target_label is None else f" and points to label {one.target_label}"
    message = f"{one.detector} scores {one.score:.4g}, above its threshold of {one.threshold:.4g}{label}."
    message = " ".join([message, *one.remarks, *_limits(one)])
    return Finding(rule_id=detector.rule.id, severity=severity, message=message, atlas=tuple(ATLAS))


def _limits(one: Evidence) -> list[str]:
    return [*one.limits, *([one.not_applicable] if one.not_applicable else [])]


def _reserve(one: Evidence) -> tuple[Finding, ...]:
    """A finding if a score below the threshold is uncertain: because it is near, or the evidence has limits."""
    if not one.near and not _limits(one):
        return ()
    message = " ".join([*one.remarks, *_limits(one)])
    return (Finding(rule_id=NOT_JUDGED.id, severity="low" if one.near else "info", message=message),)


def _disagreement(leading: Sequence[Evidence], rivals: Sequence[Evidence]) -> Finding:
    says = ", ".join(f"{one.detector} says {one.target_label}" for one in leading if one.target_label is not None)
    others = ", ".join(
        str(label) for label in sorted({one.target_label for one in rivals if one.target_label is not None})
    )
    message = f"The detectors disagree on the target label: {says}, others say {others}."
    return Finding(rule_id=NOT_JUDGED.id, severity="medium", message=message)


def _confirmation(flagged: Sequence[Evidence], label: int) -> tuple[Finding, ...]:
    count = len({one.detector for one in flagged})
    if count < 2:
        return ()
    message = f"Backdoor to label {label}: {count} detectors see it independently."
    return (Finding(rule_id=CONFIRMED.id, severity="critical", message=message, atlas=tuple(ATLAS)),)
