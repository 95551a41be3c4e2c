"""The texts about an inspection of images that all reports share."""

from __future__ import annotations

from collections.abc import Sequence

from bdprune.record import ImageVerdict, InspectedImage, InspectResult
from bdprune.report.summary import number

MOST_LISTED = 50
STYLE: dict[ImageVerdict, str] = {"normal": "clean", "suspicious": "suspicious", "unknown": "inconclusive"}
"""The verdict on a model that has the colours of the verdict on images."""

_METHODS = {"strip": "STRIP", "nu-strip": "NU+STRIP, on the partly unlearned network"}
_BY_CHANCE = 0.01


def headline(result: InspectResult) -> str:
    """One sentence on what was found."""
    count = result.incoming.count
    if result.suspicious:
        return f"{result.suspicious} of {_images(count)} {'is' if result.suspicious == 1 else 'are'} suspicious."
    if result.unknown:
        return f"{result.unknown} of {_images(count)} could not be judged; none of the others is suspicious."
    return "The image is not suspicious." if count == 1 else f"None of {_images(count)} is suspicious."


def advice(result: InspectResult) -> str:
    """What to do now."""
    if result.limits:
        return " ".join(result.limits)
    if not result.suspicious:
        return "Triggers that depend on the image, such as warps, leave no trace in the entropy."
    expected = f"Clean images alone would give {number(result.expected)}"
    if result.chance is not None and result.chance > _BY_CHANCE:
        return f"{expected}, so they may all be clean (probability {number(result.chance)}). Look at them."
    return f"{expected}. Look at the images, and scan the network with `bdprune scan`."


def method(result: InspectResult) -> str:
    """The method and its settings."""
    return f"{_METHODS[result.method]}, {result.overlays} overlays, false rejection rate {result.frr:g}"


def threshold(result: InspectResult) -> str:
    """The threshold and what set it."""
    value = "none" if result.threshold is None else f"{number(result.threshold)} bits"
    return f"{value}, from {result.held_out} held-out clean images"


def labels(result: InspectResult) -> str:
    """The labels of the suspicious images, the most frequent first: ``label 7 (truck): 12``."""
    return ", ".join(f"{label(one, result)}: {count}" for one, count in list(result.labels.items())[:5])


def label(index: int | None, result: InspectResult) -> str:
    """A label with its class name."""
    if index is None:
        return "–"
    names = result.data.class_names if result.data else ()
    return f"label {index} ({names[index]})" if index < len(names) else f"label {index}"


def listed(result: InspectResult, most: int = MOST_LISTED) -> Sequence[InspectedImage]:
    """The most suspicious images, in this order: all suspicious ones up to ``most``, or else the lowest five."""
    return result.ranked[: min(most, max(result.suspicious, 5))]


def unread(result: InspectResult) -> list[InspectedImage]:
    """The images that could not be read."""
    return [one for one in result.images if one.error]


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
