"""Checks the model's clean accuracy. If it is low, no verdict can be trusted, and often the input is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from bdprune.analysis.size import Feed, Trial, accuracy_of, beyond_chance, choose, first, logits_of, percent, trial_of
from bdprune.data import CleanData, order_pairs, start_of_text_order, text_order
from bdprune.errors import DataError
from bdprune.model import GRAY_ONLY, NORMALIZATIONS, Model, Normalization, normalization_name

__all__ = ["Sanity", "Trial", "check_sanity"]

# First a quick trial of every suspect, then a longer trial of the best: cheap, yet it separates near-equals.
_SCREEN_IMAGES = 64
_FINAL_IMAGES = 200
_FINALISTS = 6
_FEW_FOR_GUESS = 16
_LOOK_ELSEWHERE = (
    "Check that the images show the model's own classes, in its label order, in its size and with its preprocessing."
)
_PASS_MAP = "Write the map under data.sanity.class_map in the JSON report to a file, and pass --class-order FILE.json."


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
class _Better:
    """An input that fits better: its trial, its description in a sentence, and the advice to the reader."""

    trial: Trial
    how: str
    hint: str
    normalization: Normalization | None = None
    class_map: Mapping[int, int] = field(default_factory=dict)
    on: str = ""
    """The images of the trial if it used only some of them, as in `` on 200 of them``."""


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
    """Checks that the clean accuracy is sane, and looks for the mistake if it is not.

    Skill rescales accuracy so that chance is 0 and perfect is 1: (accuracy - chance) / (1 - chance), where chance is
    the larger of 1/K and the share of the most frequent label. Skill of ``good_skill`` or more passes. Otherwise common
    mistakes are tried: another image size, labels in text order, shifted or in another order, known normalisations, the
    0-255 range, reversed channels. The check fails if a correction is sane and clearly better, by at least ``margin``,
    or if skill is below ``min_skill``. (A wrong normalisation alone leaves CIFAR-10 models with 35 % to 75 % accuracy,
    so a lower bound would miss it.)

    Args:
        model: K-class model; not changed.
        data: clean images of the model's input shape.
        min_skill: minimum skill of a sane model, 0-1.
        good_skill: skill at which nothing else is tried, 0-1.
        margin: minimum gain in accuracy (0-1) for a correction to count.
        max_images: images used for the accuracy.
        seed: seed for the choice of images.

    Raises:
        DataError: no images, images not of the model's input shape, or a label outside its classes.
    """
    _check_fit(model, data)
    chosen = choose(data, max_images, torch.Generator().manual_seed(seed))
    logits = logits_of(model, chosen.images)
    accuracy = accuracy_of(logits, chosen.labels)
    if not logits.isfinite().all():
        return Sanity(accuracy, False, "The model's logits are NaN or infinite.", "Its weights are broken.")
    chance = max(1 / model.num_classes, max(chosen.class_counts.values()) / len(chosen))
    least, good = (chance + skill * (1 - chance) for skill in (min_skill, good_skill))
    images = f"{len(chosen)} images" if len(chosen) == len(data) else f"{len(chosen)} of the {len(data)} images"
    found = Sanity(accuracy, accuracy >= least, f"Clean accuracy is {percent(accuracy)} on {images}")
    if accuracy >= good:
        return replace(found, message=f"{found.message}.")
    needed = max(least, accuracy + margin)
    better, tried = _explain(model, chosen, logits, needed, good, sane=found.ok)
    return _judged(replace(found, tried=tried), better)


def _judged(found: Sanity, better: _Better | None) -> Sanity:
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


def _explain(
    model: Model, data: CleanData, logits: Tensor, needed: float, good: float, *, sane: bool
) -> tuple[_Better | None, tuple[Trial, ...]]:
    """The correction with an accuracy of ``needed`` or more, and everything tried."""
    right = logits.argmax(1) == data.labels.cpu()
    resized = _other_size(data, model.input_shape[0], right.double().mean().item(), needed)
    if resized is not None:
        return resized, (resized.trial,)
    relabelled = _relabel(logits, data, right, needed, sane=sane)
    if relabelled is not None and relabelled.trial.accuracy >= good:
        return relabelled, (relabelled.trial,)
    refed, tried = _retry(model, data, right, needed, sane=sane)
    if refed is None and relabelled is None and not sane:
        refed, more = _retry_in_text_order(model, data, right, needed)
        tried = (*more, *tried)
    if relabelled is None:
        return refed, tried
    tried = (relabelled.trial, *tried)
    return (refed if refed and refed.trial.accuracy > relabelled.trial.accuracy else relabelled), tried


def _retry_in_text_order(
    model: Model, data: CleanData, right: Tensor, needed: float
) -> tuple[_Better | None, tuple[Trial, ...]]:
    """Normalisation and class order at once: two mistakes that hide each other."""
    order = text_order(model.num_classes)
    if data.class_order or all(label == place for label, place in order.items()):
        return None, ()
    placed = torch.tensor([order[label] for label in data.labels.tolist()])
    found, tried = _retry(model, replace(data, labels=placed), right, needed, sane=False)
    if found is None:
        return None, ()
    name = f"{found.trial.name}, class order text"
    hint = f"{found.hint.removesuffix('.')} and pass --class-order text."
    class_map = {label: order[label] for label in data.class_counts}
    how = f"{found.how} and {_in_text_order(model.num_classes)}"
    trial = replace(found.trial, name=name)
    better = replace(found, trial=trial, how=how, hint=hint, class_map=class_map)
    return better, (trial, *tried[1:])


def _other_size(data: CleanData, channels: int, accuracy: float, needed: float) -> _Better | None:
    """A size whose gain is large enough. It was tried on other images, so only its gain counts, not its accuracy."""
    other = data.other_size
    if other is None or accuracy + other.accuracy - other.accuracy_now < needed:
        return None
    size = f"{other.size[0]}x{other.size[1]}"
    trial = Trial(f"size {size}", other.accuracy, other.loss, other.images)
    how = f"images of {size} (instead of {percent(other.accuracy_now)} on the same {other.images} images)"
    return _Better(trial, how, f"Pass --input-shape {channels}x{size}.")


def _retry(
    model: Model, data: CleanData, right: Tensor, needed: float, *, sane: bool
) -> tuple[_Better | None, tuple[Trial, ...]]:
    """The best suspect if its accuracy is ``needed`` or more, and everything tried.

    All suspects are tried on a few images, the best of them on more. If the model is ``sane`` as given (``right`` [N]
    bool: its hits), a suspect must also be significantly better: McNemar's test on the images where the two differ, at
    three standard deviations, because one of twenty suspects is likely to be better by chance.
    """
    screened = _try_all(model, first(data, _SCREEN_IMAGES), _suspects(model))
    least = screened[0][1].accuracy - 0.1
    finalists = [feed for feed, trial, _ in screened[:_FINALISTS] if trial.accuracy >= least]
    finals = _try_all(model, first(data, _FINAL_IMAGES), finalists)
    rest = [trial for feed, trial, _ in screened if feed not in finalists]
    tried = (*(trial for _, trial, _ in finals), *rest)
    (feed, best, hits), equals = _prefer(finals)
    if best.accuracy < needed or (sane and not beyond_chance(hits, right[: len(hits)])):
        return None, tried
    also = f" (about as good: {', '.join(equals)})" if equals else ""
    on = f" on {best.images} of them" if best.images < len(data) else ""
    how = f"normalisation {best.name}{also}"
    return _Better(best, how, _remedy(feed, model), feed.normalization, on=on), tried


def _suspects(model: Model) -> list[Feed]:
    """Other input formats for the model, most common first, RGB before BGR."""
    channels, given = model.input_shape[0], model.normalization
    known = [pair for name, pair in NORMALIZATIONS.items() if channels == 1 or name not in GRAY_ONLY]
    known = [pair for pair in known if len(pair.mean) in (0, 1, channels)]
    known = known if given in known else [given, *known]
    orders = (False, True) if channels == 3 else (False,)
    feeds = [Feed(pair, reverse) for reverse in orders for pair in known]
    return [feed for feed in feeds if feed != Feed(given)]


def _try_all(model: Model, data: CleanData, feeds: list[Feed]) -> list[_Tried]:
    """Every feed on ``data``, best first; ties keep their order."""
    outcomes = [(feed, logits_of(model, data.images, feed)) for feed in feeds]
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


_Guess: TypeAlias = tuple[_Better, Tensor]
"""A class order with its trial, and its hits ([N] bool)."""


def _relabel(logits: Tensor, data: CleanData, right: Tensor, needed: float, *, sane: bool) -> _Better | None:
    """Labels that are right except for the class order: text order, a constant shift, or any other order."""
    for guess in (_named_order, _shifted, _reordered):
        found = guess(logits, data)
        if found is None:
            continue
        better, hits = found
        if better.trial.accuracy >= needed and (not sane or beyond_chance(hits, right)):
            return better
    return None


def _named_order(logits: Tensor, data: CleanData) -> _Guess | None:
    """Text order, or the original order if the data were renumbered. A single guess needs few images."""
    num_classes = logits.shape[1]
    if not data.class_order:
        how = _in_text_order(num_classes)
        return _guess_of(logits, data, text_order(num_classes), "class order text", how, "Pass --class-order text.")
    back = {place: label for label, place in data.class_order.items()}
    if not all(back.get(label, num_classes) < num_classes for label in data.class_counts):
        return None
    how = "the original labels of the data"
    return _guess_of(logits, data, back, "class order number", how, "Omit --class-order.")


def _in_text_order(num_classes: int) -> str:
    return f"the classes in text order ({start_of_text_order(num_classes)})"


def _shifted(logits: Tensor, data: CleanData) -> _Guess | None:
    num_classes, labels = logits.shape[1], data.labels.cpu()
    if len(labels) < _FEW_FOR_GUESS:
        return None
    steps = (logits.argmax(1) - labels) % num_classes
    shift = int(torch.bincount(steps, minlength=num_classes).argmax())
    if not shift:
        return None
    signed = shift if shift <= num_classes // 2 else shift - num_classes
    hint = f"Add {signed} to every label." if signed > 0 else f"Subtract {-signed} from every label."
    order = {label: (label + shift) % num_classes for label in range(num_classes)}
    return _guess_of(logits, data, order, f"labels {signed:+d}", f"labels {signed:+d}", hint)


def _reordered(logits: Tensor, data: CleanData) -> _Guess | None:
    """The order suggested by the predictions.

    Each half of the images is tested with the order suggested by the other half. Otherwise a confused model would seem
    to have another order, because on a few images any confusion matches some order.
    """
    labels, evidence = data.labels.cpu(), logits.softmax(1).double()
    if len(labels) < _FEW_FOR_GUESS:
        return None
    half = _halves(labels)
    hits = torch.zeros(len(labels), dtype=torch.bool)
    for held in (half, ~half):
        order = _assign(evidence[~held], labels[~held])
        wanted = torch.tensor([order.get(label, -1) for label in labels[held].tolist()])
        hits[held] = logits[held].argmax(1) == wanted
    order = _assign(evidence, labels)
    how = f"labels in another order ({order_pairs(order)})"
    better, _ = _guess_of(logits, data, order, "labels in another order", how, _PASS_MAP)
    return replace(better, trial=replace(better.trial, accuracy=hits.double().mean().item())), hits


def _halves(labels: Tensor) -> Tensor:
    """Every other image of every class, as a mask ([N] bool)."""
    half = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        half[(labels == label).nonzero().flatten()[::2]] = True
    return half


def _assign(evidence: Tensor, labels: Tensor) -> dict[int, int]:
    """One label of the model for each label that occurs, all different, the most certain pair first.

    Args:
        evidence: ``[N, K]``, the predicted share of each label of the model.
        labels: ``[N]``.
    """
    present, rows = torch.unique(labels, return_inverse=True)
    table = torch.zeros((len(present), evidence.shape[1]), dtype=evidence.dtype).index_add_(0, rows, evidence)
    order: dict[int, int] = {}
    for _ in range(len(present)):
        row, column = divmod(int(table.argmax()), table.shape[1])
        order[int(present[row])] = column
        table[row], table[:, column] = -1, -1
    return order


def _guess_of(logits: Tensor, data: CleanData, order: Mapping[int, int], name: str, how: str, hint: str) -> _Guess:
    """``order`` as a possible correction; its map is from the labels of the source."""
    placed = torch.tensor([order[label] for label in data.labels.tolist()])
    source = {place: label for label, place in data.class_order.items()}
    class_map = {source.get(label, label): order[label] for label in data.class_counts}
    better = _Better(trial_of(name, logits, placed), how, hint, class_map=class_map)
    return better, logits.argmax(1) == placed
