"""The clean images of a repair: labels they must have, whether they may be mirrored, and those that check it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from torch import Tensor

from bdprune.analysis import Case, CheckLimits, SearchFor, check_repair, signs_of
from bdprune.data import CleanData
from bdprune.errors import DataError
from bdprune.methods import Purifier, Repair, hold_out, sure_drop
from bdprune.model import Model
from bdprune.record import RepairCheck, some
from bdprune.runtime import Precision, predict

_HELD_OUT = 0.3  # share of the clean images that measures the triggers of a check, if the purifier holds none out

# Of the accuracy, on all images and on those of one label. Networks that learned CIFAR-10 without mirrored images lose
# 10 points and at most 40 of a label; one of road signs loses 56 and 100 (three published ones, measured once).
_MIRROR_FALL, _MIRROR_FALL_OF_LABEL = 0.2, 0.5
_ENOUGH = 5  # images of a label that show such a fall

_DESTROYED = 0.1
"""Fall of clean accuracy beyond which triggers that flip nothing say nothing: a ruined network obeys no trigger."""


def missing_labels(model: Model, data: CleanData, allowed: bool) -> str:
    """The labels of the network without a clean image, in a sentence; empty if there are none.

    A repair judges and trains on the images that it has, so it may forget other labels, and no figure shows it.

    Args:
        allowed: whether the user accepts that.

    Raises:
        DataError: there are such labels, and it is not allowed.
    """
    missing = [str(label) for label in data.absent_labels(model.num_classes)]
    if not missing:
        return ""
    what = f"These labels have no clean image, so the repair may forget them: {some(missing)}."
    if not allowed:
        raise DataError(what, "Give at least one image of each label, or accept this with --allow-missing-labels.")
    return what


def mirror_rule(model: Model, data: CleanData) -> tuple[CleanData, str]:
    """The data without mirroring if the network recognises mirrored images clearly less well, and a sentence about it.

    A mirrored road sign is another sign. A repair that trains with mirrored images would teach it the wrong label.
    """
    if not data.mirror:
        return data, ""
    plain, mirrored = (predict(model.module, one) == data.labels.cpu() for one in (data.images, data.images.flip(-1)))
    falls = [(plain[own].float() - mirrored[own].float()).mean().item() for own in _by_label(data)]
    whole = (plain.float() - mirrored.float()).mean().item()
    if whole <= _MIRROR_FALL and max(falls, default=0.0) < _MIRROR_FALL_OF_LABEL:
        return data, ""
    what = (
        f"The network recognises {100 * mirrored.float().mean():.1f} % of the mirrored images and "
        f"{100 * plain.float().mean():.1f} % of the others, so the repair mirrors images only while it unlearns."
    )
    return replace(data, mirror=False), what


def _by_label(data: CleanData) -> list[Tensor]:
    """Which images have each label that has enough of them, bool ``[N]``."""
    labels = data.labels.cpu()
    return [labels == label for label, count in data.class_counts.items() if count >= _ENOUGH]


def with_images_for_check(purifier: Purifier, case: Case, seed: int) -> tuple[Case, CleanData]:
    """The case that the purifier may use, and clean images that it does not learn from.

    A purifier that holds images out itself takes all of them, and the others are given fewer.

    Raises:
        DataError: no class has an image to hold out.
    """
    own = getattr(purifier, "held_out", 0.0)
    rest, held = hold_out(case.images, own or _HELD_OUT, getattr(purifier, "seed", seed))
    return (case if own else case.with_data(rest)), held


def checked(case: Case, held: CleanData, repair: Repair, seed: int, precision: Precision) -> RepairCheck:
    """What clean images show before and after a repair.

    Args:
        case: the case before the repair, with all images.
        held: images that the repair did not learn from.
        repair: the repair.
        seed: of everything random.
        precision: of the unlearning.
    """
    limits, search = CheckLimits(), SearchFor()
    signs = signs_of(case, held, limits, search, seed, precision)
    check = check_repair(case, repair.model, signs, limits, search, seed, precision)
    drop = sure_drop(case.model, repair.model, held)
    if drop <= _DESTROYED:
        return check
    ruined = f"the repair costs at least {100 * drop:.0f} points of clean accuracy, so the other figures say little"
    return msgspec.structs.replace(check, left=(ruined, *check.left))
