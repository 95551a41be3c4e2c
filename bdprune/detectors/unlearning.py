"""The label that an unlearned network falls back on (RNP, Section 4.3): backdoored networks fall on one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis import plain_form
from bdprune.data import CleanData
from bdprune.errors import DataError, TrainingError
from bdprune.loops import (
    Unlearned,
    UnlearnSettings,
    flip_shares,
    halves,
    leaders,
    mean_shares,
    middle_half,
    top_label,
    unlearn,
    unlearn_together,
)
from bdprune.methods import Evidence
from bdprune.model import Model
from bdprune.runtime import DEFAULT, Precision

_FULL = 500
"""Images from which on the spread of a run is taken as it was measured; with fewer it is wider."""

_FEW, _FEW_RUNS = 300, 3
"""Below so many images, so many runs are made at least: a standard error takes more than one."""

_MANY = 10
"""Classes from which on the threshold does not depend on their number."""

_Outcome = Unlearned | TrainingError


@dataclass(frozen=True)
class UnlearningDetector:
    """Flags a model whose wrong predictions, while it unlearns, pile up on one label.

    The flip share of a label k is the share of the images of other classes that are predicted as k. The statistic is
    the lead of the largest flip share over the second largest in the middle half of the steps to the collapse: what a
    backdoor holds falls first, and in the end every network falls on some label by chance. Predictions are those of
    the training forward passes (batch statistics), so they cost nothing; in eval mode the running statistics of batch
    norms lag behind the weights and name wrong labels.

    One run depends on the order of the images and on their augmentation, both drawn by the seed. So the images are
    sorted by content first, and the unlearning is repeated in other orders while the lead is near the threshold:
    after n runs it is near if the mean lead is within ``margin / sqrt(n)`` of it. The leads of single runs have a
    standard deviation of about 0.02, so the default margin is two and a half standard errors. With fewer than 500
    images the margin is wider, by the square root of 500 over their number, and with fewer than 300 there are three
    runs at least.

    The label is named only if it leads in both halves of the steps as well (some networks change their mind), and only
    if the network falls fast: backdoored ones let go of their task in a few passes, clean ones hold on to it, and when
    a clean one gives way at last, some label leads by chance. Otherwise the evidence is good for a suspicion but not
    for a name.

    Of two classes, one takes all that the other loses, so a clean network has a large lead as well. The threshold for
    two classes is ``two_class_threshold``, that for ten or more is ``threshold``, and between them it falls on a
    straight line. What is unlearned is the plain form of the network (:func:`bdprune.analysis.plain.plain_form`).

    Args:
        unlearning: settings of the ascent.
        threshold: a lead above this is flagged in a network of ten classes or more (docs/detection.md has the
            measurements).
        two_class_threshold: the same for two classes.
        margin: how far from the threshold, in units of the lead, the lead of a single run must be to end the matter.
        max_runs: runs at most, 1 or more.
        named_within: steps in which a network must fall for its label to be named.
        min_images: fewer clean images than this are refused: their flip shares are noise (docs/detection.md).
        precision: of the ascent: ``winograd``, float32 with the fastest convolutions; ``float32``, what PyTorch
            computes; ``bfloat16``; or ``auto``, the fastest on this machine by a short trial, whose last digits may
            differ from run to run.
        seed: of order and augmentation.
    """

    unlearning: UnlearnSettings = field(
        default_factory=lambda: UnlearnSettings(weight_decay=5e-4, min_steps=8, raises=1)
    )
    threshold: float = 0.09
    two_class_threshold: float = 0.65
    margin: float = 0.05
    max_runs: int = 7
    named_within: int = 40
    min_images: int = 100
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.unlearning"
    needs_data = True

    def __call__(self, model: Model, data: CleanData | None) -> Evidence:
        """Unlearns copies of ``model`` on ``data``, in one order or more, and reads the trajectories.

        Raises:
            DataError: no data, or too few.
            TrainingError: a run with no finite step.
        """
        data = self._enough(data).by_content
        start = time.perf_counter()
        plain = plain_form(model, data.images)

        def one_round(places: Sequence[int], seed: int) -> list[_Outcome]:
            return [unlearn(plain, data, self.unlearning, seed, self.precision)]

        (runs,) = self._repeat(one_round, 1, len(data))
        assert not isinstance(runs, TrainingError)
        return self.read(runs, len(data), time.perf_counter() - start)

    @property
    def batch_size(self) -> int:
        """Images of each model in a step."""
        return self.unlearning.batch_size

    def together(self, models: Sequence[Model], data: CleanData | None) -> list[Evidence | TrainingError]:
        """Unlearns copies of all models in the same steps, those that need another run once more.

        Raises:
            DataError: no data, or too few.
        """
        data = self._enough(data).by_content
        start = time.perf_counter()
        plain = [plain_form(model, data.images) for model in models]

        def one_round(places: Sequence[int], seed: int) -> list[_Outcome]:
            return unlearn_together([plain[k] for k in places], data, self.unlearning, seed, self.precision)

        outcomes = self._repeat(one_round, len(models), len(data))
        share = (time.perf_counter() - start) / len(models)
        return [one if isinstance(one, TrainingError) else self.read(one, len(data), share) for one in outcomes]

    def read(self, runs: Sequence[Unlearned], images: int, seconds: float = 0.0) -> Evidence:
        """The evidence in the runs that have been made of one model, each on so many ``images``."""
        reading = _read(runs)
        threshold = self._threshold(reading)
        named = reading.agrees and reading.steps <= self.named_within
        return Evidence(
            detector=self.id,
            score=reading.lead,
            threshold=threshold,
            flagged=reading.lead > threshold,
            target_label=reading.label if named else None,
            seconds=seconds,
            params={**asdict(self.unlearning), "precision": self.precision, "seed": self.seed},
            details={
                "final_label": reading.label,
                "runs": len(runs),
                "leads": reading.leads,
                "standard_error": reading.error,
                "near": self._is_near(reading, images),
                "images": images,
                **_details(runs, reading.shares),
            },
        )

    def _enough(self, data: CleanData | None) -> CleanData:
        if data is None:
            raise DataError("The unlearning detector needs clean images.", "Pass some with --data.")
        if len(data) < self.min_images:
            raise DataError(f"{len(data)} clean images are too few to unlearn on.", f"Give {self.min_images} or more.")
        return data

    def _repeat(
        self, one_round: Callable[[Sequence[int], int], list[_Outcome]], models: int, images: int
    ) -> list[list[Unlearned] | TrainingError]:
        """The runs of every model, as many as each needs.

        Args:
            one_round: makes a run of each model whose place is given, with a seed.
        """
        runs: list[list[Unlearned]] = [[] for _ in range(models)]
        errors: dict[int, TrainingError] = {}
        pending = list(range(models))
        for seed in self._seeds():
            for place, outcome in zip(pending, one_round(pending, seed), strict=True):
                if isinstance(outcome, TrainingError):
                    errors[place] = outcome
                else:
                    runs[place].append(outcome)
            pending = [place for place in pending if place not in errors and not self._is_settled(runs[place], images)]
            if not pending:
                break
        return [errors.get(place, mine) for place, mine in enumerate(runs)]

    def _seeds(self) -> Iterator[int]:
        """The detector's own seed for the first run, and one drawn from it for each of the others."""
        yield self.seed
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.max_runs - 1):
            yield int(torch.randint(2**62, (), generator=generator))

    def _is_settled(self, runs: Sequence[Unlearned], images: int) -> bool:
        """Whether another run could hardly change the verdict."""
        if images < _FEW and len(runs) < _FEW_RUNS:
            return False
        reading = _read(runs)
        unnamed = reading.lead > self._threshold(reading) and not reading.agrees and reading.steps <= self.named_within
        return not unnamed and not self._is_near(reading, images)

    def _is_near(self, reading: _Reading, images: int) -> bool:
        spread = self.margin * math.sqrt(max(1.0, _FULL / images))
        return abs(reading.lead - self._threshold(reading)) <= spread / math.sqrt(len(reading.leads))

    def _threshold(self, reading: _Reading) -> float:
        few = max(_MANY - len(reading.shares), 0) / (_MANY - 2)
        return self.threshold + few * (self.two_class_threshold - self.threshold)


