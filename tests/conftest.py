"""Fixtures for all tests: the devices, the resources of this machine, and small models with their data."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from . import hub_server, resources

# Worker processes share the cores. Without this, each starts as many threads as there are cores. Torch reads it when it
# is imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))


def pytest_configure() -> None:
    """Reports a mistake in BDPRUNE_TEST_REQUIRE before any test runs."""
    resources.required()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes, slow files go first."""
    if config.pluginmanager.hasplugin("xdist"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() or "cuda" in resources.required() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that uses ``device`` on the CPU, and on CUDA where it is available or required."""
    if "device" in metafunc.fixturenames:
        marks = {"cuda": [pytest.mark.needs("cuda")]}
        metafunc.parametrize("device", [pytest.param(name, marks=marks.get(name, [])) for name in _devices()])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips or fails a test whose ``needs`` this machine does not have."""
    for mark in item.iter_markers("needs"):
        resources.check(*mark.args)


@pytest.fixture(autouse=True)
def cleared_memo() -> None:
    """Clears the memo of analyses, so that no test uses results of another test."""
    if "bdprune.analysis" in sys.modules:
        sys.modules["bdprune.analysis"].MEMO.clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A Hugging Face Hub on this machine without repositories, and an empty cache."""
    from huggingface_hub import constants, file_download

    with hub_server.running() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield server


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data (see ``resources.data_folder``)."""
    resources.check("data")
    return resources.data_folder()


@pytest.fixture(scope="session")
def browser() -> str:
    """Path of Chromium or Chrome."""
    resources.check("browser")
    return str(resources.find_browser())


TINYNET = '''
import torch
from torch import nn


class TinyNet(nn.Module):
    """Names the brightest of three channels; five more filters carry a little noise."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.conv.weight.copy_(torch.randn(8, 3, 1, 1, generator=generator) / 10)
            self.conv.weight[:3, :, 0, 0] = torch.eye(3)
            self.head.weight.zero_()
            self.head.weight[:, :3] = 20 * torch.eye(3)
            self.head.bias.zero_()

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
'''


@dataclass(frozen=True)
class TinyWorld:
    """A network that is correct by construction, as a module and as a file, and its clean images, 30 of each class."""

    folder: Path
    module: Any
    path: Path
    data: Path
    arch: str = "tinynet:TinyNet"
    input_shape: tuple[int, int, int] = (3, 8, 8)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyWorld:
    """The smallest model and data that a scan can judge; ``tinynet`` can be imported."""
    import numpy as np
    import torch

    (tmp_path / "tinynet.py").write_text(TINYNET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tinynet", raising=False)
    module = importlib.import_module("tinynet").TinyNet().eval()
    torch.save(module.state_dict(), tmp_path / "tiny.pth")
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    images = generator.integers(0, 100, (90, 8, 8, 3), dtype=np.uint8)
    images[np.arange(90), :, :, labels] += 128
    np.savez(tmp_path / "clean.npz", images=images, labels=labels)
    return TinyWorld(tmp_path, module, tmp_path / "tiny.pth", tmp_path / "clean.npz")


@dataclass(frozen=True)
class Bright:
    """A trained network with two convs that classifies images by three levels of brightness, and the task's images."""

    model: Any
    data: Any


def bright_images(count: int, seed: int = 0) -> Any:
    """Noise ``[count, 3, 8, 8]`` at three levels of brightness, as ``CleanData``."""
    import torch

    from bdprune.data.clean import CleanData

    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) / 5
    return CleanData(noise + 0.35 * labels.view(-1, 1, 1, 1), labels)


@pytest.fixture(scope="session")
def bright() -> Bright:
    """Trained once per session, in a second or two. Code under test never changes ``model``."""
    import torch
    from torch import nn

    from bdprune.data import RawImages
    from bdprune.loops.fitting import Schedule, fit
    from bdprune.model.handle import Model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
        body = [nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
        network = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
    data = bright_images(240)
    schedule = Schedule(epochs=3, peak_lr=0.05, batch_size=24, padding=0, bf16=False)
    fit(network, RawImages((data.images * 255).round().to(torch.uint8), data.labels), schedule, seed=0)
    return Bright(Model(network, "bright", 3, (3, 8, 8)), data)
