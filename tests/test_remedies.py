"""Every remedy names options and parameters that exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import bdprune
from bdprune.cli.main import main
from bdprune.pipeline import Options
from bdprune.pipeline.repair import RepairNames

PACKAGE = Path(bdprune.__file__).parent
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])")
PARAMETER = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
# Words with an underscore that are not parameters of bdprune: torch's own, and arrays and columns in files.
OTHERS = {
    "load_state_dict",
    "no_grad",
    "remove_parametrizations",
    "remove_spectral_norm",
    "set_default_dtype",
    "state_dict",
    "target_label",
    "weight_map",
    "x_test",
    "y_test",
}


def options(command: click.Command) -> set[str]:
    own = {name.removeprefix("--") for one in command.params for name in one.opts if name.startswith("--")}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union({"help"}, *map(options, below))


def texts(node: ast.AST) -> Iterator[str]:
    """The constant parts of every string in ``node``."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


def remedies(tree: ast.Module) -> Iterator[str]:
    """Second arguments of errors, and the constants and local names that they may be."""
    names: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, []).extend(texts(node.value))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not _is_error(node.func):
            continue
        for hint in [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "hint")]:
            yield from names.get(hint.id, []) if isinstance(hint, ast.Name) else texts(hint)


def _is_error(function: ast.expr) -> bool:
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    return name.endswith("Error")


def parameters() -> set[str]:
    functions = [getattr(bdprune, name) for name in ("load", "scan", "purify", "score", "invert")]
    found = {name for function in functions for name in inspect.signature(function).parameters}
    return found | set(inspect.signature(Options).parameters) | RepairNames.__annotations__.keys()


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_named_options_exist(path: Path) -> None:
    known = options(main)
    named = {option for text in texts(ast.parse(path.read_text())) for option in OPTION.findall(text)}
    # Options of other programs, such as pip, are part of their commands.
    assert named - known - {"no-build-isolation"} == set()


def test_parameters_that_remedies_name_exist() -> None:
    known = parameters() | OTHERS
    unknown = {
        (path.name, name, text)
        for path in FILES
        if path.parent.name not in ("attacks", "zoo", "loops", "ops")
        for text in remedies(ast.parse(path.read_text()))
        for name in PARAMETER.findall(text)
        if name not in known
    }
    assert unknown == set()


def test_the_code_has_many_remedies() -> None:
    found = [text for path in FILES for text in remedies(ast.parse(path.read_text()))]
    assert len(found) > 150 and any("--input-shape" in text for text in found)
