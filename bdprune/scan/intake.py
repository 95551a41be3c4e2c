"""What a scan, a repair and a scoring have in common: taking in the model, the clean data and the options."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from bdprune.data.clean import CleanData
from bdprune.data.dataset import SizedDataset
from bdprune.data.load import check_clean, load_clean
from bdprune.data.normalizations import parse_normalization
from bdprune.errors import ArchitectureError, DataError, OptionError, first_line
from bdprune.model.handle import Model, Normalization
from bdprune.model.load import load
from bdprune.scan.device import parse_device

ModelSource: TypeAlias = Model | nn.Module | str | os.PathLike[str]
DataSource: TypeAlias = CleanData | SizedDataset | str | os.PathLike[str] | None


LARGEST_SEED = 2**63 - 1
"""The largest that every generator takes."""


@dataclass(frozen=True)
class ModelOptions:
    """How to take in a model.

    Args:
        arch: registry name or ``module:callable``; None recognises it.
        num_classes: number of logits; None reads it off.
        input_shape: (channels, height, width) of one image; None takes what the architecture is made for.
        normalize: what the model expects before its first layer: a name, numbers, or None for nothing.
        device: where to run: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        seed: of everything random, not negative.

    Raises:
        OptionError: a seed that cannot be.
    """

    arch: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    normalize: Normalization | str | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            raise OptionError(f"{str(self.seed)[:80]} is no seed.", f"Give a whole number from 0 to {LARGEST_SEED}.")

    def normalization(self) -> Normalization | None:
        """The normalisation as numbers."""
        return parse_normalization(self.normalize) if isinstance(self.normalize, str) else self.normalize


def take_model(source: ModelSource, options: ModelOptions) -> Model:
    """The model, in eval mode on its device; the caller's own module or model is left as it is.

    Raises:
        ArtifactError, ArchitectureError: the file cannot be read, or is no network that is known.
        OptionError: a device that is not here, or a module whose input shape is not said.
    """
    device, normalization = parse_device(options.device), options.normalization()
    if isinstance(source, Model):
        model = source if normalization is None else replace(source, normalization=normalization)
        return model if model.device == device else model.with_network(model.clone().network.to(device))
    if isinstance(source, nn.Module):
        return _from_module(source, options, normalization or Normalization(), device)
    input_size = options.input_shape and options.input_shape[1:]
    model = load(
        Path(source),
        arch=options.arch,
        num_classes=options.num_classes,
        normalize=normalization,
        input_size=input_size,
    )
    if options.input_shape not in (None, model.input_shape):
        raise OptionError(
            f"The model takes images of shape {model.input_shape}, not {options.input_shape}.",
            "Give that number of channels in --input-shape.",
        )
    return model.with_network(model.network.to(device))


def _from_module(module: nn.Module, options: ModelOptions, normalization: Normalization, device: torch.device) -> Model:
    if options.input_shape is None:
        raise OptionError("A module does not say what images it takes.", "Give input_shape=(channels, height, width).")
    if next(module.parameters(), None) is None:
        raise ArchitectureError("The module has no parameters.", "Give one that was trained.")
    network = copy.deepcopy(module).to(device).float().eval()
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, *options.input_shape, device=device))
        _, num_classes = logits.shape
    except Exception as error:
        raise ArchitectureError(
            f"The module makes no logits of images of shape {options.input_shape}: {first_line(error)}.",
            "Give the input_shape that it was made for.",
        ) from error
    return Model(network, options.arch or type(module).__name__, num_classes, options.input_shape, normalization)


@dataclass
class DataShelf:
    """The clean data of a run: read once for every shape of model that asks, however many models there are.

    Args:
        source: where they come from, None for a run without.
        per_class: at most so many images of each class; None takes all.
        seed: of the sampling.
    """

    source: DataSource
    per_class: int | None = None
    seed: int = 0
    _read: dict[tuple[tuple[int, int, int], int], CleanData | DataError] = field(default_factory=dict)

    def fit_for(self, model: Model) -> CleanData | None:
        """The clean data in the model's input shape; None for a run without.

        Raises:
            DataError: they cannot be read or do not fit the model.
        """
        if self.source is None:
            return None
        key = (model.input_shape, model.num_classes)
        if key not in self._read:
            self._read[key] = self._load(model)
        found = self._read[key]
        if isinstance(found, DataError):
            raise found
        return found

    def _load(self, model: Model) -> CleanData | DataError:
        try:
            return self._sampled(self.source, model) if isinstance(self.source, CleanData) else self._opened(model)
        except DataError as error:
            return error

    def _opened(self, model: Model) -> CleanData:
        assert self.source is not None and not isinstance(self.source, CleanData)
        return load_clean(
            self.source,
            per_class=self.per_class,
            seed=self.seed,
            input_shape=model.input_shape,
            num_classes=model.num_classes,
        )

    def _sampled(self, data: CleanData, model: Model) -> CleanData:
        data = check_clean(data, model.input_shape, model.num_classes)
        if self.per_class is None:
            return data
        return data.sample(self.per_class, torch.Generator().manual_seed(self.seed))
