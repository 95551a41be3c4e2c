"""Adaptive sharpness-aware fine-tuning, which shrinks the large weights of backdoored filters (FT-SAM, ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.loops.finetune import TuningObjective

_TINY = 1e-12


class SharpnessAware(TuningObjective):
    """The cross-entropy at the worst weights near the current ones, in steps relative to the size of each weight.

    A step takes the gradient g at the weights w, moves to w + e with e = rho w^2 g / || |w| g ||, and uses the gradient
    there. Batch norms update their running statistics only in the first of both passes.

    Args:
        rho: radius of the neighbourhood, relative to the weights; at least 0.
        smoothing: label smoothing of the cross-entropy, in [0, 1).

    Source: Kwon et al., ASAM, ICML 2021; Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
    Minimization, ICCV 2023.
    """

    def __init__(self, rho: float, smoothing: float) -> None:
        self._rho, self._smoothing = rho, smoothing

    def start(self, module: nn.Module) -> None:
        self._module = module

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        loss = self._loss(run(images), labels)
        loss.backward()
        parameters = [one for one in self._module.parameters() if one.grad is not None]
        weights = [one.detach().clone() for one in parameters]
        with torch.no_grad():
            for parameter, shift in zip(parameters, adaptive_shift(parameters, self._rho), strict=True):
                parameter.add_(shift)
                parameter.grad = None
        buffers = [one.clone() for one in self._module.buffers()]
        self._loss(run(images), labels).backward()
        with torch.no_grad():
            for buffer, before in zip(self._module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        return loss.detach()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, label_smoothing=self._smoothing)


@torch.no_grad()
def adaptive_shift(parameters: Sequence[nn.Parameter], rho: float) -> list[Tensor]:
    """The shift rho w^2 g / || |w| g || of each parameter, with one norm over all of them.

    Args:
        parameters: weights w with gradients g.
        rho: radius.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    pairs = list(zip(parameters, gradients, strict=True))
    norm = torch.stack([(weight.abs() * gradient).norm() for weight, gradient in pairs]).norm()
    scale = rho / norm.clamp(min=_TINY)
    return [scale * weight.square() * gradient for weight, gradient in pairs]
