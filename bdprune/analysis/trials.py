"""Trials: how a model does on clean images under one way to feed it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdprune.data import CleanData
from bdprune.model import Model, Normalization, normalization_name

_BATCH = 128
_BATCH_PIXELS = _BATCH * 224 * 224


@dataclass(frozen=True)
class Trial:
    """Clean accuracy (0-1) and mean cross-entropy (nats) on ``images`` images under one way to feed the model."""

    name: str
    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True)
class Feed:
    """A way to feed the model: a normalisation, and whether the channels are reversed first."""

    normalization: Normalization
    reverse: bool = False

    @property
    def name(self) -> str:
        return normalization_name(self.normalization) + (" BGR" if self.reverse else "")


def choose(data: CleanData, count: int, generator: torch.Generator) -> CleanData:
    """At most ``count`` images, in random order, as evenly over the classes as the data allow."""
    return data.subset(choose_index(data, count, generator))


def choose_index(data: CleanData, count: int, generator: torch.Generator) -> Tensor:
    """The positions ([M] int64) of the images that :func:`choose` takes."""
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
    """Logits ``[N, K]`` (float32, on the CPU) of images ``[N, C, H, W]``; the model is not changed."""
    feed = feed or Feed(model.normalization)
    network = model.clone().network.eval() if model.network.training else model.network
    module = replace(model, network=network, normalization=feed.normalization).module
    batch = min(_BATCH, max(1, _BATCH_PIXELS // (images.shape[2] * images.shape[3])))
    batches = torch.split(images.flip(1) if feed.reverse else images, batch)
    return torch.cat([module(batch.to(model.device)).float() for batch in batches]).cpu()


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """The share of correct labels, 0-1."""
    return (logits.argmax(1) == labels.cpu()).double().mean().item()


def trial_of(name: str, logits: Tensor, labels: Tensor) -> Trial:
    """Accuracy and loss of ``logits``."""
    loss = cross_entropy(logits, labels.cpu()).item()
    return Trial(name, accuracy_of(logits, labels), loss if math.isfinite(loss) else math.inf, len(labels))


def beyond_luck(hits: Tensor, others: Tensor) -> bool:
    """Whether ``hits`` ([N] bool) are more than ``others`` by McNemar's test, at three standard deviations."""
    gained, lost = int((hits & ~others).sum()), int((others & ~hits).sum())
    return gained > lost and gained - lost >= 3 * math.sqrt(gained + lost)
