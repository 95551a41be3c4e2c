"""``tests/`` mirrors ``bdprune/``: a reader finds the tests of a module where the module is."""

from __future__ import annotations

from pathlib import Path

import bdprune

TESTS = Path(__file__).parent
PACKAGE = Path(bdprune.__file__).parent
APART = {"bench", "core", "cuda", "docs", "gpu", "plugin"}
"""Folders whose tests do not belong to a Python package."""


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {one.name for one in TESTS.iterdir() if one.is_dir() and any(one.glob("**/test_*.py"))}
    assert folders - APART <= {one.name for one in PACKAGE.iterdir() if one.is_dir()}


def test_every_package_has_tests() -> None:
    packages = {one.parent.name for one in PACKAGE.glob("*/__init__.py")}
    assert packages <= {one.name for one in TESTS.iterdir() if one.is_dir()}
