"""The parts of results."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from bdprune.record.base import Count, Record, Share

Severity = Literal["info", "low", "medium", "high", "critical"]


class ArtifactInfo(Record, frozen=True, kw_only=True):
    """The file of a model. Fields that could not be read are null.

    ``state_key`` names the set of weights inside the file, ``sets`` lists all sets in the file. For a model in shards,
    ``path`` is the index, and ``bytes`` and ``sha256`` cover the index and all shards.
    """

    path: str
    format: str | None = None
    bytes: Count | None = None
    sha256: str | None = None
    state_key: str | None = None
    prefix: str | None = None
    sets: tuple[str, ...] = ()


class ModelInfo(Record, frozen=True, kw_only=True):
    """The recognised network. ``mean`` and ``std`` are empty if the model takes images in [0, 1].

    ``digest`` is the SHA-256 of the weights, architecture, input shape and normalisation: equal for equal models in
    different files; empty if it was not needed.
    """

    arch: str
    parameters: Count
    num_classes: Count
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    filter_groups: Count | None = None
    filters: Count | None = None
    digest: str = ""


class WeightCoverage(Record, frozen=True, kw_only=True):
    """Which weights of a file were scanned.

    ``scanned`` counts the numbers in the weights. ``unscanned`` lists weights outside the scanned networks. ``same``
    lists other places in the file that hold the same weights. ``kept`` lists entries without weights, which a repair
    writes back unchanged. ``left_out`` lists other sets of weights in the file that were not scanned.
    """

    scanned: Count
    unscanned: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class Finding(Record, frozen=True, kw_only=True):
    """One message to the reader of a result. ``atlas`` holds MITRE ATLAS technique ids."""

    rule_id: Annotated[str, msgspec.Meta(pattern="^BD[0-9]{3}$")]
    severity: Severity
    message: str
    atlas: tuple[str, ...] = ()


class SanityInfo(Record, frozen=True, kw_only=True):
    """Whether the model is accurate enough on the clean data for a meaningful scan.

    ``fits`` is the short name of an option that fits better, such as ``imagenet``; ``hint`` says it in a sentence.
    ``class_map`` is an order of classes that fits better: label in the data -> label of the model; or empty.
    """

    ok: bool
    message: str
    hint: str = ""
    fits: str = ""
    class_map: dict[int, int] = msgspec.field(default_factory=dict)


class DataInfo(Record, frozen=True, kw_only=True):
    """The clean images of a run. ``per_class`` counts the images of each label that occurs.

    ``notes`` lists changes to the images (resized, converted, renumbered); ``passed_over`` counts the skipped files of
    a folder, by suffix or reason.
    """

    source: str
    count: Count
    classes: Count
    per_class: dict[int, Count]
    digest: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    passed_over: dict[str, Count] = msgspec.field(default_factory=dict)
    clean_accuracy: Share | None = None
    sanity: SanityInfo | None = None


class Env(Record, frozen=True, kw_only=True):
    """The software, device and seed of the run."""

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
    """The reason for a missing verdict, and a hint for the reader."""

    type: str
    message: str
    hint: str = ""


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


class PassedOver(Record, frozen=True, kw_only=True):
    """Files skipped for one reason. ``paths`` lists all of them if they may hold weights, else the first hundred."""

    reason: str
    may_hold_weights: bool
    count: Count
    paths: tuple[str, ...]
