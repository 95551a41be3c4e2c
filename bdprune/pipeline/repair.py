"""Repair: take in a model and clean data, check that they fit, purify, and write a drop-in checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.analysis import Sanity, check_sanity
from bdprune.data import ClassOrder, CleanData
from bdprune.errors import BdpruneError, OptionError, SanityError
from bdprune.methods import Purified, Purifier
from bdprune.methods import purifier as make_purifier
from bdprune.model import Model, save
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, number, weight_coverage
from bdprune.pipeline.open import DataShelf, DataSource, ModelOptions, ModelSource, options_from, take_models
from bdprune.pipeline.scan import Clock, Progress, silent
from bdprune.record import CurveInfo, Histogram, OutputInfo, PurifyResult, finite, some

_BINS = 20


@dataclass(frozen=True)
class Repair:
    """A repaired model, how the method came to it, and the record of it that goes to JSON.

    Attributes:
        model: the repaired model.
        purified: what the method gave.
        result: the record.
        others: repairs of the other sets of weights of the file; they stand in the same output.
    """

    model: Model
    purified: Purified
    result: PurifyResult
    others: tuple[Repair, ...] = ()


def purify(
    model: ModelSource,
    data: DataSource,
    *,
    method: str | Purifier = "rnp",
    output: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    preset: str | None = None,
    mode: str | None = None,
    max_acc_drop: float | None = None,
    precision: str | None = None,
    per_class: int | None = None,
    class_order: ClassOrder = None,
    progress: Progress | None = None,
    **options: Any,
) -> Repair:
    """Cuts a backdoor out of a model; the one that is handed in stays as it is.

    Every set of weights in a file is repaired, or ``result.left`` says which was not and why.

    Args:
        model: path of a checkpoint, a module, or what ``bdprune.load`` gave.
        data: labelled clean images, as for ``bdprune.scan``; a part is held out to choose the threshold.
        method: name of a purifier, or a purifier.
        output: where to write the repaired checkpoint, in the format of the one it came from; None writes nothing.
        settings: constructor arguments of the purifier that is named.
        preset, mode, max_acc_drop, precision: settings by the names of the command line; None leaves the method's own.
        per_class: at most so many clean images of each class; None takes all.
        class_order: as for ``bdprune.scan``.
        progress: called with a word on what happens next.
        **options: ``arch``, ``num_classes``, ``input_shape``, ``normalize``, ``device``, ``seed`` and ``state_key``, as
            in ``ModelOptions``.

    Raises:
        SanityError: the model does not do its clean job on this data, so nothing could be trusted.
        BdpruneError: anything else that is wrong with the file, the data or the options; of a file with several sets
            of weights, where none of them could be repaired.

    Example:
        >>> repair = purify("model.pth", "clean_images/", method="suspiciousness", output="repaired.pth")
        >>> repair.result.method, repair.result.accuracy_before, repair.result.output.path
        ('bdprune.suspiciousness', 1.0, 'repaired.pth')
    """
    say = progress or silent
    known = options_from(options, "purify")
    known.check()
    asked = {"preset": preset, "mode": mode, "max_drop": max_acc_drop, "precision": precision}
    chosen = {**(settings or {}), **{name: value for name, value in asked.items() if value is not None}}
    purifier = make_purifier(method, chosen, known.seed)
    if data is None or data == "none":
        raise OptionError("A repair needs clean data.", "Give a few labelled clean images (--data).")
    shelf = DataShelf(data, per_class, known.seed, class_order, fixed_size=known.input_shape is not None)
    say("loading")
    loaded = take_models(model, known)
    done: list[_Done] = []
    failed: list[tuple[str, BdpruneError]] = [(one.name, one.error) for one in loaded.unloaded]
    for taken in loaded.models:
        try:
            done.append(_repaired(taken, shelf, purifier, known, say))
        except BdpruneError as error:
            if len(loaded.models) == 1:
                raise
            failed.append((taken.artifact.state_key if taken.artifact else "", error))
    if not done:
        raise failed[-1][1]
    written = _write([one.purified.model for one in done], output)
    left = _left(loaded.models[0], failed)
    first, *others = [Repair(one.purified.model, one.purified, _record(one, written, left, known)) for one in done]
    return replace(first, others=tuple(others))


@dataclass(frozen=True)
class _Done:
    """One set of weights before and after its repair."""

    model: Model
    data: CleanData
    sanity: Sanity
    purified: Purified
    started: str
    seconds: float


def _repaired(model: Model, shelf: DataShelf, purifier: Purifier, options: ModelOptions, say: Progress) -> _Done:
    clock = Clock()
    fitted, clean = shelf.fit_for(model)
    assert clean is not None
    say("checking the clean data")
    sanity = check_sanity(fitted, clean)
    if not sanity.ok:
        raise SanityError(sanity.message, sanity.suggestion)
    say(purifier.id)
    return _Done(fitted, clean, sanity, purifier(fitted, clean), clock.started, clock.seconds)


def _left(model: Model, failed: Sequence[tuple[str, BdpruneError]]) -> tuple[str, ...]:
    """What of the file is written back as it was, though it may hold weights."""
    artifact = model.artifact
    if artifact is None:
        return ()
    named = {name for name, _ in failed}
    left = [f"{name or 'the checkpoint itself'}: {error}" for name, error in failed]
    left += [one for one in artifact.left_out if one.partition(": ")[0] not in named]
    if artifact.unscanned:
        left.append(f"weights that belong to no network that was recognised: {some(artifact.unscanned)}")
    return tuple(left)


def _write(models: Sequence[Model], output: str | os.PathLike[str] | None) -> OutputInfo | None:
    if output is None:
        return None
    written = save(models, Path(output))
    kind = models[0].artifact.format if models[0].artifact else "safetensors"
    return OutputInfo(path=str(written.path), format=kind, bytes=written.bytes, sha256=written.sha256)


def _record(one: _Done, output: OutputInfo | None, left: tuple[str, ...], options: ModelOptions) -> PurifyResult:
    purified = one.purified
    return PurifyResult(
        started=one.started,
        artifact=artifact_info(one.model),
        model=model_info(one.model),
        data=data_info(one.data, one.sanity),
        env=env(one.model.device, options.seed),
        method=purified.method,
        accuracy_before=number(purified.accuracy_before),
        accuracy_after=number(purified.accuracy_after),
        threshold=number(purified.threshold),
        threshold_rule=purified.threshold_rule,
        filters=purified.num_filters,
        filters_pruned=sum(map(len, purified.pruned.values())),
        pruned={name: tuple(index) for name, index in purified.pruned.items()},
        target_label=purified.target_label,
        curve=tuple(
            CurveInfo(
                threshold=number(point.threshold),
                clean_accuracy=number(point.clean_accuracy),
                filters_pruned=point.filters_pruned,
            )
            for point in purified.curve
        ),
        masks=_histogram(purified),
        phases={name: number(seconds) for name, seconds in purified.seconds.items()},
        params=finite(purified.params),
        output=output,
        left=left,
        coverage=weight_coverage(one.model),
        seconds=one.seconds,
    )


def _histogram(purified: Purified) -> Histogram | None:
    """All finite masks (or scores) in equal bins, and those of pruned filters; None when there are none."""
    values = _finite_values(purified.masks)
    if not len(values):
        return None
    is_mask = float(values.min()) >= 0 and float(values.max()) <= 1
    ends = (0.0, 1.0) if is_mask else (float(values.min()), float(values.max()))
    cut = _finite_values({name: purified.masks[name][index] for name, index in purified.pruned.items()})
    counts, edges = torch.histogram(values, bins=_BINS, range=ends)
    pruned, _ = torch.histogram(cut, bins=_BINS, range=ends)
    return Histogram(edges=tuple(edges.tolist()), counts=_whole(counts), pruned=_whole(pruned))


def _finite_values(masks: Mapping[str, Tensor]) -> Tensor:
    parts = [mask.detach().double().cpu().flatten() for mask in masks.values()]
    values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    return values[torch.isfinite(values)]


def _whole(counts: Tensor) -> tuple[int, ...]:
    return tuple(int(count) for count in counts.tolist())
