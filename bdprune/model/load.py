"""From a checkpoint file to a ``Model``: read safely, recognised, built, weights loaded strictly."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdprune.errors import ArchitectureError, ArtifactError, OptionError, first_line
from bdprune.model.artifact import Artifact, read_artifact
from bdprune.model.handle import Model, Normalization
from bdprune.model.recognise import differences, recognise, shapes_of
from bdprune.model.state import Found, prefixes, to_float32

_DEFAULT_SIZE = 32


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    normalize: Normalization | None = None,
    input_size: int | tuple[int, int] | None = None,
) -> Model:
    """Loads a checkpoint without running anything in it; the network is float32, on the CPU, in eval mode.

    Args:
        path: safetensors or torch file (zip or legacy); wrappers and prefixes are found by themselves.
        arch: name of the registry, or ``module:callable`` (which imports and runs that code of yours); None
            recognises the architecture.
        num_classes: number of logits, to check it; needed only by a callable whose last tensor does not tell.
        normalize: what the network expects to be applied to images in [0, 1]; None is nothing.
        input_size: height and width of the images; None takes what the architecture is made for.

    Raises:
        ArtifactError: the file is missing, damaged or hostile, or its weights are quantised, NaN or infinite.
        UnsupportedError: the file is no checkpoint.
        ArchitectureError: the architecture is unknown or ambiguous, or the tensors do not fit it.
        OptionError: ``arch`` or ``input_size`` cannot work.

    Example:
        >>> load("resnet20.th").arch                       # doctest: +SKIP
        'resnet20_cifar'
    """
    artifact, found = read_artifact(path)
    try:
        tensors = to_float32(found.tensors(), artifact.bytes)
    except ArtifactError as error:
        raise type(error)(f"Cannot load {path}: {error.message}", error.mend) from None
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and min(size) < 1:
        raise OptionError(f"The input size is {size}.", "Give the height and width of the images in pixels.")
    if arch is not None and ":" in arch:
        model, prefix = _own(arch, tensors, num_classes, size or (_DEFAULT_SIZE, _DEFAULT_SIZE))
    else:
        model, prefix = _known(arch, tensors, size)
    if num_classes is not None and num_classes != model.num_classes:
        mend = "Leave num_classes out, or give the checkpoint that has so many classes."
        raise ArchitectureError(f"The model has {model.num_classes} classes, not {num_classes}.", mend)
    kept = _keep(artifact, found, model.network, prefix)
    return replace(model, artifact=kept, normalization=normalize or Normalization())


def _known(arch: str | None, tensors: Mapping[str, Tensor], size: tuple[int, int] | None) -> tuple[Model, str]:
    prefix = prefixes(tensors)[-1]
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    recognised = recognise(shapes_of(state), arch)
    network = recognised.skeleton()
    for name in network.state_dict():
        state.setdefault(name, torch.tensor(0))  # only num_batches_tracked can be missing
    network.load_state_dict(state, assign=True)
    network.requires_grad_(True)
    height, width = size or (recognised.input_size, recognised.input_size)
    model = Model(network, recognised.name, recognised.num_classes, (recognised.in_channels, height, width))
    if size is not None:
        _num_logits(network, model.input_shape)
    return model, prefix


def _own(arch: str, tensors: Mapping[str, Tensor], num_classes: int | None, size: tuple[int, int]) -> tuple[Model, str]:
    """A network of the user's own: the first prefix with which the tensors fit is taken off."""
    if num_classes is None:
        num_classes = next((tensor.shape[0] for tensor in reversed(list(tensors.values())) if tensor.ndim == 2), None)
    network = _call(arch, num_classes)
    expected = shapes_of(network.state_dict())
    tried = [(prefix, {name.removeprefix(prefix): t for name, t in tensors.items()}) for prefix in prefixes(tensors)]
    prefix, state = min(tried, key=lambda item: len(differences(expected, shapes_of(item[1]))))
    differs = differences(expected, shapes_of(state))
    if differs:
        mend = "Give the callable that built the network of this checkpoint, and num_classes if it needs it."
        raise ArchitectureError(f"The checkpoint is no {arch}: {', '.join(differs[:3])}.", mend)
    network.load_state_dict({**network.state_dict(), **state})
    network.eval().requires_grad_(True)
    channels = next((tensor.shape[1] for tensor in state.values() if tensor.ndim == 4), 3)
    shape = (channels, *size)
    return Model(network, arch, _num_logits(network, shape), shape), prefix


def _call(arch: str, num_classes: int | None) -> nn.Module:
    function = _import(arch)
    accepts = "num_classes" in _parameters(function)
    try:
        with torch.random.fork_rng(devices=[]), _working_directory_first():
            network = function(**({"num_classes": num_classes} if accepts and num_classes else {}))
    except (Exception, SystemExit) as error:
        message = f"{arch} raised {type(error).__name__}: {first_line(error)}."
        raise OptionError(message, "It is called with num_classes if it takes that, else with nothing.") from error
    if not isinstance(network, nn.Module):
        raise OptionError(f"{arch} returned a {type(network).__name__}, no torch.nn.Module.", "Name another callable.")
    return network.cpu().float()


def _import(arch: str) -> Callable[..., Any]:
    module_name, _, attribute = arch.partition(":")
    try:
        with _working_directory_first():
            value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (Exception, SystemExit) as error:  # a script ends the program where it is imported
        mend = "Give arch as module:callable, with a module that Python can import from here."
        raise OptionError(f"Cannot import {arch}: {type(error).__name__}: {first_line(error)}.", mend) from error
    if not callable(value):
        raise OptionError(f"{arch} is a {type(value).__name__}, not callable.", "Name a class or function.")
    return value  # type: ignore[no-any-return]


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """A console script, unlike ``python -m``, does not look for modules where it is run."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _num_logits(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Number of logits, by one forward pass."""
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, *shape))
    except Exception as error:
        mend = "Give the height and width of the images it was trained on as input_size."
        raise ArchitectureError(
            f"The network cannot take images of shape {shape}: {first_line(error)}.", mend
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ArchitectureError(f"The network gives {found} instead of logits of shape (1, classes).")
    return logits.shape[1]


def _keep(artifact: Artifact, found: Found, network: nn.Module, prefix: str) -> Artifact:
    """The artifact with all that ``save`` needs beside the network."""
    dtypes: dict[str, torch.dtype | None] = {}
    kept: dict[str, Any] = {}
    own = network.state_dict().keys()
    for key, value in found.state.items():
        dtypes[key] = value.dtype if isinstance(value, Tensor) else None
        if key.removeprefix(prefix) not in own or dtypes[key] == torch.float64:
            kept[key] = value
    checkpoint = _hollow(artifact.checkpoint, found.keys)
    return replace(artifact, prefix=prefix, dtypes=dtypes, kept=kept, checkpoint=checkpoint)


def _hollow(checkpoint: Any, keys: tuple[str, ...]) -> Any:
    """``checkpoint`` without the state dict at ``keys``; its dicts on the way there are copied."""
    if not keys:
        return type(checkpoint)()
    outer = checkpoint.copy()
    outer[keys[0]] = _hollow(checkpoint[keys[0]], keys[1:])
    return outer
