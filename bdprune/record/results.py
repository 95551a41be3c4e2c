"""The results of scans, repairs, scorings, inversions and inspections: versioned records with a strict JSON form.

``bdprune schema`` prints their JSON Schema. They refuse unknown fields, write numbers that are not finite as null, and
hold all settings that are needed to repeat the run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import msgspec

from bdprune.errors import DataError
from bdprune.record.base import SCHEMA_VERSION, Count, Record, Share, notebook_form
from bdprune.record.evidence import Attachment, Evidence
from bdprune.record.inspection import EntropyHistogram, ImageVerdict, IncomingInfo, InspectedImage, InspectMethod
from bdprune.record.parts import (
    ArtifactInfo,
    CalibrationInfo,
    CompactInfo,
    CurveInfo,
    DataInfo,
    Env,
    ErrorInfo,
    FilterScore,
    Finding,
    Histogram,
    LayerScores,
    ModelInfo,
    OutputInfo,
    PassedOver,
    WeightCoverage,
)
from bdprune.record.repair import Attempt, Outcome, RepairCheck
from bdprune.record.screening import ScreenResult
from bdprune.record.trigger import TriggerInfo

Verdict = Literal["clean", "suspicious", "backdoored", "inconclusive", "error"]
VERDICTS: Mapping[Verdict, str] = {
    "clean": "Detectors looked for a trigger and for a collapse under unlearning, on clean data that the model handles "
    "well, and found nothing. It lowers the risk; it is not a proof.",
    "suspicious": "A detector flags the model, but there are not two of the three strong kinds of evidence "
    "(`collapse`, `trigger`, `pruning`), or they name different labels. Or its scores are as a whole higher than those "
    "of nearly all clean networks.",
    "backdoored": "Two of the three strong kinds of evidence name the same label, `target_label`, or the same "
    "`targets`.",
    "inconclusive": "There is no clean data, or the model labels too few of its images correctly (the findings say "
    "what would fit), or a detector gave no number, or the time did not suffice to look for a trigger and a collapse.",
    "error": "The file or the data could not be read, or the time limit was reached. `error` says why, and what to do.",
}
"""What each verdict means, in Markdown."""

ATTENTION: tuple[Verdict, ...] = ("backdoored", "suspicious", "error", "inconclusive", "clean")
"""Verdicts, the most serious first."""

Change = Literal["nothing", "pruned", "retrained", "pruned and retrained"]
"""The kind of change of the weights by a repair."""


class Document(Record, frozen=True, kw_only=True):
    """The common fields of all results.

    Attributes:
        schema_version: version of the schema.
        started: time at which the run started, UTC, ISO 8601.
        seconds: wall time of the run.
        artifact: the file of the model; None for a model in memory.
        model: the recognised network; None if it could not be loaded.
        data: the clean images; None if there were none, or if they could not be read.
        env: software, device and seed.
        coverage: which weights of the file were scanned; None for a model in memory.
    """

    schema_version: Literal["2"] = SCHEMA_VERSION
    started: str
    seconds: float
    artifact: ArtifactInfo | None
    model: ModelInfo | None
    data: DataInfo | None
    env: Env
    coverage: WeightCoverage | None = None

    @property
    def name(self) -> str:
        """The name of the model in a report."""
        if self.artifact is None:
            return "model in memory"
        several = len(self.artifact.sets) > 1 and self.artifact.state_key
        return f"{self.artifact.path}#{self.artifact.state_key}" if several else self.artifact.path


class Result(Document, frozen=True, kw_only=True, tag_field="kind", tag="scan"):
    """Verdict on one model.

    Attributes:
        verdict: ``clean``, ``suspicious``, ``backdoored``, ``inconclusive`` or ``error``.
        risk: how likely a backdoor is, in [0, 1]; None if the model could not be judged. ``calibration`` says how far
            it is a calibrated probability.
        calibration: the table that the risk comes from; None if the risk is only the strength of the evidence.
        target_label: the label that the backdoor leads to; None if it is unknown or if there are several.
        targets: the labels that the backdoor leads to if there are several, such as all labels of an all-to-all
            backdoor. Of a suspicious model, also the labels on which the evidence disagrees.
        sources: the labels whose images the backdoor flips, if it does not flip those of all labels; empty otherwise.
        detectors: the evidence of each detector that ran, in order.
        findings: messages to the reader.
        error: set exactly when the verdict is ``error``.
        not_run: detectors that did not run; the findings say why.
        budget: how far the scan went: ``fast``, ``default``, ``full``, or a time limit such as ``300 s``.

    Example:
        >>> import bdprune
        >>> result = bdprune.scan("model.pth")
        >>> Result.from_json(result.to_json()) == result
        True
    """

    verdict: Verdict
    risk: Share | None
    calibration: CalibrationInfo | None = None
    target_label: int | None
    targets: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    detectors: tuple[Evidence, ...] = ()
    findings: tuple[Finding, ...] = ()
    error: ErrorInfo | None = None
    not_run: tuple[str, ...] = ()
    budget: str = "default"

    @property
    def target_name(self) -> str:
        """Class name of the target label, empty if unknown."""
        names = self.data.class_names if self.data else ()
        return names[self.target_label] if self.target_label is not None and self.target_label < len(names) else ""

    def brief(self) -> Self:
        """The same result without evidence and findings: what the line of a table needs."""
        return msgspec.structs.replace(self, detectors=(), findings=(), calibration=None)

    def _repr_html_(self) -> str:
        return notebook_form(self)


class PurifyResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="purify"):
    """The outcome of a repair.

    Attributes:
        method: id of the purifier.
        accuracy_before: clean accuracy before the repair, on held-out clean images if the method holds some out.
        accuracy_after: clean accuracy after the repair, on the same images.
        change: what happened to the weights.
        selection: how the method chose the change, in a sentence.
        threshold: filters with a mask or score beyond it were pruned; None if there is no single threshold.
        filters: number of filters that could be pruned.
        filters_pruned: number of filters that were pruned.
        pruned: filter group -> indices of its pruned filters.
        target_label: the label that the backdoor leads to; None if the method does not name one.
        curve: clean accuracy for each threshold that was tried.
        masks: histogram of the values that the threshold was applied to.
        phases: seconds of each step.
        params: settings of the method.
        attachments: tensors such as the masks.
        compact: what the removal of pruned filters saved; None if they were not to be removed.
        output: the file that was written; None if none was.
        left: sets of weights that were not repaired, with reasons: the new file holds them unchanged.
        outcome: what clean images show: ``repaired``, no sign of the backdoor is left; ``unrepaired``, at least one is;
            ``unverified``, there was no sign to begin with; ``unchecked``, the repair was not checked.
        check: the signs before and after the repair; None if the repair was not checked.
        attempts: the methods that were tried, for a repair that chooses among several.
    """

    method: str
    accuracy_before: Share | None
    accuracy_after: Share | None
    change: Change
    selection: str
    threshold: float | None
    filters: Count
    filters_pruned: Count
    pruned: dict[str, tuple[int, ...]]
    target_label: int | None = None
    curve: tuple[CurveInfo, ...] = ()
    masks: Histogram | None = None
    phases: dict[str, float | None] = msgspec.field(default_factory=dict)
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    attachments: tuple[Attachment, ...] = ()
    compact: CompactInfo | None = None
    output: OutputInfo | None = None
    left: tuple[str, ...] = ()
    outcome: Outcome = "unchecked"
    check: RepairCheck | None = None
    attempts: tuple[Attempt, ...] = ()

    def _repr_html_(self) -> str:
        return notebook_form(self)


class ScoreResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="score"):
    """Scores of filters.

    Attributes:
        method: id of the score.
        layers: a summary of every layer, in the order of the network.
        top: the filters with the highest scores, the highest first.
        params: settings of the score.
    """

    method: str
    layers: tuple[LayerScores, ...]
    top: tuple[FilterScore, ...]
    params: dict[str, Any] = msgspec.field(default_factory=dict)


class InvertResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="invert"):
    """Recovered triggers.

    Attributes:
        triggers: first those that flip at least half of the held-out images, in the order of ``smallest``.
        smallest: of each trigger, the smallest size at which it flipped nearly all images of the search, before it was
            made stronger; None if it never did. Compare labels by this.
        skipped: triggers that were not searched, because no clean image fits that the model labels correctly, or
            because the time was short.
        complete: whether the search ran to its end; otherwise the time was too short.
        folder: where the files of the triggers are; empty if none were written.
        params: settings of the search.
    """

    triggers: tuple[TriggerInfo, ...]
    smallest: tuple[float | None, ...] = ()
    skipped: tuple[str, ...] = ()
    complete: bool = True
    folder: str = ""
    params: dict[str, Any] = msgspec.field(default_factory=dict)

    def _repr_html_(self) -> str:
        return notebook_form(self)


class InspectResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="inspect"):
    """Verdicts on images, not on a model.

    Attributes:
        method: ``strip``, or ``nu-strip`` on the partly unlearned network.
        verdict: ``suspicious`` if at least one image is; else ``unknown`` if at least one image was not judged; else
            ``normal``.
        incoming: the inspected images.
        threshold: an image with a lower entropy is suspicious, in bits; None if no image could be judged.
        frr: false rejection rate: the share of clean images that the threshold may flag.
        overlays: number of clean images that each image was superposed with.
        held_out: number of other clean images, which set the threshold.
        suspicious: number of suspicious images.
        unknown: number of images that were not judged.
        expected: number of suspicious images to expect if all images are clean.
        chance: probability of at least as many suspicious images if all are clean; None if none was judged.
        labels: predicted label -> number of suspicious images with it, the most frequent first.
        images: one entry for each image, in the order of the source.
        histogram: entropies of the clean and of the inspected images; None if there are none.
        remarks: further facts for the reader, a sentence each.
        limits: why images were not judged, a sentence each.
        params: settings of the method.
    """

    method: InspectMethod
    verdict: ImageVerdict
    incoming: IncomingInfo
    threshold: float | None
    frr: Share
    overlays: Count
    held_out: Count
    suspicious: Count
    unknown: Count
    expected: float
    chance: Share | None
    labels: dict[int, Count]
    images: tuple[InspectedImage, ...]
    histogram: EntropyHistogram | None = None
    remarks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    params: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def ranked(self) -> list[InspectedImage]:
        """The images with an entropy, the most suspicious first; equal ones in the order of the source."""
        known = [one for one in self.images if one.entropy is not None]
        return sorted(known, key=lambda one: one.entropy or 0.0)


class CoverageResult(Record, frozen=True, kw_only=True, tag_field="kind", tag="coverage"):
    """Which files of a scan's folders were scanned. It follows the results if the scan skipped files.

    Attributes:
        schema_version: version of the schema.
        files: number of all files.
        scanned: number of files with results, including shards.
        passed_over: the skipped files, by reason.
    """

    schema_version: Literal["2"] = SCHEMA_VERSION
    files: Count
    scanned: Count
    passed_over: tuple[PassedOver, ...] = ()


KINDS: dict[str, type[Record]] = {
    "scan": Result,
    "purify": PurifyResult,
    "score": ScoreResult,
    "invert": InvertResult,
    "inspect": InspectResult,
    "screen": ScreenResult,
    "coverage": CoverageResult,
}


def documents_from_json(text: str | bytes, source: str = "The text") -> list[Record]:
    """Reads results of any kind from JSON: one document, an array, or one document a line.

    Args:
        text: JSON.
        source: its name in error messages, such as its path.

    Raises:
        DataError: the text is not JSON, or its documents have another version.
    """
    try:
        found = _decoded(text)
        items = found if isinstance(found, list) else [found]
        return [msgspec.convert(one, KINDS[_kind(one)], str_keys=True) for one in items]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        what = f"{source} does not hold results of bdprune (schema {SCHEMA_VERSION}): {error}."
        raise DataError(what, "Compare them with `bdprune schema`.") from error


def _decoded(text: str | bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return msgspec.json.Decoder().decode_lines(text)


def _kind(document: object) -> str:
    if not isinstance(document, dict):
        raise msgspec.ValidationError("it has a value that is not an object")
    if "kind" not in document:
        raise msgspec.ValidationError("it has no field `kind`")
    kind = str(document["kind"])
    if kind not in KINDS:
        raise msgspec.ValidationError(f"its kind is {kind[:80]!r}, not one of {', '.join(KINDS)}")
    return kind


def schema(kind: str = "scan") -> dict[str, Any]:
    """JSON Schema (2020-12) of one kind of result: a key of ``KINDS``."""
    found = msgspec.json.schema(KINDS[kind])
    records = {one.__name__: one for one in _records(Record)}
    for name, part in found["$defs"].items():
        part["description"] = inspect.cleandoc(part["description"]).partition("\n\nAttributes:")[0]
        meanings = _meanings(records[name])
        for field, form in part["properties"].items():
            if field in meanings:
                form["description"] = meanings[field]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _records(base: type[Record]) -> Iterator[type[Record]]:
    """All records of this package."""
    for record in base.__subclasses__():
        if record.__module__.startswith("bdprune.record."):
            yield record
            yield from _records(record)


def _meanings(record: type[Record]) -> dict[str, str]:
    """Field -> its meaning, from the sections ``Attributes`` of the record and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(record.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, re.M):
            found[name] = re.sub(r"\bNone\b", "null", " ".join(text.split()))
    return found