@dataclass(frozen=True)
class _Reading:
    """What the runs of one model say together.

    Attributes:
        shares: flip share of every label in the middle half of the steps, mean over the runs.
        label: the label that leads.
        leads: its lead over the label that comes second, run by run; below 0 where it does not lead.
        agrees: whether it leads in both halves as well, in the mean.
        steps: median number of steps to the collapse.
    """

    shares: list[float]
    label: int
    leads: list[float]
    agrees: bool
    steps: float

    @property
    def lead(self) -> float:
        """Mean lead, in [0, 1]."""
        return statistics.fmean(self.leads)

    @property
    def error(self) -> float | None:
        """Standard error of the mean lead over orders of the images, None of a single run."""
        return statistics.stdev(self.leads) / math.sqrt(len(self.leads)) if len(self.leads) > 1 else None


def _read(runs: Sequence[Unlearned]) -> _Reading:
    middle = [flip_shares(middle_half(run.trajectory)) for run in runs]
    shares = mean_shares(middle)
    label, second = leaders(shares)
    leads = [of_run[label] - of_run[second] for of_run in middle]
    both = zip(*(map(flip_shares, halves(run.trajectory)) for run in runs), strict=True)
    agrees = all(top_label(mean_shares(half)) == label for half in both)
    steps = statistics.median(len(run.trajectory) for run in runs)
    return _Reading(shares, label, leads, agrees, steps)


def _details(runs: Sequence[Unlearned], shares: list[float]) -> dict[str, Any]:
    """What reports draw; the trajectory is that of the first run."""
    first = runs[0]
    return {
        "flip_shares": shares,
        "collapsed": all(run.stopped for run in runs),
        "lr": first.lr,
        "steps_per_epoch": first.steps_per_epoch,
        "batch_norms": sum(isinstance(child, _BatchNorm) for child in first.model.network.modules()),
        "trajectory": [
            {"loss": step.loss, "accuracy": step.accuracy, "votes": list(step.votes)} for step in first.trajectory
        ],
    }
