"""Neural attention distillation: a student learns where a fine-tuned teacher looks (NAD, ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.errors import OptionError
from bdprune.loops.finetune import TuningObjective
from bdprune.model import Model

_TINY = 1e-6
_PROBE = 2  # images


@dataclass(frozen=True)
class FeatureMap:
    """An output of a layer: the layer's name in the network, and which of its calls in a forward pass (from 0)."""

    path: str
    call: int = 0


class AttentionDistillation(TuningObjective):
    """Cross-entropy + sum of beta_l mse(A(F_l), A(T_l)) over feature maps F_l of the student and T_l of the teacher.

    A(F) is :func:`attention`. The mean square error averages over positions, so a beta for small maps is not comparable
    with the same beta for large ones.

    Args:
        teacher: a fine-tuned copy; it is not changed.
        maps: the feature maps, in the order of the forward pass (:func:`last_maps`).
        betas: weight of each map, at least 0.

    Source: Li et al., Neural Attention Distillation, ICLR 2021.
    """

    def __init__(self, teacher: Model, maps: Sequence[FeatureMap], betas: Sequence[float]) -> None:
        self._teacher, self._maps, self._betas = teacher.module.eval(), maps, betas

    def start(self, module: nn.Module) -> None:
        self._student = module

    def backward(self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), outputs_of(self._teacher, self._maps) as taught:
            self._teacher(images)
        with outputs_of(self._student, self._maps) as seen:
            loss = functional.cross_entropy(run(images), labels)
        for beta, one in zip(self._betas, self._maps, strict=True):
            loss = loss + beta * (attention(seen[one]) - attention(taught[one])).square().mean()
        loss.backward()
        return loss.detach()


def attention(features: Tensor) -> Tensor:
    """Sum of the squared channels, divided by its norm over all positions: ``[N, C, H, W]`` -> ``[N, H * W]``."""
    energy = features.float().square().sum(1).flatten(1)
    normalised: Tensor = energy / (energy.norm(dim=1, keepdim=True) + _TINY)
    return normalised


@contextmanager
def outputs_of(module: nn.Module, maps: Sequence[FeatureMap]) -> Iterator[dict[FeatureMap, Tensor]]:
    """Inside, one forward pass of ``module`` fills the mapping with the outputs of these layers of its ``network``."""
    seen: dict[FeatureMap, Tensor] = {}
    calls = dict.fromkeys((one.path for one in maps), 0)

    def keep(path: str, output: Tensor) -> None:
        seen[FeatureMap(path, calls[path])] = output
        calls[path] += 1

    hooks = [
        module.get_submodule(f"network.{path}").register_forward_hook(lambda _, x, out, path=path: keep(path, out))
        for path in calls
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def last_maps(model: Model, count: int) -> tuple[FeatureMap, ...]:
    """The last feature map of each of the last ``count`` resolutions, in the order of the forward pass.

    A map of one position is none: its attention is constant. A network with fewer resolutions has fewer maps.

    Raises:
        OptionError: no layer outputs a feature map.
    """
    images = torch.rand(_PROBE, *model.input_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    calls: dict[str, int] = {}
    found: dict[tuple[int, ...], FeatureMap] = {}

    def note(path: str, output: object) -> None:
        calls[path] = calls.get(path, -1) + 1
        if isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1:
            size = tuple(output.shape[2:])
            found.pop(size, None)  # the order of the last maps
            found[size] = FeatureMap(path, calls[path])

    layers = [(path, layer) for path, layer in model.network.named_modules() if path]
    hooks = [layer.register_forward_hook(lambda _, x, out, path=path: note(path, out)) for path, layer in layers]
    try:
        model.module(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise OptionError(
            "No layer of the network outputs a feature map of more than one position.",
            "Use a method without attention maps, such as fine_tuning.",
        )
    return tuple(found.values())[-count:]
