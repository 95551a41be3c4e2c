"""Networks built by a user's own callable, named as ``module:callable``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdprune.errors import ArchitectureError, OptionError, first_line
from bdprune.model.architectures.spec import Shapes
from bdprune.model.recognise import Built, differences, fits, shapes_of

_SIZES = (32, 28, 64, 48, 56, 96, 112, 128, 224, 299)
_MOST_COUNTS = 4


def check_own_weights(network: nn.Module) -> None:
    """Checks that the weight of every conv is a parameter: a change of a computed one would be lost.

    Raises:
        ArchitectureError: a weight is computed from other parameters, as weight normalisation does.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and "weight" not in layer._parameters:
            raise ArchitectureError(
                f"The weight of {name or 'the module'} is computed from other parameters, so it cannot be pruned.",
                "Remove its weight or spectral normalisation (torch.nn.utils.parametrize.remove_parametrizations).",
            )


@dataclass(frozen=True)
class OwnNetwork:
    """A user's own network that fits a part of a checkpoint.

    Attributes:
        names: its names in the checkpoint, without the checkpoint's prefix.
        inner: prefix of these names in the network itself, if the callable wraps the saved network.
        num_classes: passed to the callable; None if it takes no number.
        shapes: possible shapes (C, H, W) of its images, the likeliest first.
        heads: rows of its last matrix: most likely the number of logits.
    """

    names: frozenset[str]
    inner: str
    num_classes: int | None
    shapes: tuple[tuple[int, int, int], ...]
    heads: tuple[int, ...] = ()


class OwnMatcher:
    """Compares the callable's network with shapes.

    Args:
        arch: ``module:callable``; it is imported, and called with ``num_classes`` if it takes that or ``**kwargs``.
        num_classes: number of logits; None tries the numbers that the shapes of the checkpoint suggest.

    Raises:
        OptionError: it cannot be imported or is not callable.
    """

    def __init__(self, arch: str, num_classes: int | None) -> None:
        self._arch, self._function, self._given = arch, import_callable(arch), num_classes
        self._parameters = _parameters(self._function)
        self._names: frozenset[str] = frozenset()
        self._expected: dict[int | None, dict[str, tuple[int, ...]] | OptionError] = {}

    def __call__(self, shapes: Shapes, extras: bool) -> OwnNetwork | None:
        """The network that fits, built for the matching number of classes.

        Raises:
            OptionError: the callable fails, or returns something other than a network.
        """
        if self._names and self._names.isdisjoint(shapes):
            return None  # the number of classes changes shapes, not names
        for count, expected in self._networks(shapes):
            self._names = self._names or frozenset(_inside(expected))
            for inner in _inner_prefixes(expected):
                inside = {name.removeprefix(inner): shape for name, shape in expected.items()}
                if not inside.keys() & shapes.keys():
                    continue
                if fits(inside, shapes, extras):
                    return OwnNetwork(frozenset(inside.keys() & shapes.keys()), inner, count, *_guesses(inside))
        return None

    def build(self, fit: OwnNetwork) -> Built:
        """A network with its own parameters."""
        return Built(self._call(fit.num_classes), self._arch, fit.shapes)

    def explain(self, shapes: Shapes) -> ArchitectureError:
        """The error for a checkpoint that does not hold the network: how ``shapes`` differ from it."""
        differs = min((differences(expected, shapes) for _, expected in self._networks(shapes)), key=len)
        hint = "Name the callable that built the network of this checkpoint (--arch), and --num-classes if it needs it."
        return ArchitectureError(f"The checkpoint is not a {self._arch}: {', '.join(differs[:3])}.", hint)

    def _counts(self, shapes: Shapes) -> list[int | None]:
        """Numbers of classes to try: the given one, or the rows of the last matrices and of the 1x1 kernels."""
        own = self._parameters.get("num_classes")
        takes = own is not None or any(one.kind is one.VAR_KEYWORD for one in self._parameters.values())
        if self._given is not None or not takes:
            return [self._given if takes else None]
        heads = [shape[0] for shape in shapes.values() if len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))]
        counts: list[int | None] = [*list(dict.fromkeys(reversed(heads)))[:_MOST_COUNTS]]
        needs = own is not None and own.default is own.empty
        return counts if needs and counts else [*counts, None]

    def _networks(self, shapes: Shapes) -> list[tuple[int | None, dict[str, tuple[int, ...]]]]:
        """Names and shapes of the network for each possible number of classes.

        Raises:
            OptionError: the callable fails for all of them.
        """
        counts = self._counts(shapes)
        made = [(count, self._shapes(count)) for count in counts]
        worked = [(count, expected) for count, expected in made if not isinstance(expected, OptionError)]
        failed = [expected for _, expected in made if isinstance(expected, OptionError)]
        if not worked:
            raise failed[0]
        return worked

    def _shapes(self, count: int | None) -> dict[str, tuple[int, ...]] | OptionError:
        if count not in self._expected:
            try:
                self._expected[count] = shapes_of(self._call(count).state_dict())
            except OptionError as error:  # the number was only a guess
                self._expected[count] = error
        return self._expected[count]

    def _call(self, count: int | None) -> nn.Module:
        try:
            with torch.random.fork_rng(devices=[]), _working_directory_first():
                network = self._function(**({} if count is None else {"num_classes": count}))
        except (Exception, SystemExit) as error:
            if count is not None and isinstance(error, TypeError) and "num_classes" in str(error):
                return self._call(None)  # it passes **kwargs on to a callable without num_classes
            raise OptionError(
                f"{self._arch} raised {type(error).__name__}: {first_line(error)}.",
                "It is called with num_classes (--num-classes) if it takes that, else without arguments. If it needs "
                "more, let --arch name a function of your own without arguments.",
            ) from error
        if not isinstance(network, nn.Module):
            raise OptionError(
                f"{self._arch} returned a {type(network).__name__}, which is not a torch.nn.Module.",
                "Let --arch name another callable.",
            )
        return _ready(network, self._arch)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _ready(network: nn.Module, arch: str) -> nn.Module:
    """The network on the CPU in float32, with all its parameters."""
    hint = "Let --arch name a callable that returns a network with all of its parameters, in plain PyTorch."
    if isinstance(network, torch.jit.ScriptModule):
        raise OptionError(f"{arch} returned a TorchScript module, which cannot be trained or traced.", hint)
    try:
        network = network.cpu().float()
        shapes_of(network.state_dict())
    except Exception as error:  # parameters on the meta device, or of a lazy layer
        raise OptionError(f"{arch} returned a network without parameters: {first_line(error)}.", hint) from error
    return network


