"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.pipeline.open import parse_device


def test_names_give_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("auto") == torch.device("cuda")
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(OptionError, match="no device 'cuda:2'"):
        parse_device("cuda:2")


@pytest.mark.parametrize("text", ["", "gpu", "meta", "mps", "cuda:x"])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(OptionError):
        parse_device(text)
