"""Limits that the tools check: the size of functions and files, and the number of files that a scan runs through."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import bdprune

ROOT = Path(__file__).resolve().parent.parent
MOST_FILES = 50


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_and_files_stay_within_their_limits() -> None:
    beyond = tool("code_lines").beyond_limits
    package = Path(bdprune.__file__).parent
    assert [one for path in sorted(package.rglob("*.py")) for one in beyond(path)] == []


def test_docstrings_comments_and_blank_lines_do_not_count() -> None:
    source = '"""A module."""\n\nX = 1  # one\n"""What X is."""\n\n\ndef f():\n    """Says."""\n    return """a\nb"""\n'
    assert tool("code_lines").code_lines(source) == 4


def test_a_scan_runs_through_few_files() -> None:
    quick = bdprune.UnlearnSettings(max_epochs=1)
    unlearning = bdprune.detector("unlearning", unlearning=quick, max_runs=1)
    detectors = ["lipschitz", "suspiciousness", unlearning]
    model, data = ROOT / "zoo" / "cifar10-w8" / "badnets.safetensors", ROOT / "zoo" / "demo" / "defence.npz"
    files = tool("scan_path").crossed(model, data, detectors=detectors, per_class=10)
    assert "pipeline/scan.py" in files and "loops/unlearning.py" in files
    assert len(files) <= MOST_FILES, files
