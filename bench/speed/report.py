"""Makes docs/evaluation/speed.md and its pictures from the JSON records.

    python -m bench.speed.report [--check] [--results bench/results] [--docs docs]

It reads speed-*.json, precision-*.json and winograd-rule-*.json. ``--check`` writes nothing and exits with 1 if the
page or a picture is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.speed.page import Records, page, pictures

_ROOT = Path(__file__).resolve().parents[2]


def read(results: Path) -> Records:
    """All records in a folder, by name of the file."""
    speed, precision, rule = (
        {path.name: json.loads(path.read_text()) for path in sorted(results.glob(f"{kind}-*.json"))}
        for kind in ("speed", "precision", "winograd-rule")
    )
    return Records(speed, precision, rule)


def files(records: Records, docs: Path) -> dict[Path, str]:
    """The page and its pictures: path and content of each file."""
    found = {docs / "evaluation" / "speed.md": page(records)}
    return found | {docs / "images" / name: picture for name, picture in pictures(records).items()}


def outdated(records: Records, docs: Path) -> list[Path]:
    """Files that differ from the records, and pictures that no record needs."""
    wanted = files(records, docs)
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return wrong + [path for path in sorted((docs / "images").glob("speed-*.svg")) if path not in wanted]


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    parser.add_argument("--results", type=Path, default=_ROOT / "bench" / "results", help="folder of the records")
    parser.add_argument("--docs", type=Path, default=_ROOT / "docs", help="folder of the documents")
    options = parser.parse_args(arguments)
    records = read(options.results)
    if not records.speed:
        sys.exit(f"Found no speed-*.json in {options.results}; run `python -m bench.speed` first.")
    wrong = outdated(records, options.docs)
    if options.check:
        for path in wrong:
            print(f"{path} is out of date; run `python -m bench.speed.report`.", file=sys.stderr)
        return 1 if wrong else 0
    wanted = files(records, options.docs)
    for path in wrong:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
