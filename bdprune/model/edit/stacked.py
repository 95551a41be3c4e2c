"""G networks of one architecture as one network, whose layers process G batches in one call."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.model.handle import Model, Normalized
from bdprune.ops import masked_conv2d, stacked_conv2d

_PROBE = 2  # images on which the logits of a stack are compared with those of its models
_TOLERANCE = 1e-3  # of the largest logit: covers only a different order of summation


class StackedNetwork(nn.Module):
    """The models with their normalisations: the same images ``[N, C, H, W]`` in [0, 1] -> ``[G, N, K]``.

    Between its layers the batches of all models are concatenated, ``[G * N, C, H, W]``, so layers that process each
    image separately run unchanged. Convs, linear layers and batch norms, which have parameters, are replaced by
    variants with G sets. Parameters and buffers keep the models' names, with G as their first axis.

    Args:
        models: of one architecture, on one device, in eval mode; they do not change.
        own: paths of the layers that have G sets of parameters; None for all layers. The other layers are those of the
            first model and run on the images of all models at once. In eval mode the result is the same if the models
            differ only in ``own``.
        frozen: no parameter will change. If the same model is given G times, all share one copy of its parameters,
            through an axis of stride 0; each still has its own buffers.

    Raises:
        ValueError: :func:`why_not` gives a reason.
    """

    def __init__(self, models: Sequence[Model], own: Container[str] | None = None, frozen: bool = False) -> None:
        super().__init__()
        objection = why_not(models)
        if objection:
            raise ValueError(f"these models cannot be stacked: {objection}")
        self.models = tuple(models)
        self.network = copy.deepcopy(models[0].network)
        self._normalizations = [Normalized(nn.Identity(), model.normalization).to(model.device) for model in models]
        shared = frozen and all(model is models[0] for model in models)
        for path, child in list(self.network.named_modules()):
            kind = _KINDS.get(type(child))
            if kind is not None and (own is None or path in own):
                _stack_up(child, kind, [model.network.get_submodule(path) for model in models], shared)

    def forward(self, images: Tensor) -> Tensor:
        return self.of_each([images] * len(self._normalizations))

    def of_each(self, images: Sequence[Tensor]) -> Tensor:
        """Logits ``[G, N, K]`` of the models for images of their own, N ``[C, H, W]`` in [0, 1] for each."""
        parts = [module.normalize(own) for module, own in zip(self._normalizations, images, strict=True)]
        logits: Tensor = self.network(torch.cat(parts))
        return logits.view(len(parts), len(images[0]), -1)

    def arrange(self, channels_last: bool) -> None:
        """Converts the conv weights of every model to that memory format, in place."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for child in self.network.modules():
            if isinstance(child, StackedConv2d):
                weight = child.weight.data
                one = _shared(weight)
                if one is None:
                    child.weight.data = weight.flatten(0, 1).contiguous(memory_format=layout).view(weight.shape)
                else:
                    child.weight.data = one.contiguous(memory_format=layout).expand(weight.shape)

    def model(self, index: int, state: Mapping[str, Tensor] | None = None) -> Model:
        """A copy of model ``index`` with the present parameters and buffers of the stack, or those of ``state``."""
        network, state = copy.deepcopy(self.models[index].network), state or self.network.state_dict()
        network.load_state_dict({name: value[index] for name, value in state.items()})
        return self.models[index].with_network(network)


def why_not(models: Sequence[Model]) -> str:
    """Why these models cannot be stacked, in words; empty if they can."""
    first = models[0]
    shapes = _shapes(first)
    for model in models[1:]:
        if (type(model.network), model.num_classes, model.input_shape) != (
            type(first.network),
            first.num_classes,
            first.input_shape,
        ):
            return f"{model.arch} is not a {first.arch} of the same size"
        if _shapes(model) != shapes:
            return "their parameters differ in shape"
        if model.device != first.device:
            return "they are on different devices"
    for path, child in first.network.named_modules():
        if any(True for _ in child.named_parameters(recurse=False)) or any(True for _ in child.buffers(recurse=False)):
            if type(child) not in _KINDS:
                return f"{path or 'the network'} has parameters in a layer type that cannot be stacked"
            if isinstance(child, nn.BatchNorm2d) and (child.momentum is None or not child.track_running_stats):
                return f"{path} keeps no running average"
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            return f"{path} uses random numbers"
    return ""


@torch.no_grad()
def agrees(stacked: StackedNetwork) -> bool:
    """Whether the stack and its models give the same logits for a few images: a forward pass can hide differences."""
    first = stacked.models[0]
    images = torch.rand(_PROBE, *first.input_shape, generator=torch.Generator().manual_seed(0)).to(first.device)
    with without_tf32():
        alone = {id(model): model.module(images) for model in {id(model): model for model in stacked.models}.values()}
        expected = torch.stack([alone[id(model)] for model in stacked.models])
        try:
            found = stacked(images)
        except Exception:  # any kind of network may be passed, and may raise anything
            return False
    scale = expected.abs().max().clamp(min=1e-6)
    return bool((found - expected).abs().max() <= _TOLERANCE * scale)


