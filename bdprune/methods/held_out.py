"""The clean images that a repair learns from and decides on, views of few images, and what a repair costs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError
from bdprune.model import Model
from bdprune.runtime import crop_and_flip, predict, share_right

LARGEST_ERROR = 0.03
"""Largest standard error that :func:`sure_drop` subtracts: few images must not excuse any damage."""

_VIEWS = 4  # of an image that is held out, with itself
_OWN = 0.6  # least share of a mixed view that comes from its own image
_CONTRAST, _BRIGHTNESS = 0.2, 0.1  # largest relative and absolute change of all pixels


def hold_out(data: CleanData, share: float, seed: int) -> tuple[CleanData, CleanData]:
    """The images to learn from, and the images held out for decisions, both with all classes that have two images.

    Args:
        data: clean images.
        share: of each class that is held out, in (0, 1).
        seed: of the draw.

    Raises:
        DataError: no class has an image to hold out.
        OptionError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise OptionError(f"The share of the images to hold out is {share}.", "Give a share between 0 and 1.")
    rest, held = data.split(share, torch.Generator().manual_seed(seed))
    if not len(held):
        raise DataError(
            f"{len(data)} clean images, one of each class, leave none to hold out for choosing a threshold.",
            "Give at least two images of a class, or use the method suspiciousness without a check.",
        )
    return rest, held


def sure_drop(before: Model, after: Model, held: CleanData) -> float:
    """Fall of clean accuracy from one model to another, less its standard error (at most 0.03), in [-1, 1].

    This is the one-standard-error rule (Breiman et al., 1984): 150 images cannot distinguish a fall of 2 points from
    one of 4. The error is that of the paired differences, so images that both models label alike add nothing to it.

    Args:
        held: images that the repair did not learn from.
    """
    hits = [(predict(one.module, held.images) == held.labels).double() for one in (before, after)]
    lost = hits[0] - hits[1]
    error = float(lost.std()) / math.sqrt(len(held)) if len(held) > 1 else 0.0
    return float(lost.mean()) - min(error, LARGEST_ERROR)


def views_drop(before: Model, after: Model, held: CleanData, seed: int) -> float:
    """Fall of clean accuracy from one model to another, on images and three shifted views of each, in [-1, 1].

    The fall on 150 images alone depends much on chance. If it is larger beyond its standard error
    (:func:`sure_drop`), it counts: images that are views already have labels of the network, and their shifted views
    have not.

    Args:
        held: images that the repair did not learn from.
        seed: of the shifts.
    """
    images, labels = shifted_views(held, _VIEWS, seed), held.labels.repeat(_VIEWS)
    first, then = (share_right(predict(one.module, images), labels) for one in (before, after))
    return max(first - then, sure_drop(before, after, held))


def shifted_views(data: CleanData, count: int, seed: int) -> Tensor:
    """``[count * N, C, H, W]``: the original images, then shifted copies, half of them mirrored if that is allowed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [data.images, *(crop_and_flip(data.images, generator, flip=data.mirror) for _ in range(count - 1))]
    )


def mixed_views(model: Model, data: CleanData, count: int, seed: int) -> CleanData:
    """About ``count`` views of the images, shifted, changed in contrast and brightness, and mixed with another image.

    Mixed views lie between the images, so a network that fits only the images labels them otherwise than before. Their
    labels are those that ``model`` gives them: so their accuracy is the share that a changed network labels alike.

    Args:
        model: the network before any change.
        data: ``N`` clean images; a view is mirrored only if they may be.
        count: number of views, rounded up to a multiple of ``N``.
        seed: of everything random.

    Returns:
        The views, ``[ceil(count / N) * N, C, H, W]`` in [0, 1]. Other fields are those of ``data``.
    """
    generator = torch.Generator().manual_seed(seed)
    images = data.images.repeat(-(-count // len(data)), 1, 1, 1)
    views = crop_and_flip(images, generator, flip=data.mirror)
    contrast, brightness, own = torch.rand(3, len(views), 1, 1, 1, generator=generator).to(views)
    views = views * (1 + _CONTRAST * (2 * contrast - 1)) + _BRIGHTNESS * (2 * brightness - 1)
    others = data.images[torch.randint(len(data), (len(views),), generator=generator)]
    own = _OWN + (1 - _OWN) * own
    views = (own * views + (1 - own) * others).clamp(0, 1).contiguous()
    return replace(data, images=views, labels=predict(model.module, views))
