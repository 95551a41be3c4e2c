"""Detects a label on which the predictions of an unlearning network concentrate (RNP, Section 4.3)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis import LEAD, SCAN_UNLEARNING, TWO_CLASS_LEAD, Case, Unlearning, tensors_of
from bdprune.errors import BudgetError
from bdprune.loops import (
    Unlearned,
    UnlearnSettings,
    flip_shares,
    halves,
    leaders,
    mean_shares,
    middle_half,
    top_label,
)
from bdprune.methods import Detector, Steps
from bdprune.record import Attachment, Evidence, Needs, Rule
from bdprune.runtime import DEFAULT, Budget, Precision

_FULL = 500
"""With this many images or more, the spread of a run is as measured; with fewer it is larger."""

_FEW, _FEW_RUNS = 300, 3
"""Below this number of images, make at least this number of runs: a standard error needs more than one."""

_TYPICAL_STEPS = 25
"""Steps of a run, for an estimate of its time."""

_PASSES = 3
"""Forward passes of an image that take as long as its step of training."""

_MANY = 10
"""From this number of classes on, the threshold does not depend on their number."""

_NO_NORM = (
    "The network has no batch norm. Unlearning is unreliable on such networks: with the norms folded into the convs, "
    "a backdoored network was missed and a clean one was flagged."
)


@dataclass(frozen=True)
class UnlearningDetector(Detector):
    """Flags a model if its wrong predictions concentrate on one label while it unlearns.

    The flip share of a label k is the share of the images of other classes that are predicted as k. The statistic is
    the lead of the largest flip share over the second largest in the middle half of the steps up to the collapse. A
    backdoor's classes collapse first, and in the end every network predicts some label by chance. Predictions come from
    the forward passes of the training (batch statistics), so they cost nothing. In eval mode the running statistics of
    batch norms lag behind the weights and give wrong labels.

    One run depends on the order and the augmentation of the images, which the seed determines. So the images are first
    sorted by content, and the unlearning is repeated in other orders while the lead is near the threshold. After n runs
    it is near if the mean lead is within ``margin / sqrt(n)`` of the threshold. The leads of single runs have a
    standard deviation of about 0.02, so the default margin is two and a half standard errors. With fewer than 500
    images the margin is larger, by the square root of 500 over their number. With fewer than 300 images there are at
    least three runs. The budget ``fast`` makes no more runs than that, and no run starts that does not fit into the
    time of a budget.

    The label is named only if it also leads in both halves of the steps (in some networks the leader changes), and only
    if the network collapses fast. Backdoored networks lose their task in a few passes. Clean networks keep it longer,
    and when they collapse, some label leads by chance. Otherwise the evidence supports a suspicion but not a label.

    With two classes, one gains all predictions that the other loses, so a clean network also has a large lead. The
    threshold for two classes is ``two_class_threshold``, the threshold for ten or more is ``threshold``, and it is
    linear in between. Unlearning uses the plain form of the network (:func:`bdprune.analysis.plain_form`).

    Args:
        unlearning: settings of the ascent.
        threshold: a larger lead is flagged in a network of ten classes or more (measurements:
            docs/evaluation/detection.md).
        two_class_threshold: the same for two classes.
        margin: distance from the threshold, in units of the lead, at which a single run is enough.
        max_runs: maximum number of runs, 1 or more.
        named_within: maximum number of steps to the collapse for the label to be named.
        min_images: minimum number of clean images: flip shares of fewer images are noise
            (docs/explanation/unlearning.md).
        precision: precision of the ascent: ``winograd``, float32 with the fastest convolutions; ``float32``, plain
            PyTorch; ``bfloat16``; or ``auto``, the fastest on this machine in a short trial, whose last digits may
            differ from run to run.
        seed: seed for order and augmentation.
    """

    unlearning: UnlearnSettings = SCAN_UNLEARNING
    threshold: float = LEAD
    two_class_threshold: float = TWO_CLASS_LEAD
    margin: float = 0.05
    max_runs: int = 7
    named_within: int = 40
    min_images: int = 100
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.unlearning"
    title = "finds the label that most wrong predictions name while the network unlearns"
    paper = "Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, arXiv 2305.14876, Section 4.3"
    needs = Needs(images="labelled", minimum=100)
    cost = "training"
    label = True
    sign = "collapse"
    level = "fast"
    rule = Rule(
        id="BD030",
        name="unlearned-label",
        help="While the network unlearns its task on clean images, its predictions concentrate on one label, as in "
        "backdoored networks.",
    )

    @property
    def least_images(self) -> int:
        return self.min_images

    @property
    def batch_size(self) -> int:
        return self.unlearning.batch_size

    def steps(self, case: Case) -> Steps:
        """Unlearns copies of the model, in one or more orders of the images, and reads the trajectories.

        Raises:
            BudgetError: the time does not suffice for one run.
            DataError: there are no clean images, or too few.
            TrainingError: a run had no finite step.
        """
        data = self.check(case)
        assert data is not None
        runs: list[Unlearned] = []
        for seed in self._seeds(self._most_runs(case.budget, len(data))):
            start = time.perf_counter()
            try:
                runs.append((yield Unlearning(self.unlearning, seed, self.precision, plain=True)))
            except BudgetError:
                if not runs:
                    raise
                break
            took = time.perf_counter() - start
            if self._is_settled(runs, len(data)) or took > case.budget.remaining:
                break
        return msgspec.structs.replace(self.read(runs, len(data)), attachments=_kept(case, runs[0]))

    def read(self, runs: Sequence[Unlearned], images: int) -> Evidence:
        """The evidence from all runs of one model, each on ``images`` images."""
        reading = _read(runs)
        threshold = self._threshold(reading)
        named = reading.agrees and reading.steps <= self.named_within
        norms = sum(isinstance(child, _BatchNorm) for child in runs[0].model.network.modules())
        near = self._is_near(reading, images)
        return self.evidence(
            reading.lead,
            threshold,
            target_label=reading.label if named else None,
            label_scores=tuple(reading.shares),
            near=near,
            remarks=(_about_lead(reading, images, threshold, near),),
            limits=_limits(reading, images),
            not_applicable="" if norms else _NO_NORM,
            details={
                "final_label": reading.label,
                "runs": len(runs),
                "leads": reading.leads,
                "standard_error": reading.error,
                "near": near,
                "images": images,
                "batch_norms": norms,
                **_details(runs, reading.shares),
            },
        )

    def work(self, case: Case) -> float:
        """One run of typical length."""
        images = min(self.unlearning.batch_size, len(case.images))
        return float(_TYPICAL_STEPS * images * _PASSES)

    def _most_runs(self, budget: Budget, images: int) -> int:
        few = _FEW_RUNS if images < _FEW else 1
        return min(self.max_runs, few) if budget.level == "fast" else self.max_runs

    def _seeds(self, count: int) -> Iterator[int]:
        """The detector's own seed for the first run, and seeds drawn from it for the others."""
        yield self.seed
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(count - 1):
            yield int(torch.randint(2**62, (), generator=generator))

    def _is_settled(self, runs: Sequence[Unlearned], images: int) -> bool:
        """Whether another run is unlikely to change the verdict."""
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


