"""The index logic of the convolution kernels, piece by piece against NumPy and float64 PyTorch."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

core = pytest.importorskip("bdprune._core", reason="the native core is not built")

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=pairs,
    dilation=pairs,
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**31),
)
def test_sources_make_convolutions_and_their_input_gradients(size, kernel, stride, dilation, pad, seed) -> None:
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, pad, dilation, kernel, stride, strict=True)
    )
    if min(out) < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, *size, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(1, 1, *kernel, dtype=torch.float64, generator=generator)
    y = torch.nn.functional.conv2d(x, weight, None, stride, pad, dilation)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert tuple(y.shape[2:]) == out
    for gradient, source, expected in ((False, x.detach(), y.detach()), (True, grad, grad_x)):
        values, found = source.flatten().numpy(), np.zeros(expected.numel())
        for tap in np.ndindex(kernel):
            places = core.conv_sources(size, out, kernel, stride, pad, dilation, tap, gradient).flatten()
            found += np.where(places >= 0, values[places], 0.0) * float(weight[0, 0][tap])
        assert found == pytest.approx(expected.flatten().numpy(), abs=1e-12)


@settings(deadline=None)
@given(maps=st.integers(1, 4), groups=st.integers(1, 3), columns=st.integers(1, 4), rows=st.integers(1, 5))
def test_every_tile_has_one_block(maps: int, groups: int, columns: int, rows: int) -> None:
    blocks = range(maps * groups * columns * rows)
    tiles = [core.conv_tile(block, rows, columns, groups) for block in blocks]
    assert sorted(tiles) == [
        (m, g, c, r) for m in range(maps) for g in range(groups) for c in range(columns) for r in range(rows)
    ]


@settings(deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    mask=st.lists(st.sampled_from([0.0, 0.5]), min_size=1, max_size=130),
    runs=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=4),
)
def test_a_tile_is_computed_chunk_by_chunk_and_tap_by_tap(kernel, mask, runs) -> None:
    for chunk, zero in runs:  # whole chunks of zeros are rare among random masks
        mask[32 * chunk : 32 * chunk + 32] = [0.0 if zero else value for value in mask[32 * chunk : 32 * chunk + 32]]
    chunks = range(0, len(mask), 32)
    assert core.conv_walk(kernel, len(mask)) == [(first, *tap) for first in chunks for tap in np.ndindex(kernel)]
    kept = [first for first in chunks if any(mask[first : first + 32])]
    assert core.conv_walk(kernel, len(mask), mask) == [(first, *tap) for first in kept for tap in np.ndindex(kernel)]


@pytest.mark.parametrize("width", [0, 4, 8])
def test_every_element_of_an_operand_is_staged_once(width: int) -> None:
    places = [place for thread in range(128) for place in core.stage_places(thread, width)]
    assert sorted(places) == [(line, depth) for line in range(64) for depth in range(32)]


@settings(deadline=None)
@given(
    rows=st.integers(1, 700), channels=st.integers(1, 70), row_tiles=st.integers(1, 12), column_tiles=st.integers(1, 4)
)
def test_every_position_and_channel_counts_once_for_the_mask(rows, channels, row_tiles, column_tiles) -> None:
    counts = np.zeros((rows, channels), dtype=int)
    shares = core.mask_shares(rows, channels, row_tiles, column_tiles)
    for _, top, bottom, left, right in shares:
        counts[top:bottom, left:right] += 1
    assert (counts == 1).all()
    splits = {split for split, *_ in shares}
    assert splits == set(range(len(splits))) and len(splits) <= min(row_tiles, -(-rows // 64))


SHAPES = {"a8": (16, 8), "b8": (8, 8), "a16": (16, 16), "b16": (16, 8), "c": (16, 8)}


@pytest.mark.parametrize("which", SHAPES)
def test_fragments_cover_their_matrix_once(which: str) -> None:
    places = [place for lane in range(32) for place in core.fragment_places(which, lane)]
    rows, columns = SHAPES[which]
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]


def test_fragments_have_the_layout_of_the_ptx_isa() -> None:
    # Lane 13: group 3, thread 1 in it.
    assert core.fragment_places("a8", 13) == [(3, 1), (11, 1), (3, 5), (11, 5)]
    assert core.fragment_places("b8", 13) == [(1, 3), (5, 3)]
    assert core.fragment_places("a16", 13) == [(3, 2), (3, 3), (11, 2), (11, 3), (3, 10), (3, 11), (11, 10), (11, 11)]
    assert core.fragment_places("b16", 13) == [(2, 3), (3, 3), (10, 3), (11, 3)]
    assert core.fragment_places("c", 13) == [(3, 2), (3, 3), (11, 2), (11, 3)]


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_tf32_rounds_to_the_nearest_of_ten_bits(value: float) -> None:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    rounded = core.round_to_tf32(bits)
    low = bits & 0xFFFFE000
    assert rounded & 0x1FFF == 0
    assert rounded == (low if bits - low < 0x1000 else low + 0x2000)


def test_tf32_keeps_values_that_are_not_finite() -> None:
    for bits in (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF):
        assert core.round_to_tf32(bits) == bits


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conv_sources", ((0, 1), (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), (0, 0), False)),
        ("conv_sources", ((1, 1), (1, 1), (1, 1), (0, 1), (0, 0), (1, 1), (0, 0), True)),
        ("conv_sources", ((1, 1), (1, 2**20), (1, 1), (1, 1), (0, 0), (1, 1), (0, 0), False)),
        ("conv_tile", (-1, 1, 1, 1)),
        ("conv_tile", (0, 0, 1, 1)),
        ("conv_walk", ((0, 1), 4)),
        ("conv_walk", ((1, 1), 4, [1.0, 1.0, 1.0])),
        ("conv_walk", ((1, 1), 4, [[1.0, 1.0], [1.0, 1.0]])),
        ("stage_places", (-1, 0)),
        ("stage_places", (0, 3)),
        ("mask_shares", (0, 1, 1, 1)),
        ("mask_shares", (1, 1, 1, 0)),
        ("fragment_places", ("d8", 0)),
        ("fragment_places", ("a8", -1)),
        ("round_to_tf32", (-1,)),
        ("round_to_tf32", (2**32,)),
        ("jacobi_schedule", (0,)),
    ],
)
def test_unsupported_values_of_the_index_logic_are_errors(name: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError):
        getattr(core, name)(*arguments)
