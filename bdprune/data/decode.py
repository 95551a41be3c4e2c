"""Decodes images from untrusted files."""

from __future__ import annotations

import io
import struct
import warnings
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bdprune.data.formats import READ, format_of
from bdprune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 1 << 26

_CONVERTED = {"P": "palettes", "PA": "palettes", "CMYK": "CMYK", "RGBA": "opaque alpha", "LA": "opaque alpha"}
_GRAY_MODES = frozenset({"1", "L", "LA", "La"})
_COLOR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_TIFF_BITS, _TIFF_TILE = 258, (322, 323)
_J2K_SIZE = b"\xff\x4f\xff\x51"


def decode_image(encoded: bytes, where: str, converted: Counter[str] | None = None) -> Tensor:
    """Decodes one image of a format in ``FORMATS``, recognised by its first bytes.

    The size in the header must be at most ``MAX_PIXELS``; this is checked before any pixel is decoded.

    Args:
        encoded: the bytes of the file.
        where: name of the image in errors, such as its path.
        converted: counts images that are neither grey nor RGB in the file, by their kind.

    Returns:
        uint8 ``[1, H, W]`` for grey images, ``[3, H, W]`` for all others.

    Raises:
        DataError: the file is too long, damaged, of another format, has too many pixels or several frames, or its
            pixels are not opaque or not 8-bit.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(f"Decoding {where} needs Pillow.", "Install it: pip install pillow") from error
    if len(encoded) > MAX_ENCODED_BYTES:
        raise DataError(f"{where} takes {len(encoded)} bytes, more than the {MAX_ENCODED_BYTES} of any real image.")
    kind = format_of(encoded)
    if kind is None:
        raise _not_decoded(where, "its first bytes are of no format that is read")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large sizes, where ours is an error, and of damage, which the pixels show.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded), formats=(kind,))
            _check_header(image, encoded, where)
            image.load()
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise _not_decoded(where, f"it begins like {kind}, but the rest is damaged") from error
    except Exception as error:  # decoders fail in many ways on hostile bytes; each means the same to the reader
        raise _not_decoded(where, str(error) or type(error).__name__) from error
    return image_pixels(image, where, converted)


def _not_decoded(where: str, reason: str) -> DataError:
    hint = f"Remove or replace it; {READ} are read."
    return DataError(f"{where} cannot be decoded as an image: {reason.rstrip('.')}.", hint)


def _check_header(image: ImageFile, encoded: bytes, where: str) -> None:
    """Refuses images that would take too much memory, or that Pillow would reduce without an error."""
    _check_size(image.size, where)
    for size in _inner_sizes(image, encoded):
        _check_size(size, where)
    # Further pictures in a JPEG (MPO) are previews or other views; every JPEG reader shows the first.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise DataError(f"{where} has more than one frame.", "Save the right frame as a separate image.")
    bits = _bits(image, encoded)
    if bits > 8:
        raise DataError(f"{where} has pixels of {bits} bits, not 8 bits.", "Convert it to 8-bit RGB or grey.")


def _inner_sizes(image: ImageFile, encoded: bytes) -> list[tuple[int, int]]:
    """Further sizes in the file that determine the memory of its decoder."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None and all(tag in tags for tag in _TIFF_TILE):
        return [(int(tags[_TIFF_TILE[0]]), int(tags[_TIFF_TILE[1]]))]
    start = encoded.find(_J2K_SIZE) if image.format == "JPEG2000" else -1
    if start >= 0:
        right, down, left, top = struct.unpack_from(">4I", encoded, start + 8)
        return [(right - left, down - top)]
    return []


def _bits(image: ImageFile, encoded: bytes) -> int:
    """Bits of one channel from the header, for formats that may have more than 8; 8 for the others."""
    kind = image.format
    if kind == "PNG":
        return 16 if ";16" in str(image.tile[0][3]) else 8
    if kind == "SGI":
        return 8 * encoded[3]
    if kind == "TIFF":
        return int(max(image.tag_v2.get(_TIFF_BITS, (1,))))  # type: ignore[attr-defined]
    if kind == "PPM":
        largest = image.tile[0][3]
        return largest[-1].bit_length() if isinstance(largest, tuple) and isinstance(largest[-1], int) else 8
    if kind == "JPEG2000":
        start = encoded.find(_J2K_SIZE)
        return (encoded[start + 42] & 0x7F) + 1 if start >= 0 else 8
    if kind == "AVIF":
        start = encoded.find(b"av1C")
        return 10 if start >= 0 and encoded[start + 6] & 0x40 else 8
    return 8


def image_pixels(image: Image, where: str, converted: Counter[str] | None = None) -> Tensor:
    """Pixels of a Pillow image: uint8 ``[1, H, W]`` (grey) or ``[3, H, W]``.

    Palettes, CMYK and fully opaque alpha become RGB. It refuses transparency and more than 8 bits, because the pixels
    of the training images can't be derived from them.

    Raises:
        DataError: the image is too large, transparent in places or not 8 bits deep.
    """
    _check_size(image.size, where)
    if image.mode not in _GRAY_MODES | _COLOR_MODES:
        deep = ", not 8 bits" if image.mode[:1] in "IF" else ""
        raise DataError(f"{where} has pixels of mode {image.mode}{deep}.", "Convert it to 8-bit RGB or grey.")
    target = "L" if image.mode in _GRAY_MODES else "RGB"
    mode = image.mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{where} has transparent pixels.", "Flatten it onto the background used in training.")
    if converted is not None and mode not in ("1", "L", "RGB"):
        converted[_CONVERTED.get(mode, mode)] += 1
    pixels = np.array(image.convert(target), dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        hint = "Scale it down first."
        raise DataError(f"{where} claims {width}x{height} pixels, more than the limit of {MAX_PIXELS}.", hint)
    if width * height == 0:
        raise DataError(f"{where} is {width}x{height} pixels large.", "Remove it.")
