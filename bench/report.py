"""Measures the report over a store of many models: its size, the time and memory to write it, the time to open it.

    python bench/report.py [--models 10000] [--keep DIR]

Makes a store of synthetic results (most of them clean, with pictures of triggers), runs `bdprune report` on it in a
process of its own, and prints the figures. If Chromium or Chrome is on PATH, it opens the report in it three times,
until the table is drawn and searchable, and prints the median. ``--keep`` leaves the store and the report in DIR.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.report.chromium import Chromium  # noqa: E402
from tests.report.conftest import PICTURES  # noqa: E402
from tests.report.fleet import fill  # noqa: E402
from tests.resources import find_browser  # noqa: E402

TIMES = 3
"""How often the report is opened."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000, metavar="N")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for line in measured(args.models, folder):
            print(line, flush=True)
    return 0


def measured(models: int, folder: Path) -> Iterator[str]:
    """The figures, a line each."""
    store, report = folder / "scans.db", folder / "report.html"
    store.unlink(missing_ok=True)
    fill(store, models, PICTURES)
    seconds, peak = written(store, report)
    yield f"models          {models:,}"
    yield f"store           {store.stat().st_size / 1e6:.1f} MB"
    yield f"report          {report.stat().st_size / 1e6:.2f} MB"
    yield f"time to write   {seconds:.2f} s"
    yield f"peak memory     {peak / 1e6:.0f} MB"
    browser = find_browser()
    yield (
        f"time to open    {opened(browser, report, folder):.2f} s" if browser else "time to open    no browser on PATH"
    )


def written(store: Path, report: Path) -> tuple[float, float]:
    """Seconds and peak bytes of `bdprune report`, with the start of Python."""
    command = [sys.executable, "-m", "bdprune", "report", str(store), "-o", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, environment)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024.0


def opened(browser: str, report: Path, folder: Path) -> float:
    """Seconds from the start of the navigation until the table is drawn, the median of a few."""
    times = []
    with Chromium(browser, folder / "profile") as chromium:
        for _ in range(TIMES):
            start = time.perf_counter()
            chromium.open(report, "light")
            rows = chromium.value("document.getElementById('table').tBodies[0].rows.length")
            hidden = chromium.value("document.getElementById('controls').hidden")
            times.append(time.perf_counter() - start)
            if not rows or hidden:
                raise SystemExit("The report opened without its table.")
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
