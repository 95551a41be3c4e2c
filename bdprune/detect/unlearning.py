"""The label that an unlearned network falls back on (RNP, Section 4.3): backdoored networks fall on one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bdprune.data.clean import CleanData
from bdprune.detect.base import Evidence
from bdprune.errors import DataError, TrainingError
from bdprune.model.handle import Model
from bdprune.training.precision import DEFAULT, Precision
from bdprune.training.together import unlearn_together
from bdprune.training.trajectory import flip_shares, last_epoch, lead, top_label
from bdprune.training.unlearn import Unlearned, UnlearnSettings, unlearn


@dataclass(frozen=True)
class UnlearningDetector:
    """Flags a model whose wrong predictions, while it unlearns, pile up on one label.

    The flip share of a label k is the share of the images of other classes that are predicted as k. The statistic is
    the lead of the largest flip share over the second largest in the last pass before the collapse: a clean network
    also prefers some labels as it falls apart, but never one alone. Predictions are those of the training forward
    passes (batch statistics), so they cost nothing; in eval mode the running statistics of batch norms lag behind the
    weights and name wrong labels.

    The label is named only if it leads in the first half of the way down as well (some networks change their mind), and
    only if the network falls fast: backdoored ones let go of their task in a few passes, clean ones hold on to it, and
    when a clean one gives way at last, some label leads by chance. Otherwise the evidence is good for a suspicion but
    not for a name.

    Args:
        unlearning: settings of the ascent.
        threshold: a lead above this is flagged (docs/detection.md has the measurements).
        named_within: steps in which a network must fall for its label to be named.
        min_images: fewer clean images than this are refused: their flip shares are noise (docs/detection.md).
        precision: of the ascent: ``winograd``, float32 with the fastest convolutions; ``float32``, what PyTorch
            computes, in which the threshold was set; ``bfloat16``; or ``auto``, the fastest on this machine by a short
            trial, whose last digits may differ from run to run.
        seed: of order and augmentation.
    """

    unlearning: UnlearnSettings = field(
        default_factory=lambda: UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1)
    )
    threshold: float = 0.22
    named_within: int = 40
    min_images: int = 100
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.unlearning"
    needs_data = True

    def __call__(self, model: Model, data: CleanData | None) -> Evidence:
        """Unlearns a copy of ``model`` on ``data`` and reads the trajectory.

        Raises:
            DataError: no data, or too few.
        """
        data = self._enough(data)
        start = time.perf_counter()
        unlearned = unlearn(model, data, self.unlearning, self.seed, self.precision)
        return self.read(unlearned, time.perf_counter() - start)

    @property
    def batch_size(self) -> int:
        """Images of each model in a step."""
        return self.unlearning.batch_size

    def together(self, models: Sequence[Model], data: CleanData | None) -> list[Evidence | TrainingError]:
        """Unlearns copies of all models in the same steps.

        Raises:
            DataError: no data, or too few.
        """
        data = self._enough(data)
        start = time.perf_counter()
        outcomes = unlearn_together(models, data, self.unlearning, self.seed, self.precision)
        share = (time.perf_counter() - start) / len(models)
        return [one if isinstance(one, TrainingError) else self.read(one, share) for one in outcomes]

    def _enough(self, data: CleanData | None) -> CleanData:
        if data is None:
            raise DataError("The unlearning detector needs clean images.", "Pass some with --data.")
        if len(data) < self.min_images:
            raise DataError(f"{len(data)} clean images are too few to unlearn on.", f"Give {self.min_images} or more.")
        return data

    def read(self, unlearned: Unlearned, seconds: float = 0.0) -> Evidence:
        """The evidence in an unlearning that has been done already."""
        shares = flip_shares(last_epoch(unlearned.trajectory, unlearned.steps_per_epoch))
        score = lead(shares)
        label = top_label(shares)
        onset = unlearned.trajectory[: max(len(unlearned.trajectory) // 2, 1)]
        agreed = top_label(flip_shares(onset)) == label and len(unlearned.trajectory) <= self.named_within
        return Evidence(
            detector=self.id,
            score=score,
            threshold=self.threshold,
            flagged=score > self.threshold,
            target_label=label if agreed else None,
            seconds=seconds,
            params={**asdict(self.unlearning), "precision": self.precision, "seed": self.seed},
            details={"final_label": label, **_details(unlearned, shares)},
        )


def _details(unlearned: Unlearned, shares: list[float]) -> dict[str, Any]:
    return {
        "flip_shares": shares,
        "collapsed": unlearned.stopped,
        "lr": unlearned.lr,
        "steps_per_epoch": unlearned.steps_per_epoch,
        "trajectory": [
            {"loss": step.loss, "accuracy": step.accuracy, "votes": list(step.votes)} for step in unlearned.trajectory
        ],
    }
