"""The parts of the result of an inspection of images."""

from __future__ import annotations

from typing import Literal

import msgspec

from bdprune.record.base import Count, Record, Share

ImageVerdict = Literal["normal", "suspicious", "unknown"]
InspectMethod = Literal["strip", "nu-strip"]


class IncomingInfo(Record, frozen=True, kw_only=True):
    """The inspected images.

    Attributes:
        source: where they come from.
        count: number of images.
        unread: number of images that could not be used.
        digest: SHA-256 of their pixels in the model's size.
        notes: changes to the images: resized, converted.
        passed_over: number of skipped files of a folder, by suffix or reason.
    """

    source: str
    count: Count
    unread: Count
    digest: str
    notes: tuple[str, ...] = ()
    passed_over: dict[str, Count] = msgspec.field(default_factory=dict)


class InspectedImage(Record, frozen=True, kw_only=True):
    """The verdict on one image.

    Attributes:
        index: its place among the inspected images, from 0.
        name: its path, or its place in a file.
        verdict: ``suspicious`` (its entropy is below the threshold), ``normal``, or ``unknown`` (not judged).
        entropy: mean entropy of the predictions for the image under the overlays, in bits; None if there is none.
        p_value: probability that a clean image has an entropy as low; None if the image was not judged.
        predicted: the label that the model predicts for the image; None if it could not be read.
        picture: a PNG of at most 64 pixels a side; empty except for the most suspicious images.
        error: why the image could not be read; empty if it could.
    """

    index: Count
    name: str
    verdict: ImageVerdict
    entropy: float | None
    p_value: Share | None = None
    predicted: Count | None = None
    picture: bytes = b""
    error: str = ""


class EntropyHistogram(Record, frozen=True, kw_only=True):
    """The entropies of the held-out clean images and of the inspected images.

    Attributes:
        edges: ``edges[i]`` and ``edges[i + 1]`` are the bounds of bin i, in bits.
        clean: number of held-out clean images in each bin.
        inspected: number of inspected images in each bin.
    """

    edges: tuple[float, ...]
    clean: tuple[Count, ...]
    inspected: tuple[Count, ...]
