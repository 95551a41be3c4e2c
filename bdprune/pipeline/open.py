"""The first step of a scan, a repair and a scoring: loads the model and the clean data, and checks the options."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeGuard, Unpack

import torch
from torch import nn

from bdprune.analysis import Case, Sanity, check_sanity, fit_size
from bdprune.data import (
    ClassOrder,
    CleanData,
    SizedDataset,
    check_clean,
    check_per_class,
    load_clean,
    read_order,
    resize_clean,
    sample_per_class,
)
from bdprune.errors import ArchitectureError, DataError, OptionError, SanityError, first_line
from bdprune.hub import PREFIX, HubFile, one_file
from bdprune.model import (
    Loaded,
    Model,
    Normalization,
    architecture,
    check_own_weights,
    give_logits,
    import_callable,
    load_all,
    parse_normalization,
)
from bdprune.model import load as load_one
from bdprune.record import parse_shape
from bdprune.runtime import Precision, check_precision, plain_torch

Stages: TypeAlias = Callable[[str], None]
ModelSource: TypeAlias = Model | nn.Module | str | os.PathLike[str]
DataSource: TypeAlias = CleanData | SizedDataset | str | os.PathLike[str] | None


def is_local(model: object) -> TypeGuard[ModelSource]:
    """Whether ``model`` is a path of this machine or a model in memory, and nothing on the Hub."""
    if isinstance(model, str):
        return not model.startswith(PREFIX)
    return isinstance(model, os.PathLike | nn.Module | Model) and not isinstance(model, HubFile)


LARGEST_SEED = 2**63 - 1
"""The largest seed that every generator accepts."""


class OptionNames(TypedDict, total=False):
    """Keyword arguments of a scan, a repair and a scoring; :class:`Options` describes them."""

    arch: str | None
    num_classes: int | None
    input_shape: tuple[int, int, int] | str | None
    normalize: Normalization | str | Sequence[float] | None
    device: str
    seed: int
    state_key: str | None
    per_class: int | None
    class_order: ClassOrder
    precision: Precision | None
    skip_unknown: bool
    max_download: int | None


@dataclass(frozen=True)
class Options:
    """How to load a model and its clean data, and how to compute.

    Args:
        arch: registry name or ``module:callable``; None recognises it.
        num_classes: number of logits; None derives it from the weights.
        input_shape: (channels, height, width) of one image, or ``3x32x32``; None derives it from the architecture and
            the images.
        normalize: the normalisation of the model's images: a name, numbers, or None for none.
        device: where to run: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        seed: seed of all random numbers, not negative.
        state_key: name of one set of weights in a file that holds several; None means all, or the first if one model
            is needed.
        per_class: maximum number of clean images of each class; None takes all.
        class_order: how labels of the data map to labels of the model: ``number`` (unchanged), ``text`` (numbered
            folders in text order, as ImageFolder numbers them), a map, or the path of a JSON file with a map.
        precision: of training methods that are given by name: ``winograd``, ``float32``, ``bfloat16`` or ``auto``
            (``runtime/precision.py``); None is their default.
        skip_unknown: allow the verdict ``clean`` although some weights could not be scanned.
        max_download: maximum number of bytes to download from one repository on the Hub; None allows 10 GiB.

    Raises:
        OptionError: the seed is out of range.
    """

    arch: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    normalize: Normalization | str | None = None
    device: str = "cpu"
    seed: int = 0
    state_key: str | None = None
    per_class: int | None = None
    class_order: ClassOrder = None
    precision: Precision | None = None
    skip_unknown: bool = False
    max_download: int | None = None

    def __post_init__(self) -> None:
        shape: Any = self.input_shape
        pair: Any = self.normalize
        if isinstance(shape, str):  # as on the command line
            object.__setattr__(self, "input_shape", parse_shape(shape))
        if isinstance(pair, list | tuple):
            object.__setattr__(self, "normalize", ",".join(map(str, pair)))
        if not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            hint = f"Give a whole number from 0 to {LARGEST_SEED}."
            raise OptionError(f"Invalid seed {str(self.seed)[:80]}.", hint)

    def normalization(self) -> Normalization | None:
        """The normalisation as numbers."""
        return parse_normalization(self.normalize) if isinstance(self.normalize, str) else self.normalize

    def check(self) -> None:
        """Checks everything that does not need a model.

        Raises:
            OptionError: the device is missing, the normalisation, precision, architecture or callable is unknown, or
                the input shape is invalid.
        """
        parse_device(self.device)
        self.normalization()
        if self.precision is not None:
            check_precision(self.precision)
        if self.input_shape is not None and min(self.input_shape) < 1:
            hint = "Give channels, height and width in pixels, each 1 or more."
            raise OptionError(f"Invalid input shape {self.input_shape}.", hint)
        if self.arch is not None and ":" in self.arch:
            import_callable(self.arch)
        elif self.arch is not None:
            architecture(self.arch)


def parse_device(text: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a GPU if there is one.

    Raises:
        OptionError: an unknown or missing device.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise OptionError(f"Unknown device {text!r}.", "Give cpu, cuda, cuda:N or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"bdprune does not run on {text!r}.", "Give cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"This machine has no device {text!r}.", "Use --device cpu, or see `bdprune doctor`.")
    return device


def free_memory(device: torch.device) -> int:
    """Free bytes on ``device``; 1 GiB if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 1 << 30


