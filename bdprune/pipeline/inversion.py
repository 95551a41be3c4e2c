"""Recovers triggers: loads a model with clean data, checks that they fit, inverts, and writes the triggers to files."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack

from bdprune.analysis import MOST_PICTURED, shown_images, trigger_info, trigger_names
from bdprune.data import CleanData, check_apart
from bdprune.errors import DataError, OptionError
from bdprune.loops import Hypothesis, Inversion, InvertSettings, Recovery, Trigger
from bdprune.loops import invert as run_engine
from bdprune.pipeline.attachments import output_folder
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, weight_coverage
from bdprune.pipeline.open import (
    CleanSource,
    DataSource,
    ModelSource,
    OptionNames,
    Options,
    checked_case,
    load_model,
    options_from,
)
from bdprune.pipeline.scan import Clock, Progress, silent
from bdprune.pipeline.triggers import save_trigger
from bdprune.record import TRIGGER_KINDS, InvertResult, TriggerInfo, TriggerKind, finite, number
from bdprune.runtime import parse_budget, plain_torch

Target: TypeAlias = int | Literal["any"]
Kind: TypeAlias = TriggerKind | Literal["all"]
_KINDS = (*TRIGGER_KINDS, "all")
Folder: TypeAlias = str | os.PathLike[str] | None

_WORKS = 0.5  # share of held-out images that a trigger must flip to come first in a report


class InvertNames(OptionNames, total=False):
    """Further keyword arguments of an inversion."""

    budget: str | float | None
    settings: InvertSettings | None


@dataclass(frozen=True)
class Wanted:
    """The triggers to recover.

    Args:
        labels: target labels, ``any`` for an untargeted trigger; None for all labels and an untargeted trigger.
        sources: labels whose images the triggers flip; empty for all labels but the target.
        kind: ``patch``, ``additive``, ``warp`` or ``all``.
    """

    labels: Target | Sequence[Target] | None = None
    sources: Sequence[int] = ()
    kind: Kind = "patch"

    def hypotheses(self, num_classes: int, data: CleanData) -> list[Hypothesis]:
        """What the triggers do, for a model and its clean images: all kinds, and in each the labels in their order.

        Raises:
            OptionError: the model does not have a label, or the kind is unknown.
            DataError: there is no image that a given label's trigger could flip.
        """
        if self.kind not in _KINDS:
            raise OptionError(f"There is no kind of trigger {self.kind!r}.", f"Give {' or '.join(_KINDS)}.")
        kinds: tuple[TriggerKind, ...] = TRIGGER_KINDS if self.kind == "all" else (self.kind,)
        sources = tuple(dict.fromkeys(_label(one, num_classes) for one in _each(self.sources)))
        if self.labels is None:
            targets = [*(one for one in range(num_classes) if sources != (one,)), None]
            return [Hypothesis(target, sources, kind) for kind in kinds for target in targets]
        found = [Hypothesis(target, sources, kind) for kind in kinds for target in self._targets(num_classes)]
        for one in found:
            if not one.takes(data.labels).any():
                raise _no_images(one, data)
        return found

    def _targets(self, num_classes: int) -> Iterator[int | None]:
        """The given labels, each once; None for ``any``."""
        assert self.labels is not None
        given = _each(self.labels)
        if not given:
            raise OptionError("The list of labels is empty.", "Give at least one, or None for all labels.")
        targets = [None if isinstance(one, str) and one == "any" else _label(one, num_classes) for one in given]
        yield from dict.fromkeys(targets)


@dataclass(frozen=True)
class Inverted:
    """Recovered triggers, and the record for JSON.

    Attributes:
        triggers: a trigger for each label that was asked for, in that order.
        result: the record; its triggers are sorted, those that work first.
    """

    triggers: tuple[Trigger, ...]
    result: InvertResult


def invert(
    model: ModelSource,
    data: DataSource,
    labels: Target | Sequence[Target] | None = None,
    *,
    sources: Sequence[int] = (),
    kind: Kind = "patch",
    output: Folder = None,
    progress: Progress | None = None,
    **options: Unpack[InvertNames],
) -> tuple[Trigger, ...]:
    """Recovers triggers: the smallest changes to images that make the model give them a label.

    Args:
        model: path of a checkpoint, a module, or the model that ``bdprune.load`` returned.
        data: labelled clean images, as for ``bdprune.scan``; a part is held out to measure what the triggers flip.
        labels: target label or labels; ``any`` stands for an untargeted trigger, which leads away from the true label.
            None takes all labels and an untargeted trigger.
        sources: labels whose images the triggers flip; empty for all labels but the target.
        kind: ``patch`` (covers pixels), ``additive`` (changes colours by fixed amounts), ``warp`` (moves pixels) or
            ``all``.
        output: folder for files with the triggers and pictures of them; None writes none.
        progress: called with a short text before each stage.
        **options: ``budget``, the time that the search may take, as in 300 or ``5m``; ``settings``, an
            ``InvertSettings``; and the ``Options`` (``arch``, ``seed``, ...), as for ``bdprune.scan``.

    Returns:
        A trigger for each label, in their order; of several kinds the patches first.

    Raises:
        SanityError: the model's accuracy on this data is too low to trust a trigger.
        DataError: there is no clean image that a trigger could flip, such as none of a source label.
        OptionError: the model does not have a label, or another option is invalid.
        BdpruneError: any other problem with the file or the data.

    Example:
        >>> (trigger,) = invert("model.pth", "clean_images/", labels=1, output="triggers/")
        >>> trigger.kind, trigger.target, trigger.images > 0
        ('patch', 1, True)
    """
    wanted = Wanted(labels, sources, kind)
    return recover_triggers(model, data, wanted, output=output, progress=progress, **options).triggers


@plain_torch()
def recover_triggers(
    source: ModelSource,
    data: DataSource,
    wanted: Wanted,
    *,
    output: Folder = None,
    progress: Progress | None = None,
    **options: Unpack[InvertNames],
) -> Inverted:
    """The triggers of :func:`invert`, and the record of the run; arguments and errors are those of :func:`invert`."""
    clock, progress = Clock(), progress or silent
    values: dict[str, Any] = dict(options)
    seconds, given = _seconds(values.pop("budget", None)), values.pop("settings", None)
    known = options_from(values, "invert")
    known.check()
    settings = _settings(given, wanted, known)
    if data is None or data == "none":
        raise OptionError("The recovery of a trigger needs clean data.", "Give a few labelled clean images (--data).")
    folder = None
    if output is not None:
        check_apart(data, [output])
        folder = output_folder(output, "triggers")
    progress("loading")
    model = load_model(source, known, progress)
    progress("checking the clean data")
    case, sanity = checked_case(model, CleanSource(data, known))
    model, clean = case.model, case.images
    hypotheses = wanted.hypotheses(model.num_classes, clean)
    progress(f"recovering {len(hypotheses)} trigger{'s' if len(hypotheses) > 1 else ''}")
    (inversion,) = run_engine([model], clean, hypotheses, settings, known.seed, seconds=seconds)
    if inversion.skipped and wanted.labels is not None and seconds is None:
        raise _no_right_images(inversion.skipped[0])
    ranked, smallest = _infos(inversion, clean, folder)
    result = InvertResult(
        started=clock.started,
        artifact=artifact_info(model),
        model=model_info(model),
        data=data_info(clean, sanity),
        env=env(model.device, known.seed),
        coverage=weight_coverage(model),
        triggers=ranked,
        smallest=smallest,
        skipped=tuple(map(_named, inversion.skipped)),
        complete=inversion.complete,
        folder="" if folder is None else str(folder),
        params=finite(asdict(settings)),
        seconds=clock.seconds,
    )
    return Inverted(inversion.triggers, result)


def _settings(given: InvertSettings | None, wanted: Wanted, options: Options) -> InvertSettings:
    """The settings of the search. By default each label that is asked for takes part to the end."""
    settings = given or InvertSettings()
    if given is None and wanted.labels is not None:
        stages = tuple(replace(one, keep=0) for one in settings.stages)
        settings = replace(settings, stages=stages, final=replace(settings.final, keep=0))
    return settings if options.precision is None else replace(settings, precision=options.precision)


def _seconds(budget: str | float | None) -> float | None:
    """The time limit of a search; None without one.

    Raises:
        OptionError: it is no time.
    """
    if budget is None:
        return None
    found = parse_budget(budget)
    if found.seconds is None:
        raise OptionError(f"A search for triggers has no budget {budget}.", "Give a time, as in 300, 90s or 5m.")
    return found.seconds


def _label(given: Any, num_classes: int) -> int:
    """A label from any kind of whole number: those of NumPy and PyTorch, too."""
    try:
        label = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        label = -1
    if not 0 <= label < num_classes:
        hint = f"The model has labels 0 to {num_classes - 1}."
        raise OptionError(f"There is no label {str(given)[:80]!r}.", hint)
    return label


def _each(given: Any) -> tuple[Any, ...]:
    """The values of a list, a tensor, ...; a single value alone."""
    try:
        return (given,) if isinstance(given, str) else tuple(given)
    except TypeError:
        return (given,)


def _no_images(hypothesis: Hypothesis, data: CleanData) -> DataError | OptionError:
    """The error for a trigger that no clean image could show."""
    target, names = hypothesis.target, data.class_names
    hint = "Give such images with --data, or choose other labels with --label and --source."
    if hypothesis.sources == (target,):
        return OptionError(f"Label {target} is both the target and the only source.", "Give another source or target.")
    sources = [one for one in hypothesis.sources if one != target]
    wanted = [f"{one} ({names[one]})" if one < len(names) else str(one) for one in sources]
    images = f"of label {' or '.join(wanted)}" if wanted else f"of another label than {target}"
    goal = "An untargeted trigger" if target is None else f"A trigger for label {target}"
    return DataError(f"{goal} needs clean images {images}, and there are none.", hint)


def _no_right_images(hypothesis: Hypothesis) -> DataError:
    """The error for a trigger that the engine could not search."""
    what = f"There are too few clean images that the model labels correctly to search a {_named(hypothesis)}."
    return DataError(what, "Give more images with --data, at least two of each label.")


def _named(hypothesis: Hypothesis) -> str:
    return f"{hypothesis.kind} for {'any label' if hypothesis.target is None else f'label {hypothesis.target}'}"


def _infos(
    inversion: Inversion, data: CleanData, folder: Path | None
) -> tuple[tuple[TriggerInfo, ...], tuple[float | None, ...]]:
    """The records of the triggers, sorted, and the smallest size of each; with a folder, writes their files."""
    triggers = inversion.triggers
    files = [""] * len(triggers)
    if folder is not None:
        named = zip(triggers, trigger_names(*triggers), strict=True)
        files = [save_trigger(one, folder, shown_images(data, one), name).name for one, name in named]
    ranked = sorted(zip(inversion.recoveries, files, strict=True), key=lambda pair: _rank(pair[0]))
    infos = (
        trigger_info(one.trigger, data if place < MOST_PICTURED else None, file=file)
        for place, (one, file) in enumerate(ranked)
    )
    return tuple(infos), tuple(number(one.size) for one, _ in ranked)


def _rank(one: Recovery) -> tuple[bool, float]:
    """First the triggers that flip at least half of the held-out images; in both parts the smallest first."""
    rate = one.trigger.flip_rate
    return rate is None or rate < _WORKS, one.size
