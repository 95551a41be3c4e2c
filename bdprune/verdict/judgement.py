"""From evidence to a verdict.

The unlearning detector leads: it gives the verdict and the label. The others corroborate or disagree. Nothing is ever
called clean unless the leading detector ran on clean data that the model handles well. A verdict that is near the
detector's threshold, or that rests on few images or few classes, says so in a finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.analysis import Sanity
from bdprune.methods import Evidence
from bdprune.record import Finding, Severity, Verdict

LEADER = "bdprune.unlearning"
RULES = {LEADER: "BD030", "bdprune.lipschitz": "BD020", "bdprune.suspiciousness": "BD020"}

FEW_IMAGES, FEW_CLASSES = 300, 10
"""A verdict on fewer images or fewer classes says what it is worth."""

_NO_NORM = (
    "The network has no batch norm, and unlearning tells nothing sure of such a network: with the norms folded into "
    "the convs, a backdoored network was missed and a clean one flagged."
)
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
    if _has_no_norm(leader) and all(one.detector == LEADER for one in flagged):
        return _inconclusive(_NO_NORM, findings)
    if not leader.flagged:
        verdict: Verdict = "suspicious" if flagged else "clean"
        return Judgement(verdict, _risk(heard), _agreed_label(flagged), (*findings, *_reserve(leader)))
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
    message = " ".join([message, *_how_near(one), *_what_it_is_worth(one)])
    return Finding(rule_id=RULES.get(one.detector, "BD020"), severity=severity, message=message, atlas=_ATLAS)


def _reserve(leader: Evidence) -> tuple[Finding, ...]:
    """What takes confidence from a lead below the threshold: that it is near, few images, few classes, no norms."""
    near, worth = bool(leader.details.get("near")), _what_it_is_worth(leader)
    if not near and not worth:
        return ()
    message = " ".join([*_how_near(leader), *worth])
    return (Finding(rule_id="BD000", severity="low" if near else "info", message=message),)


def _has_no_norm(leader: Evidence) -> bool:
    """Whether the evidence is of a network of a kind on which the detector was never right."""
    return leader.details.get("batch_norms") == 0


def _how_near(one: Evidence) -> list[str]:
    """The lead beside the threshold, in a sentence; nothing of a detector that has no runs to tell of."""
    leads, images = one.details.get("leads"), one.details.get("images")
    if not leads or images is None:
        return []
    error = one.details.get("standard_error")
    spread = "" if error is None else f" +- {error:.3f}"
    orders = "1 order" if len(leads) == 1 else f"{len(leads)} orders"
    side = "above" if one.flagged else "below"
    near = ", but near it" if one.details.get("near") else ""
    lead = f"The lead is {one.score:.3f}{spread} over {orders} of {images} images"
    return [f"{lead}, {side} the threshold of {one.threshold:.3f}{near}."]


def _what_it_is_worth(one: Evidence) -> list[str]:
    """The limits of a lead, a sentence each."""
    limits = []
    if one.details.get("images", FEW_IMAGES) < FEW_IMAGES:
        limits.append(f"With fewer than {FEW_IMAGES} images other images may give another lead.")
    classes = len(one.details.get("flip_shares", ()))
    if 0 < classes < FEW_CLASSES:
        limits.append(
            f"Of {classes} classes a lead says little: clean networks have one too, so the threshold is high and many "
            "backdoored networks stay below it."
        )
    if _has_no_norm(one):
        limits.append(_NO_NORM)
    return limits


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
