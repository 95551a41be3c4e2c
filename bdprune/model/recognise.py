"""Recognises the architecture of a state dict, and its entries that belong to the network, by names and shapes."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import nn

from bdprune.errors import ArchitectureError, BdpruneError
from bdprune.files import quoted
from bdprune.model.architectures import REGISTRY, architecture
from bdprune.model.architectures.spec import Architecture, Settings, Shapes

_MAX_PARTS = 8
_MAX_PREFIXES = 2000
_WRAPPED = re.compile(r"(?<=\.)_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")
_PRUNED = re.compile(r"(.*)_(orig|mask)")


class Fit(Protocol):
    """A matcher's result for shapes that fit: the names that belong to the network."""

    @property
    def names(self) -> frozenset[str]:
        """Names as in the checkpoint, without the prefix."""

    @property
    def inner(self) -> str:
        """Prefix of these names in the network itself."""

    @property
    def heads(self) -> tuple[int, ...]:
        """The likely number of logits, if it is not known; otherwise empty."""


@dataclass(frozen=True)
class Built:
    """A network that fits, without the weights of the checkpoint.

    Attributes:
        network: on the CPU, or on the meta device.
        name: name of the architecture, or ``module:callable``.
        shapes: possible shapes (C, H, W) of its images, the likeliest first.
        num_classes: number of logits; 0 if only a forward pass can find it.
    """

    network: nn.Module
    name: str
    shapes: Sequence[tuple[int, int, int]]
    num_classes: int = 0


class Matcher(Protocol):
    """Matches shapes, explains mismatches, and builds the matching network."""

    def __call__(self, shapes: Shapes, extras: bool) -> Fit | None:
        """The fit, or None. With ``extras``, names outside the network's own modules are ignored."""

    def explain(self, shapes: Shapes) -> BdpruneError:
        """Why these shapes do not fit."""

    def build(self, fit: Any) -> Built:
        """The network of a fit."""


@dataclass(frozen=True)
class Found:
    """A network found in a state dict.

    Attributes:
        prefix: prefix of its names.
        fit: result of the matcher.
        keys: names without the prefix -> keys of the state dict.
    """

    prefix: str
    fit: Fit
    keys: Mapping[str, str] = field(repr=False)

    @property
    def slots(self) -> list[str]:
        """Keys of the state dict that belong to the network, including the masks of pruned weights."""
        masks = [mask_of(key) for name, key in self.keys.items() if is_pruned(name, key)]
        return [*self.keys.values(), *masks]


def find_networks(shapes: Shapes, matcher: Matcher) -> tuple[list[Found], list[str]]:
    """All networks in a state dict, and the keys that belong to none of them.

    The shortest prefix under which all names fit comes first; then a prefix under which the remaining names lie outside
    the network's modules. The remaining keys are searched again, so a student, its teacher and an average under three
    prefixes are three networks.

    Args:
        shapes: shape of every tensor of the state dict, by key.
        matcher: decides whether the shapes under a prefix are those of a network.
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
    """Every prefix shared by at least two weights, the shortest first; always includes the empty one."""
    counts: Counter[str] = Counter()
    for key, shape in shapes.items():
        if len(shape) >= 2:
            counts.update(_own_prefixes(key))
    several = [prefix for prefix, count in counts.items() if count >= 2]
    return ["", *sorted(several, key=lambda prefix: prefix.count("."))[:_MAX_PREFIXES]]


def merged_masks(keys: Sequence[str]) -> dict[str, str]:
    """Names of weights that torch.nn.utils.prune stores separately: ``conv.weight`` -> ``conv.weight_orig``."""
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
    """Key of the mask for the weight stored at ``key``."""
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
    """Keys that begin with each of ``prefixes``, in order; reads each key once for each of its parts."""
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
    """Names under ``prefix`` -> their keys: unchanged, then without the parts that wrappers insert into names, then
    with pruned weights merged with their masks.
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


_NEAREST = 3
_DIFFERENCES = 3
_OWN = "If it is a network of your own, name the callable that builds it: --arch module:callable."


