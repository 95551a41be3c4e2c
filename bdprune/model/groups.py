"""Pairs every conv with the norm that consumes its output, by tracing one forward pass.

The order in which modules are declared does not show this (in a pre-activation network the norm comes before the
conv). So one small image is sent through the network, and every tensor is labelled, channel by channel, with the conv
that produced it. Operators that act on each channel separately (activations, pooling, spatial padding) pass the labels
on, concatenation and channel slices rearrange them, and all others drop them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from bdprune.errors import ArchitectureError, first_line

# More than one, so that the batch dimension is not mistaken for a dimension that merges with the channels.
_IMAGES = 2


@dataclass(frozen=True)
class NormSlice:
    """Channels ``[start, start + num_filters)`` of the norm module ``name``."""

    name: str
    start: int


@dataclass(frozen=True)
class FilterGroup:
    """The filters of one conv and the norms that consume them.

    Attributes:
        name: path of the conv module; unique.
        conv: path of the conv module.
        num_filters: its output channels.
        norms: every norm with a learned scale that consumes all of its filters, in order of execution.
        exclusive: whether the filters reach the rest of the network only through those norms, and those channels of
            the norms take no other input.
        as_module: whether the conv is called as a module; if not, only its weight is used
            (``F.conv2d(x, conv.weight)``).
        is_parallel: whether it is a 1x1 conv that takes the input of an earlier conv, as in the shortcut of a residual
            block.
    """

    name: str
    conv: str
    num_filters: int
    norms: tuple[NormSlice, ...] = ()
    exclusive: bool = True
    as_module: bool = True
    is_parallel: bool = False

    @property
    def norm(self) -> NormSlice | None:
        """The norm whose scale can carry the filters' mask: the only consumer, with no other input."""
        return self.norms[0] if len(self.norms) == 1 and self.exclusive else None


def last_group(groups: Sequence[FilterGroup]) -> FilterGroup:
    """The last conv of the main path: a shortcut runs after the convs of its block, but is not the last layer.

    Args:
        groups: in order of execution, not empty.
    """
    return next((group for group in reversed(groups) if not group.is_parallel), groups[-1])


_OURS = "bdprune.model.architectures."
_traced: dict[Hashable, tuple[FilterGroup, ...]] = {}


