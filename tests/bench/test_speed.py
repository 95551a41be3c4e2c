"""Guards against slow kernels: compares CPU times of one thread in the same run, with a wide margin.

``make bench`` makes the exact figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bdprune.ops import _backend, filter_spectral_norms

pytestmark = pytest.mark.skipif(not _backend.HAS_OPS, reason="the compiled ops are not built or switched off")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With one thread, its CPU time is independent of other load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu_seconds(*calls: Callable[[], Any]) -> list[float]:
    """Least CPU time of each call over five rounds in turn, after a warm-up round."""
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
