from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def pixels() -> np.ndarray:
    """Eight different RGB images of 6x4, uint8 NHWC."""
    return np.random.default_rng(0).integers(0, 256, (8, 6, 4, 3), dtype=np.uint8)


@pytest.fixture
def unit(pixels: np.ndarray) -> torch.Tensor:
    """The same images as float32 NCHW in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def labels() -> np.ndarray:
    return np.array([0, 0, 0, 0, 1, 1, 1, 2])


def png(array: np.ndarray, mode: str | None = None, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes {relative path: bytes} below a new folder."""

    def write(files: dict[str, bytes], name: str = "tree") -> Path:
        for relative, content in files.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / name

    return write


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return png