def options_from(values: Mapping[str, Any], caller: str) -> Options:
    """``Options`` from keyword arguments.

    Raises:
        TypeError: an argument that ``caller`` does not have.
    """
    unknown = values.keys() - {field.name for field in fields(Options)}
    if unknown:
        raise TypeError(f"{caller}() got an unexpected keyword argument: {', '.join(sorted(unknown))}")
    return Options(**values)


@plain_torch()
def load(path: str | os.PathLike[str], **options: Unpack[OptionNames]) -> Model:
    """Loads one model of a checkpoint without running code from it, in eval mode on its device.

    Args:
        path: safetensors or torch file (zip or legacy), or the index of shards; wrappers and prefixes are recognised.
            A text ``hf:ORG/NAME[@REVISION][/FILE]`` names a file on the Hugging Face Hub.
        **options: ``arch``, ``num_classes``, ``input_shape``, ``normalize`` (a name such as ``cifar10``, numbers or a
            ``Normalization``), ``device``, ``seed``, ``state_key`` and ``max_download``, as in ``Options`` and on the
            command line.

    Returns:
        The preferred set of weights of the file, or the one that ``state_key`` names; ``model.artifact.left_out``
        names the others.

    Raises:
        ArtifactError: the file is missing, damaged or hostile, or its weights are quantised, NaN or infinite.
        UnsupportedError: the file is not a checkpoint.
        ArchitectureError: the architecture is unknown or ambiguous, or the tensors do not fit it.
        OptionError: an invalid option.

    Example:
        >>> model = load("model.pth", normalize="cifar10")
        >>> model.arch, model.num_classes, model.input_shape
        ('resnet18_cifar', 3, (3, 32, 32))
    """
    return load_model(path, options_from(options, "load"))


def load_model(source: ModelSource, options: Options, progress: Stages | None = None) -> Model:
    """The model, in eval mode on its device; the caller's own module or model does not change.

    Raises:
        ArtifactError, ArchitectureError: the file cannot be read, or its network is unknown.
        OptionError: the device is missing, or a module comes without an input shape.
    """
    if isinstance(source, Model | nn.Module):
        return _in_memory(source, options)
    model = load_one(_local(source, options, progress), **_load_settings(options))
    return _on_device(model, parse_device(options.device))


def load_models(source: ModelSource, options: Options, progress: Stages | None = None) -> Loaded:
    """One model for every set of weights of the source, and the sets that could not be loaded.

    Raises:
        BdpruneError: as :func:`load_model`, if no set can be loaded.
    """
    if isinstance(source, Model | nn.Module):
        return Loaded((_in_memory(source, options),))
    loaded = load_all(_local(source, options, progress), **_load_settings(options))
    device = parse_device(options.device)
    return Loaded(tuple(_on_device(model, device) for model in loaded.models), loaded.unloaded)


def _local(source: str | os.PathLike[str], options: Options, progress: Stages | None) -> Path | HubFile:
    """The file to read; one on the Hub is downloaded."""
    if isinstance(source, str) and not is_local(source):
        source = one_file(source, options.max_download)
    if not isinstance(source, HubFile):
        return Path(source)
    source.fetch(progress)
    return source


def _load_settings(options: Options) -> dict[str, Any]:
    return {
        "arch": options.arch,
        "num_classes": options.num_classes,
        "normalize": options.normalization(),
        "input_shape": options.input_shape,
        "state_key": options.state_key,
    }


def _on_device(model: Model, device: torch.device) -> Model:
    return model if model.device == device else model.with_network(model.network.to(device))


def _in_memory(source: Model | nn.Module, options: Options) -> Model:
    device, normalization = parse_device(options.device), options.normalization()
    if isinstance(source, nn.Module):
        return _from_module(source, options, normalization or Normalization(), device)
    model = source if normalization is None else replace(source, normalization=normalization)
    if model.device == device and _is_ready(model.network):
        return model
    return model.with_network(model.clone().network.to(device).float().requires_grad_(True))


