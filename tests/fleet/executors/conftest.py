"""Fixtures for executors that run models in other processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .helpers import Odd


@pytest.fixture
def odd(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Odd:
    monkeypatch.delitem(sys.modules, "oddities", raising=False)
    return Odd(tiny)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Results record the number of threads; a test may set another one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
