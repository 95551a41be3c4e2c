"""STRIP: the entropy of a network's predictions for an image that is superposed with clean images.

Gao et al., STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019, arXiv 1902.06531. The label of
a clean image changes with the picture over it, so the entropy is high. A trigger that survives the superposition keeps
its label, so the entropy is low. On a network that has begun to unlearn its task the clean images lose their labels
first, and the gap grows (NU+STRIP; Li et al., ICML 2023, arXiv 2305.14876, Appendix D.4).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis.case import Case
from bdprune.analysis.unlearned import SCAN_UNLEARNING, Unlearning
from bdprune.data import CleanData
from bdprune.errors import OptionError
from bdprune.model import Model
from bdprune.runtime import DEFAULT, convs_of, folded_form, laid_out

Rule = Literal["quantile", "normal"]
Done = Callable[[int], None]
"""Called with the number of images that are done."""

_BATCH_ON_CPU, _BATCH = 125, 500  # the maps of 125 images of 32 pixels fit into the caches of a CPU
_BATCH_PIXELS = 32 * 224 * 224
_FEWEST_OVERLAYS = 10
_SHIFTS = (1, 2, 3, 4)  # each overlay is mixed with the ones at these distances
_SAME = 1e-6  # logits that differ by less are the same output


@dataclass(frozen=True)
class StripSettings:
    """How to superpose images, and how to set the threshold.

    Args:
        overlays: number of clean images that each image is superposed with.
        image_weight: factor of the image.
        overlay_weight: factor of the clean image; the sum is clipped to [0, 1].
        frr: false rejection rate: the share of clean images that the threshold may flag, in (0, 1).
        rule: ``quantile``: the entropy of an image must be lower than that of nearly all held-out clean images, with
            the correction of conformal prediction, so that the rate holds for any distribution; ``normal``: the
            quantile of a normal distribution with their mean and standard deviation (the paper).
        held_out: maximum number of held-out clean images.
        unlearned: use the network after part of its unlearning (NU+STRIP).
    """

    overlays: int = 100
    image_weight: float = 1.0
    overlay_weight: float = 1.0
    frr: float = 0.01
    rule: Rule = "quantile"
    held_out: int = 500
    unlearned: bool = False

    def check(self) -> None:
        """Checks the ranges.

        Raises:
            OptionError: a value is outside its range.
        """
        if not all(isinstance(one, int) for one in (self.overlays, self.held_out)):
            raise OptionError("The numbers of overlays and held-out images must be whole.", "Give numbers as in 100.")
        if self.overlays < 1 or self.held_out < 1:
            few = min(self.overlays, self.held_out)
            raise OptionError(f"{few} clean images are too few.", "Give 1 overlay and 1 held-out image or more.")
        if not 0 < self.frr < 1:
            raise OptionError(f"A false rejection rate of {self.frr:g} is impossible.", "Give a share as in 0.01.")
        if self.rule not in ("quantile", "normal"):
            raise OptionError(f"There is no rule {self.rule!r}.", "Choose quantile or normal.")
        if min(self.image_weight, self.overlay_weight) <= 0:
            raise OptionError("The weights of image and overlay must be above 0.", "Give weights as in 0.5.")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "robust": {},
    "paper": {"image_weight": 1.0, "overlay_weight": 1.0, "rule": "normal", "held_out": 2000},
}
"""Settings by the name of the preset; the paper sets its threshold on 2,000 clean images."""

_UNLEARNED = {"image_weight": 0.7, "overlay_weight": 0.3}
"""The weights of the preset ``robust`` on the partly unlearned network (docs/evaluation/strip.md)."""


def strip_settings(preset: str = "robust", *, unlearned: bool = False, **changes: Any) -> StripSettings:
    """The settings of a preset for STRIP, or for NU+STRIP, some of them changed.

    Raises:
        OptionError: an unknown preset.
    """
    if preset not in PRESETS:
        raise OptionError(f"There is no preset {preset!r}.", f"Choose one of {', '.join(PRESETS)}.")
    weights = _UNLEARNED if unlearned and preset == "robust" else {}
    return StripSettings(**{**PRESETS[preset], **weights, **changes, "unlearned": unlearned})


@dataclass(frozen=True)
class Judge:
    """A network with overlays and a threshold for the entropy.

    Attributes:
        model: the network in eval mode; for NU+STRIP the partly unlearned one.
        overlays: clean images ``[M, C, H, W]``.
        settings: of the superposition.
        entropies: entropy in bits of the held-out clean images, ``[n]`` float64.
        limits: why no image can be judged; empty if images can.
    """

    model: Model
    overlays: Tensor
    settings: StripSettings
    entropies: Tensor
    limits: tuple[str, ...] = ()

    @property
    def threshold(self) -> float | None:
        """An image with a lower entropy is suspicious, in bits; None if no image can be judged."""
        return None if self.limits else _threshold(self.entropies, self.settings)

    @property
    def rate(self) -> float:
        """The share of clean images that is suspicious on average, at most the settings' ``frr``."""
        if self.settings.rule == "normal":
            return self.settings.frr
        return _rank(len(self.entropies), self.settings) / (len(self.entropies) + 1)

    def p_values(self, entropies: Tensor) -> Tensor:
        """The probability that a clean image has an entropy as low, ``[N]``; of entropies ``[N]`` in bits."""
        if self.settings.rule == "normal":
            below: Tensor = torch.special.ndtr((entropies - self.entropies.mean()) / self.entropies.std())
            return below
        ranks = torch.searchsorted(self.entropies.sort().values, entropies.contiguous(), right=True)
        return (ranks + 1).double() / (len(self.entropies) + 1)

    def chance(self, count: int, images: int) -> float:
        """The probability that ``count`` or more of ``images`` clean images are suspicious.

        Under the quantile rule the count has a beta-binomial distribution, because all images share one threshold.
        """
        k = torch.arange(count, images + 1, dtype=torch.float64)
        ways = math.lgamma(images + 1) - (k + 1).lgamma() - (images - k + 1).lgamma()
        if self.settings.rule == "normal":
            logs = ways + k * math.log(self.settings.frr) + (images - k) * math.log1p(-self.settings.frr)
        else:
            n = len(self.entropies)
            low = _rank(n, self.settings)
            high = n + 1 - low
            logs = ways + (k + low).lgamma() + (images - k + high).lgamma() - math.lgamma(images + n + 1)
            logs += math.lgamma(n + 1) - math.lgamma(low) - math.lgamma(high)
        return min(1.0, float(logs.exp().sum()))

    def measure(self, images: Tensor, done: Done = lambda count: None) -> Tensor:
        """The entropy of images ``[N, C, H, W]`` in bits, ``[N]`` float64."""
        return superposed_entropy(self.model.module, images, self.overlays, self.settings, done)


