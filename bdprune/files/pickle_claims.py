"""The contents of a pickle as plain data: globals by name, storages and tensors by their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bdprune.errors import ArtifactError
from bdprune.files.quoting import quoted

MAX_DIMENSIONS = 16

ITEM_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}


_FLOATS = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
}
"""Kinds of storages that hold float numbers -> names of the type."""


@dataclass(frozen=True)
class GlobalName:
    """A ``module.name`` in a pickle."""

    name: str


@dataclass(frozen=True)
class StorageClaim:
    """A run of ``count`` elements of ``item_bytes`` bytes, stored under ``key``."""

    key: str
    kind: str
    item_bytes: int
    count: int


@dataclass(frozen=True)
class TensorClaim:
    """A strided view of a storage."""

    storage: StorageClaim
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    # As of a tensor of torch, for those who look for weights in either.
    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.size)

    @property
    def dtype(self) -> str:
        """``float64``, ``float32``, ``float16`` or ``bfloat16``; empty for numbers that are not float."""
        return _FLOATS.get(self.storage.kind, "")

    def numel(self) -> int:
        """Number of elements."""
        return self.count

    def is_floating_point(self) -> bool:
        """Whether the elements are float numbers."""
        return bool(self.dtype)


class OrderedClaim(dict[Any, Any]):
    """Represents a ``collections.OrderedDict``, the only object whose attributes a pickle may set."""


@dataclass
class Walked:
    """The contents of a pickle.

    Attributes:
        value: the object, with ``TensorClaim`` and ``GlobalName`` instead of tensors and globals.
        storages: every storage it refers to, by key.
        tensors: every tensor it builds, in order.
    """

    value: Any
    storages: dict[str, StorageClaim] = field(default_factory=dict)
    tensors: list[TensorClaim] = field(default_factory=list)


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number from 0."""
    return type(value) is int and 0 <= value < 1 << 62


def check_view(claim: TensorClaim, what: str) -> None:
    """Checks that all elements are inside the storage and distinct (a stride of 0 would allow huge tensors)."""
    size, stride = claim.size, claim.stride
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError("a tensor without size and stride")
    if not all(is_count(number) for number in (claim.offset, *size, *stride)):
        raise ValueError("a tensor with a size, stride or offset that is not a whole number")
    last = claim.offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if claim.count and (last >= claim.storage.count or claim.count > claim.storage.count):
        raise ArtifactError(
            f"the {what} claims a tensor of size {quoted(size)} ({claim.count} elements) "
            f"on a storage of {claim.storage.count} elements.",
            "The file is damaged or hostile; download it again from a source you trust.",
        )
