"""The parts of results."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from bdprune.errors import NoWeightsError
from bdprune.record.base import Count, Record, Share

Severity = Literal["info", "low", "medium", "high", "critical"]


class ArtifactInfo(Record, frozen=True, kw_only=True):
    """The file of a model. Fields that could not be read are null.

    Attributes:
        path: where the file is; of a model in shards, the index.
        format: ``torch-zip``, ``torch-legacy`` or ``safetensors``.
        bytes: size; of a model in shards, of the index and all shards.
        sha256: SHA-256 of the same bytes.
        state_key: the set of weights inside the file.
        prefix: text before the names of the weights, such as ``module.``.
        sets: all sets of weights in the file.
    """

    path: str
    format: str | None = None
    bytes: Count | None = None
    sha256: str | None = None
    state_key: str | None = None
    prefix: str | None = None
    sets: tuple[str, ...] = ()


class ModelInfo(Record, frozen=True, kw_only=True):
    """The recognised network.

    Attributes:
        arch: name of the architecture, or the callable that made it.
        parameters: number of parameters.
        num_classes: number of classes.
        input_shape: channels, height and width of an image.
        mean: what the model subtracts from each channel of an image in [0, 1]; empty if nothing.
        std: what it then divides each channel by; empty if nothing.
        filter_groups: number of groups of filters that can be pruned.
        filters: number of filters in these groups.
        digest: SHA-256 of the weights, architecture, input shape and normalisation: equal for equal models in different
            files; empty if it was not needed.
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

    Attributes:
        scanned: count of the numbers in the scanned weights.
        unscanned: weights outside the recognised networks.
        same: other places in the file that hold the same weights.
        kept: entries without weights, which a repair writes back unchanged.
        left_out: other sets of weights in the file that were not scanned, with reasons.
    """

    scanned: Count
    unscanned: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class CalibrationInfo(Record, frozen=True, kw_only=True):
    """How far the risk of a model is a calibrated probability.

    Attributes:
        table: name of the table that gave the probability.
        prior: share of backdoored networks among those of the table, in (0, 1). The probability holds if as many of the
            scanned models are backdoored.
        p_value: (1 + k) / (1 + n), where k of n clean networks look at least as suspicious: those of the model's
            architecture, or of all architectures of the table if these are too few. None without enough of them.
        references: number of clean networks that the p-value rests on.
        reservation: why the probability is not calibrated, in a sentence; empty if it is.
    """

    table: str
    prior: Share
    p_value: Share | None = None
    references: Count = 0
    reservation: str = ""


class Finding(Record, frozen=True, kw_only=True):
    """One message to the reader of a result.

    Attributes:
        rule_id: the rule behind it.
        severity: how serious it is.
        message: what was found, in one or more sentences.
        atlas: ids of MITRE ATLAS techniques.
    """

    rule_id: Annotated[str, msgspec.Meta(pattern="^BD[0-9]{3}$")]
    severity: Severity
    message: str
    atlas: tuple[str, ...] = ()


class SanityInfo(Record, frozen=True, kw_only=True):
    """Whether the model is accurate enough on the clean data for a meaningful scan.

    Attributes:
        ok: whether it is.
        message: what the check found, in a sentence.
        hint: what to do about it; empty if nothing.
        fits: short name of an option that fits better, such as ``imagenet``; empty if none does.
        class_map: an order of classes that fits better: label in the data -> label of the model; empty if none does.
    """

    ok: bool
    message: str
    hint: str = ""
    fits: str = ""
    class_map: dict[int, int] = msgspec.field(default_factory=dict)


class DataInfo(Record, frozen=True, kw_only=True):
    """The clean images of a run.

    Attributes:
        source: where they come from.
        count: number of images.
        classes: number of classes that occur.
        per_class: label -> number of its images.
        digest: SHA-256 of pixels and labels.
        class_names: names of the classes, if they are known.
        notes: changes to the images: resized, converted, renumbered.
        passed_over: number of skipped files of a folder, by suffix or reason.
        clean_accuracy: share of images that the model labels correctly; None if it was not measured.
        sanity: whether that accuracy is enough.
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
    """The software, device and seed of the run.

    Attributes:
        tool: ``bdprune``.
        version: its version.
        torch: version of torch.
        cuda: version of CUDA that torch was built for; None for a CPU build.
        device: where the model ran.
        backend: ``native`` for compiled ops, ``reference`` for plain PyTorch.
        threads: threads of torch.
        seed: seed of the run.
        python: version of Python.
        platform: operating system and processor.
    """

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
    """The reason for a missing verdict.

    Attributes:
        type: name of the error.
        message: what was wrong.
        hint: what to do about it; may be empty.
    """

    type: str
    message: str
    hint: str = ""

    @property
    def holds_no_weights(self) -> bool:
        """Whether the file is sound but holds no weights, such as the state of an optimizer."""
        return self.type == NoWeightsError.__name__

    @property
    def reason(self) -> str:
        """What was wrong, without the name of the file and the last stop."""
        return self.message.rpartition(": ")[2].removeprefix("it ").rstrip(".")


