"""Repair: take in a model and clean data, check that they fit, purify, and write a drop-in checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.data.sanity import Sanity, check_sanity
from bdprune.errors import OptionError, SanityError
from bdprune.model.handle import Model
from bdprune.model.save import save
from bdprune.purify.base import Purified, Purifier
from bdprune.scan import registry
from bdprune.scan.describe import artifact_info, data_info, env, model_info, number
from bdprune.scan.engine import Clock, Progress, silent
from bdprune.scan.intake import DataShelf, DataSource, ModelOptions, ModelSource, take_model
from bdprune.scan.result import CurveInfo, Histogram, OutputInfo, PurifyResult, finite

_BINS = 20


@dataclass(frozen=True)
class Repair:
    """A repaired model, how the method came to it, and the record of it that goes to JSON."""

    model: Model
    purified: Purified
    result: PurifyResult


def purify(
    model: ModelSource,
    data: DataSource,
    *,
    method: str | Purifier = "rnp",
    output: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    per_class: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Repair:
    """Cuts a backdoor out of a model; the one that is handed in stays as it is.

    Args:
        model: path of a checkpoint, a module, or what ``bdprune.load`` gave.
        data: labelled clean images, as for ``bdprune.scan``; a part is held out to choose the threshold.
        method: name of a purifier, or a purifier.
        output: where to write the repaired checkpoint, in the format of the one it came from; None writes nothing.
        settings: constructor arguments of the purifier that is named.
        per_class: at most so many clean images of each class; None takes all.
        progress: called with a word on what happens next.
        **options: ``arch``, ``num_classes``, ``input_shape``, ``normalize``, ``device`` and ``seed``, as in
            ``ModelOptions``.

    Raises:
        SanityError: the model does not do its clean job on this data, so nothing could be trusted.
        BdpruneError: anything else that is wrong with the file, the data or the options.

    Example:
        >>> repair = purify("model.pth", "clean_images/", method="suspiciousness", output="repaired.pth")
        >>> repair.result.method, repair.result.accuracy_before, repair.result.output.path
        ('bdprune.suspiciousness', 1.0, 'repaired.pth')
    """
    clock, say = Clock(), progress or silent
    known = ModelOptions(**options)
    purifier = registry.purifier(method, settings or {}, known.seed)
    say("loading")
    taken = take_model(model, known)
    clean = DataShelf(data, per_class, known.seed).fit_for(taken)
    if clean is None:
        raise OptionError("A repair needs clean data.", "Give a few labelled clean images (--data).")
    say("checking the clean data")
    sanity = check_sanity(taken, clean)
    if not sanity.ok:
        raise SanityError(sanity.message, sanity.suggestion)
    say(purifier.id)
    purified = purifier(taken, clean)
    written = _write(purified.model, output)
    return Repair(purified.model, purified, _record(taken, clean, sanity, purified, written, known, clock))


def _write(model: Model, output: str | os.PathLike[str] | None) -> OutputInfo | None:
    if output is None:
        return None
    path = Path(output)
    save(model, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kind = model.artifact.format if model.artifact else "safetensors"
    return OutputInfo(path=str(path), format=kind, bytes=path.stat().st_size, sha256=digest)


def _record(
    model: Model,
    data: CleanData,
    sanity: Sanity,
    purified: Purified,
    output: OutputInfo | None,
    options: ModelOptions,
    clock: Clock,
) -> PurifyResult:
    return PurifyResult(
        started=clock.started,
        artifact=artifact_info(model),
        model=model_info(model),
        data=data_info(data, sanity),
        env=env(model.device, options.seed),
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
        seconds=clock.seconds,
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
