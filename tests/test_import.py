"""``import bdprune`` is fast, and its names lead to the right objects."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bdprune

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_other_heavy_packages() -> None:
    heavy = ["torch", "numpy", "msgspec", "click", "rich", "jinja2"]
    assert run(f"import bdprune, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_help_does_not_import_torch() -> None:
    code = """
import sys
from click.testing import CliRunner
from bdprune.cli.main import main
done = CliRunner().invoke(main, ["scan", "--help"])
assert done.exit_code == 0 and "Usage" in done.output
print([name for name in ("torch", "numpy", "rich", "jinja2") if name in sys.modules])
"""
    assert run(code) == "[]"


def test_help_is_quick() -> None:
    process = subprocess.Popen([sys.executable, "-m", "bdprune", "--help"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 0.8  # CPU seconds: usually 0.15; torch alone takes over 1


def test_version_matches_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert bdprune.__version__ == project["version"]


def test_public_names_are_the_functions_of_their_packages() -> None:
    from bdprune.fleet.scans import scan
    from bdprune.pipeline.open import load
    from bdprune.pipeline.repair import purify
    from bdprune.pipeline.scores import score
    from bdprune.record import Result

    assert bdprune.load is load and bdprune.score is score and bdprune.Result is Result
    assert inspect.signature(bdprune.scan) == inspect.signature(scan)
    assert inspect.signature(bdprune.purify) == inspect.signature(purify)
    assert sorted(bdprune.__all__) == dir(bdprune)


def test_scan_and_purify_stay_callable_after_their_packages_are_imported() -> None:
    code = """
import bdprune
import bdprune.methods.base, bdprune.fleet.scans
import bdprune.pipeline.repair, bdprune.pipeline.scan, bdprune.pipeline.scores
import bdprune.record
seen = []
bdprune.fleet.scan = lambda *args, **settings: seen.append((args, settings))
bdprune.pipeline.purify = lambda *args, **settings: seen.append((args, settings))
bdprune.scan("a", data="b")
bdprune.purify("c", "d", method="e")
print(seen)
"""
    assert run(code) == "[(('a',), {'data': 'b'}), (('c', 'd'), {'method': 'e'})]"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trojan'"):
        _ = bdprune.trojan
