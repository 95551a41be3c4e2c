"""What a GPU needs for a test to say the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32, nothing is summed by atomics, and trials are kept where no other test and no user's are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
