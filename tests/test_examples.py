"""Every example in the documents and in the public docstrings runs, on a small trained network and real files."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import bdprune

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "docs/start.md",
    *(f"docs/how-to/{name}.md" for name in ("scan-in-ci", "repair-a-model", "add-a-method")),
]
HOMES = (
    "analysis.case",
    "fleet.scans",
    "methods.base",
    "pipeline.open",
    "pipeline.repair",
    "pipeline.scores",
    "record.results",
    "registry",
)
MODULES = ["bdprune", *(f"bdprune.{home}" for home in HOMES)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a network is slower on two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.pth``, a narrow ResNet-18 that tells red, green and blue, and ``clean_images/``."""
    import torch
    from PIL import Image

    from bdprune.data import RawImages
    from bdprune.loops.fitting import Schedule, fit
    from bdprune.model.architectures import build

    labels = torch.arange(90) % 3
    noise = torch.rand(90, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    noise[torch.arange(90), labels] += 0.4
    images = (noise * 255).to(torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build("resnet18_cifar", 3, width=8)
    schedule = Schedule(epochs=12, batch_size=30, peak_lr=0.05, bf16=False)  # learns it to the last image anywhere
    fit(network, RawImages(images, labels), schedule, seed=0)
    where = tmp_path_factory.mktemp("examples")
    torch.save({"net": network.state_dict(), "epoch": 12}, where / "model.pth")
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        target = where / "clean_images" / ("0_red", "1_green", "2_blue")[label]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(target / f"{index}.png")
    return where


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.M | re.S)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run_one_after_another(document: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BDPRUNE_CACHE", str(folder))
    module = ModuleType("examples")
    monkeypatch.setitem(sys.modules, "examples", module)
    for block in blocks(document):
        exec(compile(block, document, "exec"), module.__dict__)


def test_there_are_examples() -> None:
    assert len(blocks("docs/start.md")) >= 5


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_right(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for public in (bdprune.scan, bdprune.purify):
        inspect.unwrap(public)  # type: ignore[arg-type]  # imports what doctest would import while it walks the package
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert done.failed == 0
    assert done.attempted > 0
