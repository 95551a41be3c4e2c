"""Cost and memory of a fleet with a store.

    python bench/stored.py scans [--models 1000] [--detectors lipschitz,df_tnd]
    python bench/stored.py screens [--models 10000]

``scans`` copies the networks of zoo/cifar10-w8 with slightly changed weights, scans them with data-free detectors
into a store, and again from the store. It prints the time beyond the detectors by their own clocks, with
and without the store, the time of the second run, and the growth of memory after the first 50 models. ``screens`` does
the same for screens of one core: models a second of wall time, and the peak of memory. Each part runs in a fresh
process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WARM = 50
"""Models before memory is expected not to grow."""


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def scan_run(paths: list[Path], store: str | None, detectors: str) -> dict[str, float]:
    """One run of scans: seconds, seconds of the detectors, and growth of memory."""
    import bdprune

    after_warm = 0
    with bdprune.Scanner(detectors=detectors, store=store) as scanner:
        list(scanner.scan_many(paths[:1]))  # imports
        start, spent = time.perf_counter(), 0.0
        for number, result in enumerate(scanner.scan_many(paths)):
            assert result.error is None, result.error
            spent += sum(one.seconds or 0.0 for one in result.detectors)
            if number == WARM:
                after_warm = resident("VmRSS")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "detectors": spent, "growth": resident("VmRSS") - after_warm}


def screen_run(paths: list[Path], store: str | None) -> dict[str, float]:
    """One run of screens: seconds, and the peak of memory."""
    from bdprune.screening import screen_many
    from bdprune.store import Screens, Store

    start = time.perf_counter()
    if store is None:
        results: Iterator[object] = screen_many(paths)
        count = sum(1 for _ in results)
    else:
        with Store(store) as opened:
            count = sum(1 for _ in Screens(opened).run(paths))
    return {"seconds": time.perf_counter() - start, "count": count, "peak": resident("VmHWM")}


def measured(part: str, folder: Path, store: Path | None, detectors: str = "lipschitz") -> dict[str, float]:
    """One run in a fresh process."""
    command = [
        sys.executable,
        __file__,
        part,
        "--run",
        str(folder),
        "--detectors",
        detectors,
        *([] if store is None else ["--store", str(store)]),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def scans(count: int, detectors: str) -> None:
    """Prints the cost of store and fleet."""
    from changed import changed_copies

    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name) / "models", Path(name) / "scans.db"
        changed_copies(folder, count)
        kinds = {"no store": None, "store": store, "second run": store}
        runs = {title: measured("scans", folder, used, detectors) for title, used in kinds.items()}
        for title, run in runs.items():
            beyond = (run["seconds"] - run["detectors"]) / count
            print(
                f"{title}: {run['seconds']:.1f} s for {count} models, detectors {run['detectors']:.1f} s, "
                f"beyond them {1000 * beyond:.2f} ms a model, memory +{run['growth'] / 1e6:.1f} MB after {WARM} models"
            )
        added = (runs["store"]["seconds"] - runs["no store"]["seconds"]) / count
        share = runs["second run"]["seconds"] / runs["store"]["seconds"]
        print(f"the store adds {1000 * added:.2f} ms a model; the second run takes {share:.1%} of the first")


def screens(count: int) -> None:
    """Prints the speed and memory of screens."""
    from changed import changed_copies  # not above: the process that is measured runs without torch

    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name) / "models", Path(name) / "screens.db"
        changed_copies(folder, count)
        for title, used in (("no store", None), ("store", store), ("second run", store)):
            run = measured("screens", folder, used)
            rate = run["count"] / run["seconds"]
            print(f"{title}: {run['count']} screens, {rate:.0f} a second, peak {run['peak'] / 1e6:.0f} MB")


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scans", "screens"])
    parser.add_argument("--models", type=int)
    parser.add_argument("--detectors", default="lipschitz", metavar="NAMES", help="of the scans (lipschitz)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        paths = sorted(options.run.iterdir())
        is_scan = options.part == "scans"
        run = scan_run(paths, options.store, options.detectors) if is_scan else screen_run(paths, options.store)
        print(json.dumps(run))
    elif options.part == "scans":
        scans(options.models or 1000, options.detectors)
    else:
        screens(options.models or 10_000)


if __name__ == "__main__":
    main()
