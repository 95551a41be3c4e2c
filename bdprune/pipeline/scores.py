"""Scores of every filter, layer by layer, and the worst of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from bdprune.analysis import Suspiciousness, channel_lipschitz, layer_z_scores
from bdprune.data import ClassOrder, CleanData
from bdprune.errors import OptionError
from bdprune.model import Model
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, number, weight_coverage
from bdprune.pipeline.open import DataShelf, DataSource, ModelSource, options_from, take_model
from bdprune.pipeline.scan import Clock
from bdprune.record import FilterScore, LayerScores, ScoreResult

Method = Literal["lipschitz", "suspiciousness"]
METHODS: tuple[Method, ...] = ("lipschitz", "suspiciousness")


def score(
    model: ModelSource,
    data: DataSource = None,
    *,
    method: Method = "lipschitz",
    top: int = 20,
    per_class: int | None = None,
    class_order: ClassOrder = None,
    **options: Any,
) -> ScoreResult:
    """How suspicious every filter is, and which stand out most of their layers.

    Args:
        model: path of a checkpoint, a module, or what ``bdprune.load`` gave.
        data: labelled clean images, as for ``bdprune.scan``; the Lipschitz score needs none.
        method: ``lipschitz`` (data-free) or ``suspiciousness`` (needs clean data).
        top: how many of the worst filters to list.
        per_class: at most so many clean images of each class; None takes all.
        class_order: as for ``bdprune.scan``.
        **options: as in ``ModelOptions``.

    Raises:
        OptionError: an unknown method, one that needs clean data and got none, or less than no filters to list.
        BdpruneError: anything else that is wrong with the file, the data or the options.

    Example:
        >>> scores = score("model.pth", top=3)
        >>> len(scores.layers), [worst.z > 0 for worst in scores.top]
        (20, [True, True, True])
    """
    clock, known = Clock(), options_from(options, "score")
    if method not in METHODS:
        raise OptionError(f"There is no score {method!r}.", f"Choose one of {', '.join(METHODS)}.")
    if top < 0:
        raise OptionError(f"{top} filters cannot be listed.", "Give 0 or more.")
    known.check()
    shelf = DataShelf(data, per_class, known.seed, class_order, fixed_size=known.input_shape is not None)
    taken, clean = shelf.fit_for(take_model(model, known))
    scores = _scores(taken, clean, method)
    z_scores = layer_z_scores(scores)
    return ScoreResult(
        started=clock.started,
        artifact=artifact_info(taken),
        model=model_info(taken),
        data=data_info(clean) if clean is not None else None,
        env=env(taken.device, known.seed),
        method=method,
        layers=tuple(_layer(name, scores[name], z_scores[name]) for name in scores),
        top=_worst(scores, z_scores, top),
        seconds=clock.seconds,
        coverage=weight_coverage(taken),
    )


def _scores(model: Model, data: CleanData | None, method: Method) -> dict[str, Tensor]:
    if method == "lipschitz":
        return channel_lipschitz(model)
    if data is None:
        raise OptionError("The suspiciousness score needs clean data.", "Give --data, or use --method lipschitz.")
    return Suspiciousness()(model, data)


def _layer(name: str, scores: Tensor, z_scores: Tensor) -> LayerScores:
    values = scores.double()
    return LayerScores(
        layer=name,
        filters=len(values),
        mean=number(float(values.mean())),
        std=number(float(values.std(correction=0))),
        max=number(float(values.max())),
        max_z=number(float(z_scores.max())),
    )


def _worst(scores: Mapping[str, Tensor], z_scores: Mapping[str, Tensor], top: int) -> tuple[FilterScore, ...]:
    ranked = sorted(
        ((float(z), name, index) for name, layer in z_scores.items() for index, z in enumerate(layer.tolist())),
        key=lambda entry: -entry[0] if entry[0] == entry[0] else float("inf"),
    )
    return tuple(
        FilterScore(layer=name, filter=index, score=number(float(scores[name][index])), z=number(z))
        for z, name, index in ranked[:top]
    )
