"""Text: compact and aligned, for terminals and logs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from bdprune.record import (
    Attachment,
    CoverageResult,
    Document,
    Evidence,
    InspectResult,
    InvertResult,
    PurifyResult,
    Result,
    ScoreResult,
    ScreenResult,
    TriggerInfo,
    some,
)
from bdprune.report import inspections, screens, summary
from bdprune.report.base import Documents, Style, Writer

_COLOURS = {"clean": "32", "suspicious": "33", "backdoored": "1;31", "inconclusive": "35", "error": "31"}
_MOST_NAMED = 5
_MOST_ROWS = 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

Rows = list[tuple[str, object]]
_Kind = TypeVar("_Kind")


class TextWriter(Writer):
    """Every result as a block, then a table for several scans; clean results among several have no block."""

    title = "text for people"
    media_type = "text/plain"
    suffixes = (".txt", ".log")

    streams = True
    separator = "\n"

    def to_text(self, documents: Documents, style: Style) -> str:
        several = style.several or any(len(_of(kind, documents)) > 1 for kind in (Result, ScreenResult))
        blocks = [_BLOCKS[type(one)](one, style.colour) for one in documents if _has_block(one, several)]
        if several and not style.several:
            blocks += _tables(documents, style.colour)
        elif not blocks and not style.several:
            blocks.append([summary.tally([])])
        return _joined([*blocks, *map(_coverage, _of(CoverageResult, documents))])

    def ending(self, documents: Documents, style: Style) -> str:
        """A table of several scans or screens, and the coverage."""
        tables = _tables(documents, style.colour) if style.several or len(documents) > 1 else []
        if not any(not isinstance(one, CoverageResult) for one in documents):
            tables = [[summary.tally([])]]
        return _joined([*tables, *map(_coverage, _of(CoverageResult, documents))])


def _of(kind: type[_Kind], documents: Documents) -> list[_Kind]:
    return [one for one in documents if isinstance(one, kind)]


def _has_block(one: object, several: bool) -> bool:
    """Whether a document has a block of its own: among several, only what needs attention has one."""
    if several and isinstance(one, Result):
        return one.verdict != "clean"
    if several and isinstance(one, ScreenResult):
        return one.outcome != "nothing found"
    return not isinstance(one, CoverageResult)


def _tables(documents: Documents, colour: bool) -> list[list[str]]:
    """A table of the scans, and one of the screens."""
    scans, screened = _of(Result, documents), _of(ScreenResult, documents)
    return [*([_fleet(scans, colour)] if scans else []), *([_screens(screened, colour)] if screened else [])]


def _joined(blocks: Iterable[list[str]]) -> str:
    """Blocks of lines with an empty line between them."""
    return TextWriter.separator.join("".join(f"{line}\n" for line in block) for block in blocks)


def plain(text: object) -> str:
    """Text from a file or a path without control characters and without characters that cannot be printed."""
    return _CONTROL.sub("�", str(text)).encode(errors="replace").decode()


def table(rows: Sequence[Iterable[object]], sides: str) -> list[str]:
    """Aligned lines of plain text; ``sides`` has ``l`` or ``r`` for each column."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    signs = ["<" if side == "l" else ">" for side in sides]
    lines = ([f"{c:{sign}{width}}" for c, sign, width in zip(row, signs, widths, strict=True)] for row in cells)
    return [f"  {'  '.join(line)}".rstrip() for line in lines]


def _scan(result: Result, colour: bool) -> list[str]:
    """One model: verdict first, then evidence and findings."""
    title = _title(result.verdict.upper(), _COLOURS[result.verdict], result, colour)
    lines = [title, f"  {plain(summary.headline(result))}"]
    if result.error:
        return lines + ([f"  {plain(result.error.hint)}"] if result.error.hint else [])
    lines.append(f"  {summary.advice(result)}")
    rows: Rows = [("risk", summary.number(result.risk))]
    rows += [("calibration", found)] if (found := summary.calibration(result.calibration)) else []
    rows += [("target", summary.label(result)), *_model_and_data(result)]
    if result.not_run:
        rows.append(("not run", ", ".join(result.not_run)))
    rows += [(name, some(names)) for name, names in summary.other_weights(result.coverage) if names]
    lines += table([*rows, _time(result)], "ll")
    if result.detectors:
        lines += ["", *_evidence(result.detectors)]
    said, class_names = " ".join(one.message for one in result.findings), result.data.class_names if result.data else ()
    for one in result.detectors:
        notes = [(kind, note) for kind, note in summary.notes(one, class_names) if note not in said]
        notes += [*_triggers(one.triggers, class_names), *_attached(one.attachments)]
        lines += [f"  {plain(f'{one.detector}, {kind}: {note}')}" for kind, note in notes]
    findings = [f"  {one.rule_id} {one.severity}: {plain(one.message)}" for one in result.findings]
    return [*lines, "", *findings] if findings else lines


