"""Where a recovered trigger sends the images of each label: to one target, to a target of each label, or only some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.data import CleanData
from bdprune.loops import Trigger
from bdprune.model import Model
from bdprune.runtime import convs_of, predict

_MOSTLY = 0.5  # share of a label's images that must go to one label for it to be their target
_RARELY = 0.3  # a label of which fewer images are flipped is no source of a source-specific backdoor


@dataclass(frozen=True)
class Flips:
    """The labels between which a trigger flips images.

    Attributes:
        targets: the labels that it leads to; several for an all-to-all backdoor.
        sources: the labels whose images it flips, if it spares those of most others; empty otherwise.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]


def flip_table(model: Model, trigger: Trigger, data: CleanData) -> Tensor:
    """How often stamped images of each label are predicted as each label, ``[K, K]`` (true label, predicted label)."""
    with convs_of("winograd"):
        predicted = predict(model.module, trigger.apply(data.images.to(model.device)))
    table = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    table.index_put_((data.labels.cpu(), predicted), torch.ones_like(predicted), accumulate=True)
    return table


def read_flips(table: Tensor, target: int | None) -> Flips:
    """Reads targets and sources off a :func:`flip_table`.

    Args:
        target: the label that the trigger was made for; None for an untargeted trigger.
    """
    shares = table.double() / table.sum(1, keepdim=True).clamp(min=1)
    seen = [label for label in range(len(table)) if table[label].sum() and label != target]
    if target is None:
        goals = {label: _goal(shares[label], label) for label in seen}
        targets = tuple(sorted({goal for goal in goals.values() if goal is not None}))
        flipped = {label: 1 - float(shares[label, label]) for label in seen}
    else:
        targets, flipped = (target,), {label: float(shares[label, target]) for label in seen}
    sources = [label for label, share in flipped.items() if share >= _MOSTLY]
    spared = [label for label, share in flipped.items() if share <= _RARELY]
    specific = bool(sources) and len(spared) >= 2 * len(sources)
    return Flips(targets, tuple(sources) if specific else ())


def _goal(shares: Tensor, label: int) -> int | None:
    """The label that most images of ``label`` are flipped to, None if there is none."""
    others = shares.clone()
    others[label] = 0
    best = int(others.argmax())
    return best if others[best] >= _MOSTLY else None
