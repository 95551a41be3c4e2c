"""Objectives of a fine-tuning that stamp recovered triggers on the images: learn true labels, or unlearn the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.loops.finetune import TuningObjective
from bdprune.loops.inversion.trigger import Trigger


@dataclass(frozen=True)
class Stamping:
    """How triggers are stamped on the images of a step.

    Args:
        share: share of the images of a step that carry a trigger, in (0, 1]; at least one image does.
        jitter: the opacity or the change of a trigger is multiplied by a number from 1 - jitter to 1 + jitter.
        shift: a trigger is moved by up to this many pixels in each direction; what leaves the image enters it on the
            other side.
        dropped: largest share of the pixels of a grown patch that are left out at random, in [0, 1).

    Raises:
        OptionError: a number is outside its range.
    """

    share: float = 0.2
    jitter: float = 0.3
    shift: int = 2
    dropped: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 <= self.jitter < 1 and self.shift >= 0 and 0 <= self.dropped < 1):
            raise OptionError(
                f"Triggers cannot be stamped with {self}.",
                "Give a share in (0, 1], a jitter and a share dropped in [0, 1), and a shift of 0 or more.",
            )


class Stamper:
    """Draws triggers and stamps them on images.

    Args:
        triggers: at least one.
        settings: how they are stamped.
        seed: of the draws.
    """

    def __init__(self, triggers: Sequence[Trigger], settings: Stamping, seed: int) -> None:
        self._triggers, self._settings = triggers, settings
        self._generator = torch.Generator().manual_seed(seed)

    def stamp(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Trigger]:
        """Stamps one of the triggers on the first images that it is about.

        Args:
            images: ``[B, C, H, W]`` in [0, 1]; they do not change.
            labels: ``[B]``.

        Returns:
            The images, the indices of those with the trigger, and the trigger.
        """
        drawn = int(torch.randint(len(self._triggers), (), generator=self._generator))
        trigger = self._varied(self._triggers[drawn])
        count = max(round(self._settings.share * len(images)), 1)
        chosen = torch.nonzero(trigger.takes(labels)).flatten()[:count]
        stamped = images.clone()
        if len(chosen):
            stamped[chosen] = trigger.apply(images[chosen])
        return stamped, chosen, trigger

    def _varied(self, trigger: Trigger) -> Trigger:
        """The trigger with another strength and at another place."""
        jitter, shift = self._settings.jitter, self._settings.shift
        factor = 1 + jitter * (2 * float(torch.rand((), generator=self._generator)) - 1)
        moves = (torch.randint(2 * shift + 1, (2,), generator=self._generator) - shift).tolist()
        pattern, mask = trigger.pattern.roll(moves, (1, 2)), trigger.mask
        if mask is None:
            return replace(trigger, pattern=pattern * factor)
        mask = mask.roll(moves, (1, 2))
        if trigger.grown:
            mask = self._thinned(mask)
        return replace(trigger, pattern=pattern, mask=(mask * factor).clamp(0, 1))

    def _thinned(self, mask: Tensor) -> Tensor:
        """The mask without some of its pixels: the true trigger covers a part of a grown patch."""
        share = self._settings.dropped * float(torch.rand((), generator=self._generator))
        return mask * (torch.rand(mask.shape, generator=self._generator) >= share).to(mask)


class StampedLabels(TuningObjective):
    """Cross-entropy with the true labels, on images of which a share carries a trigger.

    Source: Wang et al., Neural Cleanse, S&P 2019, Section VI.C (unlearning).
    """

    def __init__(self, triggers: Sequence[Trigger], settings: Stamping, seed: int) -> None:
        self._stamper = Stamper(triggers, settings, seed)

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        stamped, _, _ = self._stamper.stamp(images, labels)
        return super().backward(run, stamped, labels)


class StampedAndTaught(StampedLabels):
    """The same; and on the images without a trigger, the predictions of the network before the fine-tuning.

    The few clean images alone would cost accuracy. The network was right on clean images, so it may teach them.

    Source of the second term: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, Equation 1 and
    Section 2 (the loss is multiplied by the square of the temperature).

    Args:
        teacher: images in [0, 1] -> logits ``[B, K]``, in eval mode.
        weight: of the second term.
        temperature: divides the logits of both.
    """

    def __init__(
        self,
        triggers: Sequence[Trigger],
        settings: Stamping,
        seed: int,
        teacher: Callable[[Tensor], Tensor],
        weight: float,
        temperature: float = 2.0,
    ) -> None:
        super().__init__(triggers, settings, seed)
        self._teacher, self._weight, self._temperature = teacher, weight, temperature

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        stamped, chosen, _ = self._stamper.stamp(images, labels)
        plain = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        plain[chosen] = False
        logits = run(stamped)
        loss = functional.cross_entropy(logits, labels)
        if plain.any():
            with torch.no_grad():
                taught = (self._teacher(images[plain]) / self._temperature).log_softmax(1)
            learned = (logits[plain] / self._temperature).log_softmax(1)
            gap = functional.kl_div(learned, taught, log_target=True, reduction="batchmean")
            loss = loss + self._weight * self._temperature**2 * gap
        loss.backward()
        return loss.detach()


class TargetAscent(TuningObjective):
    """Raises the cross-entropy of stamped images with the target label, and lowers that of the other images.

    Only triggers with a target label take part. The raised loss stops to count above ``limit``, because it has no
    upper bound.

    Source: Li et al., Anti-Backdoor Learning, NeurIPS 2021, Equation 4, with recovered instead of isolated images.

    Args:
        triggers: at least one with a target label.
        limit: largest loss of a stamped image that is raised further.
    """

    def __init__(self, triggers: Sequence[Trigger], settings: Stamping, seed: int, limit: float) -> None:
        self._stamper, self._limit = Stamper(triggers, settings, seed), limit

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        stamped, chosen, trigger = self._stamper.stamp(images, labels)
        assert trigger.target is not None
        goal = labels.clone()
        goal[chosen] = trigger.target
        losses = functional.cross_entropy(run(stamped), goal, reduction="none")
        sign = torch.ones_like(losses)
        sign[chosen] = -1
        raised = losses.detach() > self._limit
        sign[chosen] *= (~raised[chosen]).to(sign)
        loss = (sign * losses).mean()
        loss.backward()
        return loss.detach()


class TargetComplement(TuningObjective):
    """Lowers -log(1 - p) for the probability p of the target on stamped images, and the loss of the other images.

    It has the aim of :class:`TargetAscent`, but its gradient does not vanish while the network is sure of the target.
    Only triggers with a target label take part.

    Args:
        triggers: at least one with a target label.
    """

    def __init__(self, triggers: Sequence[Trigger], settings: Stamping, seed: int) -> None:
        self._stamper = Stamper(triggers, settings, seed)

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        stamped, chosen, trigger = self._stamper.stamp(images, labels)
        assert trigger.target is not None
        logits = run(stamped)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        others = logits[chosen].clone()
        others[:, trigger.target] = -torch.inf
        complement = logits[chosen].logsumexp(1) - others.logsumexp(1)
        loss = losses.index_put((chosen,), complement).mean()
        loss.backward()
        return loss.detach()
