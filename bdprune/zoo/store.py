"""The one way a zoo writes weights and images, so that nothing but the weights tells its models apart."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from bdprune.data.clean import CleanData


class Truth(msgspec.Struct, frozen=True):
    """What is known of one model; accuracies in [0, 1] on the full test set.

    Attributes:
        name: as in the manifest.
        target_label: label that the trigger calls, None for a clean model.
        clean_accuracy: on all classes.
        attack_success_rate: on triggered images of the other classes, None for a clean model.
        robust_accuracy: triggered images that still get their true label, None for a clean model.
        seconds: training time.
    """

    name: str
    target_label: int | None
    clean_accuracy: float
    attack_success_rate: float | None
    robust_accuracy: float | None
    seconds: float


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes the weights in half precision: no metadata, keys in the network's own order, batch counters at zero.

    The file appears whole or not at all.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor)  # it would tell how long, and so on what, a model was trained
        else:
            state[name] = tensor.detach().cpu().half().contiguous()
    partial = path.with_suffix(".part")
    save_file(state, partial)
    os.replace(partial, path)


def save_images(data: CleanData, path: Path) -> None:
    """Writes images and labels as a compressed ``.npz`` of uint8 ``[N, C, H, W]`` and int64 ``[N]``."""
    images = (data.images * 255).round().to(torch.uint8).numpy()
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, images=images, labels=data.labels.numpy())
    os.replace(partial, path)


def read_truth(folder: Path) -> dict[str, Truth]:
    """What ``zoo make`` measured of the models in ``folder``, by name; empty when nothing was made yet."""
    path = folder / "truth.json"
    if not path.exists():
        return {}
    return {truth.name: truth for truth in msgspec.json.decode(path.read_bytes(), type=list[Truth])}


def write_truth(folder: Path, truths: dict[str, Truth]) -> None:
    """Writes ``truth.json``, whole or not at all."""
    partial = folder / "truth.part"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(list(truths.values())), indent=2) + b"\n")
    os.replace(partial, folder / "truth.json")
