"""Other packages import only names of ``bdprune.ops`` itself.

import-linter cannot check this: a function of an op and its file have the same name.
"""

from __future__ import annotations

import re
from pathlib import Path

import bdprune
from bdprune import ops

ROOT = Path(bdprune.__file__).parent


def test_other_packages_import_no_file_of_the_ops() -> None:
    others = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py") if path.parent.name != "ops"}
    found = {name for name, path in others.items() if re.search(r"\bbdprune\.ops\.\w+ import", path.read_text())}
    assert not found


def test_names_shared_with_a_file_are_functions_or_classes() -> None:
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
