"""Docstrings as Markdown: names in them become links to where they are documented.

Docstrings name things as ``bdprune.load``, ``Case`` or :func:`bdprune.ops.fastest`. Public names become
cross-references; everything else in a role becomes code. The section ``Example`` becomes ``Examples``, whose doctests
griffe knows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent))
from public import PUBLIC  # a module beside this one; griffe loads extensions by their path

_NAME = re.compile(r"(?::\w+:`~?(?P<role>[\w.]+)`|``(?P<code>[\w.]+)``)")


class Roles(griffe.Extension):
    """The extension that griffe loads."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Rewrites one docstring, once."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """``text`` with cross-references in place of the public names and roles, but for its doctests."""
    text, example, doctests = text.partition("\nExample:\n")
    return _NAME.sub(_reference, text) + (f"\nExamples:\n{doctests}" if example else "")


def _reference(found: re.Match[str]) -> str:
    name = found["role"] or found["code"]
    short = name.rpartition(".")[2]
    for path in (name, f"bdprune.{name}" if short[:1].isupper() else ""):
        if path in PUBLIC:
            return f"[`{name}`][{path}]"
    return f"``{short if found['role'] else name}``"