def _kept(case: Case, run: Unlearned) -> tuple[Attachment, ...]:
    """The unlearned model, if attachments are kept and it has the layers of the model."""
    same = run.model.network.state_dict().keys() == case.model.network.state_dict().keys()
    return (case.attach("unlearned", tensors_of(run)),) if case.keeps and same else ()


@dataclass(frozen=True)
class _Reading:
    """The combined result of the runs of one model.

    Attributes:
        shares: flip share of every label in the middle half of the steps, averaged over the runs.
        label: the label that leads.
        leads: its lead over the second label in each run; below 0 if it does not lead.
        agrees: whether it also leads in both halves, on average.
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
        """Standard error of the mean lead over orders of the images, None for a single run."""
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
    """Details for reports; the trajectory is from the first run."""
    first = runs[0]
    return {
        "flip_shares": shares,
        "collapsed": all(run.stopped for run in runs),
        "lr": first.lr,
        "steps_per_epoch": first.steps_per_epoch,
        "trajectory": [
            {"loss": step.loss, "accuracy": step.accuracy, "votes": list(step.votes)} for step in first.trajectory
        ],
    }


def _about_lead(reading: _Reading, images: int, threshold: float, near: bool) -> str:
    """The lead and the threshold, in a sentence."""
    spread = "" if reading.error is None else f" +- {reading.error:.3f}"
    orders = "1 order" if len(reading.leads) == 1 else f"{len(reading.leads)} orders"
    side = "above" if reading.lead > threshold else "below"
    lead = f"The lead is {reading.lead:.3f}{spread} over {orders} of {images} images"
    return f"{lead}, {side} the threshold of {threshold:.3f}{', but near it' if near else ''}."


def _limits(reading: _Reading, images: int) -> tuple[str, ...]:
    """Reasons to distrust the lead, one sentence each."""
    limits = []
    if images < _FEW:
        limits.append(f"With fewer than {_FEW} images, the lead depends on the choice of images.")
    if len(reading.shares) < _MANY:
        limits.append(
            f"With {len(reading.shares)} classes, a lead is weak evidence: clean networks have one too. So the "
            "threshold is high, and many backdoored networks stay below it."
        )
    return tuple(limits)
