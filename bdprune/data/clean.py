"""Clean data: the few labelled images that a defender has."""

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
"""``number``, ``text``, the path of a JSON file, or a map from labels of the data to labels of the model."""


@dataclass(frozen=True)
class OtherSize:
    """An image size in which a model is clearly more accurate, such as the original size of the images.

    Attributes:
        size: (height, width).
        accuracy: clean accuracy in that size, 0-1.
        accuracy_now: clean accuracy on the same images in their current size, 0-1.
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
        source: where they come from, as shown in reports.
        class_names: name of each label, empty if unknown.
        notes: changes to the images during loading, such as resizing, one sentence each.
        passed_over: number of skipped files of a folder, by suffix or reason.
        native_size: original (height, width) of all images; None if it varies or is unknown.
        other_size: a size in which the model is clearly more accurate; None if none was found.
        class_order: the applied renumbering, label in the source -> label here; empty if there was none.
        mirror: whether a mirrored image keeps its label. If not, as with road signs and digits, a repair mirrors images
            only while it unlearns.
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
    mirror: bool = True

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
        """The same images sorted by the hash of pixels and label, so that the result does not depend on their order."""
        keys = self._keys
        ordered = self.subset(torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64))
        ordered.__dict__["by_content"] = ordered  # sorted already
        return ordered

    @property
    def _keys(self) -> list[bytes]:
        """The hash of pixels and label of each image."""
        return [
            hashlib.sha256(image.contiguous().numpy().tobytes() + label.to_bytes(8, "little")).digest()
            for image, label in zip(self.images.detach().cpu(), self.labels.tolist(), strict=True)
        ]

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of images of each label that occurs, in label order."""
        labels, counts = torch.unique(self.labels, return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    def absent_labels(self, num_classes: int) -> list[int]:
        """The labels below ``num_classes`` without an image."""
        counts = self.class_counts
        return [label for label in range(num_classes) if label not in counts]

    @cached_property
    def without_copies(self) -> CleanData:
        """The images without those that equal an earlier one with the same label; a note says how many there were.

        A copy adds nothing, and it would be on both sides of :meth:`split`, so that held-out images would not be new.
        """
        first: dict[bytes, int] = {}
        for index, key in enumerate(self._keys):
            first.setdefault(key, index)
        copies = len(self) - len(first)
        if not copies:
            return self
        note = f"{copies} of {len(self)} images are copies of others and were left out."
        distinct = replace(self.subset(torch.tensor(list(first.values()))), notes=(*self.notes, note))
        distinct.__dict__["without_copies"] = distinct
        return distinct

    def subset(self, index: Tensor) -> CleanData:
        """The images at ``index`` ([M] int64), in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def sample(self, per_class: int, generator: torch.Generator) -> CleanData:
        """At most ``per_class`` images of every class, drawn without replacement, in label order."""
        return self.subset(sample_per_class(self.labels, per_class, generator))

    def spread(self, count: int) -> CleanData:
        """At most ``count`` images, at equal distances; all of them if there are no more."""
        if len(self) <= count:
            return self
        return self.subset(torch.arange(count) * len(self) // count)

    def split(self, fraction: float, generator: torch.Generator) -> tuple[CleanData, CleanData]:
        """A stratified split into (rest, held-out share of ``fraction``).

        Every class with at least two images has at least one in each part; a single image of a class goes to the rest.
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

    Drawn without replacement, in label order. It needs only labels, so that unused images are never decoded.
    """
    picks = [_shuffled(labels, label, generator)[:per_class] for label in torch.unique(labels).tolist()]
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64)


def _shuffled(labels: Tensor, label: int, generator: torch.Generator) -> Tensor:
    index = (labels == label).nonzero().flatten()
    return index[torch.randperm(len(index), generator=generator)]
