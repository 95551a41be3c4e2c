"""Scans and repairs on a GPU, or on a device that refuses what a GPU refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.model.handle import Model
from bdprune.scan import engine, intake, registry, stacks
from bdprune.scan.engine import scan_many
from bdprune.scan.purify import purify
from bdprune.scoring.lipschitz import channel_lipschitz
from bdprune.training.precision import PRECISIONS

from ..helpers import siblings


@pytest.fixture
def place(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, which scans take for one of theirs."""
    for module in (engine, intake, stacks):
        monkeypatch.setattr(module, "parse_device", torch.device)
    return str(gpu)


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_every_detector_sees_something(place: str, bright: Any, precision: Any, stack: int) -> None:
    results = list(scan_many(siblings(bright.model, 2), bright.data, device=place, stack=stack, precision=precision))
    for result in results:
        assert result.error is None and result.env.device.startswith(place)
        assert len(result.detectors) == len(registry.names("bdprune.detectors"))
        assert all("error" not in one.details for one in result.detectors)


@pytest.mark.parametrize("method", registry.names("bdprune.purifiers"))
def test_every_repair_is_written(place: str, bright: Any, method: str, tmp_path: Path) -> None:
    repair = purify(bright.model, bright.data, method=method, output=tmp_path / "out.safetensors", device=place)
    assert str(repair.model.device) == place
    assert (tmp_path / "out.safetensors").stat().st_size > 0


def test_norms_without_parameters_are_scored(place: str) -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = Model(network.eval(), "plain", 2, (3, 8, 8))
    here = channel_lipschitz(model)
    network.to(place)
    there = channel_lipschitz(model)
    assert here.keys() == there.keys()
    assert all(torch.allclose(here[name], there[name]) for name in here)
