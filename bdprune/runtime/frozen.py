"""Networks with frozen weights: logits that are differentiable in the images only, as fast as the machine allows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bdprune.model import Model, StackedNetwork
from bdprune.runtime.precision import DEFAULT, Precision, plan_for

_PROBE = 4  # images on which a folded network is compared with the original
_TOLERANCE = 1e-3  # of the largest logit


class FrozenNetworks:
    """G networks of one architecture in eval mode, whose weights never change.

    Batch norms are folded into their convs where that does not change the function, and no gradient of a weight is
    computed.

    Args:
        models: of one architecture, on one device; they do not change.
        images: ``[N, C, H, W]`` in [0, 1], a few of which are used for checks and trials.
        precision: as in :func:`bdprune.runtime.plan_for`.

    Raises:
        ValueError: several models cannot be stacked.
    """

    def __init__(self, models: Sequence[Model], images: Tensor, precision: Precision = DEFAULT) -> None:
        few = images[:_PROBE].to(models[0].device)
        folded = [folded_form(model, few) for model in models]
        if not _are_alike(folded):
            folded = list(models)
        stacked = len(models) > 1
        module = StackedNetwork(folded) if stacked else folded[0].clone().module
        module.eval().requires_grad_(False)
        self._plan = plan_for(precision, module, images)
        self._plan.arrange(module)
        self._module = _Apart(module) if isinstance(module, StackedNetwork) else module
        self.device, self.count = models[0].device, len(models)

    @property
    def module(self) -> nn.Module:
        """Images in [0, 1] -> logits, as :meth:`logits` but without its choice of convolutions."""
        return self._module

    @property
    def layout(self) -> torch.memory_format:
        """The memory format in which the images should come."""
        return torch.channels_last if self._plan.channels_last else torch.contiguous_format

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]``; with G models, the first B / G images are the first model's."""
        return self._plan.logits(self._module, images)


class _Apart(nn.Module):
    """A stack on ``[G * N, C, H, W]``, the images of each model one after another."""

    def __init__(self, stacked: StackedNetwork) -> None:
        super().__init__()
        self._stacked = stacked

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self._stacked.of_each(images.unflatten(0, (len(self._stacked.models), -1)).unbind())
        return logits.flatten(0, 1)


def _are_alike(models: Sequence[Model]) -> bool:
    """Whether the networks have the same layers: one of them may have kept a norm that the others could fold."""
    kinds = {tuple((path, type(layer)) for path, layer in model.network.named_modules()) for model in models}
    return len(kinds) == 1


@torch.no_grad()
def folded_form(model: Model, images: Tensor) -> Model:
    """``model`` with batch norms folded into the convs whose output only they take; itself if none can be folded.

    Args:
        images: ``[N, C, H, W]`` in [0, 1] on the model's device, for a comparison: a forward pass may use a layer
            twice, or read its parameters.
    """
    network = copy.deepcopy(model.network).eval()
    if not sum(
        [_fold(network, group.conv, group.norm.name) for group in model.groups if group.norm and group.as_module]
    ):
        return model
    folded = model.with_network(network)
    try:
        expected, found = model.module(images), folded.module(images)
    except Exception:  # any network may be passed, and may access its removed layers
        return model
    scale = expected.abs().max().clamp(min=1e-6)
    return folded if bool((found - expected).abs().max() <= _TOLERANCE * scale) else model


def _fold(network: nn.Module, conv_path: str, norm_path: str) -> bool:
    """Folds a norm into its conv, in place; returns whether it could."""
    conv, norm = network.get_submodule(conv_path), network.get_submodule(norm_path)
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or _has_hooks(conv) or _has_hooks(norm):
        return False
    if norm.running_mean is None or norm.running_var is None or len(norm.running_mean) != conv.out_channels:
        return False
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    network.set_submodule(norm_path, nn.Identity())
    return True


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
