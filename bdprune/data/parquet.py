"""Parquet files with one encoded image and one label a row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdprune.data.decode import decode_image
from bdprune.data.formats import READ
from bdprune.data.source import MAX_IMAGES, ImageSource, as_class_names, as_labels
from bdprune.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
_BATCH_ROWS = 256


@dataclass(frozen=True)
class RawImages:
    """Decoded images: uint8 ``[N, C, H, W]``, labels int64 ``[N]``, a name for each label (empty if unknown)."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()


def read_parquet(path: Path) -> RawImages:
    """Reads and decodes all images and labels of a parquet file, in file order.

    Raises:
        DataError: pyarrow or Pillow is not installed, the file is damaged or lacks a column, or there are no images or
            images of different sizes.
    """
    return read_source(ParquetSource(path))


def read_source(source: ImageSource) -> RawImages:
    """Decodes all images of a source, in its order.

    Raises:
        DataError: there are no images or images of different sizes, or an image cannot be read.
    """
    count = len(source.labels)
    if not count:
        raise DataError(f"{source.name} holds 0 images.", "Give a source of labelled images.")
    stack = torch.empty(0)
    for row, image in source.read(range(count)):
        if row == 0:
            stack = torch.empty((count, *image.shape), dtype=torch.uint8)
        if image.shape != stack.shape[1:]:
            raise DataError(
                f"{source.describe(row)} has shape {tuple(image.shape)}, {source.describe(0)} has "
                f"{tuple(stack.shape[1:])}.",
                "Bring all images to one size and one number of channels.",
            )
        stack[row] = image
    return RawImages(stack, source.labels, source.class_names)


class ParquetSource(ImageSource):
    """Rows of a parquet file: a column ``image`` (encoded bytes, or a struct with ``bytes``) and a column ``label``.

    It reads all labels at once, and only requested images, batch by batch, to save memory. It never opens a ``path``
    in the struct. Class names come from the schema metadata: ``classes`` (a JSON list), or the label feature that the
    Hugging Face libraries write.

    Args:
        path: of the file.
        labelled: False reads no labels, and gives every image label 0.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or a column is missing or of the wrong type.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        super().__init__(str(path))
        self._labelled = labelled
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(f"Reading {path} needs pyarrow.", "Install it: pip install pyarrow pillow") from error
        try:
            self._file = pq.ParquetFile(path)
            self._read_schema()
            self.labels = self._read_labels()
        except DataError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def describe(self, index: int) -> str:
        return f"row {index} of {self.name}"

    def read(self, index: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        rows = np.asarray(index, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        done = 0
        for start, cells in self._batches(wanted):
            stop = np.searchsorted(wanted, start + len(cells))
            for position in range(done, stop):
                row = int(wanted[position])
                yield int(order[position]), self._decode(cells[row - start], row)
            done = int(stop)
        if done < len(wanted):
            raise DataError(f"{self.name} ends before row {wanted[done]}.", "The file is damaged; write it again.")

    def _read_schema(self) -> None:
        schema, rows = self._file.schema_arrow, self._file.metadata.num_rows
        if not 0 <= rows <= MAX_IMAGES:
            raise DataError(f"{self.name} claims {rows} rows.", f"At most {MAX_IMAGES} are read.")
        self._image_column = self._find(IMAGE_COLUMNS, schema)
        self._is_struct = self._check_image(schema.field(self._image_column).type)
        if not self._labelled:
            return
        self._label_column = self._find(LABEL_COLUMNS, schema)
        self._check_label(schema.field(self._label_column).type)
        self.class_names = _class_names(schema.metadata or {}, self._label_column)

    def _find(self, names: tuple[str, ...], schema: Any) -> str:
        for name in names:
            if schema.names.count(name) == 1:
                return name
        found = ", ".join(as_class_names(schema.names[:12])) or "none"
        raise DataError(f"{self.name} has no single column {names[0]}; its columns: {found}.", "Rename the column.")

    def _check_image(self, image: Any) -> bool:
        """Whether images are structs."""
        import pyarrow as pa

        is_struct = bool(pa.types.is_struct(image) and image.get_field_index("bytes") >= 0)
        cell = image.field("bytes").type if is_struct else image
        if not (pa.types.is_binary(cell) or pa.types.is_large_binary(cell) or pa.types.is_binary_view(cell)):
            hint = f"Store encoded images ({READ}) as bytes, or a struct with a field bytes."
            raise DataError(f"The column {self._image_column} of {self.name} is of type {str(image)[:80]}.", hint)
        return is_struct

    def _check_label(self, label: Any) -> None:
        import pyarrow as pa

        if not pa.types.is_integer(label):
            kind = str(label)[:80]
            hint = "Give class numbers from 0."
            raise DataError(f"The labels of {self.name} are of type {kind}, not integers.", hint)

    def _read_labels(self) -> Tensor:
        if not self._labelled:
            return torch.zeros(self._file.metadata.num_rows, dtype=torch.int64)
        column = self._file.read(columns=[self._label_column]).column(0)
        if column.null_count:
            raise DataError(f"{self.name} has {column.null_count} rows without a label.", "Drop or label these rows.")
        if len(column) != self._file.metadata.num_rows:
            raise DataError(
                f"{self.name} claims {self._file.metadata.num_rows} rows but holds {len(column)} labels.",
                "The file is damaged; write it again.",
            )
        return as_labels(column.to_numpy(), self.name)

    def _batches(self, wanted: np.ndarray[Any, Any]) -> Iterator[tuple[int, Any]]:
        """(first row, image cells) of every batch in the row groups with a requested row."""
        start = 0
        for group in range(self._file.metadata.num_row_groups):
            stop = start + self._file.metadata.row_group(group).num_rows
            if np.searchsorted(wanted, start) < np.searchsorted(wanted, stop):
                yield from self._group_batches(group, start)
            start = stop

    def _group_batches(self, group: int, start: int) -> Iterator[tuple[int, Any]]:
        column = f"{self._image_column}.bytes" if self._is_struct else self._image_column
        batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                raise self._damaged(error) from error
            if batch is None:
                return
            cells = batch.column(0)
            yield start, cells.flatten()[0] if self._is_struct else cells
            start += len(batch)

    def _decode(self, cell: Any, row: int) -> Tensor:
        if not cell.is_valid:
            raise DataError(f"{self.describe(row)} has no image bytes.", "Store the encoded image itself, not a path.")
        return decode_image(cell.as_py(), self.describe(row), self.converted)

    def _damaged(self, error: Exception) -> DataError:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        return DataError(f"{self.name} cannot be read as parquet: {reason}.", "The file is damaged; write it again.")


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...]:
    """Class names from the schema metadata; none if the metadata has another form."""
    try:
        if b"classes" in metadata:
            names = json.loads(metadata[b"classes"])
        else:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return as_class_names(names) if isinstance(names, list) else ()
