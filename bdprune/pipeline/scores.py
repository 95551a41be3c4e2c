"""Scores every filter, layer by layer, and lists the worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

from torch import Tensor

from bdprune.analysis import Analysis, Case, Lipschitz, Suspiciousness, layer_z_scores
from bdprune.errors import OptionError
from bdprune.pipeline.describe import artifact_info, data_info, env, model_info, weight_coverage
from bdprune.pipeline.open import CleanSource, DataSource, ModelSource, OptionNames, load_model, options_from
from bdprune.pipeline.scan import Clock
from bdprune.record import FilterScore, LayerScores, ScoreResult, number
from bdprune.runtime import plain_torch

Method = Literal["lipschitz", "suspiciousness"]
METHODS: tuple[Method, ...] = ("lipschitz", "suspiciousness")


@plain_torch()
def score(
    model: ModelSource,
    data: DataSource = None,
    *,
    method: Method = "lipschitz",
    top: int = 20,
    **options: Unpack[OptionNames],
) -> ScoreResult:
    """Scores every filter, and lists the filters that stand out most in their layers.

    Args:
        model: path of a checkpoint, a module, or the model that ``bdprune.load`` returned.
        data: labelled clean images, as for ``bdprune.scan``; the Lipschitz score needs none.
        method: ``lipschitz`` (data-free) or ``suspiciousness`` (needs clean data).
        top: how many of the worst filters to list.
        **options: as for ``bdprune.scan``.

    Raises:
        OptionError: the method is unknown or lacks clean data, or ``top`` is negative.
        BdpruneError: any other problem with the file, the data or the options.

    Example:
        >>> scores = score("model.pth", top=3)
        >>> len(scores.layers), [worst.z > 0 for worst in scores.top]
        (20, [True, True, True])
    """
    clock, known = Clock(), options_from(options, "score")
    if method not in METHODS:
        raise OptionError(f"There is no score {method!r}.", f"Choose one of {', '.join(METHODS)}.")
    if top < 0:
        raise OptionError(f"The number of filters to list must be 0 or more, not {top}.", "Give 0 or more.")
    known.check()
    fitted, clean = CleanSource(data, known).fit_for(load_model(model, known))
    if method == "suspiciousness" and clean is None:
        raise OptionError("The suspiciousness score needs clean data.", "Give --data, or use --method lipschitz.")
    wanted: Analysis[dict[str, Tensor]] = Lipschitz() if method == "lipschitz" else Suspiciousness()
    scores = Case(fitted, clean).get(wanted)
    z_scores = layer_z_scores(scores)
    return ScoreResult(
        started=clock.started,
        artifact=artifact_info(fitted),
        model=model_info(fitted),
        data=data_info(clean) if clean is not None else None,
        env=env(fitted.device, known.seed),
        method=method,
        layers=tuple(_layer(name, scores[name], z_scores[name]) for name in scores),
        top=_worst(scores, z_scores, top),
        seconds=clock.seconds,
        coverage=weight_coverage(fitted),
    )


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