class CurveInfo(Record, frozen=True, kw_only=True):
    """Clean accuracy after pruning at one threshold.

    Attributes:
        threshold: the threshold.
        clean_accuracy: share of held-out clean images that are labelled correctly.
        filters_pruned: number of filters pruned at this threshold.
    """

    threshold: float | None
    clean_accuracy: float | None
    filters_pruned: Count


class Histogram(Record, frozen=True, kw_only=True):
    """Values of masks or scores.

    Attributes:
        edges: ``edges[i]`` and ``edges[i + 1]`` are the bounds of bin i.
        counts: number of values in each bin.
        pruned: number of values in each bin that belong to pruned filters.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    pruned: tuple[int, ...]


class OutputInfo(Record, frozen=True, kw_only=True):
    """The file that was written.

    Attributes:
        path: where it is.
        format: its format, that of the file that was read.
        bytes: size.
        sha256: SHA-256 of its bytes.
        description: the file next to it that loading a compact network needs; empty if the network is whole.
    """

    path: str
    format: str
    bytes: Count
    sha256: str
    description: str = ""


class CompactInfo(Record, frozen=True, kw_only=True):
    """The removal of pruned filters from a network, and what it saves.

    Attributes:
        filters_removed: number of pruned filters that are no longer in the network.
        parameters_before: parameters of the network with all its filters.
        parameters_after: parameters of the compact network.
        flops_before: floating-point operations for one image, two for each multiply-add of convs and matrix products.
        flops_after: the same for the compact network.
        ms_before: milliseconds for one image of a batch, on the device of the repair.
        ms_after: the same for the compact network.
        difference: largest difference of a logit between the two networks, on random and clean images.
        whole: filter groups with pruned filters that could not be removed, with reasons.
    """

    filters_removed: Count
    parameters_before: Count
    parameters_after: Count
    flops_before: Count
    flops_after: Count
    ms_before: float | None
    ms_after: float | None
    difference: float | None
    whole: tuple[str, ...] = ()


class LayerScores(Record, frozen=True, kw_only=True):
    """Scores of the filters of one layer.

    Attributes:
        layer: name of the layer.
        filters: number of its filters.
        mean: mean score.
        std: standard deviation of the scores.
        max: largest score.
        max_z: how many standard deviations the largest score lies above the mean.
    """

    layer: str
    filters: Count
    mean: float | None
    std: float | None
    max: float | None
    max_z: float | None


class FilterScore(Record, frozen=True, kw_only=True):
    """The score of one filter.

    Attributes:
        layer: name of the layer.
        filter: index of the filter in the layer.
        score: the score.
        z: how many standard deviations it lies above the mean of the layer.
    """

    layer: str
    filter: Count
    score: float | None
    z: float | None


class PassedOver(Record, frozen=True, kw_only=True):
    """Files that were skipped for one reason.

    Attributes:
        reason: why.
        may_hold_weights: whether the files may hold weights that nobody has scanned.
        count: number of files.
        paths: all of them if they may hold weights, else the first hundred.
    """

    reason: str
    may_hold_weights: bool
    count: Count
    paths: tuple[str, ...]
