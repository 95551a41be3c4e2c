"""A guard against a kernel that became slow: times in the same run, in CPU time of one thread, with a wide margin.

The real figures are those of ``make bench``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bdprune.ops import _backend, filter_spectral_norms

pytestmark = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or not wanted")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Then the CPU time of the thread is all the time that was worked, whatever else runs on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu_seconds(*calls: Callable[[], Any]) -> list[float]:
    """Least CPU time of each call over five rounds in which they take turns, after one to warm up."""
    least = [float("inf")] * len(calls)
    for turn in range(6):
        for index, call in enumerate(calls):
            start = time.thread_time()
            call()
            if turn:
                least[index] = min(least[index], time.thread_time() - start)
    return least


def test_spectral_norms_are_much_faster_than_svdvals(benchmark: Any) -> None:
    weight = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, ours = cpu_seconds(
        lambda: torch.linalg.svdvals(weight.flatten(2)).amax(-1), lambda: filter_spectral_norms([weight])
    )
    benchmark.pedantic(filter_spectral_norms, ([weight],), rounds=5)
    assert plain > 3 * ours
