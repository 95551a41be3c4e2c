"""Weights of source labels: a trigger with them may specialise on the label whose images flip most easily.

Our own derivation; Shen et al., K-Arm, ICML 2021, search a trigger for each pair of labels instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURE = 0.2
"""Losses of two sources that differ by this have weights that differ by the factor e."""

_MEMORY = 0.7  # share of the earlier mean in the running mean of a source's loss
_EVEN = 0.5  # share of the images of a step that is drawn evenly from all sources
_RANKED = 4  # sources of each trigger that a result names
_DRAWN = 1 << 31  # random numbers are below it


def image_weights(losses: Tensor, sources: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The weight of each image ``[H, N]``; the weights of each hypothesis have the sum 1.

    The sources that occur have the weights ``softmax(-loss / temperature)``. The images of a source share its weight
    equally. So the weighted sum of the images' losses is the weighted sum of the sources' mean losses.

    Args:
        losses: of the source of each image ``[H, N]``, equal for images of one source.
        sources: a number for the source of each image ``[H, N]``.
        temperature: above 0; a small one gives almost all weight to the source with the smallest loss.
    """
    return (-losses / temperature - _same(sources).sum(2).log()).softmax(1)


def _same(sources: Tensor) -> Tensor:
    """Whether two images of a hypothesis have the same source, 0 or 1 ``[H, N, N]``."""
    return (sources.unsqueeze(2) == sources.unsqueeze(1)).float()


class SourceWeights:
    """The weights of the L sources of F candidates, from running means of their losses.

    A step has few images of each source, so its own losses would give weights that are mostly chance. The means start
    at the losses of the images without a trigger. They change in place, so that a step can be recorded as a CUDA graph.

    Args:
        weighted: whether each candidate has weights ``[F]`` bool; the images of others count equally.
        pools: positions of the images that each candidate is about, ``[P]`` int64 each, on the CPU; none is empty.
        labels: of all images of the search ``[N]``.
        losses: of all images without a trigger, for each candidate ``[F, N]``.
    """

    def __init__(self, weighted: Tensor, pools: Sequence[Tensor], labels: Tensor, losses: Tensor) -> None:
        self._labels, self._places = labels.unique(return_inverse=True)
        self._weighted, places = weighted, self._places.cpu()
        kinds = len(self._labels)
        self._counts = torch.stack([torch.bincount(places[pool], minlength=kinds) for pool in pools])
        self._sorted = [pool[places[pool].argsort(stable=True)] for pool in pools]
        totals = torch.zeros(self._counts.shape)
        for total, pool, own in zip(totals, pools, losses.float().cpu(), strict=True):
            total.index_add_(0, places[pool], own[pool])
        self._losses = (totals / self._counts.clamp(min=1)).to(labels.device)

    def weigh(self, losses: Tensor, picks: Tensor, part: slice) -> Tensor:
        """The weights of the images of one step ``[M, N]``, without gradients; updates the running means.

        Args:
            losses: of the images ``[M, N]``.
            picks: positions of the images ``[M, N]``.
            part: the M candidates.
        """
        sources = self._places[picks]
        same = _same(sources)
        means = (same @ losses.detach().float().unsqueeze(2)).squeeze(2) / same.sum(2)
        running = torch.lerp(means, self._losses[part].gather(1, sources), _MEMORY)
        self._losses[part].scatter_(1, sources, running)  # images of one source write the same value
        return torch.where(self._weighted[part, None], image_weights(running, sources), 1 / picks.shape[1])

    def draw(self, numbers: Tensor) -> Tensor:
        """Positions of images for one step ``[F, N]``, on the CPU.

        Half of them come evenly from all sources, so that no source is forgotten, and half from the sources in
        proportion to their weights. The number of images of a source differs by less than one from its share.

        Args:
            numbers: random numbers from 0 to 2^31 - 1, ``[F, N]`` int64 on the CPU.
        """
        given = (self._counts > 0).float()
        shares = _EVEN * given / given.sum(1, keepdim=True) + (1 - _EVEN) * self._shares()
        count = numbers.shape[1]
        marks = (numbers[:, :1].double() / _DRAWN + torch.arange(count)) / count
        ends = shares.double().cumsum(1)
        sources = torch.searchsorted(ends / ends[:, -1:], marks, right=True)
        places = numbers % self._counts.gather(1, sources) + (self._counts.cumsum(1) - self._counts).gather(1, sources)
        return torch.stack([own[row] for own, row in zip(self._sorted, places, strict=True)])

    def ranked(self) -> list[tuple[int, ...]]:
        """At most four labels for each candidate, the one with the largest weight first; none without weights."""
        labels, present = self._labels.tolist(), (self._counts > 0).sum(1).tolist()
        order = self._known().argsort(dim=1, stable=True).tolist()
        return [
            tuple(labels[place] for place in row[: min(_RANKED, count)]) if weighted else ()
            for row, count, weighted in zip(order, present, self._weighted.tolist(), strict=True)
        ]

    def select(self, index: Tensor) -> None:
        """Keeps only the candidates at ``index`` ``[M]`` int64, in that order."""
        self._weighted, self._losses = self._weighted[index], self._losses[index]
        self._counts = self._counts[index.cpu()]
        self._sorted = [self._sorted[place] for place in index.tolist()]

    def _known(self) -> Tensor:
        """The running means of the losses, on the CPU; infinite for a source without images."""
        return torch.where(self._counts > 0, self._losses.cpu(), torch.inf)

    def _shares(self) -> Tensor:
        return (-self._known() / TEMPERATURE).softmax(1)
