"""The names that the page of the Python API has to document, read from the source: nothing is imported for that."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "bdprune"


def exported(package: str) -> list[str]:
    """The public names of a package, as ``bdprune.ops.fastest``: what its ``__init__`` imports from others of ours."""
    init = PACKAGE.parent.joinpath(*package.split("."), "__init__.py")
    nodes = ast.walk(ast.parse(init.read_text(encoding="utf-8")))
    imports = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bdprune.")
    ]
    return [f"{package}.{name.asname or name.name}" for node in imports for name in node.names]


PUBLIC = frozenset([*exported("bdprune"), *exported("bdprune.ops"), *exported("bdprune.testing")])