def _evidence(detectors: Sequence[Evidence]) -> list[str]:
    """One line for each detector, with p-values if there are any."""
    header = ("detector", "score", "threshold", "", "label", "p", "time")
    rows = [
        (
            one.detector,
            summary.number(one.score),
            summary.number(one.threshold),
            summary.says(one),
            "" if one.target_label is None else one.target_label,
            summary.number(one.p_value),
            summary.seconds(one.seconds),
        )
        for one in detectors
    ]
    if all(one.p_value is None for one in detectors):
        return table([row[:5] + row[6:] for row in (header, *rows)], "lrrllr")
    return table([header, *rows], "lrrllrr")


def _fleet(results: Sequence[Result], colour: bool) -> list[str]:
    """Many models: one line each and a tally, the worst first."""
    ranked = sorted(results, key=summary.rank)
    rows = [(one.verdict, summary.number(one.risk), summary.label(one), one.name) for one in ranked]
    head, *body = table([("verdict", "risk", "target", "model"), *rows], "lrll")
    painted = [
        line.replace(one.verdict, _paint(one.verdict, _COLOURS[one.verdict], colour), 1)
        for line, one in zip(body, ranked, strict=True)
    ]
    return [head, *painted, "", f"  {summary.tally(results)}"]


def _coverage(coverage: CoverageResult) -> list[str]:
    """The skipped files by reason: all that may hold weights, and the first few of the others."""
    lines = [f"  Skipped: {coverage.files - coverage.scanned} of {coverage.files} files"]
    for one in coverage.passed_over:
        caution = "MAY HOLD WEIGHTS: " if one.may_hold_weights else ""
        lines.append(f"    {caution}{plain(one.reason)}: {plain(summary.listed(one, _MOST_NAMED))}")
    return lines


def _repair(result: PurifyResult, colour: bool) -> list[str]:
    """A repair: its change, how the method chose it, and its time."""
    outcome, file = summary.outcome(result), result.output
    rows: Rows = [
        ("method", result.method),
        ("change", summary.change(result)),
        ("chosen by", result.selection),
        ("clean accuracy", f"{summary.percent(result.accuracy_before)} → {summary.percent(result.accuracy_after)}"),
        *summary.savings(result),
        ("threshold", None if result.threshold is None else summary.number(result.threshold)),
        ("target", None if result.target_label is None else f"label {result.target_label}"),
        *[("not removed", one) for one in (result.compact.whole if result.compact else ())],
        *[("not repaired", one) for one in result.left],
        *summary.check_rows(result),
        *[(f"tried {name}", text) for name, text in summary.attempt_rows(result)],
        *_model_and_data(result),
        _time(result),
        ("steps", ", ".join(summary.phases(result)) or None),
        *_attached(result.attachments),
        ("written to", f"{file.path} ({summary.size(file.bytes)})" if file else "not written"),
        ("described in", (file and file.description) or None),
    ]
    colour_code = _COLOURS["clean" if outcome == "repaired" else "suspicious"]
    lines = table([row for row in rows if row[1] is not None], "ll")
    return [
        _title(outcome.upper(), colour_code, result, colour),
        *lines,
        "",
        f"  {plain(summary.repair_advice(result))}",
    ]


def _scores(result: ScoreResult, colour: bool) -> list[str]:
    """Scores: the layers in the order of the network, then the worst filters."""
    layers = [
        (one.layer, one.filters, *map(summary.number, (one.mean, one.std, one.max, one.max_z))) for one in result.layers
    ]
    worst = [(f"{one.layer}[{one.filter}]", summary.number(one.score), summary.number(one.z)) for one in result.top]
    return [
        _title(f"{result.method} scores", "1", result, colour),
        *table([("layer", "filters", "mean", "std", "max", "max z"), *layers], "lrrrrr"),
        "",
        *table([("filter", "score", "z"), *worst], "lrr"),
    ]


def _inversion(result: InvertResult, colour: bool) -> list[str]:
    """Recovered triggers: a line for each of the first."""
    rows = [summary.TRIGGER_COLUMNS, *summary.trigger_rows(result)[:_MOST_ROWS]]
    if result.folder:
        files = ["file", *(one.file for one in result.triggers)]
        rows = [(*row, file) for row, file in zip(rows, files, strict=False)]
    left = len(result.triggers) - _MOST_ROWS
    facts: Rows = [*_model_and_data(result), _time(result)]
    facts += [("not searched", some(result.skipped))] if result.skipped else []
    facts += [] if result.complete else [("search", "stopped early, because the time was too short")]
    facts += [("written to", result.folder)] if result.folder else []
    return [
        _title("TRIGGERS", "1", result, colour),
        *table(facts, "ll"),
        "",
        *table(rows, "lllrrlll"[: len(rows[0])]),
        *([f"  and {left} more"] if left > 0 else []),
        "",
        f"  {summary.TRIGGER_ADVICE}",
    ]


