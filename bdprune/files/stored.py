"""A tensor that is still in its file: where it is, and how to read it a part at a time, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdprune.errors import ArtifactError

if TYPE_CHECKING:  # the command line prints its help without NumPy
    import numpy as np
    from numpy.typing import NDArray

_FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK_BYTES = 1 << 20
_WHOLE = 16  # a block of many slices holds a multiple of this


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Nothing of it is in memory.

    Attributes:
        path: the file.
        dtype: ``float64``, ``float32``, ``float16`` or ``bfloat16``; empty for other types, which cannot be read.
        shape: its shape.
        start: position of its first element in the file, in bytes.
        stride: distance of neighbours in each dimension, in elements; None if they follow each other.
        swapped: whether the file has the other byte order than this machine.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stride: tuple[int, ...] | None = None
    swapped: bool = False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def item_bytes(self) -> int:
        """Size of an element; only of float numbers."""
        return _FLOAT_BYTES[self.dtype]

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Whether the elements are float numbers."""
        return self.dtype in _FLOAT_BYTES

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes of the elements in the order of the shape, about 1 MiB at a time, whole slices of the first axis.

        A block is valid until the next one is asked for. A tensor whose first axis is not its slowest in the file is
        read in one piece.

        Raises:
            ArtifactError: the file cannot be read, or is shorter than when it was opened.
        """
        import numpy as np

        if not self.numel():
            return
        inner, item = math.prod(self.shape[1:]), self.item_bytes
        each = max(1, _BLOCK_BYTES // (inner * item))
        each -= each % _WHOLE if each > _WHOLE else 0
        stride = None if self.stride is None or self.stride == _packed(self.shape) else self.stride
        span = (
            inner if stride is None else 1 + sum((n - 1) * s for n, s in zip(self.shape[1:], stride[1:], strict=True))
        )
        step = inner if stride is None else stride[0]
        if step < span:
            each = self.shape[0]
        buffer = np.empty(((min(each, self.shape[0]) - 1) * step + span) * item, np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                for first in range(0, self.shape[0], each):
                    count = min(each, self.shape[0] - first)
                    part = buffer[: ((count - 1) * step + span) * item]
                    file.seek(self.start + first * step * item)
                    _fill(file, part)
                    yield self._ordered(part, count, stride, item)
        except OSError as error:
            raise ArtifactError(f"it cannot be read: {error.strerror or error}.") from error

    def float_blocks(self) -> Iterator[NDArray[np.float64]]:
        """The same as numbers: float64 ``[slices, elements of a slice]``."""
        for raw in self.blocks():
            yield as_float64(raw, self.dtype).reshape(-1, max(math.prod(self.shape[1:]), 1))

    def read(self) -> NDArray[np.float64]:
        """All values of a small tensor, float64, in its shape."""
        import numpy as np

        found = [block.ravel() for block in self.float_blocks()]
        return np.concatenate(found).reshape(self.shape) if found else np.zeros(self.shape)

    def _ordered(
        self, raw: NDArray[np.uint8], count: int, stride: tuple[int, ...] | None, item: int
    ) -> NDArray[np.uint8]:
        import numpy as np

        if stride is not None:
            shape, steps = (count, *self.shape[1:]), tuple(one * item for one in stride)
            view = np.lib.stride_tricks.as_strided(raw.view(f"u{item}"), shape, steps, writeable=False)
            raw = np.array(view, order="C").reshape(-1).view(np.uint8)
        if self.swapped:
            raw.view(f"u{item}").byteswap(inplace=True)
        return raw


def as_float64(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """The numbers of a type of :class:`StoredTensor` that these bytes hold, flat."""
    import numpy as np

    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(dtype).astype(np.float64)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of neighbours that follow each other."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fill(file: Any, part: NDArray[np.uint8]) -> None:
    view = memoryview(part)  # type: ignore[arg-type]
    while len(view):
        count = file.readinto(view)
        if not count:
            raise ArtifactError("it became shorter while it was read.", "Screen it again when it is complete.")
        view = view[count:]
