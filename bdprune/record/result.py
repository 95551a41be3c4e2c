"""The result of a scan, a repair or a scoring: versioned records that go to JSON and come back strictly.

``bdprune schema`` prints their JSON Schema. Rules that hold for all of them: unknown fields are refused, a number
that is not finite is written as null, and everything needed to repeat the run is inside.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import msgspec

from bdprune.errors import DataError

SCHEMA_VERSION: Literal["1.1"] = "1.1"

Verdict = Literal["clean", "suspicious", "backdoored", "inconclusive", "error"]
ATTENTION: tuple[Verdict, ...] = ("backdoored", "suspicious", "error", "inconclusive", "clean")
"""Verdicts, the one that needs attention most first."""

Severity = Literal["info", "low", "medium", "high", "critical"]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: immutable, named fields only, unknown fields refused."""

    def to_json(self, *, indent: int | None = 2) -> str:
        """JSON text without NaN or infinities; ``indent=None`` gives one line."""
        compact = msgspec.json.encode(finite(msgspec.to_builtins(self)))
        return (compact if indent is None else msgspec.json.format(compact, indent=indent)).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read back what ``to_json`` wrote.

        Raises:
            DataError: the text is not JSON, or not a result of this kind and version.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"This is not a {cls.__name__} of schema {SCHEMA_VERSION}: {error}.",
                "Compare it with `bdprune schema`.",
            ) from error


class ArtifactInfo(Record, frozen=True, kw_only=True):
    """The file a model came from. What could not be read is null.

    ``state_key`` names the set of weights inside the file, ``sets`` every set that the file holds. ``path`` of a model
    in shards is its index, and ``bytes`` and ``sha256`` are of the index and all shards.
    """

    path: str
    format: str | None = None
    bytes: Count | None = None
    sha256: str | None = None
    state_key: str | None = None
    prefix: str | None = None
    sets: tuple[str, ...] = ()


class ModelInfo(Record, frozen=True, kw_only=True):
    """The network as it was recognised. ``mean`` and ``std`` are empty when the model takes images as they are."""

    arch: str
    parameters: Count
    num_classes: Count
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    filter_groups: Count | None = None
    filters: Count | None = None


class WeightCoverage(Record, frozen=True, kw_only=True):
    """What of a set of weights was looked at.

    ``scanned`` counts the numbers in its weights; ``unscanned`` names weights beside it that belong to no network that
    was scanned; ``same`` names other places in the file where the very same weights stand; ``kept`` names entries
    without weights, which a repair writes back as they are; ``left_out`` names other sets of weights in the file that
    were not scanned.
    """

    scanned: Count
    unscanned: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class DetectorResult(Record, frozen=True, kw_only=True):
    """What one detector saw. ``score`` and ``threshold`` are null when they are not finite numbers."""

    id: str
    score: float | None
    threshold: float | None
    flagged: bool
    target_label: int | None = None
    seconds: float | None = 0.0
    params: dict[str, Any] = {}
    details: dict[str, Any] = {}


class Finding(Record, frozen=True, kw_only=True):
    """One thing worth telling. ``atlas`` holds MITRE ATLAS technique ids."""

    rule_id: Annotated[str, msgspec.Meta(pattern="^BD[0-9]{3}$")]
    severity: Severity
    message: str
    atlas: tuple[str, ...] = ()


class SanityInfo(Record, frozen=True, kw_only=True):
    """Whether the model does its clean job on the clean data; a scan of one that does not proves nothing.

    ``fits`` names what fits better in short, such as ``imagenet``; ``mend`` says it in a sentence. ``class_map`` is the
    order of classes that fits better: label in the data -> label of the model; empty when none does.
    """

    ok: bool
    message: str
    mend: str = ""
    fits: str = ""
    class_map: dict[int, int] = {}


class DataInfo(Record, frozen=True, kw_only=True):
    """The clean images that were used. ``per_class`` counts the images of each label that occurs.

    ``notes`` says what was done to the images (resized, converted, renumbered); ``passed_over`` counts the files of a
    folder that were not read, by suffix or reason.
    """

    source: str
    count: Count
    classes: Count
    per_class: dict[int, Count]
    digest: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    passed_over: dict[str, Count] = {}
    clean_accuracy: Share | None = None
    sanity: SanityInfo | None = None


class Env(Record, frozen=True, kw_only=True):
    """What is needed to repeat the run."""

    tool: str
    version: str
    torch: str
    cuda: str | None
    device: str
    backend: str
    threads: Count
    seed: int
    python: str
    platform: str


