"""Reading the trajectory of an unlearning: which label do the wrong predictions pile up on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class UnlearnStep:
    """What the network said of a batch, in train mode, before it was changed by it.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share of right predictions, in [0, 1].
        votes: how many images were predicted as each label.
        wrong_votes: the same, right predictions left out.
        label_counts: how many images have each label.
    """

    loss: float
    accuracy: float
    votes: tuple[int, ...]
    wrong_votes: tuple[int, ...]
    label_counts: tuple[int, ...]


def flip_shares(steps: Sequence[UnlearnStep]) -> list[float]:
    """For every label k, the share of the images of other classes that were predicted as k, in [0, 1], ``[K]``."""
    shares = []
    for label in range(len(steps[0].votes)):
        others = sum(sum(step.label_counts) - step.label_counts[label] for step in steps)
        shares.append(sum(step.wrong_votes[label] for step in steps) / others if others else 0.0)
    return shares


def last_epoch(trajectory: Sequence[UnlearnStep], steps_per_epoch: int) -> Sequence[UnlearnStep]:
    """The steps of the last pass over the data, full or not: the collapse."""
    return trajectory[-steps_per_epoch:]


def halves(trajectory: Sequence[UnlearnStep]) -> tuple[Sequence[UnlearnStep], Sequence[UnlearnStep]]:
    """The first and the second half of the steps to the collapse; of an odd number the second has one more.

    Neither is empty: a single step is both.
    """
    middle = len(trajectory) // 2
    return trajectory[: max(middle, 1)], trajectory[middle:]


def middle_half(trajectory: Sequence[UnlearnStep]) -> Sequence[UnlearnStep]:
    """The steps to the collapse without their first and their last quarter, each rounded down to whole steps."""
    quarter = len(trajectory) // 4
    return trajectory[quarter : len(trajectory) - quarter]


def mean_shares(runs: Sequence[Sequence[float]]) -> list[float]:
    """The mean over runs of the share of every label, ``[K]``."""
    return [sum(of_label) / len(runs) for of_label in zip(*runs, strict=True)]


def sink_label(trajectory: Sequence[UnlearnStep], steps_per_epoch: int) -> int:
    """The label with the largest flip share in the last pass: RNP's backdoor label."""
    return top_label(flip_shares(last_epoch(trajectory, steps_per_epoch)))


def top_label(shares: Sequence[float]) -> int:
    """The label with the largest share; the smallest such label on a tie."""
    return max(range(len(shares)), key=lambda label: shares[label])


def leaders(shares: Sequence[float]) -> tuple[int, int]:
    """The labels with the largest and the second largest share; on a tie the smaller label comes first."""
    first, second = sorted(range(len(shares)), key=lambda label: -shares[label])[:2]
    return first, second
