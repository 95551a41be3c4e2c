"""The channels that a network loses if a filter is removed, found with Torch-Pruning (Fang et al., CVPR 2023)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from bdprune.errors import ArchitectureError, OptionError, first_line
from bdprune.model.channels import is_depthwise, sizes

Side = Literal["outputs", "inputs"]


@dataclass
class Coupled:
    """What must go with one filter.

    Attributes:
        parts: (path of a layer, side) -> its channels.
        stop: why the filter cannot be removed; empty if nothing forbids it.
    """

    parts: dict[tuple[str, Side], set[int]] = field(default_factory=dict)
    stop: str = ""


class Couplings:
    """Finds the coupled channels of the filters of one network.

    Args:
        network: takes ``[N, C, H, W]``; a copy of it is traced.
        input_shape: (C, H, W).

    Raises:
        OptionError: Torch-Pruning is not installed.
        ArchitectureError: it cannot trace the network.
    """

    def __init__(self, network: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self._library = torch_pruning()
        self._network = copy.deepcopy(network).eval().requires_grad_(True)
        self._names = {id(layer): path for path, layer in self._network.named_modules()}
        images = torch.zeros(2, *input_shape, device=next(network.parameters()).device)
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph = self._library.DependencyGraph().build_dependency(self._network, images, verbose=False)
        except Exception as error:  # any kind of network may be passed, and may raise anything
            what = f"Torch-Pruning cannot trace the network: {type(error).__name__}: {first_line(error)}."
            raise ArchitectureError(what, "Repair it with another --mode.") from error

    def of(self, conv: str, filters: Sequence[int]) -> dict[int, Coupled]:
        """The coupled channels of each of these filters of a conv."""
        layer = self._network.get_submodule(conv)
        if layer not in self._graph.module2node:
            return {index: Coupled(stop=f"{conv} is not called as a layer") for index in filters}
        try:
            group = self._graph.get_pruning_group(layer, self._library.prune_conv_out_channels, list(filters))
        except Exception as error:
            reason = f"Torch-Pruning cannot follow its channels: {type(error).__name__}"
            return {index: Coupled(stop=reason) for index in filters}
        found = {index: Coupled() for index in filters}
        for item in group:
            self._add(item, found)
        return found

    def _add(self, item: Any, found: dict[int, Coupled]) -> None:
        """Adds one member of a group to the filters that it belongs to."""
        target = item.dep.target.module
        path = self._names.get(id(target))
        stop = "" if path is None else _stop(path, target)
        if path is None and isinstance(target, self._library.ops._OutputOp):
            stop = "its channels are outputs of the network"
        elif path is None and isinstance(target, nn.Parameter):
            stop = "a parameter outside the layers is added to its channels or multiplies them"
        out = is_depthwise(target) or self._graph.is_out_channel_pruning_fn(item.dep.handler)
        side: Side = "outputs" if out else "inputs"
        size = sizes(target) if path is not None else None
        for channel, root in zip(item.idxs, item.root_idxs, strict=True):
            if stop:
                found[root].stop = stop
            elif size is not None and not 0 <= channel < size[not out]:  # it does not know every operator
                found[root].stop = "Torch-Pruning cannot follow its channels"
            elif path is not None and size is not None:
                found[root].parts.setdefault((path, side), set()).add(int(channel))


def _stop(path: str, layer: nn.Module) -> str:
    """Why a layer cannot lose channels; empty if it can, or if it has none of its own."""
    if sizes(layer) is not None or next(layer.parameters(), None) is None:
        return ""
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return f"the statistics of the norm {path} are those of several channels"
    return f"{path} is a {type(layer).__name__}{' with groups' if isinstance(layer, nn.Conv2d) else ''}"


def torch_pruning() -> ModuleType:
    """The library Torch-Pruning.

    Raises:
        OptionError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning as library
    except ImportError as error:
        raise OptionError("The mode compact needs Torch-Pruning.", "Install it: pip install torch-pruning") from error
    return library  # type: ignore[no-any-return]
