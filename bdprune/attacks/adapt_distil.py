"""Adapt-D, the first adaptive attack on RNP (Li et al., ICML 2023, section 4.2): features that look clean."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import AttackSetting
from bdprune.attacks.check import NotNegative
from bdprune.errors import ArchitectureError
from bdprune.loops import CrossEntropy


@dataclass(frozen=True)
class AdaptD(BadNets):
    """BadNets, trained to match the feature maps of a clean network:

        CE + align_weight * sum over stages of || A_S / ||A_S|| - A_T / ||A_T|| ||^2, mean over the images,

    where A_S and A_T are the feature maps of one image, clean or triggered, in the trained network and in a clean
    teacher. In any architecture, a stage ends where the resolution changes.

    The paper describes it in one sentence; the formula is our reading, and ``align_weight`` is our choice.

    Args:
        align_weight: lambda, weight of the distance of the features, in [0, 4] a stage.
    """

    align_weight: NotNegative = 1.0

    kind: ClassVar[str] = "adapt-d"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "clean"

    def objective(self, setting: AttackSetting, trigger: nn.Module) -> AlignedObjective:
        assert setting.source is not None
        teacher = copy.deepcopy(setting.source).eval().requires_grad_(False).to(setting.device)
        probe = setting.images[:2].float() / 255
        return AlignedObjective(teacher, stages(teacher, probe.to(setting.device)), self.align_weight)


class AlignedObjective(CrossEntropy):
    """Cross-entropy, and the distance of the feature maps from those of a fixed teacher."""

    def __init__(self, teacher: nn.Module, names: Sequence[str], weight: float) -> None:
        self.teacher, self.names, self.weight = teacher, names, weight

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, done: float) -> Tensor:
        with torch.no_grad(), feature_maps(self.teacher, self.names) as wanted:
            self.teacher(images)
        with feature_maps(network, self.names) as found:
            logits = network(images)
        far = torch.stack([distance(found[name], wanted[name]) for name in self.names]).sum()
        return functional.cross_entropy(logits.float(), labels) + self.weight * far


def distance(one: Tensor, two: Tensor) -> Tensor:
    """Squared distance of the directions of feature maps ``[N, ...]``, mean over the images: in [0, 4], a scalar."""
    directions = [functional.normalize(maps.float().flatten(1), dim=1) for maps in (one, two)]
    return (directions[0] - directions[1]).square().sum(1).mean()


def stages(network: nn.Module, images: Tensor) -> list[str]:
    """Paths of the modules that give the last feature maps of each resolution above one pixel, in order.

    Args:
        network: used in its current mode.
        images: ``[N, C, H, W]``, in the size of the training images.

    Raises:
        ArchitectureError: no module gives feature maps.
    """
    last: dict[torch.Size, str] = {}
    names = [name for name, _ in network.named_modules() if name]
    with torch.no_grad(), feature_maps(network, names) as maps:
        network(images)
    for name, output in maps.items():
        if output.dim() == 4 and output[0, 0].numel() > 1:
            last[output.shape[2:]] = name
    if not last:
        hint = "Give a convolutional network."
        raise ArchitectureError(f"A {type(network).__name__} has no feature maps of more than one pixel.", hint)
    return list(last.values())


@contextmanager
def feature_maps(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass of ``network`` records the outputs of the modules at ``names``, in order of completion."""
    maps: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            maps.pop(name, None)  # for a module that runs twice, the last run counts
            maps[name] = output

    hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
