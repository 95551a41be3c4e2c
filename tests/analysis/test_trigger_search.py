"""The searches that detectors share: how many images are read if time is short."""

from __future__ import annotations

import pytest

from bdprune.analysis import Case, readable
from bdprune.loops import Inversion
from bdprune.runtime import Budget

from ..written import known_networks


@pytest.mark.parametrize(("seconds", "count"), [(None, 450), (1e5, 450), (100.0, 100), (1e-6, 20)])
def test_images_are_left_out_if_time_is_short(seconds: float | None, count: int) -> None:
    known = known_networks()
    data = known.data.spread(450)
    case = Case(known.clean, data).with_budget(Budget(seconds=seconds).started())
    found = [Inversion((), image_steps=8, seconds=1.0), Inversion((), image_steps=2, seconds=1.5)]  # 0.25 s a step
    assert len(readable(case, data, found, passes=4)) == pytest.approx(count, abs=1)
    assert len(readable(case, data, [], passes=4)) == 450
