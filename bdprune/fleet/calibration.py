"""Fits a calibration to the scans of a zoo, and says what it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdprune.analysis import Sanity
from bdprune.errors import DataError
from bdprune.fleet.references import ReferenceScan, ReferenceZoo, level_detectors
from bdprune.methods import Detector
from bdprune.record import Evidence, Level
from bdprune.registry import chosen_detectors
from bdprune.verdict import Calibration, Evaluation, Judgement, Known, Measure, Rate, evaluate, fit_table, judge
from bdprune.zoo import Entry, Storage

LEAST_SUCCESS = 0.5
"""A network whose trigger works on fewer of the test images is neither clean nor backdoored."""


@dataclass(frozen=True)
class Calibrated:
    """A fitted table.

    Attributes:
        table: the table.
        evaluation: of the table, with groups of networks held out.
        known: the networks that it was fitted to.
        left: network -> why it was left out, in words.
        not_run: networks of the manifest that were not scanned.
    """

    table: Calibration
    evaluation: Evaluation
    known: tuple[Known, ...]
    left: Mapping[str, str]
    not_run: tuple[str, ...]


def calibrate(zoo: ReferenceZoo, scans: Sequence[ReferenceScan], budget: Level = "default") -> Calibrated:
    """Fits a table to the scans of a zoo's networks.

    Args:
        zoo: the networks, with their measured truth.
        scans: of these networks.
        budget: of the scans.

    Raises:
        DataError: fewer than two clean networks or fewer than two attacks are left, or a detector is unknown.
    """
    detectors = chosen_detectors(level_detectors(budget), {})
    known, left = list[Known](), dict[str, str]()
    for scan in scans:
        entry = zoo.manifest.entry(scan.network)
        reason = scan.reason or _failed_attack(zoo, entry)
        if reason:
            left[scan.network] = reason
        else:
            known.append(_known(entry, scan, detectors))
    kinds = [one.backdoored for one in known]
    families = {one.family for one in known if one.backdoored}
    if kinds.count(False) < 2 or len(families) < 2:
        raise DataError(
            "A calibration needs at least two clean networks, and backdoored ones of two attacks. "
            f"There are {kinds.count(False)} clean ones and {kinds.count(True)} backdoored ones of {len(families)} "
            "attacks.",
            "Train more networks with `bdprune zoo make`.",
        )
    made = {scan.network for scan in scans}
    absent = [entry for entry in zoo.manifest.models if entry.name not in made]
    left |= {entry.name: reason for entry in absent if (reason := _failed_attack(zoo, entry))}
    there = {entry.name for entry in zoo.made()}
    waiting = tuple(entry.name for entry in absent if entry.name not in left and entry.name not in there)
    table = fit_table(zoo.manifest.name, budget, known)
    return Calibrated(table, evaluate(known), tuple(known), left, waiting)


def _failed_attack(zoo: ReferenceZoo, entry: Entry) -> str:
    truth = Storage(zoo.manifest, zoo.models).record(entry)
    success = truth.attack_success_rate if truth else None
    if success is None or success >= LEAST_SUCCESS:
        return ""
    return f"Its trigger works on only {100 * success:.0f} % of the test images."


def _known(entry: Entry, scan: ReferenceScan, detectors: Sequence[Detector]) -> Known:
    attack = entry.make_attack()
    family = "" if attack is None else attack.family
    targets = frozenset() if attack is None or attack.target is None else frozenset({attack.target})
    evidence, judgement = as_scanned(scan.evidence, detectors)
    return Known(entry.name, scan.arch, family, targets, evidence, judgement, scan.evidence)


def as_scanned(evidence: Sequence[Evidence], detectors: Sequence[Detector]) -> tuple[tuple[Evidence, ...], Judgement]:
    """The evidence that a scan would have, and its verdict: a scan ends once its verdict is sure.

    Args:
        evidence: of all detectors, in the order of a scan.
        detectors: which gave the evidence, in any order.

    Raises:
        DataError: there is evidence of another detector.
    """
    sane = Sanity(1.0, True, "")
    by_id = {one.id: one for one in detectors}
    unknown = [one.detector for one in evidence if one.detector not in by_id]
    if unknown:
        raise DataError(
            f"The scans hold evidence of {unknown[0]}, which a scan with this budget does not run.",
            "Scan the networks again with another file for the rows.",
        )
    ran = [by_id[one.detector] for one in evidence]
    for count in range(1, len(evidence)):
        judgement = judge(ran[:count], evidence[:count], sane)
        if judgement.verdict == "backdoored":
            return tuple(evidence[:count]), judgement
    return tuple(evidence), judge(ran, evidence, sane)


def calibration_page(found: Calibrated) -> str:
    """The evaluation as Markdown."""
    worth = found.evaluation
    count = (
        f"{len(worth.networks)} networks, {worth.backdoored} of them backdoored, of {len(_archs(found))} architectures"
    )
    parts = (_measures_table(worth), _verdicts(worth), _alone(found), _families(found), _left_out(found))
    lines = [f"Fitted to {count}. Budget: `{found.table.budget}`.", *(line for part in parts for line in ("", *part))]
    return "\n".join(lines) + "\n"


def _archs(found: Calibrated) -> list[str]:
    return sorted({one.arch for one in found.known})


def _measures_table(worth: Evaluation) -> list[str]:
    rows: list[tuple[str, str]] = [
        ("AUROC", "auroc"),
        ("found above every clean network", "found"),
        ("found at a false positive rate of 1 %", "found_at_1"),
        ("cross-entropy, nats", "entropy"),
        ("expected calibration error", "error"),
    ]
    lines = ["| measure (95 % interval) | attack families held out | architectures held out |", "|---|---|---|"]
    for title, name in rows:
        cells = [_interval(getattr(one, name)) for one in (worth.by_family, worth.by_arch)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _interval(one: Measure) -> str:
    return "–" if math.isnan(one.value) else f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def _verdicts(worth: Evaluation) -> list[str]:
    found = ", ".join(f"{count} {verdict}" for verdict, count in worth.verdicts.items())
    return [
        f"Verdicts on the {worth.backdoored} backdoored networks: {found}. "
        f"Of those called backdoored, {worth.labels.hits} of {worth.labels.count} have the right label. "
        f"Clean networks called backdoored: {_rate(worth.false_backdoored)}; "
        f"suspicious: {_rate(worth.false_suspicious)}."
    ]


def _rate(one: Rate) -> str:
    return f"{one.hits} of {one.count} (exact 95 % bound {100 * one.bound:.1f} %)"


def _alone(found: Calibrated) -> list[str]:
    weights = {one.detector: one.weight for one in found.table.inputs}
    lines = ["| detector | AUROC alone | networks | weight |", "|---|---|---|---|"]
    for detector, (area, count) in found.evaluation.alone.items():
        weight = f"{weights[detector]:.2f}" if detector in weights else "–"
        lines.append(f"| `{detector.removeprefix('bdprune.')}` | {area:.2f} | {count} | {weight} |")
    lines += [f"| two kinds agree | | {len(found.known)} | {found.table.agreement:.2f} |"]
    return lines


def _families(found: Calibrated) -> list[str]:
    lines = [
        "| attack | networks | backdoored | suspicious | clean | inconclusive | label right |",
        "|---|---|---|---|---|---|---|",
    ]
    networks = found.evaluation.networks
    for family in sorted({one.family for one in networks}):
        own = [one for one in networks if one.family == family]
        verdicts = [one.judgement.verdict for one in own]
        counts = " | ".join(str(verdicts.count(one)) for one in ("backdoored", "suspicious", "clean", "inconclusive"))
        right = f"{sum(one.label_right for one in own)}" if family else "–"
        lines.append(f"| {family or 'none'} | {len(own)} | {counts} | {right} |")
    return lines


def _left_out(found: Calibrated) -> list[str]:
    lines = [f"- `{name}` was left out. {reason}" for name, reason in found.left.items()]
    if found.not_run:
        lines.append(
            f"- Not run, because weights or measurements are missing: {', '.join(f'`{one}`' for one in found.not_run)}."
        )
    return lines
