"""Recognises an architecture from the names and shapes of a state dict: exactly, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from bdprune.errors import ArchitectureError
from bdprune.files import quoted
from bdprune.model.architectures import REGISTRY, architecture
from bdprune.model.architectures.spec import Architecture, Settings, Shapes
from bdprune.model.match import Built

_NEAREST = 3
_DIFFERENCES = 3
_OWN = "If it is a network of your own, name the callable that builds it: --arch module:callable."


@dataclass(frozen=True)
class Recognised:
    """An architecture that fits a state dict name by name and shape by shape.

    Attributes:
        name: of the registry.
        settings: arguments of the architecture's ``make``.
        input_size: height and width of the images.
        names: those that are its own among the names that it was compared with.
    """

    name: str
    settings: Settings
    input_size: int
    names: frozenset[str]
    inner: str = ""
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class KnownMatcher:
    """Matches shapes with the registry, or with one of its architectures.

    Args:
        arch: name of the only architecture to try; None tries all.
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
        """The error for shapes that fit no architecture: the nearest ones, and how they differ."""
        entries = [architecture(self.arch)] if self.arch else list(REGISTRY.values())
        return ArchitectureError(_nearest(entries, shapes, self.arch), _OWN)

    def build(self, fit: Recognised) -> Built:
        """The network on the meta device: names and shapes without memory."""
        shape = (fit.settings["in_channels"], fit.input_size, fit.input_size)
        return Built(_skeleton(REGISTRY[fit.name], fit.settings), fit.name, [shape], fit.settings["num_classes"])


def differences(expected: Shapes, found: Shapes) -> list[str]:
    """How ``found`` differs from ``expected``, in words, worst first: shapes, missing names, unknown names."""
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
    """Whether ``found`` has all names and shapes of ``expected``, and no others.

    With ``extras`` it may have others whose first part is not the name of a module of ``expected``: a name inside of
    one would change what that module computes.
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
        warnings.simplefilter("ignore")  # a width read off another architecture can leave a layer without elements
        return entry.make(**settings).eval()


@lru_cache(maxsize=256)
def _expected(name: str, settings: tuple[tuple[str, Any], ...]) -> Shapes | None:
    """Names and shapes of the network; None when a hostile width makes it too large for any tensor."""
    try:
        return shapes_of(_skeleton(REGISTRY[name], dict(settings)).state_dict())
    except (RuntimeError, ValueError, TypeError, OverflowError, ZeroDivisionError):
        return None


def _optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _nearest(entries: Iterable[Architecture], shapes: Shapes, arch: str | None) -> str:
    """One sentence with the candidates of which most shapes fit."""
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
    told = "; ".join(_told(name, share, differs) for share, name, differs in near)
    subject = f"The checkpoint is no {arch}" if arch else "The checkpoint fits no known architecture; nearest"
    return f"{subject}: {told}."


def _told(name: str, share: float, differs: list[str]) -> str:
    first = ", ".join(differs[:_DIFFERENCES])
    more = f" and {len(differs) - _DIFFERENCES} more" if len(differs) > _DIFFERENCES else ""
    return f"{name} ({share:.0%} of the tensors agree: {first}{more})"