def import_callable(arch: str) -> Callable[..., Any]:
    """The callable that ``module:callable`` names.

    Raises:
        OptionError: the module cannot be imported, or does not have that callable.
    """
    module_name, _, attribute = arch.partition(":")
    try:
        with _working_directory_first():
            value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # importing a script may exit
        hint = "Give --arch module:callable, with a module that Python can import from this directory."
        raise OptionError(f"Cannot import {arch}: {type(error).__name__}: {first_line(error)}.", hint) from error
    if not callable(value):
        hint = "Let --arch name a class or a function."
        raise OptionError(f"{arch} is a {type(value).__name__}, not callable.", hint)
    return value  # type: ignore[no-any-return]


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Unlike ``python -m``, a console script does not search the working directory for modules."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _inside(expected: Shapes) -> set[str]:
    """Names of the network without each of its inner prefixes."""
    return {name.removeprefix(inner) for inner in _inner_prefixes(expected) for name in expected}


def _inner_prefixes(expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The empty prefix, and each prefix that all names of the network share."""
    result = [""]
    while True:
        part = {name.removeprefix(result[-1]).partition(".")[0] for name in expected}
        longer = f"{result[-1]}{part.pop()}." if len(part) == 1 else ""
        if not longer or not all(name.startswith(longer) for name in expected):
            return result
        result.append(longer)


def _guesses(expected: Shapes) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...]]:
    """Possible shapes of its images, from its kernels' channels and usual sizes; and the rows of its last matrix."""
    heads = tuple(shape[0] for shape in expected.values() if len(shape) == 2)[-1:]
    channels = list(dict.fromkeys(shape[1] for shape in expected.values() if len(shape) == 4 and shape[1] <= 4)) or [3]
    return tuple((count, size, size) for size in _SIZES for count in channels), heads
