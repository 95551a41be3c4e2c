"""Shared by the tests of loops: a separate store for trials, and true float32 on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores trials apart from other tests and from the user's cache."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """True float32 on a GPU as well, with the same bits in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
