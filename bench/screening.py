"""Speed, memory and accuracy of screens (``bdprune screen``), on one core.

    python bench/screening.py speed [--rounds 40]
    python bench/screening.py zoo zoo/reference zoo/cifar10-w8

``speed`` screens one ResNet-18 of width 64 (random weights, 45 MB) again and again from a warm cache, and prints models
per second of processor time and of wall time, and by how much the peak of memory grows. It needs torch only to write
the file. ``zoo`` screens every model of folders with a truth.json, and prints how well each score separates backdoored
networks from clean ones (AUROC), and how many of both are beyond the threshold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bdprune.record import ScreenResult
from bdprune.screening import HEAD_THRESHOLDS, THRESHOLD, screen

FORMS = ("safetensors", "zip", "legacy")


def write_model(path: Path, form: str) -> None:
    """Writes a ResNet-18 of width 64 with random weights."""
    code = """
import sys
import torch
from safetensors.torch import save_file
from bdprune.model.architectures import build
torch.manual_seed(0)
state = build("resnet18_cifar", 10, width=64).state_dict()
path, form = sys.argv[1:]
save_file(state, path) if form == "safetensors" else torch.save(
    state, path, _use_new_zipfile_serialization=form == "zip")
"""
    subprocess.run([sys.executable, "-c", code, str(path), form], check=True)  # torch stays out of this process


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def speed(rounds: int) -> Iterator[str]:
    """A line for each format, with and without the digest."""
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            path = Path(folder) / form
            write_model(path, form)
            for digest in (False, True):
                screen(path, digest=digest)
                before, wall, processor = peak_bytes(), time.perf_counter(), time.process_time()
                for _ in range(rounds):
                    assert screen(path, digest=digest).outcome != "error"
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                yield (
                    f"{form:12} {'with' if digest else 'without'} digest: {rounds / processor:6.1f} models/s of "
                    f"processor time, {rounds / wall:6.1f} of wall time; peak grew by "
                    f"{(peak_bytes() - before) / 1e6:.1f} MB to {peak_bytes() / 1e6:.0f} MB"
                )


def area(backdoored: list[float], clean: list[float]) -> float:
    """AUROC: the share of pairs in which the backdoored network has the larger score; ties count half."""
    wins = sum((one > other) + 0.5 * (one == other) for one in backdoored for other in clean)
    return wins / (len(backdoored) * len(clean)) if backdoored and clean else float("nan")


def head_score(result: ScreenResult, kind: str) -> float | None:
    """The z-score of a statistic of the head; None if it was not computed, as for fewer than four labels."""
    return next((one.z for head in result.heads for one in head.statistics if one.statistic == kind), None)


def zoo(folders: list[Path]) -> Iterator[str]:
    """A line for each score, and one for the outcome."""
    found: list[tuple[bool, ScreenResult]] = []
    for folder in folders:
        for row in json.loads((folder / "truth.json").read_text()):
            path = folder / f"{row['name']}.safetensors"
            if path.exists():
                found.append((row["recipe"]["attack"] is not None, screen(path, digest=False)))
    count = {flag: sum(one == flag for one, _ in found) for flag in (True, False)}
    yield f"{count[True]} backdoored, {count[False]} clean"
    scores: dict[str, tuple[float | None, Callable[[ScreenResult], float | None]]] = {
        "filter": (THRESHOLD, lambda one: one.peak.max_z if one.peak else 0.0)
    }
    for kind, threshold in HEAD_THRESHOLDS.items():
        scores[kind] = threshold, lambda one, kind=kind: head_score(one, kind)  # type: ignore[misc]
    for name, (threshold, score) in scores.items():
        known = [(flag, value) for flag, one in found if (value := score(one)) is not None]
        bad, good = ([value for flag, value in known if flag == wanted] for wanted in (True, False))
        beyond = [sum(one > (threshold or float("inf")) for one in each) for each in (bad, good)]
        counts = f"{len(bad)} and {len(good)} networks"
        yield (
            f"{name:9} {counts}: AUROC {area(bad, good):.2f}; largest of a clean network {max(good, default=0):.2f}; "
            f"beyond {threshold}: {beyond[0]} backdoored, {beyond[1]} clean"
        )
    looks = [sum(flag == wanted and one.outcome == "look closer" for flag, one in found) for wanted in (True, False)]
    yield f"look closer: {looks[0]} backdoored, {looks[1]} clean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("speed").add_argument("--rounds", type=int, default=40)
    kinds.add_parser("zoo").add_argument("folders", nargs="+", type=Path)
    chosen = parser.parse_args()
    for line in speed(chosen.rounds) if chosen.kind == "speed" else zoo(chosen.folders):
        print(line, flush=True)


if __name__ == "__main__":
    main()
