"""Checkpoints to load, networks to trace, and a digest that detects changes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.model.architectures import build
from bdprune.model.handle import Model


@pytest.fixture(scope="session")
def small_network() -> nn.Module:
    """An I-BAU network with 4 classes of 8x8 images and random norm statistics."""
    return shaken(build("ibau_cnn", 4, width=2, input_size=8), seed=3)


@pytest.fixture
def small_model(small_network: nn.Module) -> Model:
    """``small_network`` as a model."""
    return Model(small_network, "ibau_cnn", 4, (3, 8, 8))


@pytest.fixture
def shake() -> Callable[[nn.Module, int], nn.Module]:
    """See ``shaken``."""
    return shaken


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an object with torch.save, or bytes as they are, and returns the path."""

    def write_(content: Any, name: str = "model.pth", **settings: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, **settings)
        return path

    return write_


@pytest.fixture
def saved() -> Callable[..., bytes]:
    """``torch.save`` to bytes."""

    def saved_(content: Any, **settings: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, **settings)
        return buffer.getvalue()

    return saved_


@pytest.fixture
def fingerprint() -> Callable[[nn.Module], str]:
    """Digest of every parameter, buffer, gradient flag and mode of a module."""

    def fingerprint_(module: nn.Module) -> str:
        digest = hashlib.sha256()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{name} {tensor.dtype} {tensor.requires_grad} {tensor.grad is None}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(str([(name, type(part), part.training) for name, part in module.named_modules()]).encode())
        return digest.hexdigest()

    return fingerprint_


def shaken(network: nn.Module, seed: int) -> nn.Module:
    """``network`` with random norms: positive variances, scales and shifts unlike the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            module.num_batches_tracked.fill_(7)
    return network.eval()
