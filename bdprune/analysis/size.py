"""Input formats for a model: its accuracy with each, and the image size that suits it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdprune.data import MAX_BYTES, CleanData, OtherSize
from bdprune.model import Model, Normalization, normalization_name

_BATCH = 128
_BATCH_PIXELS = _BATCH * 224 * 224


@dataclass(frozen=True)
class Trial:
    """Clean accuracy (0-1) and mean cross-entropy (nats) on ``images`` images with one input format."""

    name: str
    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True)
class Feed:
    """An input format: a normalisation, and whether the channels are reversed first."""

    normalization: Normalization
    reverse: bool = False

    @property
    def name(self) -> str:
        return normalization_name(self.normalization) + (" BGR" if self.reverse else "")


def choose(data: CleanData, count: int, generator: torch.Generator) -> CleanData:
    """At most ``count`` images, in random order, as evenly spread over the classes as the data allow."""
    return data.subset(choose_index(data, count, generator))


def choose_index(data: CleanData, count: int, generator: torch.Generator) -> Tensor:
    """The positions ([M] int64) of the images chosen by :func:`choose`."""
    index = torch.arange(len(data))
    if len(data) > count:
        numbered = replace(data, images=index)
        index = numbered.sample(max(1, count // len(data.class_counts)), generator).images
    return index[torch.randperm(len(index), generator=generator)[:count]]


def first(data: CleanData, count: int) -> CleanData:
    """The first ``count`` images."""
    return data.subset(torch.arange(min(count, len(data))))


@torch.no_grad()
def logits_of(model: Model, images: Tensor, feed: Feed | None = None) -> Tensor:
    """Logits ``[N, K]`` (float32, on the CPU) of images ``[N, C, H, W]``; does not change the model."""
    feed = feed or Feed(model.normalization)
    network = model.clone().network.eval() if model.network.training else model.network
    module = replace(model, network=network, normalization=feed.normalization).module
    batch = min(_BATCH, max(1, _BATCH_PIXELS // (images.shape[2] * images.shape[3])))
    batches = torch.split(images.flip(1) if feed.reverse else images, batch)
    return torch.cat([module(batch.to(model.device)).float() for batch in batches]).cpu()


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """The share of correct labels, 0-1."""
    return (logits.argmax(1) == labels.cpu()).double().mean().item()


def percent(share: float) -> str:
    """A share in [0, 1] as in reports: ``93.4 %``."""
    return f"{100 * share:.1f} %"


def trial_of(name: str, logits: Tensor, labels: Tensor) -> Trial:
    """Accuracy and loss of ``logits``."""
    loss = cross_entropy(logits, labels.cpu()).item()
    return Trial(name, accuracy_of(logits, labels), loss if math.isfinite(loss) else math.inf, len(labels))


def beyond_chance(hits: Tensor, others: Tensor) -> bool:
    """Whether ``hits`` ([N] bool) are significantly more than ``others`` (McNemar's test, 3 standard deviations)."""
    gained, lost = int((hits & ~others).sum()), int((others & ~hits).sum())
    return gained > lost and gained - lost >= 3 * math.sqrt(gained + lost)


Size: TypeAlias = tuple[int, int]
"""(height, width)."""

MAX_NATIVE_PIXELS = 512 * 512
"""Images with more pixels are not tried in their own size."""
MAX_GROWTH = 4
"""If neither size is clearly better, images keep their own size up to this multiple of the model's pixels."""

_USUAL_SIDES = (28, 32, 48, 64, 96, 128, 224)
_USUAL_FACTOR, _FINALISTS = 4, 2
_FIRST_LOOK, _SECOND_LOOK, _FEWEST = 64, 200, 16
_CHEAP_PIXELS = 128 * 128
_GOOD_SKILL = 0.75
_CLEAR_SHARE, _CLEAR_IMAGES = 0.1, 4


def fit_size(
    model: Model, resized: CleanData, native: Callable[[Size], CleanData], *, fixed: bool = False, seed: int = 0
) -> tuple[Model, CleanData]:
    """Chooses the image size that suits the model; returns the model and the images in that size.

    If all source images have one size other than the model's, and the network accepts it, the clean accuracy is
    measured at both sizes on the same images. The clearly better size wins: by McNemar's test at three standard
    deviations, or by 10 points. If neither does, the images keep their own size unless it has more than ``MAX_GROWTH``
    times the pixels.

    If they have several sizes, or more than ``MAX_NATIVE_PIXELS`` pixels, they are resized to the model's size. If the
    model is then inaccurate, other usual sizes are tried, and ``other_size`` names one that is clearly better.

    Args:
        model: not changed.
        resized: the images in the model's input shape.
        native: returns the same images in a given size.
        fixed: the user asked for the model's input shape: keep it; ``other_size`` of the result names a better one.
        seed: seed for the choice of images.

    Raises:
        DataError: ``native`` raises it.
    """
    own, size = model.input_shape[1:], resized.native_size
    if size == own or (fixed and _does_well(model, resized, seed)):
        return model, resized
    if size is None or size[0] * size[1] > MAX_NATIVE_PIXELS:
        return model, _with_usual_size(model, resized, native, seed)
    obstacle = _obstacle(model, resized, size)
    if obstacle:
        return model, _noted(resized, obstacle)
    own_size = native(size)
    trial = _compare(model, own_size, resized, size, seed)
    if not fixed and trial.prefers_native(size, own):
        taken = replace(model, input_shape=(model.input_shape[0], *size))
        return taken, _noted(own_size, _native_note(trial, model, size))
    return model, replace(_noted(resized, _resized_note(trial, model, size, fixed)), other_size=trial.other(size))


@dataclass(frozen=True)
class _Comparison:
    """Trials of the model on the same images in their own size and in the model's, and whether the gap is clear."""

    native: Trial
    own: Trial
    clear: bool

    @property
    def is_better(self) -> bool:
        return self.clear and self.native.accuracy > self.own.accuracy

    def prefers_native(self, size: Size, own: Size) -> bool:
        if self.clear:
            return self.is_better
        return size[0] * size[1] <= MAX_GROWTH * own[0] * own[1]

    def other(self, size: Size) -> OtherSize | None:
        """The result to record for the trial if its own size was clearly better."""
        if not self.is_better:
            return None
        return OtherSize(size, self.native.accuracy, self.own.accuracy, self.native.loss, self.native.images)


def _obstacle(model: Model, data: CleanData, size: Size) -> str:
    """Why the images cannot be tried in their own size, as a sentence; empty if they can."""
    if 4 * len(data) * model.input_shape[0] * size[0] * size[1] > MAX_BYTES:
        return f"Their own size of {_text(size)} was not tried, because that would take too much memory."
    if not _takes(model, size):
        return f"The network does not take images of {_text(size)}."
    return ""


def _with_usual_size(model: Model, data: CleanData, native: Callable[[Size], CleanData], seed: int) -> CleanData:
    """The images unchanged; if the model is inaccurate, names the usual size at which it is clearly most accurate."""
    own = model.input_shape[1:]
    if _does_well(model, data, seed):
        return data
    least, most = max(own) / _USUAL_FACTOR, max(own) * _USUAL_FACTOR
    usual = [(side, side) for side in _USUAL_SIDES if least <= side <= most and (side, side) != own]
    tried = [
        (size, _compare(model, native(size), data, size, seed)) for size in usual if not _obstacle(model, data, size)
    ]
    tried = sorted((entry for entry in tried if entry[1].is_better), key=_accuracy_there)[-_FINALISTS:]
    final = [(size, _compare(model, native(size), data, size, seed, thorough=True)) for size, _ in tried]
    better = [entry for entry in final if entry[1].is_better]
    if not better:
        return data
    size, trial = max(better, key=_accuracy_there)
    note = (
        f"Clean accuracy is {percent(trial.own.accuracy)} with the images resized to {_text(own)} and "
        f"{percent(trial.native.accuracy)} with {_text(size)} (on {trial.own.images} images)."
    )
    return replace(_noted(data, note), other_size=trial.other(size))


def _accuracy_there(entry: tuple[Size, _Comparison]) -> float:
    return entry[1].native.accuracy


def _does_well(model: Model, data: CleanData, seed: int) -> bool:
    """Whether the model needs no other size: its skill in a quick trial is three quarters or more."""
    look = choose(data, _FIRST_LOOK, torch.Generator().manual_seed(seed))
    chance = 1 / model.num_classes
    return accuracy_of(logits_of(model, look.images), look.labels) >= chance + _GOOD_SKILL * (1 - chance)


def _takes(model: Model, size: Size) -> bool:
    """Whether one image of ``size`` gives the model's number of logits."""
    try:
        logits = logits_of(model, torch.zeros(1, model.input_shape[0], *size))
    except Exception:  # a network may raise anything on an unsupported size
        return False
    return tuple(logits.shape) == (1, model.num_classes)


def _compare(
    model: Model, native: CleanData, resized: CleanData, size: Size, seed: int, thorough: bool = False
) -> _Comparison:
    """A trial on few images, then on more if the result is open; large images are expensive, so fewer are used."""
    pixels = max(size[0] * size[1], model.input_shape[1] * model.input_shape[2])
    share = min(1.0, _CHEAP_PIXELS / pixels)
    looks = [max(_FEWEST, round(share * count)) for count in (_FIRST_LOOK, _SECOND_LOOK)]
    index = choose_index(resized, looks[1], torch.Generator().manual_seed(seed))
    count = min(looks[0], len(index))
    pair = _trial_pair(model, native, resized, index if thorough else index[:count])
    if not thorough and not pair.clear and count < len(index):
        pair = _trial_pair(model, native, resized, index)
    return pair


def _trial_pair(model: Model, native: CleanData, resized: CleanData, index: Tensor) -> _Comparison:
    one, two = (logits_of(model, data.images[index]) for data in (native, resized))
    labels = resized.labels[index].cpu()
    clear = _is_clear(one.argmax(1) == labels, two.argmax(1) == labels)
    return _Comparison(trial_of("native", one, labels), trial_of("resized", two, labels), clear)


def _is_clear(one: Tensor, two: Tensor) -> bool:
    difference = abs(int(one.sum()) - int(two.sum()))
    by_share = difference >= max(_CLEAR_IMAGES, _CLEAR_SHARE * len(one))
    return by_share or beyond_chance(one, two) or beyond_chance(two, one)


def _noted(data: CleanData, note: str) -> CleanData:
    return replace(data, notes=(*data.notes, note))


def _native_note(trial: _Comparison, model: Model, size: Size) -> str:
    own = model.input_shape[1:]
    close = "" if trial.clear else "; the difference is too small to be certain"
    return (
        f"The images are {_text(size)} and the network takes them unresized: clean accuracy "
        f"{percent(trial.native.accuracy)}, {percent(trial.own.accuracy)} when resized to {_text(own)}, "
        f"the usual size of {model.arch} (on {trial.own.images} images{close})."
    )


def _resized_note(trial: _Comparison, model: Model, size: Size, fixed: bool) -> str:
    own = model.input_shape[1:]
    why = f"The size of {_text(own)} was requested" if fixed else f"The images were resized to {_text(own)}"
    close = "" if trial.clear else "; the difference is too small to be certain"
    return (
        f"{why}: clean accuracy {percent(trial.own.accuracy)}, {percent(trial.native.accuracy)} at {_text(size)} "
        f"(on {trial.own.images} images{close})."
    )


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
