"""Pictures in the format PNG, read back by another library."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdprune.files import PNG_SIGNATURE, encode_png

image = pytest.importorskip("PIL.Image")


def read(content: bytes) -> np.ndarray:
    with image.open(io.BytesIO(content)) as opened:
        opened.verify()  # the check sums
    with image.open(io.BytesIO(content)) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.sampled_from(["noise", "flat", "ramp"]))
def test_pillow_reads_the_same_pixels(height: int, width: int, channels: int, kind: str) -> None:
    pixels = np.zeros((height, width, channels), np.uint8)
    if kind == "noise":
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape)
    elif kind == "ramp":
        pixels[:] = (7 * np.arange(height)[:, None, None] + 11 * np.arange(width)[None, :, None]) % 256
    content = encode_png(pixels)
    assert content.startswith(PNG_SIGNATURE) and content == encode_png(pixels)
    assert np.array_equal(read(content), pixels[..., 0] if channels == 1 else pixels)


def test_a_picture_without_a_third_axis_is_grey() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert encode_png(pixels) == encode_png(pixels[..., None])
    assert np.array_equal(read(encode_png(pixels)), pixels)


def test_a_part_of_a_larger_array_is_written_as_it_looks() -> None:
    whole = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(read(encode_png(whole[::2, 1:, ::-1])), whole[::2, 1:, ::-1])


def test_smooth_pictures_are_smaller_than_their_pixels() -> None:
    rows, columns = np.mgrid[:64, :64]
    smooth = (128 + 60 * np.sin(rows / 9) + 60 * np.cos(columns / 7)).astype(np.uint8)
    assert len(encode_png(smooth)) < smooth.size / 2


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_shapes_and_types_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        encode_png(pixels)
