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
from PIL import Image, features

from bdprune.data.decode import MAX_ENCODED_BYTES, decode_image, image_pixels
from bdprune.data.formats import FORMATS, SUFFIXES, format_of, is_surely_image
from bdprune.errors import DataError

Encode = Callable[..., bytes]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose correct header states any size, with almost no pixels after it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def webp_claiming(width: int, height: int) -> bytes:
    """A lossless WebP header (14 bits per side) with nothing after it."""
    bits = (width - 1) | (height - 1) << 14
    stream = b"\x2f" + struct.pack("<I", bits) + bytes(32)
    stream += b"\0" * (len(stream) % 2)
    riff = b"WEBPVP8L" + struct.pack("<I", len(stream)) + stream
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WEBP", {"lossless": True, "exact": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        *((kind, {}) for kind in ("PNG", "BMP", "DIB", "PPM", "TIFF", "JPEG2000", "QOI", "SGI", "PCX", "TGA")),
    ],
)
def test_lossless_formats_give_the_exact_pixels(
    encode: Encode, pixels: np.ndarray, kind: str, options: dict[str, object]
) -> None:
    decoded = decode_image(encode(pixels[0], kind=kind, **options), "x")
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels[0])


def test_avif_is_close(encode: Encode) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    decoded = decode_image(encode(np.full((16, 16, 3), 77, dtype=np.uint8), kind="AVIF", quality=95), "x")
    assert decoded.shape == (3, 16, 16) and (decoded.int() - 77).abs().max() <= 2


def test_a_gif_of_one_frame_gives_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    image.save(buffer, "GIF")
    assert decode_image(buffer.getvalue(), "x")[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_more_than_one_frame_is_an_error(pixels: np.ndarray, kind: str) -> None:
    buffer = io.BytesIO()
    one, two = Image.fromarray(pixels[0]), Image.fromarray(pixels[1])
    one.save(buffer, kind, save_all=True, append_images=[two])
    with pytest.raises(DataError, match=r"a\.img has more than one frame.*as a separate image"):
        decode_image(buffer.getvalue(), "a.img")


def test_a_preview_inside_a_jpeg_is_not_a_frame(pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    flat = Image.new("RGB", (16, 16), (77, 77, 77))
    flat.save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert (decode_image(buffer.getvalue(), "x").int() - 77).abs().max() <= 2


def test_each_format_is_recognised_by_its_first_bytes(encode: Encode, pixels: np.ndarray) -> None:
    for kind in FORMATS:
        if kind != "AVIF" or features.check("avif"):
            assert format_of(encode(pixels[0], kind=kind)) == kind
    unsure = {kind for kind in FORMATS if not is_surely_image(encode(pixels[0], kind=kind))}
    assert unsure == {"PCX", "TGA", "DIB"}
    assert ".tif" in SUFFIXES and ".eps" not in SUFFIXES and ".psd" not in SUFFIXES
    for text in (b"", b"P5 is a grade", b"BMW", b"GIF images", b"II. chapter", b"hello"):
        assert not is_surely_image(text)


def tiff_claiming(**tags: int) -> bytes:
    """A TIFF of 8x8 grey pixels without compression; ``tags`` replace some of its tags."""
    values = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: 64}
    values |= {int(tag.removeprefix("t")): value for tag, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4)
    return head.ljust(200, b"\0") + bytes(range(64))


def test_tiff_sizes_are_checked_before_memory_is_taken() -> None:
    assert decode_image(tiff_claiming(), "x").flatten().tolist() == list(range(64))
    with pytest.raises(DataError, match="claims 9000x9000 pixels"):
        decode_image(tiff_claiming(t256=9000, t257=9000), "x")
    with pytest.raises(DataError, match="claims 65536x65536 pixels"):
        decode_image(tiff_claiming(t322=65536, t323=65536, t324=200, t325=64), "x")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("PPM", b"P6 1 1 65535\n" + bytes(6)),
        ("PGM", b"P5 1 1 65535\n" + bytes(2)),
        ("SGI", b"\x01\xda\x00\x02\x00\x03" + struct.pack(">HHH", 1, 1, 3) + bytes(500) + bytes(6)),
    ],
)
def test_colours_of_sixteen_bits_are_not_truncated_silently(kind: str, content: bytes) -> None:
    with pytest.raises(DataError, match="not 8 bits"):
        decode_image(content, "x")


def test_jpeg2000_of_sixteen_bits_is_an_error() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(buffer, "JPEG2000")
    with pytest.raises(DataError, match="16 bits, not 8 bits"):
        decode_image(buffer.getvalue(), "x")


def test_a_colour_png_of_sixteen_bits_is_an_error() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    body = header + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="16 bits, not 8 bits"):
        decode_image(b"\x89PNG\r\n\x1a\n" + body, "x")


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


def test_a_palette_becomes_its_colours() -> None:
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


def test_transparency_is_an_error(encode: Encode, pixels: np.ndarray) -> None:
    rgba = np.dstack([pixels[0], np.full((6, 4), 255, dtype=np.uint8)])
    rgba[2, 3, 3] = 254
    with pytest.raises(DataError, match=r"a\.png has transparent pixels.*background"):
        decode_image(encode(rgba), "a.png")


def test_sixteen_bits_are_an_error(encode: Encode) -> None:
    with pytest.raises(DataError, match="16 bits, not 8 bits"):
        decode_image(encode(np.zeros((4, 4), dtype=np.uint16)), "x")


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF", "MSP", "XBM"])
def test_other_formats_are_never_decoded(encode: Encode, pixels: np.ndarray, kind: str) -> None:
    mode = "1" if kind in ("MSP", "XBM") else None
    with pytest.raises(DataError, match=r"its first bytes are of no format.*PNG, JPEG, .* and DIB are read"):
        decode_image(encode(pixels[0], mode, kind=kind), "x")


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
def test_the_stated_size_is_checked_before_decoding(width: int, height: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="pixels"):
        decode_image(png_claiming(width, height), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_webp_that_states_a_gigabyte_takes_no_memory() -> None:
    code = (
        "import resource, sys\nfrom bdprune.data.decode import decode_image\nfrom bdprune.errors import DataError\n"
        "import PIL.WebPImagePlugin\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(sys.stdin.buffer.read(), 'x'); print('decoded')\n"
        "except DataError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], input=webp_claiming(16383, 16383), capture_output=True)
    assert int(run.stdout) < 50_000, run.stderr.decode()


def test_too_many_bytes_are_an_error() -> None:
    with pytest.raises(DataError, match="bytes, more than"):
        decode_image(bytes(MAX_ENCODED_BYTES + 1), "x")


def test_a_large_image_object_is_an_error() -> None:
    with pytest.raises(DataError, match="9000x9000"):
        image_pixels(Image.new("1", (9000, 9000)), "x")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([kind for kind in FORMATS if kind != "AVIF"]), st.data())
def test_damaged_bytes_decode_or_raise_a_data_error(kind: str, data: st.DataObject) -> None:
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


def test_a_damaged_file_is_named_without_internals() -> None:
    with pytest.raises(DataError, match="it begins like PNG, but the rest is damaged") as caught:
        decode_image(b"\x89PNG\r\n\x1a\nbroken", "a.png")
    assert "0x" not in str(caught.value)
