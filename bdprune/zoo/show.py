"""A picture of an attack: images before and after its trigger, and the difference."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bdprune.attacks import Attack, Shape, apply_trigger
from bdprune.data import CleanData
from bdprune.errors import OptionError, OutputError
from bdprune.zoo.manifest import attack_from
from bdprune.zoo.store import fill_trigger

AMPLIFIED = 10
COLUMNS = ("clean", "triggered", f"difference x{AMPLIFIED}")
_CELL = 128
"""Images are enlarged by a whole factor up to about this size in pixels."""
_GAP, _CAPTION = 8, 20
_SEVERAL = ("sources", "bounds")
"""Settings of attacks that have several values."""


def attack_of(kind: str, settings: Mapping[str, str]) -> Attack:
    """The attack of that name with settings as text, such as ``{"target": "3"}``; the target is 0 by default.

    A setting with several values has commas between them, as in ``{"sources": "1,5"}``.

    Raises:
        OptionError: an unknown attack or setting, or an invalid value.
    """
    values = {name: text.split(",") if name in _SEVERAL else text for name, text in settings.items()}
    return attack_from(kind, {"target": "0", **values}, strict=False)


def ready_trigger(attack: Attack, shape: Shape, file: Path | None) -> nn.Module:
    """The attack's trigger for images of ``shape`` (C, H, W), in eval mode.

    Args:
        attack: its settings.
        shape: of the images.
        file: safetensors file of a learned trigger; None for a trigger that is not learned.

    Raises:
        OptionError: the trigger is learned, but there is no file.
        ArtifactError: the file cannot be read, or holds another trigger.
    """
    trigger = attack.new_trigger(shape).eval()
    if file is not None:
        return fill_trigger(trigger, file)
    if attack.trigger_type == "learned" or next(trigger.parameters(), None) is not None:
        hint = "Name its file with --trigger; `bdprune zoo make` writes one next to each model."
        raise OptionError(f"The trigger of {attack.kind} is learned with a model, so it needs a file.", hint)
    return trigger


def some_victims(attack: Attack, data: CleanData, count: int) -> Tensor:
    """At most ``count`` images ``[N, C, H, W]`` on which the attack can succeed, spread evenly over ``data``.

    Raises:
        OptionError: there are none, or the data lacks a label of the attack.
    """
    goal = attack.goal(data.labels, int(data.labels.max()) + 1)
    index = (goal != data.labels).nonzero().flatten()
    if not len(index):
        raise OptionError(f"The attack cannot succeed on any image of {data.source}.", "Give another target or images.")
    places = torch.linspace(0, len(index) - 1, min(count, len(index))).round().long()
    return data.images[index[places]]


def panels(trigger: nn.Module, images: Tensor) -> Tensor:
    """Clean, triggered and amplified difference, ``[N, 3, C, H, W]`` in [0, 1].

    The difference is ``0.5 + 10 (x' - x)``, clipped: grey where nothing changed.
    """
    triggered = apply_trigger(trigger, images)
    difference = (0.5 + AMPLIFIED * (triggered - images)).clamp(0, 1)
    return torch.stack([images, triggered, difference], 1)


def picture(cells: Tensor) -> bytes:
    """A PNG file with a row for every image and a captioned column for each panel of :func:`panels`.

    Args:
        cells: ``[N, 3, C, H, W]`` in [0, 1], grey or RGB.

    Raises:
        OutputError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        hint = "Install it: pip install pillow"
        raise OutputError("Drawing a picture needs Pillow.", hint) from error
    pixels = grid(cells)
    image = Image.fromarray(pixels.numpy())
    draw = ImageDraw.Draw(image)
    step = (image.width - _GAP) // len(COLUMNS)
    for column, caption in enumerate(COLUMNS):
        draw.text((_GAP + column * step, _GAP // 2), caption, fill=(0, 0, 0))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def grid(cells: Tensor) -> Tensor:
    """The picture without its captions: uint8 RGB ``[height, width, 3]``, white between the cells."""
    rows, columns, channels, height, width = cells.shape
    scale = max(1, _CELL // max(height, width))
    bytes_ = (cells.expand(-1, -1, 3, -1, -1) if channels == 1 else cells).mul(255).round().to(torch.uint8)
    large = bytes_.repeat_interleave(scale, 3).repeat_interleave(scale, 4).permute(0, 1, 3, 4, 2)
    down, right = scale * height + _GAP, scale * width + _GAP
    sheet = torch.full((_CAPTION + rows * down, _GAP + columns * right, 3), 255, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = _CAPTION + row * down, _GAP + column * right
            sheet[top : top + scale * height, left : left + scale * width] = large[row, column]
    return sheet


@dataclass(frozen=True)
class Strength:
    """How much a trigger changes some images.

    Attributes:
        mean: change of a value, for values in [0, 1].
        largest: of all changes.
        pixels: share of the pixels that change by half a byte or more.
    """

    mean: float
    largest: float
    pixels: float


def strength(trigger: nn.Module, images: Tensor) -> Strength:
    """How much the trigger changes images ``[N, C, H, W]`` in [0, 1]."""
    moved = (apply_trigger(trigger, images) - images).abs()
    changed = (moved >= 0.5 / 255).any(1).float().mean().item()
    return Strength(moved.mean().item(), moved.max().item(), changed)
