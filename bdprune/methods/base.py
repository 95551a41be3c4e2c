"""The base classes of methods and detectors: a method describes itself, and takes a case.

A detector returns evidence, a purifier (:mod:`bdprune.methods.purifier`) a repaired model. A method is a frozen
dataclass, and all its settings are constructor arguments, so its ``repr`` records the experiment. Class attributes hold
its description; the registry, the command line, the documentation and the reports read them.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Generator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from bdprune.analysis import Analysis, Case, layer_z_scores, outcome_of
from bdprune.data import CleanData
from bdprune.errors import BdpruneError, DataError, OptionError
from bdprune.record import (
    Cost,
    Evidence,
    Gift,
    Level,
    MethodInfo,
    Needs,
    Rule,
    Sign,
    check_settings,
    finite,
)

NO_CONVS = "The network has no convolutions, whose filters this method looks at."
"""Why a method for filters cannot examine a network."""

Steps = Generator[Analysis[Any], Any, Evidence]
"""The analyses that a detector needs, one after another; each ``yield`` returns the result."""


class Method(ABC):
    """The description shared by detectors and purifiers.

    Attributes:
        id: unique name with the package before the dot, such as ``bdprune.rnp``; results use it.
        title: what the method does, in a phrase.
        paper: source; empty if it is unpublished.
        needs: clean images that it requires.
        uses_more: whether it uses clean images that it does not need, if there are any.
        cost: kind of work on a model (:data:`bdprune.record.COSTS`); a scan runs cheap detectors first.
        gives: tasks that it helps with (RNP, Table 1).
        label: whether it may name the target label.
        limits: what it cannot do by design, in a sentence; empty for a method that must pass every conformance check.
        presets: constructor arguments by the name of the preset.
    """

    kind: ClassVar[Literal["detector", "purifier"]]
    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs()
    uses_more: ClassVar[bool] = False
    cost: ClassVar[Cost] = "forward"
    gives: ClassVar[tuple[Gift, ...]]
    label: ClassVar[bool] = False
    limits: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """The method with the settings of a preset, some of them changed.

        Raises:
            OptionError: unknown preset, or a setting that the method does not take.
        """
        if name not in cls.presets:
            known = f"Choose one of {', '.join(cls.presets)}." if cls.presets else "It has no presets."
            raise OptionError(f"{cls.id} has no preset {name!r}.", known)
        return cls(**{**cls.presets[name], **settings})

    @classmethod
    def settings(cls) -> frozenset[str]:
        """Names of the constructor's arguments."""
        return frozenset(inspect.signature(cls).parameters)

    @classmethod
    def info(cls, name: str) -> MethodInfo:
        """The description as a record.

        Args:
            name: name in the registry.
        """
        return MethodInfo(
            id=cls.id,
            name=name,
            kind=cls.kind,
            title=cls.title,
            paper=cls.paper,
            needs=cls.needs,
            cost=cls.cost,
            gives=cls.gives,
            label=cls.label,
            limits=cls.limits,
            presets={key: finite(_plain(dict(value))) for key, value in cls.presets.items()},
            settings=finite(_plain(cls())),
            **cls._more_info(),
        )

    def __post_init__(self) -> None:
        """Refuses an unknown choice of a setting with fixed choices."""
        check_settings(self)

    @classmethod
    def _more_info(cls) -> dict[str, Any]:
        return {}

    @property
    def params(self) -> dict[str, Any]:
        """The settings, as results record them."""
        return dict(_plain(self))

    @property
    def least_images(self) -> int:
        """The minimum number of clean images."""
        return self.needs.minimum

    def check(self, case: Case) -> CleanData | None:
        """The clean images of ``case`` that the method needs.

        Raises:
            DataError: there are none, or too few.
        """
        needs, data = self.needs, case.data
        if needs.images == "none":
            return data
        if data is None:
            raise DataError(f"{self.id} needs clean images.", "Pass some with --data.")
        if len(data) < self.least_images:
            raise DataError(
                f"{len(data)} clean images are too few for {self.id}.", f"Give at least {self.least_images}."
            )
        few = min((data.class_counts.get(label, 0) for label in range(case.model.num_classes)), default=0)
        if few < needs.per_class:
            raise DataError(
                f"{self.id} needs {needs.per_class} clean images of every class.", "Give images of each class."
            )
        return data


