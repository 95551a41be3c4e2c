"""Writes the generated pages of docs/reference, and the generated parts of results.md, from the code.

    python tools/generate_docs.py [--folder DIR] [--check]

``--check`` writes nothing and exits with 1 where a page is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from docs import command_line, environment, methods, results, rules

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGES = {
    "command-line.md": command_line.page,
    "environment.md": environment.page,
    "methods.md": methods.page,
    "rules.md": rules.page,
}
FILLED = {"results.md": results.filled}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    stale = [path for path, text in texts(args.folder).items() if _read(path) != text]
    if args.check:
        for path in stale:
            print(f"{path} is stale. Run: python tools/generate_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in texts(args.folder).items():
        path.write_text(text, encoding="utf-8")
    return 0


def texts(folder: Path) -> dict[Path, str]:
    """What each page should hold."""
    pages = {folder / name: page() for name, page in PAGES.items()}
    return pages | {path: fill(_read(path)) for name, fill in FILLED.items() if (path := folder / name).is_file()}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
