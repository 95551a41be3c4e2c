"""Finds the networks in a state dict: which names belong to which, under which prefix, and what is left beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from bdprune.errors import BdpruneError
from bdprune.model.architectures.spec import Shapes

_MAX_PARTS = 8
_MAX_PREFIXES = 2000
_WRAPPED = re.compile(r"(?<=\.)_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")
_PRUNED = re.compile(r"(.*)_(orig|mask)")


class Fit(Protocol):
    """What a matcher says of shapes that fit: which of the names are part of the network."""

    @property
    def names(self) -> frozenset[str]:
        """Names as in the checkpoint, without the prefix."""

    @property
    def inner(self) -> str:
        """What stands before these names in the network itself."""

    @property
    def heads(self) -> tuple[int, ...]:
        """The likely number of logits, if that is not known; empty otherwise."""


@dataclass(frozen=True)
class Built:
    """A network that fits, without the weights of the checkpoint.

    Attributes:
        network: on the CPU, or on the meta device.
        name: of the architecture, or ``module:callable``.
        shapes: (C, H, W) that its images may have, the likeliest first.
        num_classes: number of logits; 0 where only a forward pass tells.
    """

    network: nn.Module
    name: str
    shapes: Sequence[tuple[int, int, int]]
    num_classes: int = 0


class Matcher(Protocol):
    """Matches shapes, explains what does not match, and builds what does."""

    def __call__(self, shapes: Shapes, extras: bool) -> Fit | None:
        """The fit, or None. With ``extras``, names outside of the network's own modules are overlooked."""

    def explain(self, shapes: Shapes) -> BdpruneError:
        """Why these shapes do not fit."""

    def build(self, fit: Any) -> Built:
        """The network of a fit."""


@dataclass(frozen=True)
class Found:
    """A network that was found in a state dict.

    Attributes:
        prefix: what stands before its names.
        fit: what the matcher said.
        keys: names without the prefix -> keys of the state dict.
    """

    prefix: str
    fit: Fit
    keys: Mapping[str, str] = field(repr=False)

    @property
    def slots(self) -> list[str]:
        """Keys of the state dict that belong to the network, the masks of pruned weights among them."""
        masks = [mask_of(key) for name, key in self.keys.items() if is_pruned(name, key)]
        return [*self.keys.values(), *masks]


def find_networks(shapes: Shapes, matcher: Matcher) -> tuple[list[Found], list[str]]:
    """All networks in a state dict, and the keys that belong to none.

    The shortest prefix under which all names fit comes first; then one under which names are left over that lie
    outside of the network's modules. What is left is searched again, so a student, its teacher and an average under
    three prefixes are three networks.

    Args:
        shapes: of every tensor of the state dict, by key.
        matcher: says whether shapes under a prefix are those of a network.
    """
    found: list[Found] = []
    left = dict(shapes)
    while left:
        one = _first_fit(left, matcher)
        if one is None:
            break
        found.append(one)
        used = set(one.slots)
        left = {key: shape for key, shape in left.items() if key not in used}
    return found, list(left)


def prefixes_of(shapes: Shapes) -> list[str]:
    """Every prefix under which at least two weights stand, the shortest first; the empty one is always there."""
    counts: Counter[str] = Counter()
    for key, shape in shapes.items():
        if len(shape) >= 2:
            counts.update(_own_prefixes(key))
    several = [prefix for prefix, count in counts.items() if count >= 2]
    return ["", *sorted(several, key=lambda prefix: prefix.count("."))[:_MAX_PREFIXES]]


def merged_masks(keys: Sequence[str]) -> dict[str, str]:
    """Names of weights that torch.nn.utils.prune keeps apart: ``conv.weight`` -> ``conv.weight_orig``."""
    known = set(keys)
    merged = {}
    for key in keys:
        match = _PRUNED.fullmatch(key)
        if match and match[2] == "orig" and f"{match[1]}_mask" in known and match[1] not in known:
            merged[match[1]] = key
    return merged


def is_pruned(name: str, key: str) -> bool:
    """Whether the weight ``name`` is stored at ``key`` without its mask."""
    return key.endswith("_orig") and not name.endswith("_orig")


def mask_of(key: str) -> str:
    """Key of the mask of the weight that is stored at ``key``."""
    return f"{key.removesuffix('_orig')}_mask"


def _first_fit(shapes: Shapes, matcher: Matcher) -> Found | None:
    under = _keys_under(shapes, prefixes_of(shapes))
    for extras in (False, True):
        for prefix, inside in under.items():
            for keys in _readings(inside, prefix):
                fit = matcher({name: shapes[key] for name, key in keys.items()}, extras)
                if fit is not None:
                    return Found(prefix, fit, {name: key for name, key in keys.items() if name in fit.names})
    return None


def _keys_under(shapes: Shapes, prefixes: Sequence[str]) -> dict[str, list[str]]:
    """Keys that begin with each of ``prefixes``, in order; every key is looked at once for each of its own parts."""
    under: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for key in shapes:
        under[""].append(key)
        for prefix in _own_prefixes(key):
            if prefix in under:
                under[prefix].append(key)
    return under


def _own_prefixes(key: str) -> list[str]:
    parts = key.split(".", _MAX_PARTS)[:-1]
    return [".".join(parts[:depth]) + "." for depth in range(1, len(parts) + 1)]


def _readings(inside: Sequence[str], prefix: str) -> Iterator[dict[str, str]]:
    """Names under ``prefix`` -> their keys: as they stand, then without the parts that wrappers put into the middle of
    names, then with pruned weights and their masks as one.
    """
    keys = {key.removeprefix(prefix): key for key in inside}
    yield keys
    plain = {_WRAPPED.sub("", name): key for name, key in keys.items()}
    if len(plain) == len(keys) and plain.keys() != keys.keys():
        yield plain
    merged = merged_masks(list(keys))
    if merged:
        masks = {f"{name}_mask" for name in merged}
        apart = set(merged.values())
        plain = {name: key for name, key in keys.items() if name not in masks | apart}
        yield plain | {name: keys[original] for name, original in merged.items()}
