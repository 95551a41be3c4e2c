"""The charts of a result. The shape of the data selects the chart, so a new detector needs no code here.

A report draws the label scores of a detector, and every detail, of any name, with one of these shapes:

* a list of ``{"layer": name, "max_z": number, "filter": index or absent}``, in the order of the network;
* a list of ``{"accuracy": share, "votes": count per label}``, one entry a step.

It lists everything else in ``details`` as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from markupsafe import Markup

from bdprune.record import Evidence, InspectResult, LayerScores, PurifyResult
from bdprune.report.summary import number
from bdprune.report.svg import Axes, Bar, Line, bars, lines


class LayerPoint(msgspec.Struct):
    """The outlier scores of one layer."""

    layer: str
    max_z: float | None
    filter: int | None = None


class Step(msgspec.Struct):
    """One step of a trajectory."""

    accuracy: float | None
    votes: list[int]


def detector_charts(detector: Evidence, class_names: Sequence[str]) -> list[tuple[str, Markup]]:
    """(caption, chart) of each part of the evidence that has a chart."""
    drawn = [("Score of each label", _label_scores(detector, class_names))] if any(detector.label_scores) else []
    for value in detector.details.values():
        points = _points(value)
        if isinstance(points[0], Step):
            drawn.append(("Accuracy and votes, step by step", _steps(points, detector.target_label)))
        elif isinstance(points[0], LayerPoint):
            drawn.append(("Largest outlier in each layer", _layers(points, detector.threshold)))
    return drawn


def listed_details(detector: Evidence) -> dict[str, Any]:
    """The details without a chart."""
    scores = list(detector.label_scores)
    return {
        name: value
        for name, value in detector.details.items()
        if _points(value)[0] is None and not (scores and value == scores)
    }


def score_chart(layers: Sequence[LayerScores]) -> Markup:
    """Largest z-score of every layer."""
    return _layers([LayerPoint(layer=one.layer, max_z=one.max_z) for one in layers], None)


def repair_charts(result: PurifyResult) -> list[tuple[str, Markup]]:
    """(caption, chart) of each part of a repair that has a chart."""
    found = {
        "Clean accuracy against threshold": _curve(result),
        "Histogram of the masks or scores": _masks(result),
        "Pruned filters by layer": _pruned(result),
    }
    return [(caption, chart) for caption, chart in found.items() if chart]


def entropy_charts(result: InspectResult) -> list[tuple[str, Markup]]:
    """(caption, chart): the histogram of the clean images, and that of the inspected images, with one threshold."""
    if result.histogram is None:
        return []
    sets = {"Held-out clean images": result.histogram.clean, "Inspected images": result.histogram.inspected}
    return [(name, _entropies(name, counts, result)) for name, counts in sets.items()]


def _entropies(name: str, counts: Sequence[int], result: InspectResult) -> Markup:
    assert result.histogram is not None
    edges, cut = result.histogram.edges, result.threshold
    values = [
        Bar(
            value=count**0.5,
            title=f"{count} images from {low:.3g} to {high:.3g} bits",
            marked=cut is not None and (low + high) / 2 < cut,
        )
        for (low, high), count in zip(pairwise(edges), counts, strict=True)
    ]
    chosen = None if cut is None else (cut, f"threshold: {cut:.3g}")
    axes = Axes("entropy in bits", "√ images")
    return bars(f"Entropy: {name.lower()}", values, axes, x_range=(edges[0], edges[-1]), chosen=chosen)


def _curve(result: PurifyResult) -> Markup | None:
    """Clean accuracy against threshold, with the chosen threshold; None without a curve."""
    known = [one for one in result.curve if one.threshold is not None and one.clean_accuracy is not None]
    if not known:
        return None
    accuracy = [(one.threshold or 0.0, one.clean_accuracy or 0.0) for one in known]
    pruned = [(one.threshold or 0.0, one.filters_pruned / max(result.filters, 1)) for one in known]
    chosen = None if result.threshold is None else (result.threshold, f"chosen: {result.threshold:.3g}")
    series = [Line("clean accuracy", accuracy, "a"), Line("filters pruned", pruned, "b")]
    return lines("Clean accuracy against threshold", series, Axes("threshold", "share"), chosen=chosen)


def _masks(result: PurifyResult) -> Markup | None:
    """Histogram of the masks or scores, with a square-root axis so that rare values show; None without values."""
    masks = result.masks
    if masks is None:
        return None
    values = [
        Bar(
            value=count**0.5,
            title=f"{count} filters from {low:.3g} to {high:.3g}, {pruned} of them pruned",
            marked=2 * pruned > count,
        )
        for (low, high), count, pruned in zip(pairwise(masks.edges), masks.counts, masks.pruned, strict=True)
    ]
    ends = masks.edges[0], masks.edges[-1]
    return bars("Filters by mask or score", values, Axes("mask or score", "√ filters"), x_range=ends)


def _pruned(result: PurifyResult) -> Markup | None:
    """Number of pruned filters in each group; None if no filter was pruned."""
    if not result.pruned:
        return None
    values = [Bar(len(index), f"{name}: {len(index)} pruned", name=name) for name, index in result.pruned.items()]
    return bars("Pruned filters by layer", values, Axes("layer", "filters"))


def _steps(steps: Sequence[Step], label: int | None) -> Markup:
    counted = [(float(i), step.votes) for i, step in enumerate(steps, 1) if sum(step.votes)]
    series = [
        Line("clean accuracy", [(float(i), s.accuracy) for i, s in enumerate(steps, 1) if s.accuracy is not None], "a"),
        Line("votes for the leading label", [(i, max(votes) / sum(votes)) for i, votes in counted], "b"),
    ]
    if label is not None and all(label < len(step.votes) for step in steps):
        series.append(Line(f"votes for label {label}", [(i, votes[label] / sum(votes)) for i, votes in counted], "c"))
    return lines("Clean accuracy and votes at each step", series, Axes("step", "share", whole=True))


def _label_scores(detector: Evidence, class_names: Sequence[str]) -> Markup:
    known = [score for score in detector.label_scores if score is not None]
    values = [
        Bar(
            score or 0.0,
            f"label {k}{f' ({class_names[k]})' if k < len(class_names) else ''}: {number(score)}",
            marked=detector.flagged and score == max(known),
            name=str(k),
        )
        for k, score in enumerate(detector.label_scores)
    ]
    return bars("Score of each label", values, Axes("label", "score"))


def _layers(layers: Sequence[LayerPoint], cut: float | None) -> Markup:
    values = [
        Bar(
            value=max(one.max_z or 0.0, 0.0),
            title=f"{one.layer}{'' if one.filter is None else f', filter {one.filter}'}: z {number(one.max_z)}",
            marked=cut is not None and (one.max_z or 0.0) > cut,
            name=one.layer,
        )
        for one in layers
    ]
    line = None if cut is None else (cut, "threshold")
    return bars("Largest z-score of each layer", values, Axes("layer, input to output", "max z"), cut=line)


def _points(value: Any) -> list[Any]:
    """The value as points of a chart, or a single None if it has another shape."""
    for shape in (Step, LayerPoint):
        try:
            return msgspec.convert(value, list[shape]) or [None]  # type: ignore[valid-type]
        except msgspec.ValidationError:
            pass
    return [None]
