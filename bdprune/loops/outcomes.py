"""What the loops over one model and over many have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch.nn import functional

from bdprune.errors import TrainingError

_Done = TypeVar("_Done")


def only(outcomes: Sequence[_Done | TrainingError]) -> _Done:
    """The outcome of the one model that there is.

    Raises:
        TrainingError: that is its outcome.
    """
    (outcome,) = outcomes
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every model ``[G]``, from logits ``[G, N, K]`` and labels ``[N]``."""
    count = len(logits)
    if count == 1:  # torch's own mean, which sums in another order
        return functional.cross_entropy(logits.squeeze(0), labels).unsqueeze(0)
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(count), reduction="none")
    return losses.view(count, -1).mean(1)
