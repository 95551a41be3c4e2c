"""The evidence of one detector about one model."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Self

import msgspec

from bdprune.record.base import Count, Record, Share, finite
from bdprune.record.trigger import TriggerInfo

_RECORDS = ("triggers", "attachments")
_NAME, _SHA256 = "^[a-z0-9_-]{1,64}$", "^[0-9a-f]{64}$"


class Attachment(Record, frozen=True, kw_only=True):
    """A tensor or picture that is too large for a record.

    Attributes:
        name: lower-case letters, digits, ``-`` and ``_``: it becomes part of a file's name.
        media_type: ``application/safetensors`` or ``image/png``.
        sha256: SHA-256 of the bytes.
        bytes: size.
        file: name of the written file; empty if none was written.
    """

    name: Annotated[str, msgspec.Meta(pattern=_NAME)]
    media_type: str
    sha256: Annotated[str, msgspec.Meta(pattern=_SHA256)]
    bytes: Count
    file: str = ""

    def __post_init__(self) -> None:
        """Checks the parts of the file's name, also for records that do not come from JSON."""
        for what, text, pattern in (("name", self.name, _NAME), ("SHA-256", self.sha256, _SHA256)):
            if not re.fullmatch(pattern, text) or text.endswith("\n"):
                raise ValueError(f"invalid {what} of an attachment: {text[:80]!r}")


class Evidence(Record, frozen=True, kw_only=True):
    """The evidence of one detector about one model.

    Attributes:
        detector: its id, such as ``bdprune.unlearning``.
        score: the detector's statistic; larger is more suspicious. None, or not finite, if the detector failed.
        threshold: a score above it is flagged.
        flagged: whether the score is above the threshold.
        target_label: the suspected target label, or None.
        targets: the suspected target labels of a backdoor with several, such as an all-to-all one; empty otherwise.
        sources: the labels whose images the backdoor flips, if it does not flip those of all labels; empty otherwise.
        label_scores: suspicion of each label, ``[K]``, larger is more suspicious; empty if the detector has none.
        p_value: probability that a clean model gives a score at least as large, or None.
        near: whether the score is so near the threshold that another run could fall on the other side.
        remarks: further facts for the reader, a sentence each.
        limits: reasons to trust the score less, a sentence each.
        not_applicable: why the detector does not work on networks of this kind; empty if it does.
        natural: why a trigger that works looks like features of its class and not like a backdoor, in a sentence; empty
            if it does not. Such evidence does not count towards a backdoor.
        supporting: why the evidence counts only beside evidence of another kind that names the same label, in a
            sentence; empty if it counts by itself.
        unseen: what the detector did not look at, because of the time, the budget or missing images; a phrase each,
            such as ``labels 200 to 999``. A model is not called clean on such evidence.
        error: why the detector failed; empty if it did not.
        seconds: wall time.
        params: constructor settings, JSON values only.
        details: further values for reports, JSON values only.
        triggers: recovered triggers, the most suspicious first.
        attachments: tensors and pictures, such as a trigger.
    """

    detector: str
    score: float | None
    threshold: float | None
    flagged: bool
    target_label: int | None = None
    targets: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    label_scores: tuple[float | None, ...] = ()
    p_value: Share | None = None
    near: bool = False
    remarks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    not_applicable: str = ""
    natural: str = ""
    supporting: str = ""
    unseen: tuple[str, ...] = ()
    error: str = ""
    seconds: float | None = 0.0
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    details: dict[str, Any] = msgspec.field(default_factory=dict)
    triggers: tuple[TriggerInfo, ...] = ()
    attachments: tuple[Attachment, ...] = ()

    @property
    def labels(self) -> frozenset[int]:
        """The labels that it names: the target label, or all targets."""
        return frozenset(self.targets if self.target_label is None else (self.target_label,))

    @property
    def valid(self) -> bool:
        """Whether the score is finite."""
        values = (self.score, self.threshold)
        return all(value is not None and math.isfinite(value) for value in values)

    def tidy(self) -> Self:
        """The same evidence after a round trip through JSON: plain values, and None for numbers that are not finite.

        Raises:
            msgspec.ValidationError: a field has the wrong type.
        """
        values = {name: finite(getattr(self, name)) for name in self.__struct_fields__ if name not in _RECORDS}
        records = {name: [finite(msgspec.to_builtins(one)) for one in getattr(self, name)] for name in _RECORDS}
        return msgspec.convert({**values, **records}, type(self), str_keys=True)


def nothing_seen(detector: str, error: str, seconds: float = 0.0) -> Evidence:
    """The evidence of a detector that failed: no score, and the error."""
    return Evidence(detector=detector, score=None, threshold=None, flagged=False, error=error, seconds=seconds)