@contextmanager
def without_tf32() -> Iterator[None]:
    """TF32 rounding alone, over many layers, would look like a different function."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int], str | tuple[int, int], tuple[int, int]]:
    """``x`` with any non-zero padding applied, and the stride, padding and dilation still to apply."""
    stride, dilation = (conv.stride[0], conv.stride[1]), (conv.dilation[0], conv.dilation[1])
    if conv.padding_mode != "zeros":
        return functional.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), stride, (0, 0), dilation
    padding = conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1])
    return x, stride, padding, dilation


class StackedConv2d(nn.Conv2d):
    """G convs on ``[G * N, I, H, W]``; weight ``[G, O, I, kh, kw]``, times the mask ``[G, O]`` if there is one."""

    mask: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        x, stride, padding, dilation = padded(self, x)
        batches, one = _unfold(x, len(self.weight)), _shared(self.weight)
        weight, bias = (self.weight, self.bias) if one is None else (one, _shared(self.bias))
        if self.mask is not None:
            where: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": self.groups}
            z = masked_conv2d(batches, weight, self.mask, bias, **where)
        elif one is not None:
            return functional.conv2d(x, weight, bias, stride, padding, dilation, self.groups)
        else:
            z = stacked_conv2d(batches, weight, bias, stride, padding, dilation, self.groups)
        return z.flatten(0, 1)


class StackedLinear(nn.Linear):
    """G linear layers on ``[G * N, I]``; weight ``[G, O, I]``."""

    def forward(self, x: Tensor) -> Tensor:
        one = _shared(self.weight)
        if one is not None:
            return functional.linear(x, one, _shared(self.bias))
        product = torch.bmm(_unfold(x, len(self.weight)), self.weight.mT)
        if isinstance(self.bias, Tensor):
            product = product + self.bias.unsqueeze(1)
        return product.flatten(0, 1)


class StackedBatchNorm2d(nn.BatchNorm2d):
    """G batch norms on ``[G * N, C, H, W]``, each over its own batch; parameters and statistics ``[G, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        return self._jointly(x) if x.is_cuda else self._in_turn(x)

    def _in_turn(self, x: Tensor) -> Tensor:
        """One call for each model, without copies."""
        parts = [
            self._normalized(batch, *(None if value is None else value[g] for value in self._values()))
            for g, batch in enumerate(_unfold(x, self._stack))
        ]
        return torch.cat(parts)

    def _jointly(self, x: Tensor) -> Tensor:
        """One call for all models, as G * C channels: fewer launches, but a copy before and after."""
        wide = _unfold(x, self._stack).transpose(0, 1).flatten(1, 2)
        flat = self._normalized(wide, *(None if value is None else value.reshape(-1) for value in self._values()))
        apart: Tensor = flat.unflatten(1, (self._stack, -1))
        return apart.transpose(0, 1).flatten(0, 1)

    @property
    def _stack(self) -> int:
        assert self.running_mean is not None
        return len(self.running_mean)

    def _values(self) -> tuple[Tensor | None, ...]:
        return self.running_mean, self.running_var, self.weight, self.bias

    def _normalized(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        assert self.momentum is not None
        return functional.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: StackedConv2d,
    nn.Linear: StackedLinear,
    nn.BatchNorm2d: StackedBatchNorm2d,
}


def _shapes(model: Model) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.network.state_dict().items()}


def _stack_up(child: nn.Module, kind: type[nn.Module], all_models: Sequence[nn.Module], shared: bool) -> None:
    """Turns ``child`` into its stacked kind in place, with the parameters and buffers of all models."""
    child.__class__ = kind
    if issubclass(kind, nn.Conv2d):
        child.register_buffer("mask", None, persistent=False)
    for name, parameter in list(child.named_parameters(recurse=False)):
        if shared:
            values = parameter.detach().expand(len(all_models), *parameter.shape)
        else:
            values = torch.stack([one.get_parameter(name).detach() for one in all_models])
        setattr(child, name, nn.Parameter(values, parameter.requires_grad and not shared))
    for name, _ in list(child.named_buffers(recurse=False)):
        setattr(child, name, torch.stack([one.get_buffer(name) for one in all_models]))


def _shared(values: Tensor | None) -> Tensor | None:
    """The value shared by all models, or None if each has its own."""
    return values[0] if values is not None and len(values) > 1 and values.stride(0) == 0 else None


def _unfold(x: Tensor, stack: int) -> Tensor:
    """``[G * N, *]`` as ``[G, N, *]``."""
    return x.view(stack, len(x) // stack, *x.shape[1:])
