"""Pictures of a trigger: mask, pattern, clean images with it, and what it changes in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.files import encode_png
from bdprune.loops import Hypothesis, Trigger
from bdprune.record import MOST_PICTURE_BYTES

_EDGES = (64, 48, 32, 16, 8)  # pixels of the longer side of an image in a small picture
_GAIN = 10.0  # how much stronger than they are changes are drawn
_FAR = 3.0  # pixels of a displacement that is drawn white
_SHOWN = 3


def shown_images(data: CleanData, trigger: Trigger) -> Tensor:
    """Up to three of the images ``[N, C, H, W]`` that the trigger flips by design, of different classes if possible."""
    labels = data.labels.cpu()
    usable = Hypothesis(trigger.target, trigger.sources).takes(labels)
    classes = torch.unique(labels[usable])[:_SHOWN].tolist()
    firsts = [int((usable & (labels == label)).nonzero()[0]) for label in classes]
    others = [one for one in usable.nonzero().flatten()[: 2 * _SHOWN].tolist() if one not in firsts]
    return data.images[torch.tensor([*firsts, *others][:_SHOWN], dtype=torch.int64, device=data.images.device)]


def draw_trigger(trigger: Trigger, images: Tensor | None = None, most_edge: int | None = None) -> dict[str, bytes]:
    """PNG pictures of the trigger, by name.

    Args:
        trigger: what to draw.
        images: ``[N, C, h, w]`` in [0, 1], clean images of the trigger's size, to be shown with the trigger.
        most_edge: limit for the longer side of an image, in pixels; larger images are made smaller. None keeps them.

    Returns:
        ``mask`` (white is opaque; only of a patch), ``pattern`` (of a patch, black where the mask is 0; of an additive
        trigger, grey is no change and a change by 0.1 is black or white; of a warp, white moves by 3 pixels),
        ``stamped`` (the images with the trigger next to each other) and ``difference`` (the absolute changes, times
        10). The last two only with images.
    """
    return {name: draw_images(one, most_edge) for name, one in _drawn(trigger, images).items()}


def small_pictures(trigger: Trigger, images: Tensor | None = None) -> dict[str, bytes]:
    """The pictures of :func:`draw_trigger`, as small as a record needs them."""
    pictures: dict[str, bytes] = {}
    for edge in _EDGES:
        pictures = draw_trigger(trigger, images, edge)
        if _bytes(pictures) <= MOST_PICTURE_BYTES:
            break
    return pictures


def _drawn(trigger: Trigger, images: Tensor | None) -> dict[str, Tensor]:
    """The pictures as images ``[N, C, h, w]``, which are not yet limited to [0, 1]."""
    pattern = trigger.pattern.detach().float().cpu()[None]
    if trigger.kind == "warp":
        drawn = {"pattern": trigger.strength.detach().float().cpu()[None, None] / _FAR}
    elif trigger.mask is None:
        drawn = {"pattern": 0.5 + _GAIN / 2 * pattern}
    else:
        mask = trigger.mask.detach().float().cpu()[None]
        drawn = {"mask": mask, "pattern": mask * pattern}
    if images is not None and len(images):
        clean = images.detach().float().cpu()
        stamped = trigger.apply(clean)
        drawn |= {"stamped": stamped, "difference": _GAIN * (stamped - clean).abs()}
    return drawn


def draw_images(images: Tensor, most_edge: int | None = None) -> bytes:
    """A PNG of images ``[N, C, h, w]`` next to each other, with a white line between them; values are cut to [0, 1].

    Args:
        most_edge: limit for the longer side of an image, in pixels; None keeps the size.
    """
    images = _smaller(images, most_edge)
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    line = images.new_ones(*images.shape[1:3], max(1, images.shape[3] // 32))
    parts = [part for one in images for part in (line, one)][1:]
    row = torch.cat(parts, dim=2).permute(1, 2, 0)
    return encode_png((row * 255).round().to(torch.uint8).numpy())


def _smaller(images: Tensor, most_edge: int | None) -> Tensor:
    images, (height, width) = images.clamp(0, 1), images.shape[2:]
    longest = max(height, width)
    if most_edge is None or longest <= most_edge:
        return images
    size = [max(1, round(edge * most_edge / longest)) for edge in (height, width)]
    return functional.interpolate(images, size, mode="area")


def _bytes(pictures: Mapping[str, bytes]) -> int:
    return sum(map(len, pictures.values()))
