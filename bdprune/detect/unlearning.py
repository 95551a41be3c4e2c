"""The label that an unlearned network falls back on (RNP, Section 4.3): backdoored networks fall on one."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from bdprune.data.clean import CleanData
from bdprune.detect.base import Evidence
from bdprune.errors import DataError
from bdprune.model.handle import Model
from bdprune.training.trajectory import flip_shares, last_epoch
from bdprune.training.unlearn import Unlearned, UnlearnSettings, unlearn


@dataclass(frozen=True)
class UnlearningDetector:
    """Flags a model whose wrong predictions, while it unlearns, pile up on one label.

    The statistic is the largest *flip share* over labels k: of the images that are not of class k, the share that
    is predicted as k, over the last pass before the collapse. Predictions are those of the training forward passes
    (batch statistics), so they cost nothing: the running statistics of batch norms lag behind the weights and name
    wrong labels.

    Args:
        unlearning: settings of the ascent.
        threshold: a flip share above this is flagged (docs/detection.md has the measurements).
        seed: of order and augmentation.
    """

    unlearning: UnlearnSettings = field(
        default_factory=lambda: UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1)
    )
    threshold: float = 0.45
    seed: int = 0

    id = "bdprune.unlearning"
    needs_data = True

    def __call__(self, model: Model, data: CleanData | None) -> Evidence:
        """Unlearns a copy of ``model`` on ``data`` and reads the trajectory.

        Raises:
            DataError: no data.
        """
        if data is None:
            raise DataError("The unlearning detector needs clean images.", "Pass some with --data.")
        start = time.perf_counter()
        unlearned = unlearn(model, data, self.unlearning, self.seed)
        return self.read(unlearned, time.perf_counter() - start)

    def read(self, unlearned: Unlearned, seconds: float = 0.0) -> Evidence:
        """The evidence in an unlearning that has been done already."""
        shares = flip_shares(last_epoch(unlearned.trajectory, unlearned.steps_per_epoch))
        score = max(shares)
        return Evidence(
            detector=self.id,
            score=score,
            threshold=self.threshold,
            flagged=score > self.threshold,
            target_label=shares.index(score),
            seconds=seconds,
            params={**asdict(self.unlearning), "seed": self.seed},
            details=_details(unlearned, shares),
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
