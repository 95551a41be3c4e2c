"""Writes pictures in the format PNG (ISO/IEC 15948), so that no image library is needed for it."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the help of a command does not load numpy
    import numpy as np
    from numpy.typing import NDArray

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # channels -> number of the colour type in the header


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a picture: equal pixels give equal bytes.

    Args:
        pixels: ``[h, w]`` or ``[h, w, 1]`` for grey, ``[h, w, 3]`` for red, green and blue; uint8.

    Raises:
        ValueError: the pixels have another shape or type, or there are none.
    """
    shaped = pixels[..., None] if pixels.ndim == 2 else pixels
    if str(shaped.dtype) != "uint8" or shaped.ndim != 3 or shaped.shape[2] not in _COLOUR_TYPES or not shaped.size:
        raise ValueError(f"pixels must be [h, w], [h, w, 1] or [h, w, 3] uint8, got {pixels.shape} {pixels.dtype}")
    height, width, channels = shaped.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    packed = min((zlib.compress(one, 9) for one in _filtered(shaped)), key=len)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _filtered(pixels: NDArray[np.uint8]) -> list[bytes]:
    """The rows as they are, as differences to the left, and as differences to the row above; modulo 256."""
    left, above = pixels.copy(), pixels.copy()
    left[:, 1:] -= pixels[:, :-1]
    above[1:] -= pixels[:-1]
    return [
        b"".join(bytes([number]) + row.tobytes() for row in one) for number, one in enumerate((pixels, left, above))
    ]


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
