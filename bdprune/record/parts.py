"""The parts of which results are made."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from bdprune.record.base import Count, Record, Share

Severity = Literal["info", "low", "medium", "high", "critical"]


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
    """The network as it was recognised. ``mean`` and ``std`` are empty when the model takes images as they are.

    ``digest`` is the SHA-256 of its weights and of all that says how they are run: equal for equal models, whatever
    file they came in; empty where it was not needed.
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


class Finding(Record, frozen=True, kw_only=True):
    """One thing worth telling. ``atlas`` holds MITRE ATLAS technique ids."""

    rule_id: Annotated[str, msgspec.Meta(pattern="^BD[0-9]{3}$")]
    severity: Severity
    message: str
    atlas: tuple[str, ...] = ()


class SanityInfo(Record, frozen=True, kw_only=True):
    """Whether the model does its clean job on the clean data; a scan of one that does not proves nothing.

    ``fits`` names what fits better in short, such as ``imagenet``; ``hint`` says it in a sentence. ``class_map`` is the
    order of classes that fits better: label in the data -> label of the model; empty when none does.
    """

    ok: bool
    message: str
    hint: str = ""
    fits: str = ""
    class_map: dict[int, int] = msgspec.field(default_factory=dict)


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
    passed_over: dict[str, Count] = msgspec.field(default_factory=dict)
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
    """Why there is no verdict, and what to do about it."""

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
    """Files that were not scanned for one reason. All that may hold weights are in ``paths``, of others a hundred."""

    reason: str
    may_hold_weights: bool
    count: Count
    paths: tuple[str, ...]
