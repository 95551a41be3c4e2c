"""A network whose only learnable parameters are masks: one number in [0, 1] for each filter."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bdprune.model.edit.stacked import StackedConv2d, StackedNetwork, padded
from bdprune.model.handle import Model
from bdprune.ops import channel_scale, masked_conv2d


class MaskedNetwork(nn.Module):
    """``model`` with a mask on the filters of every group: images ``[N, C, H, W]`` in [0, 1] -> logits ``[N, K]``.

    If exactly one norm consumes a conv, the mask multiplies the norm's scale, which costs nothing:
    y = (mask * gamma) * (x - mean) / std + beta, so a filter with mask 0 still outputs the constant beta. Otherwise the
    mask multiplies the conv's output, bias included. If the forward pass only uses the conv's weight
    (``F.conv2d(x, conv.weight)``), the mask multiplies its weight and bias.

    Only the masks require a gradient. ``train()`` and ``eval()`` act on a private copy of the network, whose running
    statistics may change; ``model`` never changes.

    Args:
        model: any loaded model; or a stack of models, which this network then owns, with masks
            ``[G, num_filters]`` and logits ``[G, N, K]``.

    Source: Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021; Li et al., Reconstructive Neuron Pruning, ICML 2023.
    """

    def __init__(self, model: Model | StackedNetwork) -> None:
        super().__init__()
        if isinstance(model, StackedNetwork):
            first = model.models[0]
            leading: tuple[int, ...] = (len(model.models),)
            self.network: nn.Module = model.requires_grad_(False)
        else:
            first, leading = model, ()
            self.network = copy.deepcopy(model.module).requires_grad_(False)
        self._groups = first.groups
        ones = [torch.ones(*leading, group.num_filters, device=first.device) for group in first.groups]
        self.mask_list = nn.ParameterList([nn.Parameter(one) for one in ones])
        for group in first.groups:
            if group.norm is None and group.as_module:
                _mask_output(self.network.get_submodule(f"network.{group.conv}"))
        for child in self.network.modules():
            if isinstance(child, nn.GroupNorm):
                child.register_forward_pre_hook(_with_gradient)

    @property
    def masks(self) -> dict[str, nn.Parameter]:
        """The masks ``[num_filters]`` by the name of their group, in the order of ``Model.groups``."""
        return {group.name: mask for group, mask in zip(self._groups, self.mask_list, strict=True)}

    @torch.no_grad()
    def clamp_(self) -> MaskedNetwork:
        """Clips every mask to [0, 1]."""
        for mask in self.mask_list:
            mask.clamp_(0, 1)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return functional_call(self.network, self._overrides(), (images,))  # type: ignore[no-any-return]

    def _overrides(self) -> dict[str, Tensor]:
        """Masked scales of the norms, and masks of the convs without such a norm, by their path in the network."""
        overrides: dict[str, Tensor] = {}
        factors: dict[str, list[tuple[int, Tensor]]] = {}
        for group, mask in zip(self._groups, self.mask_list, strict=True):
            if group.norm is None and group.as_module:
                overrides[f"network.{group.conv}.mask"] = mask
            elif group.norm is None:
                conv = self.network.get_submodule(f"network.{group.conv}")
                for name, parameter in conv.named_parameters(recurse=False):
                    overrides[f"network.{group.conv}.{name}"] = parameter * mask.view(-1, *[1] * (parameter.ndim - 1))
            else:
                factors.setdefault(group.norm.name, []).append((group.norm.start, mask))
        for name, slices in factors.items():
            gamma = self.network.get_parameter(f"network.{name}.weight")
            overrides[f"network.{name}.weight"] = gamma * _whole(slices, gamma.shape[-1])
        return overrides


def _with_gradient(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """PyTorch crashes if a group norm in channels-last layout needs the gradient of its scale but not of its input."""
    x, *others = inputs
    return (x if x.requires_grad else x.detach().requires_grad_(), *others)


def _whole(slices: list[tuple[int, Tensor]], channels: int) -> Tensor:
    """Joins the masks of channel ranges into one, ``[..., channels]``; channels without a mask get 1."""
    if len(slices) == 1 and slices[0][1].shape[-1] == channels:
        return slices[0][1]
    parts: list[Tensor] = []
    reached = 0
    for start, mask in sorted(slices, key=lambda item: item[0]):
        parts += [mask.new_ones(*mask.shape[:-1], start - reached), mask]
        reached = start + mask.shape[-1]
    return torch.cat([*parts, mask.new_ones(*mask.shape[:-1], channels - reached)], -1)


class MaskedConv2d(nn.Conv2d):
    """A conv whose output channels are multiplied by the buffer ``mask`` ``[out_channels]``."""

    mask: Tensor

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, stride, padding, dilation = padded(self, input)
        return masked_conv2d(
            x, weight, self.mask, bias, stride=stride, padding=padding, dilation=dilation, groups=self.groups
        )


class _ScaledConv2d:
    """The same for a subclass with its own forward pass."""

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return channel_scale(super().forward(x), self.mask)  # type: ignore[misc]


def _mask_output(conv: nn.Module) -> None:
    """Turns ``conv`` into its masked kind in place, so that its path and parameters stay the same."""
    assert isinstance(conv, nn.Conv2d)
    if isinstance(conv, StackedConv2d):
        conv.mask = conv.weight.new_ones(conv.weight.shape[:2])
        return
    kind = type(conv)
    plain = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    conv.__class__ = MaskedConv2d if plain else type(f"Masked{kind.__name__}", (_ScaledConv2d, kind), {})
    conv.register_buffer("mask", conv.weight.new_ones(conv.out_channels), persistent=False)