class Detector(Method):
    """A method that measures how suspicious a model is: ``detector(case) -> Evidence``.

    A subclass defines ``__call__``. One that trains may define :meth:`steps` instead, and then takes stacks: it yields
    the analyses that it needs, and equal analyses for many models of one architecture are computed in one batch.

    Attributes:
        rule: rule id under which its findings are reported.
        sign: kind of its evidence (:data:`bdprune.record.SIGNS`). Two of the kinds in ``STRONG`` that name the same
            label make a model backdoored; any other finding makes it suspicious.
        level: least budget at which a scan runs it (:data:`bdprune.record.LEVELS`), unless it is asked for by name. A
            scan runs a detector with the level None only if it is asked for by name.

    Example:
        A subclass in another package is found by an entry point of the group ``bdprune.detectors``.

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class LargestWeight(Detector):
        ...     threshold: float = 10.0
        ...     id = "example.largest_weight"
        ...     title = "the largest weight"
        ...     needs = Needs(images="none")
        ...     cost = "weights"
        ...
        ...     def __call__(self, case):
        ...         largest = max(float(value.abs().max()) for value in case.model.network.state_dict().values())
        ...         return self.evidence(largest, self.threshold)
        >>> import bdprune
        >>> LargestWeight()(Case(bdprune.load("model.pth"))).flagged
        True
    """

    kind = "detector"
    gives: ClassVar[tuple[Gift, ...]] = ("detection",)
    rule: ClassVar[Rule] = Rule(id="BD010", name="suspicious-model", help="A detector sees signs of a backdoor.")
    sign: ClassVar[Sign] = "other"
    level: ClassVar[Level | None] = "default"

    def __call__(self, case: Case) -> Evidence:
        """The evidence from one model, independent of the order of the images.

        Raises:
            BdpruneError: it cannot examine this model; a scan then records evidence without a score.
        """
        case = case.in_order()
        steps = self.steps(case)
        found: Any = None
        while isinstance(found := resumed(steps, found), Analysis):
            found = outcome_of(lambda wanted=found: case.get(wanted))  # type: ignore[misc]
        return found

    def steps(self, case: Case) -> Steps:
        """The same as a generator of the analyses that it needs (see the class)."""
        raise NotImplementedError(f"{type(self).__name__} defines neither __call__ nor steps")

    @classmethod
    def takes_stacks(cls) -> bool:
        """Whether it can examine many models in one batch."""
        return cls.steps is not Detector.steps

    @property
    def batch_size(self) -> int:
        """Images of each model in one training step, for memory estimates of a scan; 0 if it does not train."""
        return 0

    def work(self, case: Case) -> float:
        """The least work for useful evidence, in passes of one image forward through the model; 0 if it is negligible.

        A step of training counts as three passes of each of its images. A scan with a time limit does not run a
        detector that does not fit. One that can do less or more work gives the least here, and reads ``case.budget``.
        """
        return 0.0

    @classmethod
    def _more_info(cls) -> dict[str, Any]:
        return {"rule": cls.rule, "sign": cls.sign, "level": cls.level, "stackable": cls.takes_stacks()}

    def evidence(self, score: float, threshold: float, **more: Any) -> Evidence:
        """Evidence of this detector, flagged if the score is above the threshold.

        Args:
            more: further fields of :class:`bdprune.record.Evidence`.
        """
        more.setdefault("params", self.params)
        return Evidence(detector=self.id, score=score, threshold=threshold, flagged=score > threshold, **more)

    def outlier_evidence(self, case: Case, scores: Mapping[str, Tensor], threshold: float) -> Evidence:
        """The largest z-score of any filter within its layer, compared with ``threshold``; details hold each layer's.

        Args:
            scores: group name -> score per filter ``[num_filters]``; attached to the evidence as ``filter_scores``.
        """
        z = layer_z_scores(scores)
        peaks = {name: value.max().item() for name, value in z.items()}
        layers = [
            {"layer": name, "filters": len(value), "max_z": peaks[name], "filter": int(value.argmax())}
            for name, value in z.items()
        ]
        attached = (case.attach("filter_scores", scores),) if scores else ()
        score = max(peaks.values(), default=0.0)
        blank = "" if scores else NO_CONVS
        return self.evidence(score, threshold, not_applicable=blank, details={"layers": layers}, attachments=attached)


def resumed(steps: Steps, outcome: Any) -> Analysis[Any] | Evidence:
    """The detector's next analysis, or its evidence.

    Args:
        outcome: the result of the last analysis, or the error that it raised, which is raised at the ``yield``.
    """
    try:
        return steps.throw(outcome) if isinstance(outcome, BdpruneError) else steps.send(outcome)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _plain(value: object) -> Any:
    """Dataclasses as nested dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return value