def judge_for(case: Case, settings: StripSettings, seed: int = 0, done: Done = lambda count: None) -> Judge:
    """Splits the clean images into overlays and held-out images, and measures the latter.

    The split keeps as many held-out images as the quantile rule needs, if that leaves at least ten overlays.

    Args:
        case: the model, and at least two clean images.
        seed: of the split, and of the order of the images in unlearning.
        done: called after each part of the held-out images.

    Raises:
        OptionError: a setting is outside its range.
        TrainingError: the network cannot be unlearned.
    """
    settings.check()
    overlays, held = split(case.images, settings, seed)
    model = half_unlearned(case, overlays.images, settings, seed) if settings.unlearned else case.model
    model = _fast(model, overlays.images)
    found = superposed_entropy(model.module, held.images, overlays.images, settings, done)
    return Judge(model, overlays.images, settings, found, _limits(model, held, found, settings))


def split(data: CleanData, settings: StripSettings, seed: int) -> tuple[CleanData, CleanData]:
    """The clean images as overlays, at most half of them, and held-out images, in random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    room = min(len(data) - needed(settings), len(data) // 2)
    count = min(settings.overlays, room if room >= _FEWEST_OVERLAYS else max(len(data) // 2, 1))
    return data.subset(order[:count]), data.subset(order[count : count + settings.held_out])


def needed(settings: StripSettings) -> int:
    """The number of held-out images from which on a threshold exists."""
    return math.ceil(1 / settings.frr - 1e-9) - 1 if settings.rule == "quantile" else 2


def half_unlearned(case: Case, overlays: Tensor, settings: StripSettings, seed: int) -> Model:
    """The network after the first part of its unlearning, with new running statistics of its batch norms.

    At the end of the unlearning the network predicts one label with certainty, for clean images too, so that the
    entropies of all images are equal. The running statistics lag behind the weights, and are those of single images.
    The new ones come from the overlays, each under four others: incoming images and held-out images must not change the
    network.
    """
    unlearned = case.get(Unlearning(SCAN_UNLEARNING, seed, plain=True))
    model = (unlearned.half_way or unlearned.model).clone()
    module = model.module  # before the norms train: it takes the mode of the network
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad(), convs_of(DEFAULT):
        for shift in _SHIFTS if norms and len(overlays) > 1 else ():
            for batch in _mixed(overlays, overlays.roll(shift, 0), settings).tensor_split(-(-len(overlays) // _BATCH)):
                module(batch.to(model.device))
    module.eval()
    return model


def _mixed(images: Tensor, overlays: Tensor, settings: StripSettings) -> Tensor:
    return (settings.image_weight * images + settings.overlay_weight * overlays).clamp_(0, 1)


@torch.no_grad()
def _fast(model: Model, images: Tensor) -> Model:
    """The model with folded batch norms, in channels_last unless its forward pass needs contiguous maps (``view``)."""
    few = images[:2].to(model.device)
    model = folded_form(model, few)
    other = model.clone()
    other.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        same = torch.allclose(other.module(laid_out(few, torch.channels_last)), model.module(few), rtol=1e-3, atol=1e-3)
    except RuntimeError:
        return model
    return other if same else model


@torch.no_grad()
def superposed_entropy(
    module: nn.Module, images: Tensor, overlays: Tensor, settings: StripSettings, done: Done = lambda count: None
) -> Tensor:
    """The mean entropy of the predictions for each image under all overlays, in bits.

    H(x) = -(1/N) sum_n sum_i p_i log2 p_i, with the softmax p of the logits for clip(a x + b o_n, 0, 1) (STRIP,
    Equation 4).

    Args:
        module: images in [0, 1] -> logits ``[N, K]``, in eval mode.
        images: ``[N, C, H, W]`` in [0, 1].
        overlays: ``[M, C, H, W]`` in [0, 1].
        settings: the weights a and b.
        done: called after each part with its number of images.

    Returns:
        ``[N]`` float64 on the CPU.
    """
    device = next(module.parameters()).device
    batch = _batch_of(overlays, device)
    layout = _layout_of(module)
    shown = overlays.to(device)
    found = []
    with convs_of(DEFAULT):
        for part in images.split(max(batch // len(overlays), 1)):
            mixed = _mixed(part.to(device)[:, None], shown, settings).flatten(0, 1)
            laid = laid_out(mixed, layout)
            bits = torch.cat([_entropy(module(one)) for one in laid.split(batch)])
            found.append(bits.view(len(part), len(overlays)).mean(1).cpu())
            done(len(part))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def predicted_labels(model: Model, images: Tensor) -> Tensor:
    """The label that ``model`` predicts for each image, ``[N]`` int64 on the CPU."""
    with convs_of(DEFAULT):
        return torch.cat(
            [
                model.module(one.to(model.device)).argmax(1).cpu()
                for one in images.split(_batch_of(images, model.device))
            ]
        )


def _layout_of(module: nn.Module) -> torch.memory_format:
    """The memory layout of the weights of the convs."""
    maps = (one for one in module.parameters() if one.dim() == 4 and not one.is_contiguous())
    return torch.contiguous_format if next(maps, None) is None else torch.channels_last


def _batch_of(images: Tensor, device: torch.device) -> int:
    """The number of images in one pass: fewer of large ones, so that the maps need little memory."""
    most = _BATCH_ON_CPU if device.type == "cpu" else _BATCH
    return max(1, min(most, _BATCH_PIXELS // (images.shape[2] * images.shape[3])))


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.double().log_softmax(1)
    return -(logs.exp() * logs).sum(1) / math.log(2)


def _threshold(entropies: Tensor, settings: StripSettings) -> float:
    if settings.rule == "normal":
        return float(entropies.mean() + statistics.NormalDist().inv_cdf(settings.frr) * entropies.std())
    return float(entropies.kthvalue(_rank(len(entropies), settings)).values)


def _rank(held_out: int, settings: StripSettings) -> int:
    """The threshold is the entropy of this rank among the held-out images, the lowest has rank 1.

    An image below it has a conformal p-value of at most ``frr`` (Vovk et al., Algorithmic Learning in a Random World).
    """
    return math.floor(settings.frr * (held_out + 1) + 1e-9)


def _limits(model: Model, held: CleanData, entropies: Tensor, settings: StripSettings) -> tuple[str, ...]:
    """Why no image can be judged by these held-out images."""
    least = needed(settings)
    if len(held) < least:
        return (
            f"{len(held)} held-out clean images cannot set a threshold for a false rejection rate of {settings.frr:g}: "
            f"that takes {least}. Give more clean images (--data, --per-class) or a larger --frr.",
        )
    if not entropies.isfinite().all():
        return ("The network's predictions are NaN or infinite, so they have no entropy.",)
    with torch.no_grad():
        logits = torch.cat([model.module(one.to(model.device)) for one in _few(held.images)])
    if bool((logits - logits[0]).abs().max() <= _SAME * logits.abs().max().clamp(min=1)):
        return ("The network gives the same output for every image, so entropy cannot tell images apart.",)
    threshold = _threshold(entropies, settings)
    if threshold <= 0:
        return (
            f"The threshold for a false rejection rate of {settings.frr:g} is {threshold:.3g} bits, and no entropy is "
            "below 0. Use a larger --frr, or another preset.",
        )
    return ()


def _few(images: Tensor) -> Iterator[Tensor]:
    yield from images[:16].split(4)