def groups_of(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[FilterGroup, ...]:
    """:func:`trace_groups`, cached for every shape of the known architectures: a folder of models has few.

    The layers and shapes of a known architecture determine its forward pass.
    """
    if not type(network).__module__.startswith(_OURS):
        return trace_groups(network, input_shape)
    layers = tuple((path, type(layer)) for path, layer in network.named_modules())
    shapes = tuple((name, value.shape) for name, value in network.state_dict().items())
    key = layers, shapes, input_shape
    if key not in _traced:
        _traced[key] = trace_groups(network, input_shape)
    return _traced[key]


def trace_groups(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[FilterGroup, ...]:
    """Every conv that runs in one forward pass of ``network`` in eval mode, in order of execution.

    Args:
        network: takes ``[N, C, H, W]``; its parameters, buffers and mode do not change.
        input_shape: (C, H, W).

    Raises:
        ArchitectureError: the forward pass fails.
    """
    private = _private(network)
    tracer = _Tracer(private)
    images = torch.zeros(_IMAGES, *input_shape, device=next(network.parameters()).device)
    try:
        with torch.no_grad(), tracer:
            output = private(images)
    except Exception as error:
        hint = "Give the size of the images that the network takes."
        raise ArchitectureError(
            f"The network cannot take images of shape {input_shape}: {first_line(error)}.", hint
        ) from error
    tracer.leak(output)
    return tracer.groups()


def _private(network: nn.Module) -> nn.Module:
    """A copy in eval mode with the same parameters (eval mode only reads them) and its own buffers."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()}
    return copy.deepcopy(network, memo).eval()


@dataclass(frozen=True)
class _Run:
    """``length`` adjacent channels: those of ``conv`` from ``start`` on, or of no conv (``conv`` is None)."""

    conv: str | None
    start: int
    length: int


_Origin: TypeAlias = tuple[_Run, ...]
_Rule: TypeAlias = "Callable[[_Tracer, dict[str, Any], Any], list[_Origin | None]]"


class _Tracer(TorchDispatchMode):
    """Labels each tensor with the origin of its channels (dimension 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins: MutableMapping[Tensor, _Origin] = WeakTensorKeyDictionary()
        self.convs: dict[int, tuple[str, int]] = {}
        self.norms: dict[int, str] = {}
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                self.convs.setdefault(id(module.weight), (name, module.out_channels))
                module.register_forward_hook(partial(self.called, name))
            elif isinstance(module, _BatchNorm) and module.weight is not None:
                self.norms.setdefault(id(module.weight), name)
            elif _scales_channels(module):
                module.register_forward_pre_hook(partial(self.enter, name))
        self.sizes: dict[str, int] = {}
        self.consumers: dict[str, dict[NormSlice, None]] = {}
        self.inputs: dict[str, list[_Origin]] = {}
        self.leaking: set[str] = set()
        self.ran: set[str] = set()
        self.read: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        self.parallel: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        named = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        origins = _rule(func.overloadpacket.__name__)(self, named, outputs)
        for output, origin in zip(outputs, origins, strict=False):
            if isinstance(output, Tensor):
                self.label(output, origin)
        return result

    def label(self, tensor: Tensor, origin: _Origin | None) -> None:
        if origin is not None and any(run.conv for run in origin):
            self.origins[tensor] = origin
        else:
            self.origins.pop(tensor, None)

    def origin(self, tensor: Any) -> _Origin | None:
        return self.origins.get(tensor) if isinstance(tensor, Tensor) else None

    def leak(self, values: object) -> None:
        """Records that the convs of ``values`` reach something other than a norm."""
        for value in values if isinstance(values, (tuple, list)) else (values,):
            self.leaking.update(run.conv for run in self.origin(value) or () if run.conv)

    def called(self, name: str, conv: nn.Conv2d, inputs: object, output: Tensor) -> None:
        """Labels the output of a conv module that computes its weight in its forward pass: ``convolve`` misses it."""
        self.ran.add(name)
        if self.origin(output) is None:
            self.sizes.setdefault(name, conv.out_channels)
            self.label(output, (_Run(name, 0, conv.out_channels),))

    def convolve(self, named: dict[str, Any], outputs: list[Any]) -> list[_Origin | None]:
        self.leak(named["input"])
        found = self.convs.get(id(named["weight"]))
        if found is None:
            return []
        name, channels = found
        if named["input"] in self.read and named["weight"].shape[2:] == (1, 1):
            self.parallel.add(name)
        self.read[named["input"]] = None
        self.sizes.setdefault(name, channels)
        return [(_Run(name, 0, channels),)]

    def enter(self, norm: str, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The input of a norm that computes its statistics with other operators, without its labels."""
        tensor, *others = inputs
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or tensor.shape[1] != len(module.get_parameter("weight")):
            return None
        self.consume(norm, tensor)
        tensor = tensor.detach()
        self.label(tensor, None)
        return tensor, *others

    def normalise(self, named: dict[str, Any], outputs: list[Any]) -> list[_Origin | None]:
        norm = self.norms.get(id(named.get("weight")))
        if norm is None:
            return self.end(named, outputs)
        self.consume(norm, named["input"])
        return []

    def consume(self, norm: str, tensor: Tensor) -> None:
        """Records which filters a norm takes, and at which of its channels."""
        origin = self.origin(tensor) or (_Run(None, 0, tensor.shape[1]),)
        self.inputs.setdefault(norm, []).append(origin)
        for position, run in _placed(origin):
            if run.conv and run.length == self.sizes[run.conv]:
                self.consumers.setdefault(run.conv, {})[NormSlice(norm, position)] = None
            elif run.conv:
                self.leaking.add(run.conv)

    def end(self, named: dict[str, Any], outputs: list[Any]) -> list[_Origin | None]:
        for value in named.values():
            self.leak(value)
        return []

    def channelwise(self, named: dict[str, Any], outputs: list[Any]) -> list[_Origin | None]:
        """The first argument's labels, if batch and channels keep their place and no other labels are mixed in."""
        first, *others = named.values()
        if _same_channels(first, outputs[0]) and not any(_is_map(other) for other in others):
            return [self.origin(first)]
        return self.end(named, outputs)

    def concatenate(self, named: dict[str, Any], outputs: list[Any]) -> list[_Origin | None]:
        if named.get("dim", 0) not in (1, 1 - outputs[0].ndim):
            return self.end(named, outputs)
        runs: list[_Run] = []
        for tensor in named["tensors"]:
            runs.extend(self.origin(tensor) or (_Run(None, 0, tensor.shape[1]),))
        return [_merged(runs)]

    def split(self, named: dict[str, Any], outputs: list[Any]) -> list[_Origin | None]:
        """Pieces along the channels, or along other dimensions except the batch."""
        tensor = next(iter(named.values()))
        dim = named.get("dim", 0) % tensor.ndim
        origin = self.origin(tensor)
        if dim > 1:
            return [origin] * len(outputs)
        if origin is None or dim == 0 or named.get("step", 1) != 1:
            return self.end(named, outputs)
        start = named.get("start") or 0
        starts = [start % tensor.shape[1]] if start else [0]
        for output in outputs[:-1]:
            starts.append(starts[-1] + output.shape[1])
        return [_cut(origin, first, output.shape[1]) for first, output in zip(starts, outputs, strict=True)]

    def groups(self) -> tuple[FilterGroup, ...]:
        """The groups found, in order of execution."""
        return tuple(self._group(name, size) for name, size in self.sizes.items())

    def _group(self, conv: str, size: int) -> FilterGroup:
        norms = tuple(self.consumers.get(conv, ()))
        alone = all(self._feeds_alone(conv, size, norm) for norm in norms)
        exclusive = alone and conv not in self.leaking
        return FilterGroup(conv, conv, size, norms, exclusive, conv in self.ran, conv in self.parallel)

    def _feeds_alone(self, conv: str, size: int, norm: NormSlice) -> bool:
        expected = (norm.start, _Run(conv, 0, size))
        return all(expected in _placed(origin) for origin in self.inputs[norm.name])


def _scales_channels(module: nn.Module) -> bool:
    """Whether a norm other than batch norm has a scale for each channel (dimension 1).

    ``nn.LayerNorm`` itself scales the last dimensions; a subclass with its own forward pass (ConvNeXt) takes channels
    first.
    """
    if isinstance(module, nn.LayerNorm):
        return (
            type(module).forward is not nn.LayerNorm.forward and module.weight is not None and module.weight.ndim == 1
        )
    return isinstance(module, nn.GroupNorm | _InstanceNorm) and module.weight is not None


def _rule(operator: str) -> _Rule:
    if operator == "convolution":
        return _Tracer.convolve
    if "batch_norm" in operator:
        return _Tracer.normalise
    if operator == "cat":
        return _Tracer.concatenate
    if operator in ("split", "split_with_sizes", "slice"):
        return _Tracer.split
    return _Tracer.channelwise if operator.rstrip("_") in _CHANNELWISE else _Tracer.end


# Operators whose output channel c depends only on input channel c. ``_same_channels`` also checks the shapes, so that
# padding the channels or flattening the image into them drops the labels.
# fmt: off
_CHANNELWISE = frozenset({
    "relu", "leaky_relu", "_prelu_kernel", "elu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "log_sigmoid_forward", "abs", "neg", "exp", "square", "sqrt",
    "clamp", "clamp_min", "clamp_max", "threshold", "mul", "add", "sub", "div", "native_dropout", "bernoulli",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax",
    "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_bicubic2d", "clone", "alias", "detach", "_to_copy", "contiguous", "view", "_unsafe_view", "reshape",
    "squeeze", "unsqueeze", "as_strided",
})
# fmt: on


def _same_channels(tensor: Any, output: Any) -> bool:
    is_pair = isinstance(tensor, Tensor) and isinstance(output, Tensor)
    return is_pair and tensor.ndim >= 2 and tensor.shape[:2] == output.shape[:2]


def _is_map(value: Any) -> bool:
    """Whether ``value`` is a tensor with values for every image, not a setting, weight or scalar."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == _IMAGES


def _placed(origin: _Origin) -> Iterator[tuple[int, _Run]]:
    """Each run with the position of its first channel."""
    position = 0
    for run in origin:
        yield position, run
        position += run.length


def _merged(runs: Sequence[_Run]) -> _Origin:
    """Merges adjacent runs that continue each other."""
    result: list[_Run] = []
    for run in runs:
        last = result[-1] if result else None
        if last and last.conv == run.conv and (run.conv is None or last.start + last.length == run.start):
            result[-1] = _Run(run.conv, last.start, last.length + run.length)
        else:
            result.append(run)
    return tuple(result)


def _cut(origin: _Origin, start: int, length: int) -> _Origin:
    """Channels ``[start, start + length)`` of ``origin``."""
    runs = []
    for position, run in _placed(origin):
        first, last = max(start, position), min(start + length, position + run.length)
        if first < last:
            runs.append(_Run(run.conv, run.start + first - position, last - first))
    return _merged(runs)
