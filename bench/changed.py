"""Copies of zoo/cifar10-w8 with slightly changed weights, for measurements of many models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ZOO = Path(__file__).resolve().parents[1] / "zoo" / "cifar10-w8"
CHANGE = 1e-3
"""Noise that is added to the weights, as a part of their standard deviation."""


def changed_copies(folder: Path, count: int, names: Sequence[str] = (), seed: int = 0) -> list[Path]:
    """Writes networks that all differ, so that no result can be taken from another one.

    Args:
        folder: where the files go; it is created.
        count: number of files. They copy the networks in turn.
        names: of the networks; empty for all of them.
        seed: of the noise.

    Returns:
        The files, ``00000.safetensors`` and so on.
    """
    folder.mkdir(exist_ok=True)
    originals = [ZOO / f"{name}.safetensors" for name in names] or sorted(ZOO.glob("*.safetensors"))
    generator = torch.Generator().manual_seed(seed)
    paths = [folder / f"{number:05}.safetensors" for number in range(count)]
    for path, original in zip(paths, itertools.cycle(originals), strict=False):
        _copy(original, path, generator)
    return paths


def _copy(original: Path, path: Path, generator: torch.Generator) -> None:
    with safe_open(original, "pt") as file:
        tensors, notes = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, value in tensors.items():
        if value.is_floating_point() and value.dim() > 1:
            noise = torch.randn(value.shape, generator=generator) * value.float().std() * CHANGE
            tensors[name] = (value.float() + noise).to(value.dtype)
    save_file(tensors, path, notes)
