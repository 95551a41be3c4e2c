"""Times a scan without its detectors: reading, recognising the model, checking the clean data, judging.

    python bench/overhead.py [--models clean badnets] [--rounds 5]

Scans models of zoo/cifar10-w8 on zoo/demo/defence.npz after all imports. Prints the fastest round in seconds of wall
time: the scan, its detectors by their own clocks, the rest, and the part of the rest that checks the clean data.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import bdprune
from bdprune.analysis import MEMO, check_sanity
from bdprune.pipeline import CleanSource

ZOO = Path(__file__).parents[1] / "zoo"
IMAGES = ZOO / "demo" / "defence.npz"


def measure(name: str) -> tuple[float, float]:
    """Seconds of a scan, and of its detectors."""
    MEMO.clear()
    start = time.perf_counter()
    result = bdprune.scan(ZOO / "cifar10-w8" / f"{name}.safetensors", IMAGES)
    return time.perf_counter() - start, sum(one.seconds or 0.0 for one in result.detectors)


def sanity_seconds(name: str) -> float:
    """Seconds of the check of the clean data."""
    model = bdprune.load(ZOO / "cifar10-w8" / f"{name}.safetensors")
    fitted, data = CleanSource(IMAGES).fit_for(model)
    assert data is not None
    start = time.perf_counter()
    check_sanity(fitted, data.by_content)
    return time.perf_counter() - start


def main() -> None:
    """Prints one line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["clean", "badnets", "wanet"])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    measure(chosen.models[0])  # imports
    for name in chosen.models:
        rounds = [measure(name) for _ in range(chosen.rounds)]
        least = min(rounds, key=lambda one: one[0] - one[1])
        sanity = min(sanity_seconds(name) for _ in range(chosen.rounds))
        rest = least[0] - least[1]
        print(f"{name}: scan {least[0]:.2f}, detectors {least[1]:.2f}, rest {rest:.3f}, check of the data {sanity:.3f}")


if __name__ == "__main__":
    main()
