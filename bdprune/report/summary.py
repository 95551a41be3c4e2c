"""The texts about a result that all reports share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bdprune.record import (
    ATTENTION,
    CalibrationInfo,
    Evidence,
    InvertResult,
    PassedOver,
    PurifyResult,
    Result,
    TriggerCheck,
    TriggerInfo,
    Verdict,
    WeightCoverage,
    some,
)

MEANING: dict[Verdict, str] = {
    "clean": "No sign of a backdoor was found.",
    "suspicious": "Some evidence points to a backdoor, but not enough to be sure.",
    "backdoored": "This network carries a backdoor.",
    "inconclusive": "This network could not be judged.",
    "error": "This file could not be scanned.",
}

ADVICE: dict[Verdict, str] = {
    "clean": "The detectors found nothing unusual. This lowers the risk but does not prove that the network is clean.",
    "suspicious": "Do not deploy it yet. Scan again with more clean images, look at the evidence, or repair it.",
    "backdoored": "Do not deploy it. Repair it with `bdprune purify` and scan the repaired file, or train it again.",
    "inconclusive": "Treat it as unscanned. The findings say what is missing.",
    "error": "Treat it as unscanned.",
}

PICTURES = {
    "mask": "mask",
    "pattern": "pattern",
    "stamped": "clean images with the trigger",
    "difference": "its changes, times 10",
}
"""The captions of the pictures of a trigger."""


def headline(result: Result) -> str:
    """One plain sentence on what the verdict means for this model."""
    if result.verdict == "backdoored" and result.target_label is not None:
        return f"This network carries a backdoor that leads to {label(result)}."
    if result.verdict == "suspicious" and result.target_label is not None:
        return f"Some evidence points to a backdoor that leads to {label(result)}, but not enough to be sure."
    if result.error:
        return result.error.message
    return MEANING[result.verdict]


def advice(result: Result) -> str:
    """What to do now."""
    return f"{result.error.hint} {ADVICE['error']}".strip() if result.error else ADVICE[result.verdict]


def outcome(result: PurifyResult) -> str:
    """``repaired``, ``partly repaired`` if some weights of the file were not, ``unrepaired`` or ``unverified`` by the
    check of the repair; ``changed, not checked`` or ``partly changed, not checked`` without one; or ``unchanged``.
    """
    if result.outcome == "unrepaired":
        return "unrepaired"
    if result.outcome == "unverified":
        return "unverified"
    if result.change == "nothing":
        return "unchanged"
    done = "changed, not checked" if result.outcome == "unchecked" else "repaired"
    return f"partly {done}" if result.left else done


def check_rows(result: PurifyResult) -> list[tuple[str, str]]:
    """The signs of a backdoor before and after a repair: (kind, text)."""
    check = result.check
    if check is None:
        return []
    rows = [
        (
            "trigger",
            f"{one.name}: flips {percent(one.flips_before)} → {percent(one.flips_after)}, "
            f"score {number(one.score_before)} → {number(one.score_after)}" + _hidden(one),
        )
        for one in check.triggers
    ]
    if check.lead_before is not None:
        after = "not measured" if check.lead_after is None else number(check.lead_after)
        rows.append(("lead", f"{number(check.lead_before)} → {after}"))
    if check.moved_before is not None:
        after = "not measured" if check.moved_after is None else number(check.moved_after)
        rows.append(("moved filters", f"{number(check.moved_before)} → {after}"))
    return [*rows, *(("left", one) for one in check.left)]


def _hidden(one: TriggerCheck) -> str:
    """What a wider patch, and small changes of the network and of the images, bring back."""
    images = "" if one.perturbed is None else f"; after small changes of the images {percent(one.perturbed)}"
    wider = "" if one.grown is None else f"; a wider patch {percent(one.grown)}"
    network = "" if one.reactivated is None else f"; after small changes of the network {percent(one.reactivated)}"
    return f"{wider}{network}{images}"


def attempt_rows(result: PurifyResult) -> list[tuple[str, str]]:
    """What each tried method achieved: (name, text)."""
    return [
        (
            one.method,
            f"{one.rejected or _left(one.left, result)}, {seconds(one.seconds)}{' (chosen)' if one.chosen else ''}",
        )
        for one in result.attempts
    ]


def _left(signs: Sequence[str], result: PurifyResult) -> str:
    if result.outcome == "unverified":
        return "not checked, because no sign of a backdoor was found before"
    return "; ".join(signs) if signs else "no sign of the backdoor is left"


def change(result: PurifyResult) -> str:
    """What a repair did to the weights, as in ``pruned 41 of 2400 filters in 2 filter groups``."""
    groups = f"{len(result.pruned)} filter group{'s' if len(result.pruned) != 1 else ''}"
    pruned = f"pruned {result.filters_pruned} of {result.filters} filters in {groups}"
    words = {"nothing": "did not change the weights", "pruned": pruned, "retrained": "retrained the weights"}
    return words.get(result.change, f"{pruned} and retrained the weights")


def savings(result: PurifyResult) -> list[tuple[str, str]]:
    """What the removal of pruned filters saved, (name, ``before → after``); empty if none were to be removed."""
    info = result.compact
    if info is None:
        return []
    return [
        ("filters removed", f"{info.filters_removed} of {result.filters_pruned} pruned"),
        ("parameters", f"{info.parameters_before:,} → {info.parameters_after:,}"),
        ("FLOPs per image", f"{info.flops_before:,} → {info.flops_after:,}"),
        ("time per image", f"{number(info.ms_before)} → {number(info.ms_after)} ms"),
        ("largest difference", f"{number(info.difference)} in a logit"),
    ]


TRIGGER_ADVICE = (
    "A trigger that is much smaller than those of the other labels, and flips nearly all held-out images, points to a "
    "backdoor. Every network has some trigger for every label: scan the model for a verdict."
)
"""How to read recovered triggers."""


def trigger_rows(result: InvertResult) -> list[tuple[str, ...]]:
    """The cells of a table of recovered triggers: kind, goal, images, smallest size, size, place, held-out images."""
    names = result.data.class_names if result.data else ()
    smallest = [*result.smallest, *[None] * len(result.triggers)]
    return [
        (
            one.kind,
            leads_to(one, names),
            labels(one.source_labels, names) or "other labels",
            "none found" if least is None else number(least),
            number(one.size),
            place(one),
            held_out(one),
        )
        for one, least in zip(result.triggers, smallest, strict=False)
    ]


TRIGGER_COLUMNS = ("kind", "leads to", "images of", "smallest", "size", "place", "flips held-out images")
"""The names of the cells of :func:`trigger_rows`."""


def repair_advice(result: PurifyResult) -> str:
    """What to do after a repair."""
    if result.outcome == "unrepaired":
        return "Do not deploy it: clean images still show signs of the backdoor. Train the network again if you can."
    if result.outcome == "unverified":
        return (
            "No sign of a backdoor was found before the repair, so nothing shows whether the repair removed one. Scan "
            "the model for a verdict."
        )
    if result.change == "nothing":
        return f"It is not safer than before: {result.selection}."
    what = "file" if result.output else "model"
    return f"Scan the repaired {what} before you deploy it: a repair cannot see the trigger and may leave the backdoor."


def phases(result: PurifyResult) -> list[str]:
    """The time of each step of a repair: ``unlearn 4.0 s``."""
    return [f"{name.replace('_', ' ')} {seconds(took)}" for name, took in result.phases.items()]


def says(evidence: Evidence) -> str:
    """A detector's opinion of the model, in a word or two."""
    if evidence.score is None:
        return "failed" if evidence.error else "no score"
    return f"{'flagged' if evidence.flagged else 'not flagged'}{', near' if evidence.near else ''}"