@dataclass(frozen=True)
class Recognised:
    """An architecture whose names and shapes fit a state dict.

    Attributes:
        name: registered name.
        settings: arguments of the architecture's ``make``.
        input_size: height and width of the images.
        names: names of the network among those that it was compared with.
    """

    name: str
    settings: Settings
    input_size: int
    names: frozenset[str]
    inner: str = ""
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class KnownMatcher:
    """Matches shapes with all registered architectures, or with one of them.

    Args:
        arch: the only architecture to try; None tries all.
    """

    arch: str | None = None

    def __call__(self, shapes: Shapes, extras: bool) -> Recognised | None:
        """The architecture that fits.

        Raises:
            ArchitectureError: more than one fits.
        """
        entries = [architecture(self.arch)] if self.arch else list(REGISTRY.values())
        fits = [found for entry in entries if (found := _fit(entry, shapes, extras))]
        if len(fits) > 1:
            names = ", ".join(found.name for found in fits)
            raise ArchitectureError(f"The checkpoint fits several architectures: {names}.", "Choose one with --arch.")
        return fits[0] if fits else None

    def explain(self, shapes: Shapes) -> ArchitectureError:
        """The error for shapes that fit no architecture: names the nearest ones, and how they differ."""
        entries = [architecture(self.arch)] if self.arch else list(REGISTRY.values())
        return ArchitectureError(_nearest(entries, shapes, self.arch), _OWN)

    def build(self, fit: Recognised) -> Built:
        """The network on the meta device: names and shapes without memory."""
        shape = (fit.settings["in_channels"], fit.input_size, fit.input_size)
        return Built(_skeleton(REGISTRY[fit.name], fit.settings), fit.name, [shape], fit.settings["num_classes"])


def differences(expected: Shapes, found: Shapes) -> list[str]:
    """The differences between the two, in words, worst first: shapes, missing names, unknown names."""
    wrong = [
        f"{quoted(name)} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    missing = [f"{quoted(name)} is missing" for name in expected if name not in found and not _optional(name)]
    unknown = [f"{quoted(name)} {found[name]} is not part of it" for name in found if name not in expected]
    return wrong + missing + unknown


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fits(expected: Shapes, found: Shapes, extras: bool) -> bool:
    """Whether ``found`` has all names and shapes of ``expected``, and no other names.

    With ``extras`` it may have other names, if their first part is not the name of a module of ``expected``: a name
    inside a module would change what that module computes.
    """
    if any(
        found.get(name) != shape and not (name not in found and _optional(name)) for name, shape in expected.items()
    ):
        return False
    own = {name.partition(".")[0] for name in expected}
    unknown = found.keys() - expected.keys()
    return not unknown or (extras and not any(name.partition(".")[0] in own for name in unknown))


def _fit(entry: Architecture, shapes: Shapes, extras: bool) -> Recognised | None:
    settings = entry.read(shapes) if entry.may_fit(shapes) else None
    if settings is None:
        return None
    expected = _expected(entry.name, tuple(settings.items()))
    if expected is None or not fits(expected, shapes, extras):
        return None
    size, own = settings.get("input_size", entry.input_size), frozenset(shapes.keys() & expected.keys())
    return Recognised(entry.name, settings, size, own)


def _skeleton(entry: Architecture, settings: Settings) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a width read from another architecture can make a layer empty
        return entry.make(**settings).eval()


@lru_cache(maxsize=256)
def _expected(name: str, settings: tuple[tuple[str, Any], ...]) -> Shapes | None:
    """Names and shapes of the network; None if a hostile width makes a tensor too large."""
    try:
        return shapes_of(_skeleton(REGISTRY[name], dict(settings)).state_dict())
    except (RuntimeError, ValueError, TypeError, OverflowError, ZeroDivisionError):
        return None


def _optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _nearest(entries: Iterable[Architecture], shapes: Shapes, arch: str | None) -> str:
    """One sentence with the candidates for which most shapes fit."""
    ranked = []
    for entry in entries:
        settings = entry.read(shapes) or {"num_classes": 10, "in_channels": 3, "width": entry.width}
        expected = _expected(entry.name, tuple(settings.items()))
        if expected is not None:
            same = sum(shapes.get(name) == shape for name, shape in expected.items())
            ranked.append((same / max(len({*expected, *shapes}), 1), entry.name, differences(expected, shapes)))
    ranked.sort(key=lambda item: (-item[0], item[1]))
    near = [item for item in ranked[:_NEAREST] if item[0] > 0 or arch]
    if not near:
        first = ", ".join(f"{quoted(name)} {shape}" for name, shape in list(shapes.items())[:_DIFFERENCES])
        return f"The checkpoint has nothing in common with any known architecture; it begins with {first}."
    listed = "; ".join(_described(name, share, differs) for share, name, differs in near)
    subject = f"The checkpoint is not a {arch}" if arch else "The checkpoint fits no known architecture; nearest"
    return f"{subject}: {listed}."


def _described(name: str, share: float, differs: list[str]) -> str:
    first = ", ".join(differs[:_DIFFERENCES])
    more = f" and {len(differs) - _DIFFERENCES} more" if len(differs) > _DIFFERENCES else ""
    return f"{name} ({share:.0%} of the tensors agree: {first}{more})"
