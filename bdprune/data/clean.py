"""Clean data: the handful of labelled images a defender has."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    images: Tensor
    labels: Tensor
    source: str = "memory"
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> CleanData:
        """The images at ``index`` ([M] int64), in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def sample(self, per_class: int, generator: torch.Generator) -> CleanData:
        """At most ``per_class`` images of every class, drawn without replacement; classes stay in label order."""
        picks = [self._shuffled(label, generator)[:per_class] for label in self.labels.unique().tolist()]
        return self.subset(torch.cat(picks)) if picks else self

    def split(self, fraction: float, generator: torch.Generator) -> tuple[CleanData, CleanData]:
        """A stratified split into (rest, held-out share of ``fraction``).

        Every class with at least two images gives at least one to each side; a class with one image gives it to
        the rest.
        """
        rest, held = [], []
        for label in self.labels.unique().tolist():
            index = self._shuffled(label, generator)
            count = min(max(round(fraction * len(index)), 1), len(index) - 1)
            held.append(index[:count])
            rest.append(index[count:])
        return self.subset(torch.cat(rest)), self.subset(torch.cat(held))

    def _shuffled(self, label: int, generator: torch.Generator) -> Tensor:
        index = (self.labels == label).nonzero().flatten()
        return index[torch.randperm(len(index), generator=generator)]
