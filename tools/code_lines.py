"""Counts code lines of Python files, without docstrings, comments and blank lines, by package.

    python tools/code_lines.py [FOLDER] [--limits]

``--limits`` also lists functions above 50 lines, files above 400 lines and functions with more than 7 parameters
(without ``self``, ``cls`` and the parameters of click commands), and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LONGEST_FUNCTION, LONGEST_FILE, MOST_PARAMETERS = 50, 400, 7
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source: str) -> int:
    """Lines with a token that is neither a comment nor part of a docstring."""
    silent = docstring_lines(ast.parse(source))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - silent)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of strings that are statements: docstrings of modules, classes, functions and names."""
    alone = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return {line for node in alone for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def beyond_limits(path: Path) -> Iterator[str]:
    """The limits that a file exceeds."""
    source = path.read_text()
    count = len(source.splitlines())
    if count > LONGEST_FILE:
        yield f"{path}: {count} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{path}:{node.lineno} {node.name}: {length} lines"
            taken = parameters(node)
            if taken > MOST_PARAMETERS and not _is_command(node) and not _is_fixed_by_others(node):
                yield f"{path}:{node.lineno} {node.name}: {taken} parameters"


def parameters(function: Function) -> int:
    """Number of parameters that a caller may pass."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(one.arg not in ("self", "cls") for one in arguments)


def _is_command(function: Function) -> bool:
    return any("click" in ast.unparse(one) or "command" in ast.unparse(one) for one in function.decorator_list)


def _is_fixed_by_others(function: Function) -> bool:
    """Whether others fix the parameters: fake kernels follow the schema of their op."""
    return any("register" in ast.unparse(one) for one in function.decorator_list)


def main() -> int:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bdprune"))
    parser.add_argument("--limits", action="store_true")
    chosen = parser.parse_args()
    files = sorted(chosen.folder.rglob("*.py"))
    counts: Counter[str] = Counter()
    for path in files:
        place = path.relative_to(chosen.folder).parts
        counts[place[0] if len(place) > 1 else "."] += code_lines(path.read_text())
    for package, count in sorted(counts.items()):
        print(f"{count:6}  {package}")
    print(f"{counts.total():6}  in {len(files)} files")
    wrong = [one for path in files for one in beyond_limits(path)] if chosen.limits else []
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