class ErrorInfo(Record, frozen=True, kw_only=True):
    """Why there is no verdict, and the mend."""

    type: str
    message: str
    mend: str = ""


class Document(Record, frozen=True, kw_only=True):
    """What every top-level result has, and how it travels."""

    schema_version: Literal["1.1"] = SCHEMA_VERSION
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
    detectors: tuple[DetectorResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    error: ErrorInfo | None = None
    not_run: tuple[str, ...] = ()

    @property
    def target_name(self) -> str:
        """Class name of the target label, empty when unknown."""
        names = self.data.class_names if self.data else ()
        return names[self.target_label] if self.target_label is not None and self.target_label < len(names) else ""


class CurveInfo(Record, frozen=True, kw_only=True):
    """Clean accuracy on held-out clean images after pruning at ``threshold``."""

    threshold: float | None
    clean_accuracy: float | None
    filters_pruned: Count


class Histogram(Record, frozen=True, kw_only=True):
    """``counts[i]`` values lie in [edges[i], edges[i + 1]); ``pruned[i]`` of them belong to pruned filters."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    pruned: tuple[int, ...]


class OutputInfo(Record, frozen=True, kw_only=True):
    """The file that was written."""

    path: str
    format: str
    bytes: Count
    sha256: str


class PurifyResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="purify"):
    """What a repair did. Both accuracies are on the same clean images, held out where the method holds some out.

    ``threshold`` is null when the rule has no single one; ``pruned`` maps a filter group to the indices of its pruned
    filters; ``masks`` is the histogram of what the threshold was put on. ``left`` says which sets of weights of the
    file were not repaired, and why: they stand in the new file as they were.
    """

    method: str
    accuracy_before: Share | None
    accuracy_after: Share | None
    threshold: float | None
    threshold_rule: str
    filters: Count
    filters_pruned: Count
    pruned: dict[str, tuple[int, ...]]
    target_label: int | None = None
    curve: tuple[CurveInfo, ...] = ()
    masks: Histogram | None = None
    phases: dict[str, float | None] = {}
    params: dict[str, Any] = {}
    findings: tuple[Finding, ...] = ()
    output: OutputInfo | None = None
    left: tuple[str, ...] = ()


class LayerScores(Record, frozen=True, kw_only=True):
    """Scores of one layer's filters; ``max_z`` is the largest in standard deviations above the layer's mean."""

    layer: str
    filters: Count
    mean: float | None
    std: float | None
    max: float | None
    max_z: float | None


class FilterScore(Record, frozen=True, kw_only=True):
    """One filter's score, and how many standard deviations it lies above its layer's mean."""

    layer: str
    filter: Count
    score: float | None
    z: float | None


class ScoreResult(Document, frozen=True, kw_only=True, tag_field="kind", tag="score"):
    """Suspicion per filter: every layer in the order of the network, and the worst filters of all."""

    method: str
    layers: tuple[LayerScores, ...]
    top: tuple[FilterScore, ...]
    params: dict[str, Any] = {}


class PassedOver(Record, frozen=True, kw_only=True):
    """Files that were not scanned for one reason. All that may hold weights are in ``paths``, of others a hundred."""

    reason: str
    may_hold_weights: bool
    count: Count
    paths: tuple[str, ...]


class CoverageResult(Record, frozen=True, kw_only=True, tag_field="kind", tag="coverage"):
    """What became of the files in the folders of a scan. It follows the results where files were passed over.

    ``files`` counts all files that were found, ``scanned`` those that results are about, shards among them.
    """

    schema_version: Literal["1.1"] = SCHEMA_VERSION
    files: Count
    scanned: Count
    passed_over: tuple[PassedOver, ...] = ()


KINDS: dict[str, type[Record]] = {
    "scan": Result,
    "purify": PurifyResult,
    "score": ScoreResult,
    "coverage": CoverageResult,
}


def schema(kind: str = "scan") -> dict[str, Any]:
    """JSON Schema (2020-12) of one kind of result: ``scan``, ``purify``, ``score`` or ``coverage``."""
    found = msgspec.json.schema(KINDS[kind])
    for part in found["$defs"].values():
        part["description"] = inspect.cleandoc(part["description"]).partition("\n\nExample:")[0]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def finite(value: Any) -> Any:
    """``value`` as strict JSON: a number that is not finite becomes None, an object that JSON does not know text.

    Bytes of a file name that are no UTF-8 (lone surrogates in Python) become question marks.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite(item) for item in value]
    return str(value).encode(errors="replace").decode()


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
