"""Encoded images to pixels, for files that nobody vouches for."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bdprune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL_MEND = "Install it with: pip install 'bdprune[parquet]'"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 1 << 26

_GRAY_MODES = frozenset({"1", "L", "LA", "La"})
_COLOR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})


def decode_image(encoded: bytes, where: str) -> Tensor:
    """Decodes one PNG, JPEG, WebP or BMP image.

    The size in the header is checked before any pixel is decoded: at most ``MAX_PIXELS``.

    Args:
        encoded: the bytes of the file.
        where: what to call the image in errors, such as its path.

    Returns:
        uint8 ``[1, H, W]`` for grey images, ``[3, H, W]`` for all others.

    Raises:
        DataError: the bytes are too many, no such image, damaged, too large, or not opaque 8-bit pixels.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"Decoding {where} needs Pillow.", INSTALL_MEND) from error
    if len(encoded) > MAX_ENCODED_BYTES:
        raise DataError(f"{where} takes {len(encoded)} bytes, more than the {MAX_ENCODED_BYTES} of any real image.")
    try:
        with warnings.catch_warnings():
            # Pillow warns from its own, looser limit; ours is an error and follows right below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(image.size, where)
        image.load()
    except DataError:
        raise
    except Exception as error:  # decoders fail in many ways on hostile bytes; each means the same to the reader
        raise DataError(
            f"{where} cannot be decoded as an image: {str(error) or type(error).__name__}.",
            "Remove or replace it; PNG, JPEG, WebP and BMP are read.",
        ) from error
    return image_pixels(image, where)


def image_pixels(image: Image, where: str) -> Tensor:
    """Pixels of a Pillow image: uint8 ``[1, H, W]`` (grey) or ``[3, H, W]``.

    Palettes, CMYK and fully opaque alpha become RGB. Transparency and more than 8 bits are refused, because what
    the model saw in training can't be guessed from them.

    Raises:
        DataError: the image is too large, transparent in places or not 8 bits deep.
    """
    _check_size(image.size, where)
    if image.mode not in _GRAY_MODES | _COLOR_MODES:
        raise DataError(f"{where} has pixels of mode {image.mode}, not 8 bits.", "Convert it to 8-bit RGB or grey.")
    target = "L" if image.mode in _GRAY_MODES else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{where} has transparent pixels.", "Flatten it onto the background used in training.")
    pixels = np.array(image.convert(target), dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{where} claims {width}x{height} pixels, more than the limit of {MAX_PIXELS}.", "Scale it down first."
        )
    if width * height == 0:
        raise DataError(f"{where} is {width}x{height} pixels large.", "Remove it.")
