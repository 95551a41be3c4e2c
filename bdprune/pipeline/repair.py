"""Repairs a model: loads it with clean data, checks that they fit, purifies, and writes a drop-in checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import msgspec

from bdprune.analysis import Case, check_sanity
from bdprune.data import CleanData, check_apart
from bdprune.errors import BdpruneError, DataError, OptionError, SanityError
from bdprune.files import check_writable, description_path
from bdprune.methods import Purifier, Repair, limits_of
from bdprune.model import Loaded, Model, is_the_input, same_file, save, torch_pruning
from bdprune.pipeline.attachments import attachments_folder, save_attachments
from bdprune.pipeline.compacting import compacted
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, weight_coverage
from bdprune.pipeline.mask_histogram import mask_histogram
from bdprune.pipeline.open import CleanSource, DataSource, ModelSource, OptionNames, Options, load_models, options_from
from bdprune.pipeline.repair_data import checked, mirror_rule, missing_labels, with_images_for_check
from bdprune.pipeline.scan import Clock, Progress, short_id, silent
from bdprune.pipeline.scan_reuse import reuse_scan, scans_of
from bdprune.record import (
    CompactInfo,
    CurveInfo,
    DataInfo,
    OutputInfo,
    PurifyResult,
    Result,
    finite,
    number,
    some,
)
from bdprune.registry import chosen_purifier, method_class
from bdprune.runtime import DEFAULT, plain_torch

_WHOLE = "the checkpoint itself"  # the name of a set of weights that has none
_COMPACT = "compact"  # a mode of a repair: prune so that the filters can be removed, then remove them
_GO_ON = "scan"  # the preset of a purifier that reuses the results of a scan


class RepairNames(OptionNames, total=False):
    """Further keyword arguments of a repair."""

    mode: str | None
    max_acc_drop: float | None
    start_from: Result | Sequence[Result] | str | os.PathLike[str] | None
    attachments: str | os.PathLike[str] | None
    check: bool
    allow_missing_labels: bool


@dataclass(frozen=True)
class Repaired:
    """A repaired model, the method's outputs, and the record for JSON.

    Attributes:
        repair: the method's outputs: masks, curve, attachments.
        result: the record.
        others: repairs of the other sets of weights of the file, written to the same output.
    """

    repair: Repair
    result: PurifyResult
    others: tuple[Repaired, ...] = ()

    @property
    def model(self) -> Model:
        """The repaired model."""
        return self.repair.model

    def _repr_html_(self) -> str:
        return "".join(one.result._repr_html_() for one in (self, *self.others))


@plain_torch()
def purify(
    model: ModelSource,
    data: DataSource,
    *,
    method: str | Purifier = "auto",
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Unpack[RepairNames],
) -> Repaired:
    """Removes a backdoor from a model; the given model does not change.

    It repairs every set of weights in a file; ``result.left`` lists the sets that it could not repair, with reasons.

    Args:
        model: path of a checkpoint, a module, or the model that ``bdprune.load`` returned.
        data: labelled clean images, as for ``bdprune.scan``; a part is held out to choose the threshold.
        method: name of a purifier, or a purifier.
        preset: a named set of settings, for a purifier that is given by name.
        settings: single settings by name, for the same.
        output: where to write the result, in the format and dtypes of the file (of a module: float32); None: nowhere.
        progress: called with a short text before each stage.
        **options: ``mode`` and ``max_acc_drop``, settings by the names of the command line (the mode ``compact``
            removes pruned filters); ``start_from``, the result of a scan of the same weights on the same images, or
            its JSON file: the method reuses the model that the scan unlearned in this process or attached;
            ``attachments``, a folder for tensors such as the masks; ``check``, whether to look for signs of the
            backdoor before and after the repair (``auto`` always does); and the ``Options`` of ``bdprune.scan``.

    Raises:
        SanityError: the model's accuracy on this data is too low to trust a repair.
        DataError: ``start_from`` comes from other weights or images.
        BdpruneError: any other problem with the file, the data or the options; for a file with several sets of
            weights, only if none of them could be repaired.

    Example:
        >>> repair = purify("model.pth", "clean_images/", method="suspiciousness", output="repaired.pth")
        >>> repair.result.method, repair.result.accuracy_before, repair.result.output.path
        ('bdprune.suspiciousness', 1.0, 'repaired.pth')
    """
    _check_places(model, data, output, options)
    run = _run_of(method, preset, settings, dict(options), progress or silent)
    clean = _clean_source(data, run.options)
    run.progress("loading")
    loaded = load_models(model, run.options, run.progress)
    done, failed = _repair_all(loaded, clean, run)
    written = _write([one.repair.model for one in done], output)
    left = _left(loaded.models, failed)
    first, *others = [Repaired(one.repair, _record(one, written, left, run)) for one in done]
    return replace(first, others=tuple(others))


def _check_places(
    model: ModelSource, data: DataSource, output: str | os.PathLike[str] | None, options: RepairNames
) -> None:
    """Checks, before long work, that the files of the output can be written, and that none is among the inputs."""
    folder = options.get("attachments")
    check_apart(data, [folder] if folder else [])
    if output is None:
        return
    check_writable(Path(output))
    if isinstance(model, str | os.PathLike) and same_file(Path(output), Path(model)):
        raise is_the_input(Path(output))
    if options.get("mode") == _COMPACT:
        check_writable(description_path(Path(output)))


def _clean_source(data: DataSource, options: Options) -> CleanSource:
    if data is None or data == "none":
        raise OptionError("A repair needs clean data.", "Give a few labelled clean images (--data).")
    return CleanSource(data, options)


@dataclass(frozen=True)
class _Run:
    """The settings that all sets of weights of a repair share."""

    purifier: Purifier
    options: Options
    progress: Progress
    starts: Sequence[Result] = ()
    compact: bool = False
    attachments: Path | None = None
    folders: tuple[Path, ...] = ()
    check: bool = False
    allow_missing: bool = False

    @property
    def seed(self) -> int:
        """The seed of the purifier, or that of the options if it has none; the options' seed draws the images."""
        own = getattr(self.purifier, "seed", None)
        return own if isinstance(own, int) else self.options.seed


