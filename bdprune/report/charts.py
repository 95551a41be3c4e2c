"""Which charts a result can show. They are told by the shape of the data, so a new detector gets them for free.

A detector's ``details`` are drawn when they hold, under these keys,

* ``layers``: a list of ``{"layer": name, "max_z": number, "filter": index or absent}``, in the order of the network;
* ``trajectory``: a list of ``{"accuracy": share, "votes": count per label}``, one entry a step;
* ``flip_shares``: a list with the share of each label.

Everything else in ``details`` is listed as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import msgspec
from markupsafe import Markup

from bdprune.record import Evidence, LayerScores, PurifyResult
from bdprune.report.svg import Bar, Line, bars, lines

T = TypeVar("T")


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
    """(caption, chart) of everything in the details that can be drawn."""
    details = detector.details
    drawn: list[tuple[str, Markup]] = []
    steps = _read(details.get("trajectory"), list[Step])
    if steps:
        drawn.append(("Unlearning, batch by batch", _trajectory(steps, detector.target_label)))
    shares = _read(details.get("flip_shares"), list[float])
    if shares:
        drawn.append(("Where wrong predictions go", _shares(shares, detector, class_names)))
    layers = _read(details.get("layers"), list[LayerPoint])
    if layers:
        drawn.append(("Largest outlier in each layer", _layers(layers, detector.threshold)))
    return drawn


def listed_details(detector: Evidence) -> dict[str, Any]:
    """The details that no chart shows."""
    shapes: dict[str, Any] = {"trajectory": list[Step], "flip_shares": list[float], "layers": list[LayerPoint]}
    return {
        name: value for name, value in detector.details.items() if name not in shapes or not _read(value, shapes[name])
    }


def score_chart(layers: Sequence[LayerScores]) -> Markup:
    """Largest z-score of every layer."""
    return _layers([LayerPoint(layer=one.layer, max_z=one.max_z) for one in layers], None)


def curve_chart(result: PurifyResult) -> Markup | None:
    """Clean accuracy against threshold, with the threshold that was chosen; None without a curve."""
    known = [one for one in result.curve if one.threshold is not None and one.clean_accuracy is not None]
    if not known:
        return None
    accuracy = [(one.threshold, one.clean_accuracy) for one in known]
    pruned = [(one.threshold, one.filters_pruned / max(result.filters, 1)) for one in known]
    chosen = None if result.threshold is None else (result.threshold, f"chosen: {result.threshold:.3g}")
    series = [Line("clean accuracy", accuracy, "a"), Line("filters pruned", pruned, "b")]  # type: ignore[arg-type]
    return lines("Clean accuracy against threshold", series, x_label="threshold", y_label="share", chosen=chosen)


def mask_chart(result: PurifyResult) -> Markup | None:
    """Histogram of the masks, in square roots so that rare low values show; None without masks."""
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
    title = "Histogram of the masks"
    ends = masks.edges[0], masks.edges[-1]
    return bars(title, values, x_label="mask", y_label="√ filters", x_range=ends)


def pruned_chart(result: PurifyResult) -> Markup | None:
    """How many filters each group lost; None when none did."""
    if not result.pruned:
        return None
    values = [Bar(len(index), f"{name}: {len(index)} pruned") for name, index in result.pruned.items()]
    return bars("Pruned filters by layer", values, x_label="layer", y_label="filters", x_names=list(result.pruned))


def _trajectory(steps: Sequence[Step], label: int | None) -> Markup:
    accuracy = [(float(i), step.accuracy) for i, step in enumerate(steps, 1) if step.accuracy is not None]
    winner = [(float(i), max(step.votes) / sum(step.votes)) for i, step in enumerate(steps, 1) if sum(step.votes)]
    series = [Line("clean accuracy", accuracy, "a"), Line("votes for the leading label", winner, "b")]
    if label is not None and all(label < len(step.votes) for step in steps):
        named = [(float(i), step.votes[label] / sum(step.votes)) for i, step in enumerate(steps, 1) if sum(step.votes)]
        series.append(Line(f"votes for label {label}", named, "c"))
    return lines("Accuracy and votes while unlearning", series, x_label="batch", y_label="share", x_whole=True)


def _shares(shares: Sequence[float], detector: Evidence, class_names: Sequence[str]) -> Markup:
    values = [
        Bar(
            share,
            f"label {k}{f' ({class_names[k]})' if k < len(class_names) else ''}: {100 * share:.1f} %",
            marked=detector.flagged and share == max(shares),
        )
        for k, share in enumerate(shares)
    ]
    title = "Share of the images of other classes that were predicted as each label"
    names = [str(k) for k in range(len(shares))]
    return bars(title, values, x_label="label", y_label="share", x_names=names)


def _layers(layers: Sequence[LayerPoint], cut: float | None) -> Markup:
    values = [
        Bar(
            value=max(one.max_z or 0.0, 0.0),
            title=f"{one.layer}{'' if one.filter is None else f', filter {one.filter}'}: z {_text(one.max_z)}",
            marked=cut is not None and (one.max_z or 0.0) > cut,
        )
        for one in layers
    ]
    title = "Largest z-score of each layer"
    names = [one.layer for one in layers]
    return bars(title, values, x_label="layer, input to output", y_label="max z", x_names=names, cut=cut)


def _text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _read(value: Any, shape: type[T]) -> T | None:
    """``value`` if it has that shape, else None: details are free, and plug-ins write them too."""
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError:
        return None