def _inspection(result: InspectResult, colour: bool) -> list[str]:
    """An inspection: its verdict and settings, then the images with the lowest entropy."""
    incoming, unread = result.incoming, inspections.unread(result)
    rows: Rows = [
        ("method", inspections.method(result)),
        ("threshold", inspections.threshold(result)),
        ("images", f"{incoming.count} from {incoming.source}"),
        *[("note", note) for note in incoming.notes],
        ("suspicious", f"{result.suspicious}, {summary.number(result.expected)} by chance"),
        ("labels", inspections.labels(result)),
        *[("not read", f"{one.name}: {one.error}") for one in unread[:_MOST_NAMED]],
        ("not read", f"and {len(unread) - _MOST_NAMED} more" if len(unread) > _MOST_NAMED else ""),
        *[("remark", one) for one in result.remarks],
        *_model_and_data(result),
        _time(result),
    ]
    shown = [
        (
            one.verdict,
            *map(summary.number, (one.entropy, one.p_value)),
            inspections.label(one.predicted, result),
            one.name,
        )
        for one in inspections.listed(result, _MOST_ROWS)
    ]
    return [
        _title(result.verdict.upper(), _COLOURS[inspections.STYLE[result.verdict]], result, colour),
        f"  {plain(inspections.headline(result))}",
        f"  {plain(inspections.advice(result))}",
        *table([row for row in rows if row[1]], "ll"),
        *(["", *table([("verdict", "entropy", "p", "predicted", "image"), *shown], "lrrll")] if shown else []),
    ]


def _screen(result: ScreenResult, colour: bool) -> list[str]:
    """A screen: its outcome, then the layers and the head."""
    code = _COLOURS[screens.STYLE[result.outcome]]
    lines = [
        _title(result.outcome.upper(), code, result, colour),
        f"  {plain(screens.headline(result))}",
        f"  {plain(screens.advice(result))}",
    ]
    rows: Rows = [("largest z", screens.peak(result))] if result.layers else []
    rows += [("head", f"{one.layer}, {screens.head(one)}") for one in result.heads]
    rows += [("not screened", screens.unscreened(result))] if result.unscreened else []
    rows += [] if result.error else [("time", summary.seconds(result.seconds))]
    return [*lines, *(table(rows, "ll") if rows else [])]


def _screens(results: Sequence[ScreenResult], colour: bool) -> list[str]:
    """Many screens: one line each and a tally, first those that need attention."""
    ranked = sorted(results, key=screens.rank)
    rows = [(one.outcome, summary.number(one.peak.max_z if one.peak else None), one.name) for one in ranked]
    head, *body = table([("outcome", "max z", "model"), *rows], "lrl")
    painted = [
        line.replace(one.outcome, _paint(one.outcome, _COLOURS[screens.STYLE[one.outcome]], colour), 1)
        for line, one in zip(body, ranked, strict=True)
    ]
    return [head, *painted, "", f"  {screens.tally(results)}", f"  {screens.ADVICE['nothing found']}"]


_BLOCKS: dict[type, Callable[..., list[str]]] = {
    Result: _scan,
    PurifyResult: _repair,
    ScoreResult: _scores,
    ScreenResult: _screen,
    InspectResult: _inspection,
    InvertResult: _inversion,
}


def _model_and_data(result: Document) -> Rows:
    rows: Rows = []
    model, data = result.model, result.data
    if model is not None:
        shape = "x".join(map(str, model.input_shape))
        size = f"{model.parameters:,} parameters, {model.num_classes} classes, input {shape}"
        rows.append(("model", f"{model.arch}, {size}"))
    if data is None:
        return [*rows, ("data", "none")]
    accuracy = "" if data.clean_accuracy is None else f", clean accuracy {summary.percent(data.clean_accuracy)}"
    rows.append(("data", f"{data.count} images of {data.classes} classes from {data.source}{accuracy}"))
    return rows + [("note", note) for note in data.notes]


def _time(result: Document) -> tuple[str, str]:
    return "time", f"{summary.seconds(result.seconds)} on {result.env.device}, {result.env.backend} ops"


def _triggers(triggers: Sequence[TriggerInfo], class_names: Sequence[str]) -> list[tuple[str, str]]:
    """A row for each of the first triggers, and the number of the others."""
    rows = [("trigger", summary.trigger(one, class_names)) for one in triggers[:_MOST_NAMED]]
    left = len(triggers) - len(rows)
    return [*rows, *([("trigger", f"and {left} more")] if left else [])]


def _attached(attachments: Sequence[Attachment]) -> list[tuple[str, str]]:
    """A row for each attachment that was written to a file."""
    return [("attached", f"{one.name}, {summary.size(one.bytes)}, in {one.file}") for one in attachments if one.file]


def _title(text: str, code: str, result: Document | ScreenResult, colour: bool) -> str:
    return f"{_paint(plain(text), code, colour)}  {plain(result.name)}"


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text
