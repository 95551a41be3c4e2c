"""Repairs a model: loads it with clean data, checks that they fit, purifies, and writes a drop-in checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import msgspec

from bdprune.analysis import (
    Case,
    Unlearning,
    check_sanity,
    from_tensors,
)
from bdprune.data import check_apart
from bdprune.errors import BdpruneError, DataError, OptionError, SanityError
from bdprune.files import read_safetensors
from bdprune.loops import UnlearnSettings
from bdprune.methods import Purifier, Repair, limits_of
from bdprune.model import Loaded, Model, save, torch_pruning
from bdprune.pipeline.attachments import attachments_folder, read_attachment, save_attachments
from bdprune.pipeline.compacting import compacted
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, weight_coverage
from bdprune.pipeline.mask_histogram import mask_histogram
from bdprune.pipeline.open import CleanSource, DataSource, ModelSource, OptionNames, Options, load_models, options_from
from bdprune.pipeline.repair_data import checked, mirror_rule, missing_labels, with_images_for_check
from bdprune.pipeline.scan import Clock, Progress, short_id, silent
from bdprune.record import (
    CompactInfo,
    CurveInfo,
    DataInfo,
    Evidence,
    OutputInfo,
    PurifyResult,
    Result,
    documents_from_json,
    finite,
    number,
    some,
)
from bdprune.registry import chosen_purifier, method_class
from bdprune.runtime import DEFAULT

_COMPACT = "compact"  # a mode of a repair: prune so that the filters can be removed, then remove them
_GO_ON = "scan"  # the preset of a purifier that reuses the results of a scan
_GIVE_SCAN = "Give the file that `bdprune scan --format json=FILE` wrote."


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
        output: where to write the repaired checkpoint, in the format of the original; None writes nothing.
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
    run = _run_of(method, preset, settings, dict(options), progress or silent)
    clean = _clean_source(data, run.options)
    check_apart(data, [run.attachments] if run.attachments else [])
    run.progress("loading")
    loaded = load_models(model, run.options, run.progress)
    done, failed = _repair_all(loaded, clean, run)
    written = _write([one.repair.model for one in done], output)
    left = _left(loaded.models[0], failed)
    first, *others = [Repaired(one.repair, _record(one, written, left, run)) for one in done]
    return replace(first, others=tuple(others))


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
    check, starts = bool(options.pop("check", False)), _results(source)
    allow_missing = bool(options.pop("allow_missing_labels", False))
    known = options_from(options, "purify")
    known.check()
    chosen = {**(settings or {}), **{name: value for name, value in named.items() if value is not None}}
    preset = chosen.pop("preset", None) or preset
    if not isinstance(method, str) and (chosen or preset or known.precision):
        raise OptionError(
            f"{method.id} is an instance, so purify takes no settings for it.", "Give them to its constructor."
        )
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


def _results(source: Result | Sequence[Result] | str | os.PathLike[str] | None) -> list[Result]:
    """The given results of scans; a path is read as JSON with one result, an array, or one result a line.

    Raises:
        OptionError: the file cannot be read, or holds no result of a scan.
    """
    if source is None:
        return []
    if not isinstance(source, str | os.PathLike):
        given = [source] if isinstance(source, Result) else list(source)
        if not given or not all(isinstance(one, Result) for one in given):
            raise OptionError(
                "A repair starts from results of scans.", "Give a result of bdprune.scan, or the path of its JSON."
            )
        return given
    try:
        text = Path(source).read_bytes()
    except OSError as error:
        raise OptionError(f"Cannot read {source}: {error.strerror}.", _GIVE_SCAN) from None
    try:
        found = [one for one in documents_from_json(text, str(source)) if isinstance(one, Result)]
    except DataError as error:
        raise OptionError(error.message, _GIVE_SCAN) from None
    if not found:
        raise OptionError(f"{source} holds no result of a scan.", _GIVE_SCAN)
    return found


def _go_on(run: _Run, case: Case) -> None:
    """Finds the scan of this model on these images, and loads the unlearned models that it has kept.

    Raises:
        DataError: there is no such scan, or a kept model is damaged.
    """
    start = next((one for one in run.starts if one.model is not None and one.model.digest == case.digest), None)
    if start is None:
        there = ", ".join(one.name for one in run.starts)
        raise DataError(
            f"The scan is of another model: its weights, input shape or normalisation differ ({there}).",
            "Scan this model first, or repair it without the result of a scan.",
        )
    if start.data is None or start.data.digest != case.images.digest:
        raise DataError(
            "The scan used other clean images.",
            "Give the same --data, --per-class, --class-order and --seed, or repair without the result of a scan.",
        )
    for evidence in start.detectors:
        if {"unlearning", "seed", "precision"} <= evidence.params.keys():
            _reuse_unlearned(evidence, run, case)


def _reuse_unlearned(evidence: Evidence, run: _Run, case: Case) -> None:
    """Puts the unlearned model of a scan into the case's memo, unless it is there already."""
    params = evidence.params
    try:
        settings = msgspec.convert(params["unlearning"], UnlearnSettings)
    except msgspec.ValidationError as error:
        raise DataError(f"The settings of {evidence.detector} are damaged: {error}.", "Scan it again.") from error
    key = case.key(Unlearning(settings, params["seed"], params["precision"]))
    if key in case.memo:
        return
    kept = (read_attachment(one, run.folders) for one in evidence.attachments if one.name == "unlearned")
    content = next((one for one in kept if one is not None), None)
    if content is None:
        run.progress("unlearning again, because the scan kept no unlearned model")
        return
    run.progress("loading the unlearned model of the scan")
    case.memo.put(key, from_tensors(read_safetensors(content)[0], case.model))


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
        _go_on(run, case)
    run.progress("checking the clean data")
    missing = missing_labels(fitted, case.images, run.allow_missing)
    sanity = check_sanity(fitted, case.images)
    if not sanity.ok:
        raise SanityError(sanity.message, sanity.suggestion)
    mirrored, no_mirror = mirror_rule(fitted, case.images)
    case = case.with_data(mirrored)
    taken, held = with_images_for_check(run.purifier, case, run.options.seed) if run.check else (case, None)
    run.progress(f"repairing with {short_id(run.purifier)}")
    repair, info = run.purifier(taken), None
    if held is not None and repair.check is None:
        run.progress("checking the repair")
        precision = run.options.precision or DEFAULT
        repair = replace(repair, check=checked(case, held, repair, run.options.seed, precision))
    if run.compact:
        run.progress("removing pruned filters")
        repair, info = compacted(repair, case.images.images)
    about = data_info(case.images, sanity)
    about = msgspec.structs.replace(about, notes=(*about.notes, *(one for one in (missing, no_mirror) if one)))
    return _Done(fitted, about, repair, case.attachments, clock.started, clock.seconds, info)


def _left(model: Model, failed: Sequence[tuple[str, BdpruneError]]) -> tuple[str, ...]:
    """The parts of the file that may hold weights but are written back unchanged, with reasons."""
    artifact = model.artifact
    if artifact is None:
        return ()
    named = {name for name, _ in failed}
    left = [f"{name or 'the checkpoint itself'}: {error}" for name, error in failed]
    left += [one for one in artifact.left_out if one.partition(": ")[0] not in named]
    if artifact.unscanned:
        left.append(f"weights outside the recognised networks: {some(artifact.unscanned)}")
    return tuple(left)


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
        env=env(one.model.device, run.options.seed),
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
