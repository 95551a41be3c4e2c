"""A recovered trigger: its tensors, and how to stamp it onto images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.loops.inversion.families import FAMILIES
from bdprune.loops.inversion.hypotheses import Hypothesis
from bdprune.record import Box, TriggerInfo, TriggerKind

_SEEN = 0.5  # share of a mask's largest value from which a pixel counts as covered
_SPREAD = 0.5  # share of the image from which a trigger has no place of its own


@dataclass(frozen=True, eq=False)
class Trigger:
    """A recovered trigger.

    Attributes:
        mask: ``[1, h, w]`` in [0, 1], the opacity of a patch; None for other kinds.
        pattern: ``[C, h, w]``, the colours of a patch in [0, 1], or the change of each colour in [-1, 1]; ``[2, h,
            w]``, the displacement of a warp, to the right and downwards, in pixels.
        target: the label that it leads to; None for any label but the true one.
        sources: the labels whose images it was made for; empty for all labels but the target.
        flip_rate: share of held-out images that it flips, in [0, 1]; None if no image was held out.
        images: number of held-out images.
        kind: ``patch``, ``additive`` or ``warp``.
        grown: whether it is the strongest patch around a recovered one (:func:`bdprune.loops.grow`).
    """

    mask: Tensor | None
    pattern: Tensor
    target: int | None
    sources: tuple[int, ...] = ()
    flip_rate: float | None = None
    images: int = 0
    kind: TriggerKind = "patch"
    grown: bool = False

    @property
    def _masks(self) -> Tensor | None:
        return None if self.mask is None else self.mask.unsqueeze(0)

    @property
    def strength(self) -> Tensor:
        """``[h, w]``: the mask, the largest change of a colour at each pixel, or the displacement in pixels."""
        return FAMILIES[self.kind].strength(self._masks, self.pattern.unsqueeze(0))[0]

    @property
    def size(self) -> float:
        """Sum of the strength over all pixels."""
        return self.strength.sum().item()

    def apply(self, images: Tensor) -> Tensor:
        """Stamps the trigger onto images ``[N, C, h, w]`` in [0, 1]; returns the same shape."""
        masks = None if self._masks is None else self._masks.to(images)
        return FAMILIES[self.kind].apply(images, masks, self.pattern.unsqueeze(0).to(images))[0]

    def takes(self, labels: Tensor) -> Tensor:
        """Which images it is about, bool ``[N]``, from their labels ``[N]``."""
        return Hypothesis(self.target, self.sources).takes(labels)

    def flips(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Which predictions ``[N]`` for stamped images of these labels ``[N]`` are flipped, bool ``[N]``."""
        return predicted != labels if self.target is None else predicted == self.target

    @property
    def box(self) -> Box | None:
        """The smallest rectangle that holds the pixels of at least half the largest strength."""
        seen = self.strength >= _SEEN * self.strength.max()
        if self.size == 0 or seen.float().mean() > _SPREAD:
            return None
        rows, columns = (torch.nonzero(seen.any(axis)).flatten() for axis in (1, 0))
        top, bottom, left, right = (int(value) for value in (rows[0], rows[-1], columns[0], columns[-1]))
        return Box(x=left, y=top, width=right - left + 1, height=bottom - top + 1)

    @property
    def info(self) -> TriggerInfo:
        """Its record."""
        return TriggerInfo(
            kind=self.kind,
            target_label=self.target,
            source_labels=self.sources,
            size=self.size,
            flip_rate=self.flip_rate,
            images=self.images,
            box=self.box,
        )


def largest_size(trigger: Trigger) -> float:
    """The size of a trigger of this kind and image size that changes every pixel as far as possible."""
    return FAMILIES[trigger.kind].largest(trigger.pattern.shape) * trigger.strength.numel()
