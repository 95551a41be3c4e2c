"""Loads a checkpoint file as a ``Model``: safe reading, recognition, building, strict loading of weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor, nn

from bdprune import files
from bdprune.errors import ArchitectureError, ArtifactError, BdpruneError, OptionError
from bdprune.model.compact_match import CompactFit, CompactMatcher
from bdprune.model.description import read_description
from bdprune.model.handle import Model, Normalization
from bdprune.model.outputs import give_logits
from bdprune.model.own_network import OwnMatcher
from bdprune.model.recognise import (
    Found,
    KnownMatcher,
    Matcher,
    find_networks,
    is_pruned,
    mask_of,
    prefixes_of,
    shapes_of,
)

Shape: TypeAlias = tuple[int, int, int]
_GIVE_KEY = "Choose one of them with --state-key."


@dataclass(frozen=True)
class Unloaded:
    """A set of weights that could not be loaded: its name in the file, and the reason."""

    name: str
    error: BdpruneError


@dataclass(frozen=True)
class Loaded:
    """The models loaded from one file, one for every set of weights, the preferred one first.

    Attributes:
        models: at least one.
        unloaded: sets of weights that fit no network.
    """

    models: tuple[Model, ...]
    unloaded: tuple[Unloaded, ...] = ()


class LoadOptions(TypedDict, total=False):
    """Options for reading a checkpoint.

    Attributes:
        arch: registered name, or ``module:callable``, which is imported and run (your own code); None recognises the
            architecture.
        num_classes: expected number of logits; passed to the callable if it takes it.
        normalize: normalisation that the network expects of images in [0, 1]; None for none.
        input_shape: (channels, height, width) of the images; None takes the size that the architecture was made for.
        state_key: name of the set of weights to load; None takes trained weights before averaged ones.
    """

    arch: str | None
    num_classes: int | None
    normalize: Normalization | None
    input_shape: Shape | None
    state_key: str | None


def load(path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Model:
    """Loads a checkpoint without running anything in it; the network is float32, on the CPU, in eval mode.

    If the weights have fewer channels than their architecture, the description next to them (``PATH.arch.json``, which
    ``save`` wrote) says which.

    Args:
        path: safetensors or torch file (zip or legacy), or the index of shards; wrappers and prefixes are detected.
        options: see ``LoadOptions``.

    Raises:
        ArtifactError: the file is missing, damaged or hostile, or its weights are quantised, NaN or infinite.
        UnsupportedError: the file is not a checkpoint.
        ArchitectureError: the architecture is unknown or ambiguous, or the tensors do not fit it.
        OptionError: ``arch`` or ``input_shape`` is invalid.

    Example:
        >>> load("resnet20.th").arch                       # doctest: +SKIP
        'resnet20_cifar'
    """
    loaded = load_all(path, **options)
    first, *others = loaded.models
    assert first.artifact is not None
    names = [_named(one.artifact.state_key) for one in others if one.artifact is not None]
    left = [f"{name}: not loaded, because one model was asked for" for name in names]
    return replace(first, artifact=replace(first.artifact, left_out=(*first.artifact.left_out, *left)))


def load_all(path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Loaded:
    """Loads every set of weights in a checkpoint: student and teacher, averages, several models.

    Arguments and errors are those of :func:`load`; errors and artifacts call the file ``str(path)``. Sets that fit no
    network are returned as ``unloaded`` if another one fits; if none does, the error of the first is raised.
    """
    unknown = options.keys() - LoadOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}")
    arch, state_key = options.get("arch"), options.get("state_key")
    input_shape, num_classes = options.get("input_shape"), options.get("num_classes")
    if input_shape is not None and min(input_shape) < 1:
        raise OptionError(f"Invalid input shape {input_shape}.", "Give channels, height and width in pixels.")
    checkpoint = files.read_checkpoint(path)
    matcher: Matcher = OwnMatcher(arch, num_classes) if arch and ":" in arch else KnownMatcher(arch)
    compact = read_description(checkpoint.path) if files.description_path(checkpoint.path).exists() else ()
    matcher = CompactMatcher(matcher, compact, checkpoint.path) if compact else matcher
    try:
        files.check_expansion(_all_tensors(checkpoint), checkpoint.bytes)
        sets = _sets(checkpoint, matcher)
        chosen, unloaded = _choose(sets, state_key)
    except ArchitectureError as error:
        if files.is_shard(checkpoint.path):
            raise ArchitectureError(error.message, f"It is one shard of several. {files.GIVE_INDEX}") from None
        raise
    except ArtifactError as error:
        raise type(error)(f"Cannot load {path}: {error.message}", error.hint) from None
    models: list[Model] = []
    for one in chosen:
        try:
            model = _build(checkpoint, one, matcher, input_shape, num_classes)
            models.append(replace(model, normalization=options.get("normalize") or Normalization()))
        except BdpruneError as error:
            unloaded.append(Unloaded(one.name, _naming(path, error)))
    if not models:
        raise unloaded[0].error
    left = [f"{_named(one.name)}: {one.error.message}" for one in unloaded]
    left += [f"{_named(one.name)}: not chosen" for one in sets if state_key is not None and one not in chosen]
    names = tuple(one.name for one in sets)
    return Loaded(tuple(_knowing(model, path, names, tuple(left)) for model in models), tuple(unloaded))


@dataclass(frozen=True, eq=False)
class _Set:
    """One network in the file: its name, its state dict, and the match found there."""

    name: str
    home: files.StateDict
    found: Found | None
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    error: BdpruneError | None = None


def _all_tensors(checkpoint: files.Checkpoint) -> dict[str, Tensor]:
    return {
        f"{number}/{name}": tensor
        for number, state in enumerate(checkpoint.contents.states)
        for name, tensor in state.tensors().items()
    }


def _sets(checkpoint: files.Checkpoint, matcher: Matcher) -> list[_Set]:
    return [one for state in checkpoint.contents.states for one in _sets_in(state, matcher)]


def _sets_in(state: files.StateDict, matcher: Matcher) -> list[_Set]:
    """The networks in one state dict; one set without a network if it has none."""
    tensors = state.tensors()
    shapes = shapes_of(tensors)
    try:
        found, left = find_networks(shapes, matcher)
    except BdpruneError as error:
        return [_Set(state.name, state, None, error=error)]
    if not found:
        common = _common_prefix(shapes)
        stripped = {name.removeprefix(common): shape for name, shape in shapes.items()}
        return [_Set(state.name, state, None, error=_with_hint(matcher.explain(stripped), shapes))]
    weights = tuple(name for name in left if files.is_weight_name(name, tensors[name]))
    used = {key for one in found for key in one.slots} | set(weights)
    kept = tuple(str(key) for key in state.state if key not in used)
    names = [state.name] if len(found) == 1 else [_joined(state.name, one.prefix) for one in found]
    return [_Set(name, state, one, weights, kept) for name, one in zip(names, found, strict=True)]


def _with_hint(error: BdpruneError, names: Mapping[str, Any]) -> BdpruneError:
    """``error`` with a better hint if the names show how the network was changed before it was saved."""
    ends = {name.rpartition(".")[2] for name in names}
    if {"weight_g", "weight_v"} <= ends or {"original0", "original1"} <= ends:
        hint = "Remove weight normalisation (torch.nn.utils.parametrize.remove_parametrizations) and save it again."
    elif "weight_u" in ends:
        hint = "Call torch.nn.utils.remove_spectral_norm on its layers and save it again."
    elif "weight_orig" in ends:
        hint = "Call torch.nn.utils.prune.remove on its layers and save it again."
    else:
        return error
    return type(error)(error.message, hint)


def _joined(state: str, prefix: str) -> str:
    return "/".join(filter(None, (state, prefix.removesuffix("."))))


def _common_prefix(shapes: Mapping[str, Any]) -> str:
    """The longest common prefix of all names."""
    shared = [prefix for prefix in prefixes_of(shapes) if all(name.startswith(prefix) for name in shapes)]
    return shared[-1]


def _choose(sets: list[_Set], state_key: str | None) -> tuple[list[_Set], list[Unloaded]]:
    """The sets to build, and the sets that cannot be built.

    Raises:
        ArtifactError: no set has the name ``state_key``, or several do.
    """
    if state_key is not None:
        named = [one for one in sets if state_key in (one.name, *map(files.join_path, one.home.paths))]
        exact = [one for one in named if one.name == state_key] or named
        if len(exact) != 1:
            names = ", ".join(_named(files.quoted(one.name) if one.name else "") for one in sets)
            found = "several sets" if exact else "no set"
            raise ArtifactError(f"it holds {found} of weights named {state_key!r}; it holds {names}.", _GIVE_KEY)
        sets = exact
    fitting = [one for one in sets if one.found is not None]
    failed = [Unloaded(one.name, one.error) for one in sets if one.found is None and one.error is not None]
    if not fitting:
        raise failed[0].error
    return fitting, failed


def _build(
    checkpoint: files.Checkpoint,
    one: _Set,
    matcher: Matcher,
    input_shape: tuple[int, int, int] | None,
    num_classes: int | None,
) -> Model:
    assert one.found is not None
    built = matcher.build(one.found.fit)
    known, channels = ":" not in built.name, built.shapes[0][0]
    if known and input_shape is not None and input_shape[0] != channels:
        _, height, width = input_shape
        hint = f"Give --input-shape {channels}x{height}x{width}, or omit it."
        raise ArchitectureError(f"The model takes images of {channels} channels, not {input_shape[0]}.", hint)
    slots = _slots(one)
    _fill(built.network, one, slots)
    built.network.eval().requires_grad_(True)
    compact = one.found.fit.compact if isinstance(one.found.fit, CompactFit) else None
    if not known or compact or input_shape is not None or built.num_classes == 1:
        expected = num_classes or next(iter(one.found.fit.heads), None)
        shape, count = _first_that_runs(built.network, [input_shape] if input_shape else built.shapes, expected)
    else:
        shape, count = built.shapes[0], built.num_classes
    if num_classes is not None and num_classes != count:
        hint = f"Omit --num-classes, or give a checkpoint with {num_classes} classes."
        raise ArchitectureError(f"The model has {count} classes, not {num_classes}.", hint)
    return Model(built.network, built.name, count, shape, artifact=_artifact(checkpoint, one, slots), compact=compact)


def _first_that_runs(network: nn.Module, shapes: Sequence[Shape], num_classes: int | None) -> tuple[Shape, int]:
    """The first of ``shapes`` that the network accepts, and the number of its logits."""
    first: ArchitectureError | None = None
    for shape in shapes:
        try:
            return shape, give_logits(network, shape, num_classes)
        except ArchitectureError as error:
            first = first or error
    assert first is not None
    raise first


def _slots(one: _Set) -> dict[str, files.Slot]:
    """The place of every tensor of the network in the file, by key."""
    assert one.found is not None
    tensors = one.home.state
    slots: dict[str, files.Slot] = {}
    for short, key in one.found.keys.items():
        name, tensor = one.found.fit.inner + short, tensors[key]
        if is_pruned(short, key):
            mask_key = mask_of(key)
            mask = tensors[mask_key]
            slots[key] = files.Slot(name, tensor.dtype, tensor, mask)
            slots[mask_key] = files.Slot(name, mask.dtype, tensor, mask, is_mask=True)
        else:
            slots[key] = files.Slot(name, tensor.dtype, tensor if tensor.dtype == torch.float64 else None)
    return slots


def _fill(network: nn.Module, one: _Set, slots: Mapping[str, files.Slot]) -> None:
    """Loads the tensors of the set into ``network``, each converted to the network's dtype."""
    expected: dict[str, Tensor] = network.state_dict()
    state: dict[str, Tensor] = {}
    for key, slot in slots.items():
        if slot.name not in expected or slot.is_mask:
            continue
        tensor = one.home.state[key]
        if slot.mask is not None:
            tensor = _masked(key, tensor, slot.mask)
        state[slot.name] = files.with_dtype(key, tensor, expected[slot.name].dtype)
    checked = {name for name, _ in network.named_parameters()}
    checked |= {name for name in state if name.endswith(("running_mean", "running_var"))}
    files.check_finite({name: value for name, value in state.items() if name in checked})
    for name, value in expected.items():
        if name not in state:  # only num_batches_tracked can be missing
            state[name] = torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value
    network.load_state_dict(state, assign=any(value.is_meta for value in expected.values()))


