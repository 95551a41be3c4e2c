"""The small eigenvalue solvers of csrc/core against NumPy, through bdprune._core."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

core = pytest.importorskip("bdprune._core", reason="the native core is not built")

Array = NDArray[np.float64]


def gram(rows: int, side: int, seed: int) -> Array:
    x = np.random.default_rng(seed).standard_normal((rows, side))
    return np.asarray(x.T @ x)


def with_spectrum(values: Array, seed: int) -> Array:
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return np.asarray(q * values @ q.T)


@settings(deadline=None)
@given(side=st.integers(1, 49))
def test_one_sweep_visits_every_pair_once_and_steps_are_disjoint(side: int) -> None:
    steps = core.jacobi_schedule(side)
    assert sorted(itertools.chain(*steps)) == list(itertools.combinations(range(side), 2))
    for pairs in steps:
        assert len(set(itertools.chain(*pairs))) == 2 * len(pairs)


@settings(deadline=None)
@given(side=st.integers(1, 49), rows=st.integers(1, 80), seed=st.integers(0, 2**31))
def test_jacobi_finds_the_largest_eigenvalue_of_a_gram_matrix(side: int, rows: int, seed: int) -> None:
    matrix = gram(rows, side, seed)
    expected = np.linalg.eigvalsh(matrix)[-1]
    assert core.jacobi_largest(matrix) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(side=st.integers(1, 80), rows=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_tridiagonalisation_finds_the_largest_eigenvalue(side: int, rows: int, seed: int) -> None:
    matrix = gram(rows, side, seed)
    matrix /= np.trace(matrix)
    expected = np.linalg.eigvalsh(matrix)[-1]
    assert core.tridiagonal_largest(matrix) == pytest.approx(expected, rel=1e-13)


SPECTRA = {
    "rank 1": lambda n: np.eye(n)[0],
    "all equal": np.ones,
    "twice the largest": lambda n: np.concatenate([[1.0, 1.0], np.full(n - 2, 0.5)]),
    "nearly twice": lambda n: np.concatenate([[1.0, 1.0 - 1e-9], np.full(n - 2, 1e-3)]),
    "graded": lambda n: np.logspace(0, -14, n),
    "clustered": lambda n: 1.0 - 1e-4 * np.arange(n),
}


@pytest.mark.parametrize("side", [2, 3, 4, 9, 10, 25, 49])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_hard_spectra(spectrum: str, side: int) -> None:
    for seed in range(20):
        matrix = with_spectrum(SPECTRA[spectrum](side), seed)
        matrix = (matrix + matrix.T) / 2
        assert core.jacobi_largest(matrix) == pytest.approx(1.0, rel=1e-12)
        assert core.tridiagonal_largest(matrix / np.trace(matrix)) * np.trace(matrix) == pytest.approx(1.0, rel=1e-13)


@pytest.mark.parametrize("side", [9, 25, 49])
def test_one_sweep_less_is_still_accurate_to_float32(side: int) -> None:
    default = {9: 5, 25: 6, 49: 7}[side]
    for seed in range(60):
        matrix = gram(2 * side, side, seed)
        expected = np.linalg.eigvalsh(matrix)[-1]
        assert core.jacobi_largest(matrix, default - 1) == pytest.approx(expected, rel=1e-7)
        assert core.jacobi_largest(matrix, default) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e30, 1e250])
def test_accuracy_does_not_depend_on_the_scale(scale: float) -> None:
    matrix = gram(30, 9, 0)
    assert core.jacobi_largest(matrix * scale) == pytest.approx(np.linalg.eigvalsh(matrix)[-1] * scale, rel=1e-13)


def test_zero_and_non_finite_matrices() -> None:
    assert core.jacobi_largest(np.zeros((4, 4))) == 0.0
    for bad in (np.nan, np.inf):
        matrix = np.eye(3)
        matrix[1, 1] = bad
        assert np.isnan(core.jacobi_largest(matrix))


def test_wrong_shapes_are_errors() -> None:
    for function in (core.jacobi_largest, core.tridiagonal_largest):
        with pytest.raises(ValueError, match="square"):
            function(np.zeros((2, 3)))
        with pytest.raises(ValueError, match="square"):
            function(np.zeros((0, 0)))
