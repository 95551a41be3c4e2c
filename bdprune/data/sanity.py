"""Is the model any good on the clean data? If not, no verdict on it can be trusted, and often the input is at fault."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdprune.data.clean import CleanData
from bdprune.data.normalizations import GRAY_ONLY, NORMALIZATIONS, name_of
from bdprune.errors import DataError
from bdprune.model.handle import Model, Normalization

_BATCH = 128
# A first look at every suspect, then a second one at the best of them: cheap, yet it tells near-equals apart.
_SCREEN_IMAGES = 64
_FINAL_IMAGES = 200
_FINALISTS = 6
_FEW_FOR_SHIFT = 16
_FEW_PER_CLASS = 5
_LOOK_ELSEWHERE = "Check that the images show the model's own classes, in its label order and with its preprocessing."


@dataclass(frozen=True)
class Trial:
    """Clean accuracy (0-1) and mean cross-entropy (nats) on ``images`` images under one way to feed the model."""

    name: str
    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True)
class Sanity:
    """What the check of the clean accuracy found.

    Attributes:
        accuracy: share of correct labels, 0-1, as the model and the data were given.
        ok: whether verdicts on this model with these data mean anything.
        message: one sentence on what was found.
        suggestion: one sentence on what to do about it, empty when ok.
        fits: what fits better in short, such as ``imagenet``, ``none BGR`` or ``labels -1``; empty when nothing does.
        normalization: the normalisation that fits better, None when none does.
        tried: every other way to feed the model that was tried, best first.
    """

    accuracy: float
    ok: bool
    message: str
    suggestion: str = ""
    fits: str = ""
    normalization: Normalization | None = None
    tried: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class _Feed:
    """A way to feed the model: a normalisation, and whether the channels are reversed first."""

    normalization: Normalization
    reverse: bool = False

    @property
    def name(self) -> str:
        return name_of(self.normalization) + (" BGR" if self.reverse else "")


_Tried: TypeAlias = tuple[_Feed, Trial, Tensor]
"""A feed, how it did, and its hits ([N] bool)."""


@dataclass(frozen=True)
class _Better:
    """Something that fits better: its trial, how to put it in a sentence, and what the reader can do."""

    trial: Trial
    how: str
    mend: str
    normalization: Normalization | None = None


def check_sanity(
    model: Model,
    data: CleanData,
    *,
    min_skill: float = 0.5,
    good_skill: float = 0.75,
    margin: float = 0.1,
    max_images: int = 500,
    seed: int = 0,
) -> Sanity:
    """Checks that the clean accuracy is sane, and looks for the mistake when it is not.

    Skill is the share of the way from chance to perfect: (accuracy - chance) / (1 - chance), where chance is the
    larger of 1/K and the share of the most frequent label. At ``good_skill`` and above all is well. Below it the
    usual suspects are tried: known normalisations, the 0-255 range, reversed channels, labels that are shifted or
    in another order. The check fails if one of them is sane and clearly better, by at least ``margin``, or if skill
    is below ``min_skill``. (Wrong normalisation alone leaves CIFAR-10 models anything from 35 % to 75 % accuracy,
    so a bare lower bound would miss it.)

    Args:
        model: K-class model; not changed.
        data: clean images of the model's input shape.
        min_skill: least skill of a sane model, 0-1.
        good_skill: skill from which nothing else is tried, 0-1.
        margin: how much more accurate (0-1) another way must be to be believed.
        max_images: images used for the accuracy.
        seed: of the choice of images.

    Raises:
        DataError: no images, images not of the model's input shape, or a label beyond its classes.
    """
    _check_fit(model, data)
    chosen = _choose(data, max_images, torch.Generator().manual_seed(seed))
    logits = _logits(model, chosen.images, _Feed(model.normalization))
    accuracy = _accuracy(logits, chosen.labels)
    if not logits.isfinite().all():
        return Sanity(accuracy, False, "The model gives logits that are NaN or infinite.", "Its weights are broken.")
    chance = max(1 / model.num_classes, max(chosen.class_counts.values()) / len(chosen))
    floor, good = (chance + skill * (1 - chance) for skill in (min_skill, good_skill))
    found = f"Clean accuracy is {accuracy:.1%} on {len(chosen)} images"
    if accuracy >= good:
        return Sanity(accuracy, True, f"{found}.")
    needed = max(floor, accuracy + margin)
    better = _relabel(logits, chosen.labels, needed)
    tried: tuple[Trial, ...] = (better.trial,) if better else ()
    if better is None:
        right = logits.argmax(1) == chosen.labels.cpu()
        better, tried = _refeed(model, chosen, right, needed, sane=accuracy >= floor)
    if better is not None:
        message = f"{found}, but {better.trial.accuracy:.1%} with {better.how}."
        return Sanity(accuracy, False, message, better.mend, better.trial.name, better.normalization, tried)
    if accuracy >= floor:
        return Sanity(
            accuracy, True, f"{found}; no other known way to feed the model does clearly better.", tried=tried
        )
    message = f"{found}, too low to judge anything; known normalisations, ranges, channel and label orders don't help."
    return Sanity(accuracy, False, message, _LOOK_ELSEWHERE, tried=tried)


def _check_fit(model: Model, data: CleanData) -> None:
    if not len(data):
        raise DataError(f"{data.source} holds 0 images.", "Give labelled clean images.")
    if tuple(data.images.shape[1:]) != tuple(model.input_shape):
        raise DataError(
            f"The images of {data.source} are {tuple(data.images.shape[1:])}, the model takes {model.input_shape}.",
            "Load them with the input shape of the model.",
        )
    if int(data.labels.min()) < 0 or int(data.labels.max()) >= model.num_classes:
        raise DataError(
            f"The labels of {data.source} run from {int(data.labels.min())} to {int(data.labels.max())}, "
            f"the model has classes 0 to {model.num_classes - 1}.",
            "Use data of the model's own classes.",
        )


def _choose(data: CleanData, count: int, generator: torch.Generator) -> CleanData:
    """At most ``count`` images, in random order, as evenly over the classes as the data allow."""
    if len(data) > count:
        data = data.sample(max(1, count // len(data.class_counts)), generator)
    return data.subset(torch.randperm(len(data), generator=generator)[:count])


def _first(data: CleanData, count: int) -> CleanData:
    return data.subset(torch.arange(min(count, len(data))))


@torch.no_grad()
def _logits(model: Model, images: Tensor, feed: _Feed) -> Tensor:
    network = model.clone().network.eval() if model.network.training else model.network
    module = replace(model, network=network, normalization=feed.normalization).module
    batches = torch.split(images.flip(1) if feed.reverse else images, _BATCH)
    return torch.cat([module(batch.to(model.device)).float() for batch in batches]).cpu()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels.cpu()).double().mean().item()


def _trial(name: str, logits: Tensor, labels: Tensor) -> Trial:
    loss = cross_entropy(logits, labels.cpu()).item()
    return Trial(name, _accuracy(logits, labels), loss if math.isfinite(loss) else math.inf, len(labels))


def _refeed(
    model: Model, data: CleanData, right: Tensor, needed: float, *, sane: bool
) -> tuple[_Better | None, tuple[Trial, ...]]:
    """The best suspect if its accuracy is ``needed`` or more, and everything tried.

    All suspects are tried on a few images, the best of them on more. Where the model is ``sane`` as
    given (``right`` [N] bool: its hits), a suspect must also be better beyond chance: McNemar's test on the images
    where the two differ, at three standard deviations, because one of twenty is always lucky.
    """
    screened = _try_all(model, _first(data, _SCREEN_IMAGES), _suspects(model))
    least = screened[0][1].accuracy - 0.1
    finalists = [feed for feed, trial, _ in screened[:_FINALISTS] if trial.accuracy >= least]
    finals = _try_all(model, _first(data, _FINAL_IMAGES), finalists)
    rest = [trial for feed, trial, _ in screened if feed not in finalists]
    tried = (*(trial for _, trial, _ in finals), *rest)
    (feed, best, hits), equals = _prefer(finals)
    right = right[: len(hits)]
    gained, lost = int((hits & ~right).sum()), int((right & ~hits).sum())
    if best.accuracy < needed or (sane and gained - lost < 3 * math.sqrt(gained + lost)):
        return None, tried
    also = f" (about as good: {', '.join(equals)})" if equals else ""
    return _Better(best, f"normalisation {best.name}{also}", _mend(feed, model), feed.normalization), tried


def _suspects(model: Model) -> list[_Feed]:
    """Other ways to feed the model, most common first, RGB before BGR."""
    channels, given = model.input_shape[0], model.normalization
    known = [pair for name, pair in NORMALIZATIONS.items() if channels == 1 or name not in GRAY_ONLY]
    known = [pair for pair in known if len(pair.mean) in (0, 1, channels)]
    known = known if given in known else [given, *known]
    orders = (False, True) if channels == 3 else (False,)
    feeds = [_Feed(pair, reverse) for reverse in orders for pair in known]
    return [feed for feed in feeds if feed != _Feed(given)]


def _try_all(model: Model, data: CleanData, feeds: list[_Feed]) -> list[_Tried]:
    """Every feed on ``data``, best first; equals keep their order."""
    outcomes = [(feed, _logits(model, data.images, feed)) for feed in feeds]
    labels = data.labels.cpu()
    tried = [(feed, _trial(feed.name, logits, labels), logits.argmax(1) == labels) for feed, logits in outcomes]
    return sorted(tried, key=lambda entry: (-entry[1].accuracy, entry[1].loss))


def _prefer(finals: list[_Tried]) -> tuple[_Tried, list[str]]:
    """The most common feed among those that can't be told apart from the best, and the names of the others."""
    best = finals[0][1]
    equals = [t for t in finals if t[1].accuracy >= best.accuracy - 0.02 and t[1].loss <= 1.1 * best.loss]
    order = list(NORMALIZATIONS.values())
    equals.sort(key=lambda t: (t[0].reverse, order.index(t[0].normalization) if t[0].normalization in order else -1))
    return equals[0], [trial.name for _, trial, _ in equals[1:]]


