"""The label that an unlearned network falls back on (RNP, Section 4.3): backdoored networks fall on one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis import SCAN_UNLEARNING, Case, Unlearning, tensors_of
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
from bdprune.runtime import DEFAULT, Precision

_FULL = 500
"""Images from which on the spread of a run is taken as it was measured; with fewer it is wider."""

_FEW, _FEW_RUNS = 300, 3
"""Below so many images, so many runs are made at least: a standard error takes more than one."""

_MANY = 10
"""Classes from which on the threshold does not depend on their number."""

_NO_NORM = (
    "The network has no batch norm, and unlearning tells nothing sure of such a network: with the norms folded into "
    "the convs, a backdoored network was missed and a clean one flagged."
)


@dataclass(frozen=True)
class UnlearningDetector(Detector):
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
    straight line. What is unlearned is the plain form of the network (``analysis/plain.py``).

    Args:
        unlearning: settings of the ascent.
        threshold: a lead above this is flagged in a network of ten classes or more (measured in
            docs/evaluation/detection.md).
        two_class_threshold: the same for two classes.
        margin: how far from the threshold, in units of the lead, the lead of a single run must be to end the matter.
        max_runs: runs at most, 1 or more.
        named_within: steps in which a network must fall for its label to be named.
        min_images: fewer clean images than this are refused: their flip shares are noise
            (docs/explanation/unlearning.md).
        precision: of the ascent: ``winograd``, float32 with the fastest convolutions; ``float32``, what PyTorch
            computes; ``bfloat16``; or ``auto``, the fastest on this machine by a short trial, whose last digits may
            differ from run to run.
        seed: of order and augmentation.
    """

    unlearning: UnlearnSettings = SCAN_UNLEARNING
    threshold: float = 0.09
    two_class_threshold: float = 0.65
    margin: float = 0.05
    max_runs: int = 7
    named_within: int = 40
    min_images: int = 100
    precision: Precision = DEFAULT
    seed: int = 0

    id = "bdprune.unlearning"
    title = "the label on which the wrong predictions of an unlearning network pile up"
    paper = "Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, arXiv 2305.14876, Section 4.3"
    needs = Needs(images="labelled", minimum=100)
    cost = "training"
    label = True
    decisive = True
    rule = Rule(
        id="BD030",
        name="unlearned-label",
        help="While the network unlearns its task on clean images, its predictions fall on one label, as those of a "
        "backdoored network do.",
    )

    @property
    def least_images(self) -> int:
        return self.min_images

    @property
    def batch_size(self) -> int:
        return self.unlearning.batch_size

    def steps(self, case: Case) -> Steps:
        """Unlearns copies of the model, in one order of the images or more, and reads the trajectories.

        Raises:
            DataError: no clean images, or too few.
            TrainingError: a run with no finite step.
        """
        data = self.check(case)
        assert data is not None
        runs: list[Unlearned] = []
        for seed in self._seeds():
            runs.append((yield Unlearning(self.unlearning, seed, self.precision, plain=True)))
            if self._is_settled(runs, len(data)):
                break
        return msgspec.structs.replace(self.read(runs, len(data)), attachments=_kept(case, runs[0]))

    def read(self, runs: Sequence[Unlearned], images: int) -> Evidence:
        """The evidence in the runs that have been made of one model, each on so many ``images``."""
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


def _kept(case: Case, run: Unlearned) -> tuple[Attachment, ...]:
    """The unlearned model, where somebody wants it and it has the layers of the model."""
    same = run.model.network.state_dict().keys() == case.model.network.state_dict().keys()
    return (case.attach("unlearned", tensors_of(run)),) if case.keeps and same else ()


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
        "trajectory": [
            {"loss": step.loss, "accuracy": step.accuracy, "votes": list(step.votes)} for step in first.trajectory
        ],
    }


def _about_lead(reading: _Reading, images: int, threshold: float, near: bool) -> str:
    """The lead beside the threshold, in a sentence."""
    spread = "" if reading.error is None else f" +- {reading.error:.3f}"
    orders = "1 order" if len(reading.leads) == 1 else f"{len(reading.leads)} orders"
    side = "above" if reading.lead > threshold else "below"
    lead = f"The lead is {reading.lead:.3f}{spread} over {orders} of {images} images"
    return f"{lead}, {side} the threshold of {threshold:.3f}{', but near it' if near else ''}."


def _limits(reading: _Reading, images: int) -> tuple[str, ...]:
    """What takes from the worth of a lead, a sentence each."""
    limits = []
    if images < _FEW:
        limits.append(f"With fewer than {_FEW} images other images may give another lead.")
    if len(reading.shares) < _MANY:
        limits.append(
            f"Of {len(reading.shares)} classes a lead says little: clean networks have one too, so the threshold is "
            "high and many backdoored networks stay below it."
        )
    return tuple(limits)