def _run_of(
    method: str | Purifier,
    preset: str | None,
    settings: Mapping[str, Any] | None,
    options: dict[str, Any],
    progress: Progress,
) -> _Run:
    """The purifier and the options, checked before any file is read."""
    mode = options.pop("mode", None)
    if mode == _COMPACT:
        torch_pruning()  # before long work
    limit = options.pop("max_acc_drop", None)
    known_settings = method_class("purifier", method).settings() if isinstance(method, str) else ()
    named = {"mode": _mode(mode, method), **limits_of(known_settings, limit)}
    source, folder = options.pop("start_from", None), options.pop("attachments", None)
    check, starts = bool(options.pop("check", False)), scans_of(source)
    allow_missing, seed = bool(options.pop("allow_missing_labels", False)), options.get("seed")
    known = options_from(options, "purify")
    known.check()
    chosen = {**(settings or {}), **{name: value for name, value in named.items() if value is not None}}
    preset = chosen.pop("preset", None) or preset
    if not isinstance(method, str) and (chosen or preset or known.precision):
        raise OptionError(
            f"{method.id} is an instance, so purify takes no settings for it.", "Give them to its constructor."
        )
    if seed is not None and chosen.get("seed", getattr(method, "seed", seed)) != seed:
        raise OptionError(f"The seed {seed} differs from that of the method.", "Give one of the two.")
    if starts and preset is None and isinstance(method, str) and _GO_ON in method_class("purifier", method).presets:
        preset = _GO_ON
    chosen |= {} if known.precision is None else {"precision": known.precision}
    purifier = chosen_purifier(method, preset, chosen, {"seed": known.seed})
    purifier.refuse_two_limits(limit)
    attachments = None if folder is None else attachments_folder(folder)
    next_to_it = [Path(source).parent] if isinstance(source, str | os.PathLike) else []
    folders = tuple([attachments, *next_to_it] if attachments else next_to_it)
    return _Run(purifier, known, progress, starts, mode == _COMPACT, attachments, folders, check, allow_missing)


def _mode(mode: str | None, method: str | Purifier) -> str | None:
    """The method's own mode; only filters that output zero can be removed."""
    if mode != _COMPACT:
        return mode
    return "zero_gamma_beta" if isinstance(method, str) else None


@dataclass(frozen=True)
class _Done:
    """One set of weights before and after its repair."""

    model: Model
    data: DataInfo
    repair: Repair
    attachments: Mapping[str, bytes]
    started: str
    seconds: float
    compact: CompactInfo | None = None


def _repair_all(loaded: Loaded, clean: CleanSource, run: _Run) -> tuple[list[_Done], list[tuple[str, BdpruneError]]]:
    """The repaired sets of weights, and the errors of the others by name.

    Raises:
        BdpruneError: no set could be repaired; it is the error of the last one.
    """
    done: list[_Done] = []
    failed = [(one.name, one.error) for one in loaded.unloaded]
    for model in loaded.models:
        try:
            done.append(_repaired(model, clean, run))
        except BdpruneError as error:
            if len(loaded.models) == 1:
                raise
            failed.append((model.artifact.state_key if model.artifact else "", error))
    if not done:
        raise failed[-1][1]
    return done, failed


