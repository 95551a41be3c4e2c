from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdprune.data.decode import MAX_ENCODED_BYTES, decode_image, image_pixels
from bdprune.errors import DataError

Encode = Callable[..., bytes]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes with a correct header of any size and next to no pixels behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def webp_claiming(width: int, height: int) -> bytes:
    """A lossless WebP header (14 bits a side) with nothing behind it."""
    bits = (width - 1) | (height - 1) << 14
    stream = b"\x2f" + struct.pack("<I", bits) + bytes(32)
    stream += b"\0" * (len(stream) % 2)
    riff = b"WEBPVP8L" + struct.pack("<I", len(stream)) + stream
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_lossless_formats_give_the_very_pixels(
    encode: Encode, pixels: np.ndarray, kind: str, options: dict[str, object]
) -> None:
    decoded = decode_image(encode(pixels[0], kind=kind, **options), "x")
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels[0])


def test_jpeg_is_close(encode: Encode) -> None:
    flat = np.full((16, 16, 3), 77, dtype=np.uint8)
    decoded = decode_image(encode(flat, kind="JPEG", quality=95), "x")
    assert decoded.shape == (3, 16, 16)
    assert (decoded.int() - 77).abs().max() <= 2


def test_grey_stays_grey(encode: Encode, pixels: np.ndarray) -> None:
    decoded = decode_image(encode(pixels[0, :, :, 0]), "x")
    assert decoded.shape == (1, 6, 4)
    assert np.array_equal(decoded[0].numpy(), pixels[0, :, :, 0])


def test_black_and_white_becomes_grey() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[True, False]])).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "x").tolist() == [[[255, 0]]]


def test_palette_becomes_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "x")[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_opaque_alpha_is_dropped(encode: Encode, pixels: np.ndarray) -> None:
    decoded = decode_image(encode(pixels[0], "RGBA"), "x")
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels[0])


def test_grey_with_opaque_alpha_stays_grey(encode: Encode, pixels: np.ndarray) -> None:
    assert decode_image(encode(pixels[0, :, :, 0], "LA"), "x").shape == (1, 6, 4)


def test_transparency_is_refused(encode: Encode, pixels: np.ndarray) -> None:
    rgba = np.dstack([pixels[0], np.full((6, 4), 255, dtype=np.uint8)])
    rgba[2, 3, 3] = 254
    with pytest.raises(DataError, match=r"a\.png has transparent pixels.*background"):
        decode_image(encode(rgba), "a.png")


def test_sixteen_bits_are_refused(encode: Encode) -> None:
    with pytest.raises(DataError, match="mode I;16, not 8 bits"):
        decode_image(encode(np.zeros((4, 4), dtype=np.uint16)), "x")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS", "ICO"])
def test_other_formats_are_not_even_tried(encode: Encode, pixels: np.ndarray, kind: str) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(encode(pixels[0], kind=kind), "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncation_is_found(encode: Encode, pixels: np.ndarray, kind: str) -> None:
    whole = encode(np.tile(pixels[0], (8, 8, 1)), kind=kind)
    with pytest.raises(DataError, match=r"cat/1\.img cannot be decoded as an image"):
        decode_image(whole[: len(whole) // 2], "cat/1.img")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_garbage_is_an_error(content: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(content, "x")


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (11000, 11000), (60000, 60000)])
def test_claimed_size_is_checked_before_decoding(width: int, height: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="pixels"):
        decode_image(png_claiming(width, height), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_webp_that_claims_a_gigabyte_takes_no_memory() -> None:
    code = (
        "import resource, sys\nfrom bdprune.data.decode import decode_image\nfrom bdprune.errors import DataError\n"
        "import PIL.WebPImagePlugin\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(sys.stdin.buffer.read(), 'x'); print('decoded')\n"
        "except DataError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], input=webp_claiming(16383, 16383), capture_output=True)
    assert int(run.stdout) < 50_000, run.stderr.decode()


def test_too_many_bytes_are_refused() -> None:
    with pytest.raises(DataError, match="bytes, more than"):
        decode_image(bytes(MAX_ENCODED_BYTES + 1), "x")


def test_large_image_object_is_refused() -> None:
    with pytest.raises(DataError, match="9000x9000"):
        image_pixels(Image.new("1", (9000, 9000)), "x")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), st.data())
def test_damaged_bytes_decode_or_raise_data_error(kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_image(bytes(content), "x")
    except DataError as error:
        assert error.message.startswith("x ")
    else:
        assert decoded.dtype == torch.uint8 and decoded.ndim == 3 and decoded.shape[0] in (1, 3)
