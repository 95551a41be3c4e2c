"""What is known about a recovered trigger."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

import msgspec

from bdprune.record.base import Count, Record, Share

TriggerKind = Literal["patch", "additive", "warp"]
"""A patch covers pixels, an additive trigger changes their colours by fixed amounts, a warp moves them."""

TRIGGER_KINDS: tuple[TriggerKind, ...] = get_args(TriggerKind)

Pixel = Annotated[int, msgspec.Meta(ge=0)]
Label = Annotated[int, msgspec.Meta(ge=0)]

MOST_PICTURE_BYTES = 48 << 10
"""Limit for all pictures of a trigger; as base64 text in JSON and HTML they then take at most 64 KiB."""
_NAME = re.compile("[a-z0-9-]{1,64}")
_PNG = b"\x89PNG\r\n\x1a\n"


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

    The pictures are part of the record, not attachments: they are small, and a result is then complete in one file,
    whichever process made it and whether a folder for attachments was given or not. The HTML report shows them from the
    JSON alone. The tensors at full size are an attachment.

    Attributes:
        kind: ``patch`` (covers pixels with a pattern), ``additive`` (changes their colours by fixed amounts) or
            ``warp`` (moves them).
        target_label: the label that it leads to; None for an untargeted trigger, which leads away from the true label.
        source_labels: the labels whose images it was made for; empty for all labels but the target.
        size: sum over all pixels of the mask, of the largest change of a colour, or of the displacement in pixels.
        flip_rate: share of held-out images that it flips (to the target label, or away from their own), in [0, 1];
            None if no image was held out.
        images: number of held-out images.
        box: where it lies; None if it is spread over the whole image.
        attachment: name of the attachment of the evidence that holds mask and pattern; empty if there is none.
        file: name of the safetensors file of its mask and pattern; empty if none was written.
        pictures: name -> PNG, as base64 in JSON: ``mask``, ``pattern``, ``stamped`` (up to three of the clean images
            with the trigger) and ``difference`` (the changes to them, ten times as strong); empty if none were made.
            Images of more than 64 pixels are made smaller. All pictures have at most 48 KiB.
    """

    kind: TriggerKind
    target_label: Label | None
    source_labels: tuple[Label, ...] = ()
    size: float
    flip_rate: Share | None
    images: Count
    box: Box | None = None
    attachment: str = ""
    file: str = ""
    pictures: dict[str, bytes] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the pictures, which a page embeds."""
        for name, content in self.pictures.items():
            if not _NAME.fullmatch(name) or not content.startswith(_PNG):
                raise ValueError(f"the picture {name[:80]!r} of a trigger is not a PNG with a plain name")
        if sum(map(len, self.pictures.values())) > MOST_PICTURE_BYTES:
            raise ValueError(f"the pictures of a trigger have more than {MOST_PICTURE_BYTES} bytes")
