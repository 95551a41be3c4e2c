"""Judges images, not models: STRIP and NU+STRIP on incoming queries or on a training set."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from bdprune.analysis import (
    Case,
    Judge,
    Sanity,
    StripSettings,
    draw_images,
    judge_for,
    predicted_labels,
    strip_settings,
)
from bdprune.data import Incoming, IncomingSource
from bdprune.errors import OptionError
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, weight_coverage
from bdprune.pipeline.open import (
    CleanSource,
    DataSource,
    ModelSource,
    OptionNames,
    Options,
    checked_case,
    load_model,
    options_from,
)
from bdprune.pipeline.scan import Clock, Progress
from bdprune.record import (
    EntropyHistogram,
    ImageVerdict,
    IncomingInfo,
    InspectedImage,
    InspectMethod,
    InspectResult,
    finite,
    number,
)
from bdprune.runtime import plain_torch

METHODS: tuple[InspectMethod, ...] = ("strip", "nu-strip")
Watch = Callable[[str, int, int], None]
"""Called with the present stage, the number of images that it has done, and its total; 0 and 0 if it counts none."""

_PART = 64  # images that are read at a time
_BINS = 30
_EDGE = 64  # pixels of the longer side of a picture in the report


class InspectNames(OptionNames, total=False):
    """Further keyword arguments of an inspection."""

    preset: str
    pictures: int


def unwatched(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@plain_torch()
def inspect(
    model: ModelSource,
    data: DataSource,
    images: IncomingSource,
    *,
    method: InspectMethod = "strip",
    settings: Mapping[str, Any] | None = None,
    watch: Watch = unwatched,
    **options: Unpack[InspectNames],
) -> InspectResult:
    """Judges each image by the entropy of the model's predictions for it under clean images (STRIP).

    Args:
        model: path of a checkpoint, a module, or the model that ``bdprune.load`` returned.
        data: labelled clean images, as for ``bdprune.scan``; some are laid over each image, the others set the
            threshold.
        images: the images to judge: a folder of pictures at any depth, an ``.npz`` or parquet file, a tensor
            ``[N, C, H, W]``, ``CleanData`` or a dataset; labels are not read.
        method: ``strip``, or ``nu-strip``: the same on the network after the first part of its unlearning.
        settings: single settings by their names: ``overlays``, ``frr``, ``image_weight``, ``overlay_weight``, ``rule``
            and ``held_out``.
        watch: called with the stage and the number of images done.
        **options: ``preset``, ``robust`` or ``paper``; ``pictures``, the number of the most suspicious images of which
            the result has a picture (24); and the ``Options`` as for ``bdprune.scan``.

    Raises:
        SanityError: the model labels too few of the clean images correctly.
        OptionError: the method, the preset or a setting is unknown or out of range, or there is no clean data.
        BdpruneError: any other problem with the file, the images or the options.

    Example:
        >>> found = inspect("model.pth", "clean_images/", "incoming/", settings={"overlays": 10, "frr": 0.1})
        >>> len(found.images), found.held_out, found.frr
        (90, 80, 0.1)
    """
    clock, given = Clock(), dict[str, Any](options)
    preset, pictures = given.pop("preset", "robust"), given.pop("pictures", 24)
    known, chosen = options_from(given, "inspect"), _settings(method, preset, settings)
    if not isinstance(pictures, int) or pictures < 0:
        raise OptionError(f"The number of pictures must be 0 or more, not {pictures}.", "Give a whole number.")
    known.check()
    watch("loading", 0, 0)
    case, sanity = _opened(model, data, known, lambda stage: watch(stage, 0, 0))
    incoming = Incoming(images, case.model.input_shape)
    judge = _judge(case, chosen, known.seed, watch)
    found = _measured(judge, case, incoming, pictures, watch)
    judged = _judged(judge, incoming, found)
    return _record(case, sanity, judge, incoming, judged, clock, known)


def _settings(method: str, preset: str, changes: Mapping[str, Any] | None) -> StripSettings:
    if method not in METHODS:
        raise OptionError(f"There is no method {method!r}.", f"Choose one of {', '.join(METHODS)}.")
    unknown = set(changes or ()) - (StripSettings.__dataclass_fields__.keys() - {"unlearned"})
    if unknown:
        raise OptionError(f"There is no setting {', '.join(sorted(unknown))}.", "Give overlays, frr, rule, ...")
    chosen = strip_settings(preset, **(changes or {}), unlearned=method == "nu-strip")
    chosen.check()
    return chosen


def _opened(model: ModelSource, data: DataSource, options: Options, progress: Progress) -> tuple[Case, Sanity]:
    """The model with its clean images, in the size that suits it, and the check on them."""
    clean = CleanSource(data, options)
    if clean.source is None:
        raise OptionError("An inspection needs clean data.", "Give a few labelled clean images with --data.")
    return checked_case(load_model(model, options, progress), clean)


def _judge(case: Case, settings: StripSettings, seed: int, watch: Watch) -> Judge:
    if settings.unlearned:
        watch("unlearning", 0, 0)
    total, count = min(settings.held_out, len(case.images)), 0

    def done(images: int) -> None:
        nonlocal count
        count += images
        watch("measuring clean images", count, total)

    return judge_for(case, settings, seed, done)


@dataclass(frozen=True)
class _Measured:
    """Entropies (bits) and predicted labels of the images that could be read, and pictures of some, by position."""

    entropies: dict[int, float]
    labels: dict[int, int]
    pictures: dict[int, bytes]

    def draw(self, index: Sequence[int], images: Tensor, most: int) -> None:
        """Keeps pictures of the images with the lowest entropies so far, at most this many.

        They are drawn at once: an incoming image may be gone when all have been measured.
        """
        known = [one for one in (*self.pictures, *index) if math.isfinite(self.entropies[one])]
        lowest = set(heapq.nsmallest(most, known, key=lambda one: (self.entropies[one], one)))
        for place, one in zip(index, images, strict=True):
            if place in lowest:
                self.pictures[place] = draw_images(one[None], _EDGE)
        for gone in self.pictures.keys() - lowest:
            del self.pictures[gone]


def _measured(judge: Judge, case: Case, incoming: Incoming, pictures: int, watch: Watch) -> _Measured:
    """Measures the images part by part, with pictures of the most suspicious ones."""
    found, count = _Measured({}, {}, {}), 0

    def done(images: int) -> None:
        nonlocal count
        count += images
        watch("inspecting images", count, len(incoming))

    for index, images in incoming.parts(_PART):
        found.entropies.update(zip(index, judge.measure(images, done).tolist(), strict=True))
        found.labels.update(zip(index, predicted_labels(case.model, images).tolist(), strict=True))
        found.draw(index, images, pictures)
    return found


def _judged(judge: Judge, incoming: Incoming, found: _Measured) -> tuple[InspectedImage, ...]:
    """The verdict on every image."""
    threshold = judge.threshold
    known = {index: value for index, value in found.entropies.items() if math.isfinite(value)}
    ranked = sorted(known, key=lambda index: known[index])
    p_values = _by_position(ranked, judge.p_values(torch.tensor([known[index] for index in ranked]).double()))

    def one(index: int) -> InspectedImage:
        verdict: ImageVerdict = "unknown"
        if threshold is not None and index in known:
            verdict = "suspicious" if known[index] < threshold else "normal"
        return InspectedImage(
            index=index,
            name=incoming.describe(index),
            verdict=verdict,
            entropy=known.get(index),
            p_value=number(p_values[index]) if verdict != "unknown" else None,
            predicted=found.labels.get(index),
            picture=found.pictures.get(index, b""),
            error=incoming.unread.get(index, ""),
        )

    return tuple(one(index) for index in range(len(incoming)))


def _by_position(index: Sequence[int], values: Tensor) -> dict[int, float]:
    return dict(zip(index, values.tolist(), strict=True))


def _record(
    case: Case,
    sanity: Sanity,
    judge: Judge,
    incoming: Incoming,
    judged: tuple[InspectedImage, ...],
    clock: Clock,
    options: Options,
) -> InspectResult:
    verdicts = Counter(one.verdict for one in judged)
    suspicious, counted = verdicts["suspicious"], verdicts["suspicious"] + verdicts["normal"]
    verdict: ImageVerdict = "suspicious" if suspicious else "unknown" if verdicts["unknown"] else "normal"
    flagged = [one.predicted for one in judged if one.verdict == "suspicious" and one.predicted is not None]
    settings = judge.settings
    return InspectResult(
        started=clock.started,
        artifact=artifact_info(case.model),
        model=model_info(case.model),
        data=data_info(case.images, sanity),
        env=env(case.model.device, options.seed),
        coverage=weight_coverage(case.model),
        method="nu-strip" if settings.unlearned else "strip",
        verdict=verdict,
        incoming=_incoming_info(incoming),
        threshold=judge.threshold,
        frr=settings.frr,
        overlays=len(judge.overlays),
        held_out=len(judge.entropies),
        suspicious=suspicious,
        unknown=verdicts["unknown"],
        expected=judge.rate * counted,
        chance=judge.chance(suspicious, counted) if counted else None,
        labels=dict(Counter(flagged).most_common()),
        images=judged,
        histogram=_histogram(judge.entropies, judged),
        limits=judge.limits,
        params=finite(asdict(settings)),
        seconds=clock.seconds,
    )


def _incoming_info(incoming: Incoming) -> IncomingInfo:
    return IncomingInfo(
        source=incoming.name,
        count=len(incoming),
        unread=len(incoming.unread),
        digest=incoming.digest,
        notes=incoming.notes,
        passed_over=dict(incoming.passed_over),
    )


def _histogram(clean: Tensor, judged: Sequence[InspectedImage]) -> EntropyHistogram | None:
    """Both sets of entropies in equal bins from 0; None without finite ones."""
    known = clean[clean.isfinite()]
    found = torch.tensor([one.entropy for one in judged if one.entropy is not None], dtype=torch.float64)
    both = torch.cat([known, found])
    if not len(both):
        return None
    ends = (0.0, max(float(both.max()), 1e-6))
    counts, edges = torch.histogram(known.clamp(*ends), bins=_BINS, range=ends)
    others, _ = torch.histogram(found.clamp(*ends), bins=_BINS, range=ends)
    whole = [tuple(int(count) for count in one.tolist()) for one in (counts, others)]
    return EntropyHistogram(edges=tuple(edges.tolist()), clean=whole[0], inspected=whole[1])
