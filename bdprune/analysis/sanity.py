"""Checks the model's clean accuracy. If it is low, no verdict can be trusted, and often the input is wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from bdprune.analysis.class_order import Better, in_text_order, relabel
from bdprune.analysis.size import Feed, Trial, accuracy_of, beyond_chance, choose, first, logits_of, percent, trial_of
from bdprune.data import CleanData, text_order
from bdprune.errors import BudgetError, DataError
from bdprune.model import GRAY_ONLY, NORMALIZATIONS, Model, Normalization, normalization_name
from bdprune.runtime import Budget

__all__ = ["Sanity", "Trial", "check_sanity"]

# First a quick trial of every suspect, then a longer trial of the best: cheap, yet it separates near-equals.
_SCREEN_IMAGES = 64
_FINAL_IMAGES = 200
_FINALISTS = 6
_PART = 32  # images between two looks at the time
_NO_LIMIT = Budget()
_LOOK_ELSEWHERE = (
    "Check that the images show the model's own classes, in its label order, in its size and with its preprocessing."
)


@dataclass(frozen=True)
class Sanity:
    """The result of the clean accuracy check.

    Attributes:
        accuracy: share of correct labels, 0-1, with the model and data as given.
        ok: whether verdicts on this model with this data can be trusted.
        message: one sentence with the finding.
        suggestion: one sentence with the remedy, empty if ok.
        fits: short name of the input that fits better, such as ``imagenet``, ``none BGR``, ``labels -1``,
            ``class order text`` or ``size 64x64``; empty if there is none.
        normalization: the normalisation that fits better, None if there is none.
        tried: all other inputs tried, best first.
        class_map: the class order that fits better, label in the data -> label of the model, for the labels that occur;
            empty if there is none.
    """

    accuracy: float
    ok: bool
    message: str
    suggestion: str = ""
    fits: str = ""
    normalization: Normalization | None = None
    tried: tuple[Trial, ...] = ()
    class_map: Mapping[int, int] = field(default_factory=dict, hash=False)


_Tried: TypeAlias = tuple[Feed, Trial, Tensor]
"""A feed, its trial, and its hits ([N] bool)."""


@dataclass(frozen=True)
class SanityLimits:
    """Limits of the check.

    Attributes:
        least: minimum skill of a sane model, 0-1.
        good: skill at which nothing else is tried, 0-1.
        margin: minimum gain in accuracy (0-1) for a correction to count.
    """

    least: float = 0.5
    good: float = 0.75
    margin: float = 0.1


_LIMITS = SanityLimits()


def check_sanity(
    model: Model,
    data: CleanData,
    *,
    limits: SanityLimits = _LIMITS,
    max_images: int = 500,
    seed: int = 0,
    budget: Budget = _NO_LIMIT,
) -> Sanity:
    """Checks that the clean accuracy is sane, and looks for the mistake if it is not.

    Skill rescales accuracy so that chance is 0 and perfect is 1: (accuracy - chance) / (1 - chance), where chance is
    the larger of 1/K and the share of the most frequent label. Skill of ``limits.good`` or more passes. Otherwise
    common mistakes are tried: another image size, labels in text order, shifted or in another order, known
    normalisations, the 0-255 range, reversed channels. The check fails if a correction is sane and clearly better, by
    at least ``limits.margin``, or if skill is below ``limits.least``. (A wrong normalisation alone leaves CIFAR-10
    models with 35 % to 75 % accuracy, so a lower bound would miss it.)

    Args:
        model: K-class model; not changed.
        data: clean images of the model's input shape.
        limits: limits of the check.
        max_images: images used for the accuracy.
        seed: seed for the choice of images.
        budget: its deadline limits the time: the check takes at most a third of it, and uses fewer images if need be.

    Raises:
        DataError: no images, images not of the model's input shape, or a label outside its classes.
    """
    _check_fit(model, data)
    chosen = choose(data, max_images, torch.Generator().manual_seed(seed))
    chosen, logits, budget = _measured(model, chosen, budget)
    accuracy = accuracy_of(logits, chosen.labels)
    if not logits.isfinite().all():
        return Sanity(accuracy, False, "The model's logits are NaN or infinite.", "Its weights are broken.")
    chance = max(1 / model.num_classes, max(chosen.class_counts.values()) / len(chosen))
    least, good = (chance + skill * (1 - chance) for skill in (limits.least, limits.good))
    images = f"{len(chosen)} images" if len(chosen) == len(data) else f"{len(chosen)} of the {len(data)} images"
    found = Sanity(accuracy, accuracy >= least, f"Clean accuracy is {percent(accuracy)} on {images}")
    if accuracy >= good:
        return replace(found, message=f"{found.message}.")
    needed = max(least, accuracy + limits.margin)
    try:
        better, tried = _explain(_Search(model, budget, needed, sane=found.ok), chosen, logits, good)
    except BudgetError:
        return _unexplained(found)
    return _judged(replace(found, tried=tried), better)


def _measured(model: Model, data: CleanData, budget: Budget) -> tuple[CleanData, Tensor, Budget]:
    """The images that the time suffices for, their logits, and the budget of the rest of the check.

    A third of the time that is left is for the whole check, and half of that for the accuracy as given.
    """
    if math.isinf(budget.remaining):
        return data, logits_of(model, data.images), budget
    limit = budget.less(budget.remaining * 2 / 3)
    half = limit.less(limit.remaining / 2)
    parts: list[Tensor] = []
    for images in data.images.split(_PART):
        if parts and not half.remaining:
            break
        parts.append(logits_of(model, images))
    logits = torch.cat(parts)
    return first(data, len(logits)), logits, limit


def _unexplained(found: Sanity) -> Sanity:
    """The result where the time did not suffice to try other input formats."""
    why = "the time of the budget did not suffice to try other input formats"
    if found.ok:
        return replace(found, message=f"{found.message}; {why}.")
    hint = f"Allow more with --budget. {_LOOK_ELSEWHERE}"
    return replace(found, message=f"{found.message}, too low for any verdict; {why}.", suggestion=hint)


def _judged(found: Sanity, better: Better | None) -> Sanity:
    """Completes ``found``, whose message is the beginning of a sentence, with the correction that fits better."""
    if better is not None:
        message = f"{found.message}, but {percent(better.trial.accuracy)}{better.on} with {better.how}."
        fits, normalization, class_map = better.trial.name, better.normalization, better.class_map
        wrong = replace(found, ok=False, message=message, suggestion=better.hint)
        return replace(wrong, fits=fits, normalization=normalization, class_map=class_map)
    if found.ok:
        return replace(found, message=f"{found.message}; no other known input format is clearly better.")
    why = "too low for any verdict; known normalisations, ranges, channel and label orders don't help"
    return replace(found, message=f"{found.message}, {why}.", suggestion=_LOOK_ELSEWHERE)


def _check_fit(model: Model, data: CleanData) -> None:
    if not len(data):
        raise DataError(f"{data.source} holds 0 images.", "Give at least one labelled clean image.")
    if tuple(data.images.shape[1:]) != tuple(model.input_shape):
        raise DataError(
            f"The images of {data.source} are {tuple(data.images.shape[1:])}, the model takes {model.input_shape}.",
            "Load them with the input shape of the model.",
        )
    if int(data.labels.min()) < 0 or int(data.labels.max()) >= model.num_classes:
        raise DataError(
            f"The labels of {data.source} range from {int(data.labels.min())} to {int(data.labels.max())}, "
            f"the model has classes 0 to {model.num_classes - 1}.",
            "Use data of the model's own classes.",
        )


@dataclass(frozen=True)
class _Search:
    """The search for a better input format: the model, its time, and what a correction must reach."""

    model: Model
    budget: Budget
    needed: float
    _: KW_ONLY
    sane: bool


def _explain(search: _Search, data: CleanData, logits: Tensor, good: float) -> tuple[Better | None, tuple[Trial, ...]]:
    """The correction with the needed accuracy, and everything tried.

    Raises:
        BudgetError: the time does not suffice to try everything.
    """
    model, needed, sane = search.model, search.needed, search.sane
    right = logits.argmax(1) == data.labels.cpu()
    resized = _other_size(data, model.input_shape[0], right.double().mean().item(), needed)
    if resized is not None:
        return resized, (resized.trial,)
    relabelled = relabel(logits, data, right, needed, sane=sane)
    if relabelled is not None and relabelled.trial.accuracy >= good:
        return relabelled, (relabelled.trial,)
    refed, tried = _retry(search, data, right)
    if refed is None and relabelled is None and not sane:
        refed, more = _retry_in_text_order(search, data, right)
        tried = (*more, *tried)
    if relabelled is None:
        return refed, tried
    tried = (relabelled.trial, *tried)
    return (refed if refed and refed.trial.accuracy > relabelled.trial.accuracy else relabelled), tried


def _retry_in_text_order(search: _Search, data: CleanData, right: Tensor) -> tuple[Better | None, tuple[Trial, ...]]:
    """Normalisation and class order at once: two mistakes that hide each other."""
    num_classes = search.model.num_classes
    order = text_order(num_classes)
    if data.class_order or all(label == place for label, place in order.items()):
        return None, ()
    placed = torch.tensor([order[label] for label in data.labels.tolist()])
    found, tried = _retry(search, replace(data, labels=placed), right)
    if found is None:
        return None, ()
    name = f"{found.trial.name}, class order text"
    hint = f"{found.hint.removesuffix('.')} and pass --class-order text."
    class_map = {label: order[label] for label in data.class_counts}
    how = f"{found.how} and {in_text_order(num_classes)}"
    trial = replace(found.trial, name=name)
    better = replace(found, trial=trial, how=how, hint=hint, class_map=class_map)
    return better, (trial, *tried[1:])


def _other_size(data: CleanData, channels: int, accuracy: float, needed: float) -> Better | None:
    """A size whose gain is large enough. It was tried on other images, so only its gain counts, not its accuracy."""
    other = data.other_size
    if other is None or accuracy + other.accuracy - other.accuracy_now < needed:
        return None
    size = f"{other.size[0]}x{other.size[1]}"
    trial = Trial(f"size {size}", other.accuracy, other.loss, other.images)
    how = f"images of {size} (instead of {percent(other.accuracy_now)} on the same {other.images} images)"
    return Better(trial, how, f"Pass --input-shape {channels}x{size}.")


def _retry(search: _Search, data: CleanData, right: Tensor) -> tuple[Better | None, tuple[Trial, ...]]:
    """The best suspect if it has the needed accuracy, and everything tried.

    All suspects are tried on a few images, the best of them on more. If the model is sane as given (``right`` [N]
    bool: its hits), a suspect must also be significantly better: McNemar's test on the images where the two differ, at
    three standard deviations, because one of twenty suspects is likely to be better by chance.

    Raises:
        BudgetError: the time does not suffice to try all suspects.
    """
    model = search.model
    screened = _try_all(search, first(data, _SCREEN_IMAGES), _suspects(model))
    least = screened[0][1].accuracy - 0.1
    finalists = [feed for feed, trial, _ in screened[:_FINALISTS] if trial.accuracy >= least]
    finals = _try_all(search, first(data, _FINAL_IMAGES), finalists)
    rest = [trial for feed, trial, _ in screened if feed not in finalists]
    tried = (*(trial for _, trial, _ in finals), *rest)
    (feed, best, hits), equals = _prefer(finals)
    if best.accuracy < search.needed or (search.sane and not beyond_chance(hits, right[: len(hits)])):
        return None, tried
    also = f" (about as good: {', '.join(equals)})" if equals else ""
    on = f" on {best.images} of them" if best.images < len(data) else ""
    how = f"normalisation {best.name}{also}"
    return Better(best, how, _remedy(feed, model), feed.normalization, on=on), tried


def _suspects(model: Model) -> list[Feed]:
    """Other input formats for the model, most common first, RGB before BGR."""
    channels, given = model.input_shape[0], model.normalization
    known = [pair for name, pair in NORMALIZATIONS.items() if channels == 1 or name not in GRAY_ONLY]
    known = [pair for pair in known if len(pair.mean) in (0, 1, channels)]
    known = known if given in known else [given, *known]
    orders = (False, True) if channels == 3 else (False,)
    feeds = [Feed(pair, reverse) for reverse in orders for pair in known]
    return [feed for feed in feeds if feed != Feed(given)]


def _try_all(search: _Search, data: CleanData, feeds: list[Feed]) -> list[_Tried]:
    """Every feed on ``data``, best first; ties keep their order.

    Raises:
        BudgetError: the time does not suffice.
    """
    outcomes, start = [], time.perf_counter()
    for done, feed in enumerate(feeds):
        pace = (time.perf_counter() - start) / done if done else 0.0
        search.budget.check(pace * (len(feeds) - done))
        outcomes.append((feed, logits_of(search.model, data.images, feed)))
    labels = data.labels.cpu()
    tried = [(feed, trial_of(feed.name, logits, labels), logits.argmax(1) == labels) for feed, logits in outcomes]
    return sorted(tried, key=lambda entry: (-entry[1].accuracy, entry[1].loss))


def _prefer(finals: list[_Tried]) -> tuple[_Tried, list[str]]:
    """The most common feed among those not significantly worse than the best, and the names of the others."""
    best = finals[0][1]
    equals = [t for t in finals if t[1].accuracy >= best.accuracy - 0.02 and t[1].loss <= 1.1 * best.loss]
    order = list(NORMALIZATIONS.values())
    equals.sort(key=lambda t: (t[0].reverse, order.index(t[0].normalization) if t[0].normalization in order else -1))
    return equals[0], [trial.name for _, trial, _ in equals[1:]]


def _remedy(feed: Feed, model: Model) -> str:
    parts = ["reverse the channel order of the images"] if feed.reverse else []
    parts += (
        [f"pass --normalize {normalization_name(feed.normalization)}"]
        if feed.normalization != model.normalization
        else []
    )
    text = " and ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
