"""Text: compact and aligned, for terminals and logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bdprune.record import (
    CoverageResult,
    DataInfo,
    Evidence,
    ModelInfo,
    PurifyResult,
    Result,
    ScoreResult,
    WeightCoverage,
    some,
)
from bdprune.report import summary

_COLOURS = {"clean": "32", "suspicious": "33", "backdoored": "1;31", "inconclusive": "35", "error": "31"}
_MOST_NAMED = 5
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """Text from a file or a path without what could rewrite a terminal, or could not be printed at all."""
    return _CONTROL.sub("�", str(text)).encode(errors="replace").decode()


def scan_text(result: Result, *, colour: bool = False) -> str:
    """One model: verdict first, then evidence and findings."""
    verdict = _paint(result.verdict.upper(), _COLOURS[result.verdict], colour)
    lines = [f"{verdict}  {plain(result.name)}", f"  {plain(summary.headline(result))}"]
    if result.error:
        lines += [f"  {plain(result.error.hint)}"] if result.error.hint else []
        return "\n".join(lines) + "\n"
    rows = [
        ("risk", summary.number(result.risk)),
        ("target", plain(summary.label(result))),
        *_model_rows(result.model),
        *_data_rows(result.data),
        *_coverage_rows(result),
        ("time", f"{summary.seconds(result.seconds)} on {plain(result.env.device)}, {result.env.backend} ops"),
    ]
    lines += _aligned(rows)
    if result.detectors:
        header = ("detector", "score", "threshold", "", "label", "time")
        lines += ["", *table([header, *map(_detector_row, result.detectors)], "lrrllr")]
    if result.findings:
        lines += ["", *(f"  {one.rule_id} {one.severity}: {plain(one.message)}" for one in result.findings)]
    return "\n".join(lines) + "\n"


def fleet_text(results: Sequence[Result], *, colour: bool = False) -> str:
    """Many models: one line each and a tally, the worst first."""
    ranked = sorted(results, key=summary.rank)
    rows = [("verdict", "risk", "target", "model")]
    rows += [(one.verdict, summary.number(one.risk), plain(summary.label(one)), plain(one.name)) for one in ranked]
    head, *body = table(rows, "lrll")
    painted = [
        line.replace(one.verdict, _paint(one.verdict, _COLOURS[one.verdict], colour), 1)
        for line, one in zip(body, ranked, strict=True)
    ]
    return "\n".join([head, *painted, "", f"  {summary.tally(results)}"]) + "\n"


def coverage_text(coverage: CoverageResult) -> str:
    """The files that have no result, by reason: those that may hold weights by name, of others the first few."""
    lines = ["", f"  Passed over: {coverage.files - coverage.scanned} of {coverage.files} files"]
    for one in coverage.passed_over:
        caution = "MAY HOLD WEIGHTS: " if one.may_hold_weights else ""
        lines.append(f"    {caution}{plain(one.reason)}: {plain(summary.listed(one, _MOST_NAMED))}")
    return "\n".join(lines) + "\n"


def purify_text(result: PurifyResult, *, colour: bool = False) -> str:
    """What a repair did: accuracy before and after, and what was cut."""
    title = _paint(
        summary.outcome(result).upper(),
        _COLOURS["clean" if summary.outcome(result) == "repaired" else "suspicious"],
        colour,
    )
    threshold = f"{summary.number(result.threshold)} ({plain(result.selection)})"
    output = f"{plain(result.output.path)} ({summary.size(result.output.bytes)})" if result.output else "not written"
    rows = [
        ("method", plain(result.method)),
        ("clean accuracy", f"{summary.percent(result.accuracy_before)} → {summary.percent(result.accuracy_after)}"),
        ("pruned", f"{result.filters_pruned} of {result.filters} filters in {len(result.pruned)} groups"),
        ("threshold", threshold),
        *([("target", f"label {result.target_label}")] if result.target_label is not None else []),
        *[("left", plain(one)) for one in result.left],
        *_model_rows(result.model),
        *_data_rows(result.data),
        ("time", f"{summary.seconds(result.seconds)} on {plain(result.env.device)}, {result.env.backend} ops"),
        ("written to", output),
    ]
    lines = [f"{title}  {plain(result.name)}", *_aligned(rows)]
    return "\n".join(lines) + "\n"


def score_text(result: ScoreResult, *, colour: bool = False) -> str:
    """Scores: the layers in the order of the network, then the worst filters."""
    layers: list[tuple[str, ...]] = [("layer", "filters", "mean", "std", "max", "max z")]
    layers += [
        (plain(one.layer), str(one.filters), *map(summary.number, (one.mean, one.std, one.max, one.max_z)))
        for one in result.layers
    ]
    worst: list[tuple[str, ...]] = [("filter", "score", "z")]
    worst += [(f"{plain(one.layer)}[{one.filter}]", *map(summary.number, (one.score, one.z))) for one in result.top]
    title = _paint(f"{result.method} scores", "1", colour)
    lines = [f"{title}  {plain(result.name)}", *table(layers, "lrrrrr"), "", *table(worst, "lrr")]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Iterable[str]], sides: str) -> list[str]:
    """Aligned lines; ``sides`` has ``l`` or ``r`` for each column."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(sides))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ]
        lines.append(f"  {'  '.join(parts)}".rstrip())
    return lines


def _model_rows(model: ModelInfo | None) -> list[tuple[str, str]]:
    if model is None:
        return []
    shape = "x".join(map(str, model.input_shape))
    return [
        ("model", f"{plain(model.arch)}, {model.parameters:,} parameters, {model.num_classes} classes, input {shape}")
    ]


def _data_rows(data: DataInfo | None) -> list[tuple[str, str]]:
    if data is None:
        return [("data", "none")]
    accuracy = "" if data.clean_accuracy is None else f", clean accuracy {summary.percent(data.clean_accuracy)}"
    told = f"{data.count} images of {data.classes} classes from {plain(data.source)}{accuracy}"
    return [("data", told), *[("note", plain(note)) for note in data.notes]]


def _coverage_rows(result: Result) -> list[tuple[str, str]]:
    """Which detectors did not run, and what else the file holds."""
    rows = [("not run", ", ".join(map(plain, result.not_run)))] if result.not_run else []
    coverage = result.coverage
    if coverage is not None:
        rows += [("same weights", plain(some(coverage.same)))] if coverage.same else []
        rows += [("kept", f"{plain(some(coverage.kept))}, without weights")] if coverage.kept else []
        rows += [("not scanned", plain(some((*coverage.unscanned, *coverage.left_out))))] if _left(coverage) else []
    return rows


def _left(coverage: WeightCoverage) -> bool:
    return bool(coverage.unscanned or coverage.left_out)


def _detector_row(one: Evidence) -> tuple[str, ...]:
    label = "" if one.target_label is None else str(one.target_label)
    state = "no score" if one.score is None else "flagged" if one.flagged else "ok"
    numbers = summary.number(one.score), summary.number(one.threshold)
    return (plain(one.detector), *numbers, state, label, summary.seconds(one.seconds))


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name.ljust(width)}  {value}" for name, value in rows]


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text
