"""Purifiers that retrain the weights of a copy: the split of the images, and the limit on the cost."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from bdprune.analysis import Case
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.methods.held_out import hold_out, views_drop
from bdprune.methods.purifier import Phases, Purifier, Repair
from bdprune.model import Model, rounded
from bdprune.record import Needs
from bdprune.runtime import within


@dataclass(frozen=True, kw_only=True)
class Retraining(Purifier):
    """A purifier that retrains a copy, and goes as far towards its weights as clean accuracy on other images allows.

    A subclass defines :meth:`retrain`. A network part of the way between the original and the retrained weights often
    keeps more of its clean accuracy than of its backdoor (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR
    2022).

    Args:
        max_drop: largest fall of clean accuracy on views of the held-out clean images
            (:func:`bdprune.methods.views_drop`), in [0, 1]. Retraining on 500 images of CIFAR-10 costs 2 to 5 points
            against most attacks (NAD and I-BAU in RNP, Table 2), so a limit of 2 points would keep most backdoors.
        held_out: share of the clean images that are held out for this decision, in (0, 1).
        ways: shares of the way from the original to the retrained weights, in (0, 1], in the order in which they are
            tried; the first that keeps ``max_drop`` is taken. If none does, the weights stay as they are.
        seed: seed for the split and for the retraining.
    """

    max_drop: float = 0.04
    held_out: float = 0.3
    ways: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    seed: int = 0

    PUBLISHED: ClassVar[dict[str, Any]] = {"max_drop": 1.0, "ways": (1.0,)}
    """The settings of a preset of a paper: papers retrain all the way, whatever it costs."""

    needs = Needs(images="labelled", minimum=2)
    cost = "training"

    def __post_init__(self) -> None:
        """Checks the ways."""
        super().__post_init__()
        if not self.ways or not all(0 < way <= 1 for way in self.ways):
            raise OptionError(f"{self.id} cannot take the ways {self.ways}.", "Give one or more shares in (0, 1].")

    @abstractmethod
    def retrain(self, case: Case, data: CleanData, phase: Phases) -> Model:
        """A retrained copy of the model.

        Args:
            case: the case, of which only the model may be used.
            data: clean images to train on.
            phase: takes the time of the parts of the training.

        Raises:
            TrainingError: the training gave values that are not finite.
        """

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model; a share of the images is held out for the decision.

        Raises:
            DataError: there are no clean images, or no class has an image to hold out.
            TrainingError: the training gave values that are not finite.
        """
        self.check(case)
        rest, held = hold_out(case.images, self.held_out, self.seed)
        phase = Phases()
        retrained = self.retrain(case, rest, phase)
        with phase("choose"):
            way, model = self._farthest(case.model, retrained, held)
        return self.repair(
            case,
            model,
            held,
            retrained=way > 0,
            num_filters=0,
            selection=self._selection(way, len(held)),
            seconds=phase.seconds,
        )

    def _farthest(self, model: Model, retrained: Model, held: CleanData) -> tuple[float, Model]:
        """The first share of the way that keeps the limit, and its model; 0 and a copy if there is none."""
        for way in self.ways:
            part = between(model, retrained, way)
            if within(views_drop(model, part, held, self.seed), self.max_drop):
                return way, part
        return 0.0, model.clone()

    def _selection(self, way: float, held: int) -> str:
        limit = f"at most {100 * self.max_drop:g} points on views of {held} held-out images"
        if not way:
            return f"nothing is changed: no part of the way to the retrained weights costs {limit}"
        if way == 1:
            return f"the retrained weights, which cost {limit}"
        return (
            f"{way:.0%} of the way to the retrained weights, the largest of {len(self.ways)} parts that costs {limit}"
        )


def between(model: Model, other: Model, way: float) -> Model:
    """The model at a share of the way from ``model`` to ``other``, two of one architecture, as its file can hold it.

    At 1 it is ``other``. Weights and running statistics are mixed linearly; counters are those of ``other``.

    Args:
        way: share, in [0, 1].
    """
    mixed = other.clone()
    if way != 1:
        there, done = mixed.network.state_dict(), set[int]()
        for name, here in model.network.state_dict().items():
            place = there[name].data_ptr()
            if here.is_floating_point() and place not in done:  # a tied weight has several names
                there[name].copy_(here.lerp(there[name], way))
                done.add(place)
    return rounded(mixed)
