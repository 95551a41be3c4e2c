"""Makes results on a GPU reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """True float32, no sums with atomics, and trials stored apart from other tests and from the user's cache."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
