"""The channel moments of csrc/core on NumPy arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

core = pytest.importorskip("bdprune._core", reason="the native core is not built")


@settings(deadline=None)
@given(
    samples=st.integers(0, 6),
    channels=st.integers(1, 70),
    positions=st.integers(1, 90),
    fastest=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_moments_of_any_shape(samples: int, channels: int, positions: int, fastest: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((samples, channels, positions)) + 5).astype(np.float32)
    shift = np.full(channels, 5.0)
    given_x = np.ascontiguousarray(x.transpose(0, 2, 1)) if fastest else x
    cross, total, norms = core.channel_moments(given_x, shift, fastest)
    centred = (x.astype(np.float64) - 5).transpose(1, 0, 2).reshape(channels, -1)
    scale = max(1.0, np.abs(centred).max(initial=0.0) ** 2 * centred.shape[1])
    assert np.abs(cross - centred @ centred.T).max() <= 1e-6 * scale
    assert np.abs(total - centred.sum(1)).max() <= 1e-6 * scale
    assert norms == pytest.approx(np.sqrt(np.square(x.astype(np.float64)).mean(2)).sum(0), rel=1e-12)
    assert np.array_equal(cross, cross.T)


def test_a_shift_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="one value per channel"):
        core.channel_moments(np.zeros((2, 3, 4), dtype=np.float32), np.zeros(4))
