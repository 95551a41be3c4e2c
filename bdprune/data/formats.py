"""The supported image formats: their names, suffixes and first bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 64
"""Number of first bytes that identify a format."""


@dataclass(frozen=True)
class ImageFormat:
    """One kind of image file.

    Attributes:
        suffixes: of its files, in lower case.
        head: a pattern of the first ``HEAD_BYTES`` bytes.
        sure: whether the pattern alone identifies an image; else the suffix must also match.
    """

    suffixes: tuple[str, ...]
    head: bytes
    sure: bool = True


# Pillow may open only these: EPS runs another program, and PSD, PDF, WMF and similar formats are documents.
FORMATS: dict[str, ImageFormat] = {
    "PNG": ImageFormat((".png", ".apng"), rb"\x89PNG\r\n\x1a\n"),
    "JPEG": ImageFormat((".jpg", ".jpeg", ".jpe", ".jfif"), rb"\xff\xd8\xff"),
    "WEBP": ImageFormat((".webp",), rb"RIFF.{4}WEBP"),
    "BMP": ImageFormat((".bmp",), rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
    "PPM": ImageFormat((".ppm", ".pgm", ".pbm", ".pnm"), rb"P[1-6]\s+[#\d]"),
    "TIFF": ImageFormat((".tif", ".tiff"), rb"II[*+]\0|MM\0[*+]"),
    "GIF": ImageFormat((".gif",), rb"GIF8[79]a"),
    "JPEG2000": ImageFormat(
        (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"), rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"
    ),
    "AVIF": ImageFormat((".avif", ".avifs"), rb".{4}ftyp(avi[fs]|(mif1|msf1).{0,40}avi[fs])"),
    "QOI": ImageFormat((".qoi",), rb"qoif"),
    "SGI": ImageFormat((".sgi", ".rgb", ".rgba", ".bw"), rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]"),
    "PCX": ImageFormat((".pcx",), rb"\x0a[\0\x02\x03\x05][\0\x01][\x01\x02\x04\x08]", sure=False),
    "TGA": ImageFormat(
        (".tga",),
        rb".(\x01[\x01\x09]|\0[\x02\x03\x0a\x0b]).{13}[\x01\x08\x0f\x10\x18\x20]",
        sure=False,
    ),
    "DIB": ImageFormat((".dib",), rb"[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", sure=False),
}
"""By Pillow's name, most common first."""

READ = f"{', '.join(list(FORMATS)[:-1])} and {list(FORMATS)[-1]}"
"""The formats as a text."""

SUFFIXES = frozenset(suffix for known in FORMATS.values() for suffix in known.suffixes)

_HEADS = [(name, known.sure, re.compile(known.head, re.DOTALL)) for name, known in FORMATS.items()]


def format_of(head: bytes) -> str | None:
    """The format of a file that starts with ``head``; None if it is not in ``FORMATS``."""
    return next((name for name, _, pattern in _HEADS if pattern.match(head[:HEAD_BYTES])), None)


def is_surely_image(head: bytes) -> bool:
    """Whether a file that starts with ``head`` is an image, regardless of its name."""
    name = format_of(head)
    return name is not None and FORMATS[name].sure
