"""Starts a repair from a scan of the same model on the same images: it reuses the unlearned model of the scan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bdprune.analysis import Case, Unlearning, from_tensors
from bdprune.errors import DataError, OptionError
from bdprune.files import read_safetensors
from bdprune.loops import UnlearnSettings
from bdprune.pipeline.attachments import read_attachment
from bdprune.pipeline.scan import Progress, silent
from bdprune.record import Evidence, Result, documents_from_json

_GIVE_SCAN = "Give the file that `bdprune scan --format json=FILE` wrote."


def scans_of(source: Result | Sequence[Result] | str | os.PathLike[str] | None) -> list[Result]:
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


def reuse_scan(case: Case, starts: Sequence[Result], folders: Sequence[Path], progress: Progress = silent) -> None:
    """Finds the scan of this model on these images, and loads the unlearned models that it has kept.

    Args:
        case: the model and its clean images.
        starts: results of scans.
        folders: where the attachments may lie.
        progress: called with a short text before each stage.

    Raises:
        DataError: there is no such scan, or a kept model is damaged.
    """
    start = next((one for one in starts if one.model is not None and one.model.digest == case.digest), None)
    if start is None:
        there = ", ".join(one.name for one in starts)
        raise DataError(
            f"The scan is of another model: its weights, input shape or normalisation differ ({there}).",
            "Scan this model first, or repair it without the result of a scan.",
        )
    if start.data is None or start.data.digest != case.images.digest:
        raise DataError(
            "The scan used other clean images.",
            "Give the same --data, --per-class, --class-order and --seed, scan again, or repair without a scan.",
        )
    for evidence in start.detectors:
        if {"unlearning", "seed", "precision"} <= evidence.params.keys():
            _reuse_unlearned(evidence, case, folders, progress)


def _reuse_unlearned(evidence: Evidence, case: Case, folders: Sequence[Path], progress: Progress) -> None:
    """Puts the unlearned model of a scan into the case's memo, unless it is there already."""
    params = evidence.params
    try:
        settings = msgspec.convert(params["unlearning"], UnlearnSettings)
    except msgspec.ValidationError as error:
        raise DataError(f"The settings of {evidence.detector} are damaged: {error}.", "Scan it again.") from error
    key = case.key(Unlearning(settings, params["seed"], params["precision"]))
    if key in case.memo:
        return
    kept = (read_attachment(one, folders) for one in evidence.attachments if one.name == "unlearned")
    content = next((one for one in kept if one is not None), None)
    if content is None:
        progress("unlearning again, because the scan kept no unlearned model")
        return
    progress("loading the unlearned model of the scan")
    case.memo.put(key, from_tensors(read_safetensors(content)[0], case.model))
