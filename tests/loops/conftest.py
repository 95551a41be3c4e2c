"""What tests of loops have in common: trials of their own, and float32 that is float32 on a GPU too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are kept where no other test and no user's cache is."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32 on a GPU too, and has the same bits in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
