"""What is known about a recovered trigger."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from bdprune.record.base import Count, Record, Share

TriggerKind = Literal["patch", "additive"]
"""A patch covers pixels with a pattern; an additive trigger changes their colours by fixed amounts."""

Pixel = Annotated[int, msgspec.Meta(ge=0)]


class Box(Record, frozen=True, kw_only=True):
    """The smallest rectangle that holds nearly all of a trigger, in pixels.

    Attributes:
        x: column of its left edge.
        y: row of its upper edge.
        width: number of columns.
        height: number of rows.
    """

    x: Pixel
    y: Pixel
    width: Count
    height: Count


class TriggerInfo(Record, frozen=True, kw_only=True):
    """A recovered trigger, without its tensors.

    Attributes:
        kind: ``patch`` (covers pixels with a pattern) or ``additive`` (changes their colours by fixed amounts).
        target_label: the label that it leads to; None for an untargeted trigger, which leads away from the true label.
        source_labels: the labels whose images it was made for; empty for all labels but the target.
        size: sum of the mask in pixels, or of the largest change of a colour at each pixel.
        flip_rate: share of held-out images that it flips (to the target label, or away from their own), in [0, 1];
            None if no image was held out.
        images: number of held-out images.
        box: where it lies; None if it is spread over the whole image.
        file: name of the safetensors file of its mask and pattern; empty if none was written.
    """

    kind: TriggerKind
    target_label: int | None
    source_labels: tuple[int, ...] = ()
    size: float
    flip_rate: Share | None
    images: Count
    box: Box | None = None
    file: str = ""
