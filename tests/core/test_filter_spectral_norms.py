"""The spectral norms of csrc/core on NumPy arrays."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

core = pytest.importorskip("bdprune._core", reason="the native core is not built")

Array = NDArray[np.float64]

# Error bound of sums of 32 float32 products, relative to the norm: five roundings.
FLOAT_RUNS = 3e-7


def svd_norms(matrices: Array) -> Array:
    return np.linalg.svd(matrices.astype(np.float64), compute_uv=False).max(axis=1)


@settings(deadline=None)
@given(
    count=st.integers(1, 35),
    rows=st.integers(1, 70),
    cols=st.integers(1, 60),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 2**31),
)
def test_norms_of_any_shape(count: int, rows: int, cols: int, dtype: str, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((count, rows, cols)).astype(dtype)
    rel = 1e-13 if dtype == "float64" else FLOAT_RUNS
    assert core.spectral_norms(x, dtype, count, rows, cols) == pytest.approx(svd_norms(x), rel=rel)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rows", [9, 31, 32, 33, 63, 64, 65, 66, 255, 256, 257, 258, 600])
def test_rows_of_nine(rows: int, dtype: str) -> None:
    """3x3 filters from 32 channels on have their own kernel, which processes two rows at a time."""
    x = np.random.default_rng(rows).standard_normal((11, rows, 9)).astype(dtype)
    rel = 1e-13 if dtype == "float64" else FLOAT_RUNS
    norms = core.spectral_norms(x, dtype, *x.shape)
    assert norms == pytest.approx(svd_norms(x), rel=rel)
    x[5] = np.nan  # In memory, the neighbouring rows adjoin the rest.
    others = np.arange(11) != 5
    assert np.array_equal(core.spectral_norms(x, dtype, *x.shape)[others], norms[others])
    assert core.spectral_norms(x[3:4].copy(), dtype, 1, rows, 9)[0] == norms[3]


def test_every_product_of_a_row_counts() -> None:
    """Two columns of equal values and zeros elsewhere: the largest singular value is the norm of both columns."""
    for i, j in itertools.combinations(range(9), 2):
        x = np.zeros((1, 40, 9), np.float32)
        x[..., [i, j]] = 0.5
        assert core.spectral_norms(x, "float32", 1, 40, 9)[0] == pytest.approx(20**0.5, rel=1e-7)


@st.composite
def spectra(draw: st.DrawFn) -> Array:
    """Singular values, 1 the largest: some within 2^-gap of it or equal to it, the others below an upper limit."""
    side = draw(st.integers(2, 49))
    near = draw(st.integers(0, side - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    gaps = rng.random(near) * draw(st.sampled_from([0.0, 2.0 ** -draw(st.integers(1, 54))]))
    ceiling = draw(st.sampled_from([0.0, 1e-160, 1e-8, 0.9, 1.0]))
    rest = ceiling * rng.random(side - 1 - near) ** draw(st.integers(1, 40))
    return np.concatenate([[1.0], 1.0 - gaps, rest])


def with_singular_values(values: Array, rows: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return np.asarray(left * values @ right.T)


@settings(deadline=None)
@given(values=spectra(), more=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_clusters_multiplicities_and_graded_spectra(values: Array, more: int, seed: int) -> None:
    x = with_singular_values(values, len(values) + more, seed)[None]
    assert core.spectral_norms(x, "float64", *x.shape) == pytest.approx(svd_norms(x), rel=1e-14)


@settings(deadline=None)
@given(values=st.lists(spectra(), min_size=1, max_size=4), place=st.integers(0, 15), seed=st.integers(0, 2**31))
def test_the_bits_of_a_filter_do_not_depend_on_difficult_neighbours(values: list[Array], place: int, seed: int) -> None:
    batch = np.random.default_rng(seed).standard_normal((16, 12, 9))
    alone = core.spectral_norms(batch[place : place + 1].copy(), "float64", 1, 12, 9)
    for i, neighbour in enumerate(values):
        batch[(place + 1 + i) % 16] = with_singular_values(np.resize(neighbour, 9), 12, seed)
    batch[(place + 5) % 16], batch[(place + 6) % 16] = 0.0, np.nan
    assert core.spectral_norms(batch, "float64", 16, 12, 9)[place] == alone[0]


@settings(deadline=None)
@given(
    exponents=st.lists(st.integers(-149, 126), min_size=1, max_size=20),
    rows=st.integers(1, 70),
    cols=st.sampled_from([3, 9, 25]),
    seed=st.integers(0, 2**31),
)
def test_float32_of_any_range(exponents: list[int], rows: int, cols: int, seed: int) -> None:
    # Whole numbers up to 2^3 are exact at every exponent, down to the denormals.
    x = np.random.default_rng(seed).integers(-3, 4, (len(exponents), rows, cols)).astype(np.float64)
    scale = np.exp2(np.array(exponents, dtype=np.float64))
    ours = core.spectral_norms((x * scale[:, None, None]).astype(np.float32), "float32", *x.shape)
    assert ours == pytest.approx(svd_norms(x) * scale, rel=FLOAT_RUNS, abs=0.0)


@settings(deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), dtype=st.sampled_from(["float16", "bfloat16"])
)
def test_every_16_bit_pattern_is_read_as_by_numpy(bits: list[int], dtype: str) -> None:
    raw = np.array(bits, dtype=np.uint16)
    wide = raw.view(np.float16) if dtype == "float16" else (raw.astype(np.uint32) << 16).view(np.float32)
    expected = np.abs(wide.astype(np.float64))  # a 1 x 1 matrix has its own magnitude as norm
    ours = core.spectral_norms(raw, dtype, len(raw), 1, 1)
    assert np.array_equal(ours, np.where(np.isfinite(expected), expected, np.nan), equal_nan=True)


def test_all_float16_values_in_one_vector_lane() -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    finite = raw[np.isfinite(raw.view(np.float16))]
    padded = np.zeros((len(finite), 16), dtype=np.uint16)
    padded[:, 3] = finite
    ours = core.spectral_norms(padded, "float16", len(finite), 16, 1)
    assert np.array_equal(ours, np.abs(finite.view(np.float16).astype(np.float64)))


def test_wrong_sizes_are_errors() -> None:
    x = np.zeros((2, 3, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="96 bytes, 192 are needed"):
        core.spectral_norms(x, "float32", 4, 3, 4)
    with pytest.raises(ValueError, match="too large"):
        core.spectral_norms(x, "float32", 2**40, 2**40, 1)
    with pytest.raises(ValueError, match="not be negative"):
        core.spectral_norms(x, "float32", -2, -3, 4)
    with pytest.raises(ValueError, match="not int8"):
        core.spectral_norms(x, "int8", 2, 3, 4)
    with pytest.raises(ValueError, match="contiguous"):
        core.spectral_norms(x.transpose(2, 0, 1), "float32", 2, 3, 4)
    with pytest.raises(ValueError, match="aligned"):
        core.spectral_norms(np.zeros(97, dtype=np.uint8)[1:], "float32", 2, 3, 4)


def test_wrong_types_are_errors() -> None:
    x = np.zeros((2, 3, 4), dtype=np.float32)
    for arguments in (
        (),
        (x,),
        (x, "float32", 2, 3),
        (x, "float32", 2, 3, 4, 5),
        (x, 32, 2, 3, 4),
        (3, "float32", 1, 1, 1),
    ):
        with pytest.raises(TypeError):
            core.spectral_norms(*arguments)
    with pytest.raises(OverflowError):
        core.spectral_norms(x, "float32", 2**70, 3, 4)


def test_every_contiguous_buffer_is_read() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    expected = core.spectral_norms(x, "float32", 2, 3, 4)
    for buffer in (x.tobytes(), bytearray(x.tobytes()), memoryview(x), x.view(np.uint8)):
        found = core.spectral_norms(weights=buffer, dtype="float32", count=2, rows=3, cols=4)
        assert found.dtype == np.float64 and np.array_equal(found, expected)


def test_no_reference_is_kept() -> None:
    x = bytearray(96)
    before = sys.getrefcount(x)
    for count in (2, 4):  # one call succeeds, the other fails
        for _ in range(3):
            with contextlib.suppress(ValueError):
                core.spectral_norms(x, "float32", count, 3, 4)
    assert sys.getrefcount(x) == before
    x.append(0)  # a buffer in use cannot be resized


def test_other_threads_run_during_the_computation() -> None:
    x = np.random.default_rng(0).standard_normal((16, 160, 160))

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        core.spectral_norms(x, "float64", *x.shape)
        return begin, time.perf_counter()

    def longest_pause() -> float:
        """The longest pause of this thread while the other computes, as a share of that time."""
        ticks = []
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(timed)
            while not future.done():
                ticks.append(time.perf_counter())
        begin, end = future.result()
        times = [begin, *(tick for tick in ticks if begin < tick < end), end]
        return max(later - earlier for earlier, later in itertools.pairwise(times)) / (end - begin)

    assert any(longest_pause() < 0.4 for _ in range(20))  # a busy machine may run one thread after the other