def _is_ready(network: nn.Module) -> bool:
    """Whether a network is in the state of a loaded file: eval mode, float32, and gradients for every weight."""
    return not network.training and all(
        one.requires_grad and one.dtype == torch.float32 for one in network.parameters()
    )


def _from_module(module: nn.Module, options: Options, normalization: Normalization, device: torch.device) -> Model:
    if options.input_shape is None:
        raise OptionError("A module needs an input shape.", "Give input_shape=(channels, height, width).")
    if next(module.parameters(), None) is None:
        raise ArchitectureError("The module has no parameters.", "Give a trained module.")
    check_own_weights(module)
    try:
        network = copy.deepcopy(module).to(device).float().eval().requires_grad_(True)
    except Exception as error:  # tensors that were computed from others, or that have no memory
        raise ArchitectureError(
            f"The module cannot be copied: {first_line(error)}.",
            "Give a module with plain parameters on a real device.",
        ) from error
    num_classes = give_logits(network, options.input_shape, options.num_classes)
    return Model(network, options.arch or type(module).__name__, num_classes, options.input_shape, normalization)


@dataclass
class CleanSource:
    """The clean data of a run, read once for every input shape among the models.

    Args:
        source: where the data comes from; None for a run without data.
        options: ``per_class``, ``class_order`` and ``seed``; if ``input_shape`` is given, all images are resized to it.

    Raises:
        OptionError: ``per_class`` is less than 1, or ``class_order`` is invalid.
    """

    source: DataSource
    options: Options = field(default_factory=Options)
    _read: dict[tuple[tuple[int, int, int], int], CleanData | DataError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.source, str) and self.source == "none":
            self.source = None
        check_per_class(self.options.per_class)
        order = self.options.class_order
        self.class_order = None if order is None else read_order(order)

    def fit_for(self, model: Model) -> tuple[Model, CleanData | None]:
        """The model and the clean data in the image size that suits them; None for a run without data.

        If the network accepts the images' own size and is clearly more accurate in it, the returned model has that
        input shape, and the ``notes`` of the data say so (:func:`bdprune.analysis.size.fit_size`).

        Raises:
            DataError: the data cannot be read or does not fit the model.
        """
        if self.source is None:
            return model, None

        def native(size: tuple[int, int]) -> CleanData:
            return self._in_shape((model.input_shape[0], *size), model.num_classes)

        resized = self._in_shape(model.input_shape, model.num_classes)
        fixed = self.options.input_shape is not None
        fitted, data = fit_size(model, resized, native, fixed=fixed, seed=self.options.seed)
        return fitted, data.without_copies  # only now: images that differ may be equal after a resizing

    def _in_shape(self, shape: tuple[int, int, int], num_classes: int) -> CleanData:
        key = (shape, num_classes)
        if key not in self._read:
            self._read[key] = self._load(shape, num_classes)
        found = self._read[key]
        if isinstance(found, DataError):
            raise found
        return found

    def _load(self, shape: tuple[int, int, int], num_classes: int) -> CleanData | DataError:
        try:
            if isinstance(self.source, CleanData):
                return self._sampled(self.source, shape, num_classes)
            return self._opened(shape, num_classes)
        except DataError as error:
            return error

    def _opened(self, shape: tuple[int, int, int], num_classes: int) -> CleanData:
        assert self.source is not None and not isinstance(self.source, CleanData)
        return load_clean(
            self.source,
            per_class=self.options.per_class,
            seed=self.options.seed,
            input_shape=shape,
            num_classes=num_classes,
            class_order=self.class_order,
        )

    def _sampled(self, data: CleanData, shape: tuple[int, int, int], num_classes: int) -> CleanData:
        data = check_clean(data, shape, num_classes, self.class_order)
        if self.options.per_class is not None:
            generator = torch.Generator().manual_seed(self.options.seed)
            # In the order of the data: a limit that no class reaches changes nothing.
            data = data.subset(sample_per_class(data.labels, self.options.per_class, generator).sort().values)
        return resize_clean(data, shape[1:])


def checked_case(model: Model, source: CleanSource) -> tuple[Case, Sanity]:
    """The model with its clean images, in the size that suits it and sorted by content, and the check on them.

    Raises:
        DataError: the images do not fit the model, or there are none.
        SanityError: the model labels too few of them correctly.
    """
    fitted, data = source.fit_for(model)
    if data is None:
        raise DataError("There are no clean images.", "Give a few labelled clean images with --data.")
    case = Case(fitted, data.by_content)
    sanity = check_sanity(fitted, case.images)
    if not sanity.ok:
        raise SanityError(sanity.message, sanity.suggestion)
    return case, sanity
