"""Scans and repairs on a GPU, or on a device that rejects the same operations as a GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdprune import registry
from bdprune.analysis.lipschitz import channel_lipschitz
from bdprune.analysis.suspiciousness import Suspiciousness
from bdprune.fleet import scans
from bdprune.fleet.executors import stack as stacks
from bdprune.fleet.scans import scan_many
from bdprune.model.handle import Model
from bdprune.pipeline import open as intake
from bdprune.pipeline import scan as pipeline
from bdprune.pipeline.repair import purify
from bdprune.runtime.precision import PRECISIONS

from ..helpers import siblings

pytestmark = pytest.mark.usefixtures("gpu", "bfloat16")  # before anything is trained


@pytest.fixture
def place(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the device, which scans accept."""
    for module in (intake, pipeline, stacks, scans):
        monkeypatch.setattr(module, "parse_device", torch.device)
    return str(gpu)


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_every_detector_gives_evidence(place: str, bright: Any, precision: Any, stack: int) -> None:
    results = list(scan_many(siblings(bright.model, 2), bright.data, device=place, stack=stack, precision=precision))
    for result in results:
        assert result.error is None and result.env.device.startswith(place)
        scanned = [one.id for one in registry.methods("detector") if one.level in ("fast", "default")]
        assert [one.detector for one in result.detectors] == scanned
        assert not any(one.error for one in result.detectors)
        stacked = {one.detector: one.details.get("stack", 1) for one in result.detectors}  # a failure would be a loop
        assert stacked["bdprune.unlearning"] == stacked["bdprune.lipschitz"] == stack


@pytest.mark.parametrize("method", registry.names("purifier"))
@pytest.mark.parametrize("plain", [True, False])
def test_every_repair_is_written(place: str, bright: Any, method: str, plain: bool, tmp_path: Path) -> None:
    """With its own defaults, and without the fine-tuning at its end."""
    takes_it = "fine_tuning" in registry.method_class("purifier", method).settings()
    settings = {"fine_tuning": None} if plain and takes_it else {}
    output = tmp_path / "out.safetensors"
    repair = purify(bright.model, bright.data, method=method, settings=settings, output=output, device=place)
    assert str(repair.model.device) == place
    assert output.stat().st_size > 0


@pytest.mark.parametrize("per_image", [True, False])
def test_every_factor_equals_the_one_on_the_cpu(place: str, bright: Any, per_image: bool) -> None:
    score, model = Suspiciousness(saliency=1, per_image=per_image), bright.model
    here, there = (score(one, bright.data) for one in (model, model.with_network(model.clone().network.to(place))))
    assert here.keys() == there.keys()
    assert all(torch.allclose(here[name], there[name], rtol=1e-2) for name in here)


def test_norms_without_running_statistics_are_scored(place: str) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    layers = [nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    network = nn.Sequential(*layers).eval()
    here = channel_lipschitz(Model(network, "plain", 2, (3, 8, 8)))
    there = channel_lipschitz(Model(copy.deepcopy(network).to(place), "plain", 2, (3, 8, 8)))
    assert len(here["0"]) == 4 and torch.allclose(here["0"], there["0"])
