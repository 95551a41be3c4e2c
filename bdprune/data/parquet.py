"""Parquet files with one encoded image and one label a row."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdprune.errors import DataError


@dataclass(frozen=True)
class RawImages:
    """Decoded images: uint8 ``[N, C, H, W]``, labels int64 ``[N]``, a name for each label (empty when unknown)."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()


def read_parquet(path: Path) -> RawImages:
    """Reads the columns ``image`` (encoded bytes) and ``label`` of a parquet file, in file order.

    Raises:
        DataError: the file or one of the two columns is missing, or pyarrow or Pillow is not installed.
    """
    try:
        import pyarrow.parquet as pq
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"Reading {path} needs {error.name}.", "Install it with: pip install 'bdprune[parquet]'"
        ) from error
    table = pq.read_table(path, columns=["image", "label"])
    images = [np.asarray(Image.open(io.BytesIO(cell))) for cell in table["image"].to_pylist()]
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return RawImages(stack, torch.tensor(table["label"].to_pylist(), dtype=torch.int64))
