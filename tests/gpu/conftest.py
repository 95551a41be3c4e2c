"""The device of the cases: a GPU, or a stand-in that rejects the same operations as a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdprune.runtime import precision

from ..zoo.conftest import tiny_data, write

__all__ = ["tiny_data", "write"]


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """Must exist before the first backward pass: autograd looks for devices only once."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    from .pretend import pretend_device

    return pretend_device()


@pytest.fixture
def bfloat16(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in device computes in bfloat16 like a GPU."""
    if gpu.type != "cuda":
        monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)


@pytest.fixture(autouse=True)
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stores trials in a temporary folder."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path / "cache"))
