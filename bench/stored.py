"""Cost and memory of a fleet with a store.

    python bench/stored.py scans [--models 1000]
    python bench/stored.py screens [--models 10000]

``scans`` copies the networks of zoo/cifar10-w8 with slightly changed weights, scans them with the data-free detector
``lipschitz`` into a store, and again from the store. It prints the time beyond the detectors by their own clocks, with
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

import numpy as np

ZOO = Path(__file__).parents[1] / "zoo" / "cifar10-w8"
WARM = 50
"""Models before memory is expected not to grow."""


def copies(folder: Path, count: int) -> list[Path]:
    """Copies of the zoo's networks, each with one changed weight; all have another digest."""
    from safetensors.numpy import load_file, save_file

    states = [load_file(path) for path in sorted(ZOO.glob("*.safetensors")) if "trigger" not in path.name]
    paths = []
    for number in range(count):
        state = dict(states[number % len(states)])
        name = next(key for key, value in state.items() if value.ndim == 4)
        changed = state[name].copy()
        changed.flat[number % changed.size] *= np.float32(1 + 1e-3 * (1 + number / count)).astype(changed.dtype)
        paths.append(folder / f"{number:05}.safetensors")
        save_file(state | {name: changed}, paths[-1])
    return paths


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def scan_run(paths: list[Path], store: str | None) -> dict[str, float]:
    """One run of scans: seconds, seconds of the detectors, and growth of memory."""
    import bdprune

    after_warm = 0
    with bdprune.Scanner(detectors="lipschitz", store=store) as scanner:
        list(scanner.scan_many(paths[:1]))  # imports
        start, detectors = time.perf_counter(), 0.0
        for number, result in enumerate(scanner.scan_many(paths)):
            assert result.error is None, result.error
            detectors += sum(one.seconds or 0.0 for one in result.detectors)
            if number == WARM:
                after_warm = resident("VmRSS")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "detectors": detectors, "growth": resident("VmRSS") - after_warm}


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


def measured(part: str, folder: Path, store: Path | None) -> dict[str, float]:
    """One run in a fresh process."""
    command = [
        sys.executable,
        __file__,
        part,
        "--run",
        str(folder),
        *([] if store is None else ["--store", str(store)]),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def scans(count: int) -> None:
    """Prints the cost of store and fleet."""
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name) / "models", Path(name) / "scans.db"
        folder.mkdir()
        copies(folder, count)
        runs = {"no store": measured("scans", folder, None), "store": measured("scans", folder, store)}
        runs["second run"] = measured("scans", folder, store)
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
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name) / "models", Path(name) / "screens.db"
        folder.mkdir()
        copies(folder, count)
        for title, used in (("no store", None), ("store", store), ("second run", store)):
            run = measured("screens", folder, used)
            rate = run["count"] / run["seconds"]
            print(f"{title}: {run['count']} screens, {rate:.0f} a second, peak {run['peak'] / 1e6:.0f} MB")


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scans", "screens"])
    parser.add_argument("--models", type=int)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run = scan_run if options.part == "scans" else screen_run
        print(json.dumps(run(sorted(options.run.iterdir()), options.store)))
    elif options.part == "scans":
        scans(options.models or 1000)
    else:
        screens(options.models or 10_000)


if __name__ == "__main__":
    main()
