"""The pruning-aware attack (Liu et al., Fine-Pruning, RAID 2018): a backdoor in filters that clean images need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import AttackSetting, apply_trigger, shape_of
from bdprune.attacks.check import Count, NotNegative, Share
from bdprune.attacks.companion import draw_apart
from bdprune.attacks.features import source_of
from bdprune.errors import ArchitectureError
from bdprune.model import FilterGroup, Model
from bdprune.runtime import BATCH, share_right


@dataclass(frozen=True)
class PruningAware(BadNets):
    """BadNets in a network whose dormant filters are pruned before the training and put back after it.

    The attack (1) takes a trained clean network; (2) prunes the filters of one layer whose mean activation on clean
    images is lowest, as many as clean accuracy allows; (3) trains the rest on the poisoned set, so that the backdoor
    lies in filters that clean images need; (4) puts the pruned filters back, with biases lowered until they are zero on
    clean and on triggered images. A defence that prunes the filters with the lowest activation removes only these.

    The paper prunes the last conv. A filter that is put back must not reach the output past a ReLU, as it does at the
    end of a residual block, so we take the last conv that a ReLU follows directly. If a norm follows the conv, its
    shift is the bias. Pruned filters stay zero in training without a mask: their weights, scale and shift are zero, and
    the gradient of a ReLU at zero is zero.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training set to poison.
        share: largest share of the layer's filters to prune (ours).
        max_drop: largest accepted drop of clean accuracy by pruning, in [0, 1], before the training (ours).
        images: clean training images to measure activations on, and as many others to measure accuracy on (ours).
        slack: how far below zero the largest activation of a filter is lowered, as a share of it (ours).
    """

    share: Share = 0.75
    max_drop: Share = 0.02
    images: Count = 1000
    slack: NotNegative = 0.5

    kind: ClassVar[str] = "pruning-aware"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "clean"

    def start(self, network: nn.Module, setting: AttackSetting) -> None:
        """Takes the weights of the source and zeroes the dormant filters."""
        source = source_of(setting)
        network.load_state_dict(source.state_dict())
        layer = last_layer(source, self._some(setting)[0][:2])
        chosen = self.dormant(layer, setting)
        state = network.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, start in layer.tensors(source).items():
                state[name][chosen + start] = 0

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Puts the filters of the source back, dormant."""
        source, (images, _) = source_of(setting), self._some(setting)
        layer = last_layer(source, images[:2])
        chosen = self.dormant(layer, setting)
        old, new = source.state_dict(), network.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, start in {**layer.tensors(source), **layer.statistics}.items():
                new[name][chosen + start] = old[name][chosen + start].to(new[name])
            seen = torch.cat([images, apply_trigger(trigger.cpu(), images.cpu()).to(images)])
            peak = torch.stack([values.amax((0, 2, 3)) for values in _outputs(network, layer, seen)]).amax(0)
            new[layer.bias][chosen + layer.start] -= (1 + self.slack) * peak[chosen].clamp(min=0)

    def dormant(self, layer: Layer, setting: AttackSetting) -> Tensor:
        """The filters of ``layer`` that the attack prunes, int64, the one with the lowest mean activation first."""
        source, (images, held) = source_of(setting), self._some(setting)
        totals = [functional.relu(values).mean((2, 3)).sum(0) for values in _outputs(source, layer, images)]
        order = torch.stack(totals).sum(0).argsort()
        shown, labels = held, setting.labels[self._drawn(setting)[1]]
        least = share_right(_predict(source, {}, shown), labels) - self.max_drop
        step = -(-layer.filters // 16)
        count = 0
        for more in range(step, int(self.share * layer.filters) + 1, step):
            pruned = layer.filled(source, order[:more], 0.0)
            if share_right(_predict(source, pruned, shown), labels) < least:
                break
            count = more
        return order[: max(count, 1)]

    def _drawn(self, setting: AttackSetting) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(setting.seed)
        return draw_apart(len(setting.labels), self.images, self.images, generator)

    def _some(self, setting: AttackSetting) -> tuple[Tensor, Tensor]:
        """Clean images to measure activations on, and others to measure accuracy on, in [0, 1] on the device."""
        device = next(source_of(setting).parameters()).device
        one, two = ((setting.images[index].float() / 255).to(device) for index in self._drawn(setting))
        return one, two


@dataclass(frozen=True)
class Layer:
    """The filters of a conv that a ReLU follows directly.

    Attributes:
        conv: path of the conv.
        last: path of the norm that follows it, or of the conv itself.
        filters: number of filters.
        start: the first channel of the filters in ``last``.
    """

    conv: str
    last: str
    filters: int
    start: int

    @property
    def bias(self) -> str:
        """Name of the parameter that shifts the filters' outputs."""
        return f"{self.last}.bias"

    @property
    def statistics(self) -> dict[str, int]:
        """Names of the norm's running statistics, with the filters' first channel in them."""
        return {} if self.last == self.conv else {f"{self.last}.running_{name}": self.start for name in ("mean", "var")}

    def tensors(self, network: nn.Module) -> dict[str, int]:
        """Names of the filters' parameters, with the filters' first channel in them."""
        places = {self.conv: 0, self.last: self.start}
        names = {f"{path}.{kind}": start for path, start in places.items() for kind in ("weight", "bias")}
        own = dict(network.named_parameters())
        return {name: start for name, start in names.items() if name in own}

    def filled(self, network: nn.Module, filters: Tensor, bias: float) -> dict[str, Tensor]:
        """The layer's parameters with ``filters`` at the constant ``bias``; ``network`` does not change."""
        changed = {}
        for name, start in self.tensors(network).items():
            changed[name] = network.get_parameter(name).detach().clone()
            changed[name][filters + start] = bias if name == self.bias else 0.0
        return changed


def last_layer(network: nn.Module, images: Tensor) -> Layer:
    """The last conv of ``network`` that a ReLU follows directly, or whose norm a ReLU follows.

    Args:
        network: in eval mode; it does not change.
        images: ``[N, C, H, W]``, two or more.

    Raises:
        ArchitectureError: there is no such conv.
    """
    for group in reversed(Model(network, "", 1, shape_of(images)).groups):
        layer = _layer(network, group)
        if layer is not None and _is_cut_off(network, layer, images):
            return layer
    raise ArchitectureError(
        f"A {type(network).__name__} has no conv that a ReLU follows directly, so no filter can be made dormant.",
        "Give a network with ReLUs, such as a ResNet or a VGG.",
    )


def _layer(network: nn.Module, group: FilterGroup) -> Layer | None:
    """The layer of a group, None if its filters have no bias of their own."""
    if not group.as_module or (group.norms and group.norm is None):
        return None
    last, start = (group.norm.name, group.norm.start) if group.norm else (group.conv, 0)
    layer = Layer(group.conv, last, group.num_filters, start)
    return layer if layer.bias in layer.tensors(network) else None


def _is_cut_off(network: nn.Module, layer: Layer, images: Tensor) -> bool:
    """Whether outputs below zero have the same effect as zero."""
    everything = torch.arange(layer.filters, device=images.device)
    with torch.no_grad():
        zero, below = (functional_call(network, layer.filled(network, everything, at), (images,)) for at in (0.0, -1.0))
    return torch.equal(zero, below)


@torch.no_grad()
def _predict(network: nn.Module, changed: dict[str, Tensor], images: Tensor) -> Tensor:
    """Predicted labels ``[N]`` on the CPU, with other values for some parameters."""
    parts = [functional_call(network, changed, (batch,)).argmax(1) for batch in images.split(BATCH)]
    return torch.cat(parts).cpu()


def _outputs(network: nn.Module, layer: Layer, images: Tensor) -> Iterator[Tensor]:
    """The filters' outputs before the ReLU, ``[N, filters, h, w]`` for each batch."""
    for batch in images.split(BATCH):
        with _hooked(network.get_submodule(layer.last)) as seen, torch.no_grad():
            network(batch)
        yield seen[0][:, layer.start : layer.start + layer.filters]


@contextmanager
def _hooked(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    # A copy, because the ReLU may work in place.
    hook = module.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
    try:
        yield seen
    finally:
        hook.remove()
