"""Clean data: the handful of labelled images a defender has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class CleanData:
    """Labelled clean images.

    Attributes:
        images: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]`` int64.
        source: where they came from, as shown in reports.
        class_names: name of each label, empty when unknown.
        notes: what was done to the images on the way in, such as resizing, one sentence each.
    """

    images: Tensor
    labels: Tensor
    source: str = "memory"
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and the hex digest of shape, images and labels: equal for equal data in equal order."""
        state = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for image in self.images.detach().cpu():
            state.update(image.contiguous().numpy().tobytes())
        state.update(self.labels.cpu().contiguous().numpy().tobytes())
        return f"sha256:{state.hexdigest()}"

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of images of each label that occurs, in label order."""
        labels, counts = torch.unique(self.labels, return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    def subset(self, index: Tensor) -> CleanData:
        """The images at ``index`` ([M] int64), in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def sample(self, per_class: int, generator: torch.Generator) -> CleanData:
        """At most ``per_class`` images of every class, drawn without replacement; classes stay in label order."""
        return self.subset(sample_per_class(self.labels, per_class, generator))

    def split(self, fraction: float, generator: torch.Generator) -> tuple[CleanData, CleanData]:
        """A stratified split into (rest, held-out share of ``fraction``).

        Every class with at least two images gives at least one to each side; a class with one image gives it to
        the rest.
        """
        rest, held = [], []
        for label in torch.unique(self.labels).tolist():
            index = _shuffled(self.labels, label, generator)
            count = min(max(round(fraction * len(index)), 1), len(index) - 1)
            held.append(index[:count])
            rest.append(index[count:])
        return self.subset(torch.cat(rest)), self.subset(torch.cat(held))


def sample_per_class(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Positions ([M] int64) of at most ``per_class`` images of every label in ``labels`` ([N] int64).

    Drawn without replacement; classes stay in label order, so that images need not be decoded to be chosen.
    """
    picks = [_shuffled(labels, label, generator)[:per_class] for label in torch.unique(labels).tolist()]
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64)


def _shuffled(labels: Tensor, label: int, generator: torch.Generator) -> Tensor:
    index = (labels == label).nonzero().flatten()
    return index[torch.randperm(len(index), generator=generator)]