def _masked(key: str, original: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != original.shape or not original.is_floating_point():
        raise ArtifactError(
            f"the mask of {files.quoted(key)} has shape {tuple(mask.shape)}, the weight {tuple(original.shape)}.",
            "Call torch.nn.utils.prune.remove on the network before saving it.",
        )
    return original * mask.to(original.dtype)


def _artifact(checkpoint: files.Checkpoint, one: _Set, slots: Mapping[str, files.Slot]) -> files.Artifact:
    """Everything that ``save`` needs besides the network, without second copies of values that the network holds."""
    assert one.found is not None
    places = one.home.paths
    given = {key: None for key, slot in slots.items() if slot.original is None}
    return files.Artifact(
        path=checkpoint.path,
        format=checkpoint.format,
        bytes=checkpoint.bytes,
        sha256=checkpoint.sha256,
        state_key=one.name,
        prefix=one.found.prefix,
        unscanned=(*one.left, *checkpoint.contents.outside),
        kept=(*one.kept, *(f"{name} (the state of an optimiser)" for name in checkpoint.contents.optimisers)),
        places=places,
        slots=dict(slots),
        checkpoint=files.with_values(checkpoint.value, places, given),
        metadata=checkpoint.metadata,
        shards=checkpoint.shards,
        index_metadata=checkpoint.index_metadata,
    )


def _knowing(model: Model, path: str | os.PathLike[str], sets: tuple[str, ...], left_out: tuple[str, ...]) -> Model:
    """``model`` with the name of its file, and those of the other sets of weights in it."""
    assert model.artifact is not None
    return replace(model, artifact=replace(model.artifact, path=Path(str(path)), sets=sets, left_out=left_out))


def _named(name: str) -> str:
    return name or "the checkpoint itself"


def _naming(path: str | os.PathLike[str], error: BdpruneError) -> BdpruneError:
    """An ``ArtifactError`` that names its file; other errors are about the model."""
    if isinstance(error, ArtifactError):
        return type(error)(f"Cannot load {path}: {error.message}", error.hint)
    return error
