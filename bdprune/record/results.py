"""The results of a scan, a repair and a scoring: versioned records that go to JSON and come back strictly.

``bdprune schema`` prints their JSON Schema. Rules that hold for all of them: unknown fields are refused, a number
that is not finite is written as null, and everything needed to repeat the run is inside.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import msgspec

from bdprune.errors import DataError
from bdprune.record.base import SCHEMA_VERSION, Count, Record, Share
from bdprune.record.evidence import Attachment, Evidence
from bdprune.record.parts import (
    ArtifactInfo,
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

Verdict = Literal["clean", "suspicious", "backdoored", "inconclusive", "error"]
ATTENTION: tuple[Verdict, ...] = ("backdoored", "suspicious", "error", "inconclusive", "clean")
"""Verdicts, the one that needs attention most first."""

Change = Literal["nothing", "pruned", "retrained", "pruned and retrained"]
"""What a repair did to the weights."""


class Document(Record, frozen=True, kw_only=True):
    """What every top-level result has, and how it travels."""

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
        """What to call the model in a report."""
        if self.artifact is None:
            return "model in memory"
        several = len(self.artifact.sets) > 1 and self.artifact.state_key
        return f"{self.artifact.path}#{self.artifact.state_key}" if several else self.artifact.path


class Result(Document, frozen=True, kw_only=True, tag_field="kind", tag="scan"):
    """Verdict on one model.

    ``risk`` is in [0, 1], larger is worse, null when nothing could be judged. ``target_label`` is the label that the
    backdoor leads to, null when none is named. ``error`` is set exactly when the verdict is ``error``. ``not_run``
    names the detectors that were asked for and did not run.

    Example:
        >>> import bdprune
        >>> result = bdprune.scan("model.pth")
        >>> Result.from_json(result.to_json()) == result
        True
    """

    verdict: Verdict
    risk: Share | None
    target_label: int | None
    detectors: tuple[Evidence, ...] = ()
    findings: tuple[Finding, ...] = ()
    error: ErrorInfo | None = None
    not_run: tuple[str, ...] = ()

    @property
    def target_name(self) -> str:
        """Class name of the target label, empty when unknown."""
        names = self.data.class_names if self.data else ()
        return names[self.target_label] if self.target_label is not None and self.target_label < len(names) else ""


class PurifyResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="purify"):
    """What a repair did. Both accuracies are on the same clean images, held out where the method holds some out.

    ``change`` says what was done to the weights, ``selection`` how that was chosen, ``phases`` the seconds that each
    step took. ``threshold`` is null when there is no single one; ``pruned`` maps a filter group to the indices of its
    pruned filters; ``masks`` is the histogram of what the threshold was put on. ``left`` says which sets of weights of
    the file were not repaired, and why: they stand in the new file as they were.
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
    output: OutputInfo | None = None
    left: tuple[str, ...] = ()


class ScoreResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="score"):
    """Suspicion per filter: every layer in the order of the network, and the worst filters of all."""

    method: str
    layers: tuple[LayerScores, ...]
    top: tuple[FilterScore, ...]
    params: dict[str, Any] = msgspec.field(default_factory=dict)


class CoverageResult(Record, frozen=True, kw_only=True, tag_field="kind", tag="coverage"):
    """What became of the files in the folders of a scan. It follows the results where files were passed over.

    ``files`` counts all files that were found, ``scanned`` those that results are about, shards among them.
    """

    schema_version: Literal["2"] = SCHEMA_VERSION
    files: Count
    scanned: Count
    passed_over: tuple[PassedOver, ...] = ()


KINDS: dict[str, type[Record]] = {
    "scan": Result,
    "purify": PurifyResult,
    "score": ScoreResult,
    "coverage": CoverageResult,
}


def documents_from_json(text: str | bytes) -> list[Record]:
    """Reads back results of any kind: one document, an array of them, or one a line.

    Raises:
        DataError: the text is not JSON, or not of documents of this version.
    """
    try:
        found = _decoded(text)
        items = found if isinstance(found, list) else [found]
        return [msgspec.convert(one, KINDS[_kind(one)], str_keys=True) for one in items]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        what = f"These are not results of schema {SCHEMA_VERSION}: {error}."
        raise DataError(what, "Compare them with `bdprune schema`.") from error


def _decoded(text: str | bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return msgspec.json.Decoder().decode_lines(text)


def _kind(document: object) -> str:
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in KINDS:
        raise msgspec.ValidationError(f"a document of kind {str(kind)[:80]!r}, not one of {', '.join(KINDS)}")
    return str(kind)


def schema(kind: str = "scan") -> dict[str, Any]:
    """JSON Schema (2020-12) of one kind of result: ``scan``, ``purify``, ``score`` or ``coverage``."""
    found = msgspec.json.schema(KINDS[kind])
    for part in found["$defs"].values():
        part["description"] = inspect.cleandoc(part["description"]).partition("\n\nExample:")[0]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
