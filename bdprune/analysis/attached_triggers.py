"""Triggers as a part of evidence: their records with small pictures, and attachments with their tensors."""

from __future__ import annotations

import msgspec

from bdprune.analysis.case import Case
from bdprune.analysis.trigger_bytes import dump_trigger
from bdprune.analysis.trigger_pictures import shown_images, small_pictures
from bdprune.data import CleanData
from bdprune.loops import Trigger
from bdprune.record import Attachment, TriggerInfo

MOST_PICTURED = 20
"""Limit for the triggers of a result that come with pictures: a network may have thousands of labels."""
_MOST_NAMED = 4  # source labels in a name


def attach_triggers(case: Case, *triggers: Trigger) -> tuple[tuple[TriggerInfo, ...], tuple[Attachment, ...]]:
    """The records of recovered triggers for the evidence of a detector, and the attachments with their tensors.

    Args:
        case: the model, whose clean images the pictures show.
        *triggers: the most suspicious first; the first 20 get pictures.

    Returns:
        (for :attr:`Evidence.triggers`, for :attr:`Evidence.attachments`)
    """
    names = trigger_names(*triggers)
    attached = tuple(
        case.attach_bytes(name, dump_trigger(one), "application/safetensors")
        for name, one in zip(names, triggers, strict=True)
    )
    infos = tuple(
        trigger_info(one, case.data if place < MOST_PICTURED else None, attachment=name)
        for place, (name, one) in enumerate(zip(names, triggers, strict=True))
    )
    return infos, attached


def trigger_info(trigger: Trigger, data: CleanData | None, *, attachment: str = "", file: str = "") -> TriggerInfo:
    """The record of a trigger, with small pictures of it on some of the images; without images no pictures.

    Args:
        trigger: described by the record.
        data: clean images of the trigger's size.
        attachment: name of the attachment with its tensors.
        file: name of the file with its tensors.
    """
    pictures = {} if data is None else small_pictures(trigger, shown_images(data, trigger))
    return msgspec.structs.replace(trigger.info, attachment=attachment, file=file, pictures=pictures)


def trigger_names(*triggers: Trigger) -> list[str]:
    """A name for each trigger, all different: ``trigger-8``, ``trigger-8-from-3``, ``trigger-any-additive``."""
    names: list[str] = []
    for one in triggers:
        name = _name(one)
        count = sum(1 for other in names if other == name or other.startswith(f"{name}-no-"))
        names.append(f"{name}-no-{count + 1}" if count else name)
    return names


def _name(trigger: Trigger) -> str:
    sources = trigger.sources
    listed = map(str, sources) if len(sources) <= _MOST_NAMED else (str(len(sources)), "labels")
    parts = ["trigger", "any" if trigger.target is None else str(trigger.target)]
    parts += ["from", *listed] if sources else []
    return "-".join([*parts, *([] if trigger.kind == "patch" else [trigger.kind])])
