"""What one detector saw in one model."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Self

import msgspec

from bdprune.record.base import Count, Record, Share, finite

_NAME, _SHA256 = "^[a-z0-9_-]{1,64}$", "^[0-9a-f]{64}$"


class Attachment(Record, frozen=True, kw_only=True):
    """Something too large for a record, such as a tensor or a picture, by the SHA-256 of its bytes.

    ``name`` is of small letters, digits, ``-`` and ``_``: it becomes part of a file's name. ``media_type`` is
    ``application/safetensors`` or ``image/png``; ``file`` is the name under which it was written beside the report,
    empty where nobody asked for that.
    """

    name: Annotated[str, msgspec.Meta(pattern=_NAME)]
    media_type: str
    sha256: Annotated[str, msgspec.Meta(pattern=_SHA256)]
    bytes: Count
    file: str = ""

    def __post_init__(self) -> None:
        """Makes sure of the parts of the file's name, also where no JSON was read."""
        for what, text, pattern in (("name", self.name, _NAME), ("SHA-256", self.sha256, _SHA256)):
            if not re.fullmatch(pattern, text) or text.endswith("\n"):
                raise ValueError(f"invalid {what} of an attachment: {text[:80]!r}")


class Evidence(Record, frozen=True, kw_only=True):
    """What one detector saw.

    Attributes:
        detector: its id, such as ``bdprune.unlearning``.
        score: the detector's statistic; larger is more suspicious. None, or not finite, where it saw nothing.
        threshold: a score above it is flagged.
        flagged: whether the score is above the threshold.
        target_label: the label it names, None when it names none.
        label_scores: how suspicious each label is, ``[K]``, larger is more; empty for a detector that has no such
            score.
        p_value: how likely a clean model gives a score as large, None when the detector cannot say.
        near: whether the score is so near the threshold that the next run could fall on the other side.
        remarks: what a reader should know beside the score, a sentence each.
        limits: what takes from the worth of the score, a sentence each.
        not_applicable: why the detector can tell nothing of a network of this kind; empty where it can.
        error: why it saw nothing; empty where it saw something.
        seconds: wall time.
        params: constructor settings, JSON values only.
        details: whatever a report may draw, JSON values only.
        attachments: tensors and pictures, such as a trigger.
    """

    detector: str
    score: float | None
    threshold: float | None
    flagged: bool
    target_label: int | None = None
    label_scores: tuple[float | None, ...] = ()
    p_value: Share | None = None
    near: bool = False
    remarks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    not_applicable: str = ""
    error: str = ""
    seconds: float | None = 0.0
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    details: dict[str, Any] = msgspec.field(default_factory=dict)
    attachments: tuple[Attachment, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether there is a score to judge by."""
        values = (self.score, self.threshold)
        return all(value is not None and math.isfinite(value) for value in values)

    def tidy(self) -> Self:
        """The same as JSON would give it back: plain values, and None in place of numbers that are not finite.

        Raises:
            msgspec.ValidationError: a field is of another type.
        """
        values = {name: finite(getattr(self, name)) for name in self.__struct_fields__ if name != "attachments"}
        attached = [msgspec.structs.asdict(one) for one in self.attachments]
        return msgspec.convert({**values, "attachments": attached}, type(self), str_keys=True)


def nothing_seen(detector: str, error: str, seconds: float = 0.0) -> Evidence:
    """The evidence of a detector that broke down: no score, and why."""
    return Evidence(detector=detector, score=None, threshold=None, flagged=False, error=error, seconds=seconds)