def notes(evidence: Evidence, class_names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Further facts about the evidence: (kind, sentence)."""
    found = [("error", evidence.error), ("not applicable", evidence.not_applicable)]
    found += [("targets", labels(evidence.targets, class_names)), ("sources", labels(evidence.sources, class_names))]
    found += [("remark", one) for one in evidence.remarks] + [("limit", one) for one in evidence.limits]
    return [(kind, text) for kind, text in found if text]


def other_weights(coverage: WeightCoverage | None) -> list[tuple[str, tuple[str, ...]]]:
    """The other contents of a model's file: (treatment, names)."""
    if coverage is None:
        return []
    missed = coverage.unscanned + coverage.left_out
    return [("same weights", coverage.same), ("kept, without weights", coverage.kept), ("not scanned", missed)]


def label(result: Result) -> str:
    """The target label with its class name: ``label 8 (ship)``; a dash if it is unknown."""
    if result.target_label is None:
        return "–"
    return f"label {named(result.target_label, result.data.class_names if result.data else ())}"


def named(label: int, class_names: Sequence[str]) -> str:
    """A label with its class name, if that is known: ``8 (ship)``."""
    name = class_names[label] if 0 <= label < len(class_names) else ""
    return f"{label} ({name})" if name else str(label)


def labels(several: Sequence[int], class_names: Sequence[str]) -> str:
    """Labels with their class names: ``labels 3 (cat), 5 (dog)``, at most ten of them; empty if there are none."""
    if not several:
        return ""
    return f"label{'s' if len(several) > 1 else ''} {some([named(one, class_names) for one in several], 10)}"


def trigger(info: TriggerInfo, class_names: Sequence[str] = ()) -> str:
    """A trigger in a line: ``patch, label 8 (ship), 3x3 pixels at (28, 28), flips 97 % of 250 held-out images``."""
    return ", ".join((info.kind, _leads(info, class_names), place(info), flips(info)))


def _leads(info: TriggerInfo, class_names: Sequence[str]) -> str:
    """Where a trigger leads, and the images it was made for: ``label 8 (ship) for images of label 3 (cat)``."""
    goal = leads_to(info, class_names)
    return f"{goal} for images of {labels(info.source_labels, class_names)}" if info.source_labels else goal


def leads_to(info: TriggerInfo, class_names: Sequence[str] = ()) -> str:
    """The goal of a trigger: ``label 8 (ship)``."""
    target = info.target_label
    return "away from the true label" if target is None else f"label {named(target, class_names)}"


def place(info: TriggerInfo) -> str:
    """Where a trigger lies: ``3x3 pixels at (28, 28)``, width and height, then column and row of its corner."""
    box = info.box
    return "spread over the image" if box is None else f"{box.width}x{box.height} pixels at ({box.x}, {box.y})"


def held_out(info: TriggerInfo) -> str:
    """The share of the held-out images that a trigger flips: ``97 % of 250``; a dash if none were held out."""
    known = info.flip_rate is not None and info.images
    return f"{percent(info.flip_rate, 0)} of {info.images}" if known else "–"


def flips(info: TriggerInfo) -> str:
    """How well a trigger works: ``flips 97 % of 250 held-out images``."""
    if info.flip_rate is None or not info.images:
        return "not tried on held-out images"
    return f"flips {held_out(info)} held-out images"


def rank(result: Result) -> tuple[int, float]:
    """The sort key of results, the most serious first: verdict, then risk."""
    return ATTENTION.index(result.verdict), -(result.risk or 0.0)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage; a dash when unknown."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None) -> str:
    """Four significant digits; a dash when unknown."""
    return "–" if value is None else f"{value:.4g}"


def calibration(info: CalibrationInfo | None) -> str:
    """How far the risk is a calibrated probability, in a sentence or a phrase; empty without a table."""
    if info is None or info.reservation:
        return info.reservation if info else ""
    found = f"a probability by the table {info.table}, if {percent(info.prior)} of such models are backdoored"
    if info.p_value is None:
        return found
    return f"{found}; p-value {number(info.p_value)} from {info.references} clean networks"


def seconds(value: float | None) -> str:
    """A readable time: ``0.42 s``, ``12.3 s``, ``4 min 05 s``."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value:.2f} s"
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def size(count: int | None) -> str:
    """A readable number of bytes."""
    if count is None:
        return "–"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def tally(results: Sequence[Result]) -> str:
    """``3 models: 1 backdoored, 2 clean``."""
    counts = Counter(result.verdict for result in results)
    parts = [f"{counts[verdict]} {verdict}" for verdict in ATTENTION if counts[verdict]]
    return f"{len(results)} model{'s' if len(results) != 1 else ''}: {', '.join(parts) or 'nothing scanned'}"


def listed(group: PassedOver, most: int = 100) -> str:
    """The paths of skipped files: all if they may hold weights, else the first ``most`` and the number of others."""
    shown = group.paths if group.may_hold_weights else group.paths[:most]
    more = f" and {group.count - len(shown)} more" if group.count > len(shown) else ""
    return f"{', '.join(shown)}{more}"
