"""A method in another package, and one more module in bdprune, appear everywhere without changes to bdprune."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import bdprune.detectors
from bdprune import registry
from bdprune.cli.main import main
from bdprune.testing import check_detector, check_purifier

ROOT = Path(__file__).parents[2]
EXAMPLE = Path(__file__).parent / "plugin"
DEMO = ROOT / "zoo" / "demo"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the package of the example."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    subprocess.run(pip, check=True)
    return folder / "site"


@pytest.fixture
def start(site: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs Python in a new process that finds the installed package, and returns the output."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "200"}

    def call(*args: object) -> str:
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode in (0, 1, 5), done.stderr
        return done.stdout

    return call


@pytest.fixture
def run(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Runs ``bdprune ARGS`` in this process, which finds the installed package, and returns the output."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("COLUMNS", "200")
    registry._method_places.cache_clear()

    def call(*args: object) -> str:
        done = CliRunner().invoke(main, [*map(str, args)], prog_name="bdprune")
        assert done.exit_code in (0, 1, 5), done.output
        return done.stdout

    yield call
    registry._method_places.cache_clear()
    sys.modules.pop("bdprune_example", None)


def test_a_process_lists_the_plug_in_with_its_description(start: Callable[..., str]) -> None:
    assert "finds a label that depends on one feature" in start("-m", "bdprune", "detectors")


def test_the_plug_in_is_listed_as_json(run: Callable[..., str]) -> None:
    found = {one["name"]: one for one in json.loads(run("purifiers", "--format", "json"))}
    assert found["peaks"]["id"] == "example.peaks" and found["peaks"]["settings"] == {"u": 3.0}


def test_the_plug_in_can_be_chosen_on_the_command_line(run: Callable[..., str]) -> None:
    assert "|peak_weight" in run("scan", "--help")
    scan = ["scan", DEMO / "clean.safetensors", "--data", DEMO / "defence.npz", "--per-class", 2]
    result = json.loads(run(*scan, "--detectors", "lipschitz,peak_weight", "--format", "json"))
    mine = result["detectors"][1]
    assert mine["detector"] == "example.peak_weight" and len(mine["label_scores"]) == 10
    assert "peak_weight" in run(*scan, "--detectors", "peak_weight")


def test_the_plug_in_is_in_the_generated_tables(start: Callable[..., str], tmp_path: Path) -> None:
    start(ROOT / "tools" / "generate_docs.py", "--folder", tmp_path)
    page = (tmp_path / "methods.md").read_text()
    assert (
        "| [peak_weight](#peak_weight-detector) | finds a label that depends on one feature | no images | weights |"
        in page
    )
    assert "BD901 `peak-weight`" in page and "### peaks (purifier)" in page


@pytest.mark.usefixtures("run")
def test_the_plug_in_passes_the_checks() -> None:
    mine = importlib.import_module("bdprune_example")
    detector, purifier = check_detector(mine.PeakWeight), check_purifier(mine.LipschitzPruning())
    assert detector.pop("gives the same evidence in a stack") == "skipped: The detector does not take stacks."
    assert detector.pop("gives the same evidence in a scan of a stack") == "skipped: The detector does not take stacks."
    assert detector["finds a planted backdoor"] == "passed"
    assert purifier.pop("removes a planted backdoor").startswith("skipped: It misses a backdoor whose filters")
    assert {*detector.values(), *purifier.values()} == {"passed"}


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more module in bdprune.detectors."""
    source = (EXAMPLE / "bdprune_example.py").read_text()
    (tmp_path / "dropped.py").write_text(source.partition("@dataclass(frozen=True)\nclass LipschitzPruning")[0])
    monkeypatch.setattr(bdprune.detectors, "__path__", [*bdprune.detectors.__path__, str(tmp_path)])
    registry._method_places.cache_clear()
    yield
    registry._method_places.cache_clear()
    sys.modules.pop("bdprune.detectors.dropped", None)


def test_one_more_module_appears_everywhere(dropped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    assert "finds a label that depends on one feature" in run(main, ["detectors"]).output
    assert "dropped" in run(main, ["scan", "--help"]).output
    assert isinstance(registry.detector("dropped", threshold=2.0), registry.method_class("detector", "dropped"))
    monkeypatch.syspath_prepend(ROOT / "tools")
    assert "[dropped](#dropped-detector)" in importlib.import_module("docs.methods").page()
    scanned = bdprune.scan(DEMO / "clean.safetensors", detectors="dropped")
    assert [one.detector for one in scanned.detectors] == ["example.peak_weight"]
