"""The result of a screen: scores of the weights alone."""

from __future__ import annotations

from typing import Literal, Self

import msgspec

from bdprune.record.base import SCHEMA_VERSION, Count, Record, notebook_form
from bdprune.record.parts import ArtifactInfo, ErrorInfo

ScreenOutcome = Literal["nothing found", "look closer", "error"]
LabelStatistic = Literal["norm", "mean", "positive", "bias"]


class LayerScreen(Record, frozen=True, kw_only=True):
    """The channel Lipschitz scores of one convolution.

    Attributes:
        layer: name of the convolution; after the set of weights and ``/``, if the file has several sets.
        norm: name of the batch norm that likely follows it, a guess from the names; empty if none was found. Then the
            scores are plain spectral norms.
        filters: number of its filters.
        filter: index of the filter with the largest score.
        max: the largest score; None for a layer without filters.
        max_z: how many standard deviations the largest score lies above the mean of the layer; 0 for fewer than three
            filters.
    """

    layer: str
    norm: str
    filters: Count
    filter: Count
    max: float | None
    max_z: float


class HeadStatistic(Record, frozen=True, kw_only=True):
    """How far one label stands out among the rows of a head.

    Attributes:
        statistic: ``norm``: Euclidean norm of the row; ``mean``: mean of its weights; ``positive``: sum of its
            positive weights; ``bias``: bias of the label.
        label: the label with the largest value.
        value: that value.
        z: its distance from the median of all labels, in robust standard deviations (1.4826 MAD).
        threshold: a larger distance is flagged; None if this statistic is never flagged.
        flagged: whether it is.
    """

    statistic: LabelStatistic
    label: Count
    value: float | None
    z: float | None
    threshold: float | None
    flagged: bool


class HeadScreen(Record, frozen=True, kw_only=True):
    """The last linear layer, a guess from names and shapes.

    Attributes:
        layer: its name; after the set of weights and ``/``, if the file has several sets.
        labels: number of its rows.
        statistics: empty for fewer than four labels, among which none can be an outlier.
    """

    layer: str
    labels: Count
    statistics: tuple[HeadStatistic, ...] = ()


class ScreenResult(Record, frozen=True, kw_only=True, tag_field="kind", tag="screen"):
    """What the weights of a file show without any image. It is never a verdict that a model is clean.

    Attributes:
        schema_version: version of the schema.
        version: version of bdprune.
        started: time at which the screen started, UTC, ISO 8601.
        seconds: wall time of the screen.
        artifact: the file.
        outcome: ``look closer`` if a filter or a label stands out beyond its threshold; ``nothing found`` if none
            does, which is no evidence that the model is clean; ``error`` if the file could not be screened.
        reasons: what stands out, a sentence each.
        threshold: a larger ``max_z`` of a layer is flagged.
        layers: one entry for each convolution, in the order of the file.
        heads: the linear layers of each set of weights that may be its last one.
        unscreened: weights outside of the sets of weights, which were not screened.
        error: set exactly when the outcome is ``error``.
    """

    schema_version: Literal["2"] = SCHEMA_VERSION
    version: str
    started: str
    seconds: float
    artifact: ArtifactInfo
    outcome: ScreenOutcome
    reasons: tuple[str, ...] = ()
    threshold: float
    layers: tuple[LayerScreen, ...] = ()
    heads: tuple[HeadScreen, ...] = ()
    unscreened: tuple[str, ...] = ()
    error: ErrorInfo | None = None

    @property
    def name(self) -> str:
        """The name of the file in a report."""
        return self.artifact.path

    @property
    def peak(self) -> LayerScreen | None:
        """The layer with the largest ``max_z``; None without layers."""
        return max(self.layers, key=lambda one: one.max_z, default=None)

    def brief(self) -> Self:
        """The same result with only its most outlying layer: what the line of a table needs."""
        layers = () if self.peak is None else (self.peak,)
        return msgspec.structs.replace(self, layers=layers, heads=(), reasons=())

    def _repr_html_(self) -> str:
        return notebook_form(self)
