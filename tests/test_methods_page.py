"""docs/methods.md is made from the methods' own descriptions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "generate_docs.py"


def test_is_up_to_date() -> None:
    """``python tools/generate_docs.py`` makes it."""
    assert generate("--check").returncode == 0


def test_says_so_where_it_is_stale(tmp_path: Path) -> None:
    (tmp_path / "stale.md").write_text("old")
    done = generate(tmp_path / "stale.md", "--check")
    assert done.returncode == 1 and "stale.md is stale. Run: python tools/generate_docs.py" in done.stderr
    assert (tmp_path / "stale.md").read_text() == "old"


def generate(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, args)], capture_output=True, text=True)
