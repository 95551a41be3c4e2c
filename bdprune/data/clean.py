"""Clean data: the handful of labelled images a defender has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

ClassOrder: TypeAlias = str | os.PathLike[str] | Mapping[int, int] | Sequence[int] | None
"""``number``, ``text``, the path of a JSON file, or the label of the model for each label of the data."""


@dataclass(frozen=True)
class OtherSize:
    """A size of the images in which a model does clearly better, such as the one that they have in their source.

    Attributes:
        size: (height, width).
        accuracy: clean accuracy in that size, 0-1.
        accuracy_now: clean accuracy on the same images in the size that they were brought to, 0-1.
        loss: mean cross-entropy in that size, in nats.
        images: number of images on which it was measured.
    """

    size: tuple[int, int]
    accuracy: float
    accuracy_now: float
    loss: float
    images: int


@dataclass(frozen=True)
class CleanData:
    """Labelled clean images.

    Attributes:
        images: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]`` int64.
        source: where they came from, as shown in reports.
        class_names: name of each label, empty when unknown.
        notes: what was done to the images on the way in, such as resizing, one sentence each.
        passed_over: how many files of a folder were not read, by suffix or reason.
        native_size: (height, width) that all images had in their source, None when they had several or it is unknown.
        other_size: a size in which the model does clearly better; None where none was found.
        class_order: the renumbering that was applied, label in the source -> label here; empty when there was none.
    """

    images: Tensor
    labels: Tensor
    source: str = "memory"
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict, hash=False)
    native_size: tuple[int, int] | None = None
    other_size: OtherSize | None = None
    class_order: Mapping[int, int] = field(default_factory=dict, hash=False)

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

    @cached_property
    def by_content(self) -> CleanData:
        """The same images sorted by the hash of pixels and label: whatever order they come in, they leave in this."""
        keys = [
            hashlib.sha256(image.contiguous().numpy().tobytes() + label.to_bytes(8, "little")).digest()
            for image, label in zip(self.images.detach().cpu(), self.labels.tolist(), strict=True)
        ]
        ordered = self.subset(torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64))
        ordered.__dict__["by_content"] = ordered  # sorted already
        return ordered

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