def _repaired(model: Model, clean: CleanSource, run: _Run) -> _Done:
    clock = Clock()
    fitted, data = clean.fit_for(model)
    assert data is not None
    case = Case(fitted, data.by_content if run.starts else data)  # a scan sorts its images by content
    if run.starts:
        reuse_scan(case, run.starts, run.folders, run.progress)
    run.progress("checking the clean data")
    missing = missing_labels(fitted, case.images, run.allow_missing)
    sanity = check_sanity(fitted, case.images)
    if not sanity.ok:
        raise SanityError(sanity.message, sanity.suggestion)
    mirrored, no_mirror = mirror_rule(fitted, case.images)
    case = case.with_data(mirrored)
    with _noted(data):
        taken, held = (
            with_images_for_check(run.purifier, case, run.seed)
            if run.check and not run.purifier.checks_itself
            else (case, None)
        )
        run.progress(f"repairing with {short_id(run.purifier)}")
        repair, info = run.purifier(taken), None
    if held is not None and repair.check is None:
        run.progress("checking the repair")
        precision = run.options.precision or DEFAULT
        repair = replace(repair, check=checked(case, held, repair, run.seed, precision))
    if run.compact:
        run.progress("removing pruned filters")
        repair, info = compacted(repair, case.images.images)
    about = data_info(case.images, sanity)
    about = msgspec.structs.replace(about, notes=(*about.notes, *(one for one in (missing, no_mirror) if one)))
    return _Done(fitted, about, repair, case.attachments, clock.started, clock.seconds, info)


@contextmanager
def _noted(data: CleanData) -> Iterator[None]:
    """Adds the notes of the data to an error about them: it may count fewer images than the user gave."""
    try:
        yield
    except DataError as error:
        raise type(error)(" ".join([error.message, *data.notes]), error.hint) from error


def _left(models: Sequence[Model], failed: Sequence[tuple[str, BdpruneError]]) -> tuple[str, ...]:
    """The parts of the file that may hold weights but are written back unchanged, with reasons."""
    artifacts = [model.artifact for model in models if model.artifact is not None]
    named = {name or _WHOLE: error for name, error in failed}
    left = [f"{name}: {error}" for name, error in named.items()]
    left += [one for own in artifacts for one in own.left_out if one.partition(": ")[0] not in named]
    unscanned = [name for own in artifacts for name in own.unscanned]
    if unscanned:
        left.append(f"weights outside the recognised networks: {some(list(dict.fromkeys(unscanned)))}")
    return tuple(dict.fromkeys(left))


def _write(models: Sequence[Model], output: str | os.PathLike[str] | None) -> OutputInfo | None:
    if output is None:
        return None
    written = save(models, Path(output))
    kind = models[0].artifact.format if models[0].artifact else "safetensors"
    return OutputInfo(
        path=str(written.path),
        format=kind,
        bytes=written.bytes,
        sha256=written.sha256,
        description="" if written.description is None else str(written.description),
    )


def _record(one: _Done, output: OutputInfo | None, left: tuple[str, ...], run: _Run) -> PurifyResult:
    repair = one.repair
    return PurifyResult(
        started=one.started,
        artifact=artifact_info(one.model),
        model=model_info(one.model),
        data=one.data,
        env=env(one.model.device, run.seed),
        method=repair.method,
        accuracy_before=number(repair.accuracy_before),
        accuracy_after=number(repair.accuracy_after),
        change=repair.change,
        selection=repair.selection,
        threshold=number(repair.threshold),
        filters=repair.num_filters,
        filters_pruned=sum(map(len, repair.pruned.values())),
        pruned={name: tuple(index) for name, index in repair.pruned.items()},
        target_label=repair.target_label,
        curve=tuple(
            CurveInfo(
                threshold=number(point.threshold),
                clean_accuracy=number(point.clean_accuracy),
                filters_pruned=point.filters_pruned,
            )
            for point in repair.curve
        ),
        masks=mask_histogram(repair),
        phases={name: number(seconds) for name, seconds in repair.seconds.items()},
        params=finite(repair.params),
        attachments=save_attachments(repair.attachments, one.attachments, run.attachments),
        compact=one.compact,
        output=output,
        left=left,
        outcome=repair.check.outcome if repair.check else "unchecked",
        check=repair.check,
        attempts=repair.attempts,
        coverage=weight_coverage(one.model),
        seconds=one.seconds,
    )