def _mend(feed: _Feed, model: Model) -> str:
    parts = ["reverse the channel order of the images"] if feed.reverse else []
    parts += [f"pass --normalize {name_of(feed.normalization)}"] if feed.normalization != model.normalization else []
    text = " and ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _relabel(logits: Tensor, labels: Tensor, needed: float) -> _Better | None:
    """Labels that are right but for a constant shift, or but for the order of the classes."""
    labels = labels.cpu()
    if len(labels) < _FEW_FOR_SHIFT:
        return None
    for found in (_shifted(logits, labels), _reordered(logits, labels)):
        if found is not None and found.trial.accuracy >= needed:
            return found
    return None


def _shifted(logits: Tensor, labels: Tensor) -> _Better | None:
    num_classes = logits.shape[1]
    steps = (logits.argmax(1) - labels) % num_classes
    shift = int(torch.bincount(steps, minlength=num_classes).argmax())
    if not shift:
        return None
    signed = shift if shift <= num_classes // 2 else shift - num_classes
    mend = f"Add {signed} to every label." if signed > 0 else f"Subtract {-signed} from every label."
    return _label_trial(logits, (labels + shift) % num_classes, f"labels {signed:+d}", mend)


def _reordered(logits: Tensor, labels: Tensor) -> _Better | None:
    num_classes = logits.shape[1]
    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    table.index_put_((labels, logits.argmax(1)), torch.ones_like(labels), accumulate=True)
    seen = table.sum(1).nonzero().flatten()
    order = table.argmax(1)
    # With a few images a class any confusion is some order; and two classes that share a prediction are none.
    if int(table.sum(1)[seen].min()) < _FEW_PER_CLASS or len(torch.unique(order[seen])) < len(seen):
        return None
    pairs = ", ".join(f"{label}→{int(order[label])}" for label in seen.tolist()[:12])
    return _label_trial(logits, order[labels], "labels in another order", f"Renumber the classes: {pairs}.")


def _label_trial(logits: Tensor, labels: Tensor, name: str, mend: str) -> _Better:
    return _Better(_trial(name, logits, labels), name, mend)
