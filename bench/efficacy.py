"""Measures verdicts and repairs of a zoo's models with several seeds on the full test set.

    python bench/efficacy.py zoo/demo/manifest.toml --data DIR [--seeds 5] [--part scans] [--only MODEL] [--rows FILE]
                              [--budget full]
                              [--clean zoo/demo/defence.npz] [--device cuda]

DIR holds the zoo's dataset. Prints Markdown tables: the verdicts of every model, and clean accuracy (CA) and attack
success rate (ASR) before and after each repair, with RNP's published figures (Li et al., 2023, Tables 2 and 10:
ResNet-18 of width 64, 200 epochs). Seeds change the split, the order and the augmentation. The clean images are the
zoo's, or those of --clean. Thresholds depend on these images only, with the same settings for every attack. Triggers
and test images are used for measuring only.

Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from recovered import recovered_rows, recovered_table
from rows import Row, Rows, commit
from verdicts import by, verdict_row, verdict_table

from bdprune.analysis import MEMO, Case
from bdprune.attacks import shape_of
from bdprune.data import CleanData, RawImages, load_clean, read_dataset
from bdprune.fleet import scan
from bdprune.methods import Repair
from bdprune.model import Model, load
from bdprune.ops import device_name
from bdprune.pipeline import parse_device
from bdprune.purifiers import RNP, SuspiciousnessPruning
from bdprune.record import Result
from bdprune.zoo import Entry, Storage, images_of, load_trigger, measure, read_manifest, weights_path

METHODS: dict[str, tuple[int, Callable[[int], RNP | SuspiciousnessPruning]]] = {
    "rnp": (500, lambda seed: RNP(seed=seed)),
    "suspiciousness-100": (100, lambda seed: SuspiciousnessPruning(seed=seed)),
    "suspiciousness-10": (10, lambda seed: SuspiciousnessPruning(seed=seed)),
}
# Published ASR and CA after RNP, in per cent.
PAPER = {
    "badnets": (0.20, 92.22),
    "trojan": (2.23, 92.56),
    "blend": (0.33, 92.62),
    "label-consistent": (8.87, 93.12),
    "sig": (0.43, 94.62),
    "dynamic": (15.24, 90.18),
    "wanet": (10.98, 92.83),
    "feature-collision": (1.80, 90.93),
    "dfst": (4.61, 92.78),
    "awp": (1.04, 94.24),
    "lira": (13.51, 92.26),
    "ablend": (1.09, 90.38),
}


class Subject:
    """One model of a zoo and its truth.

    Args:
        entry: the model's entry in the manifest.
        folder: folder with its files.
        clean: the defender's clean images.
        test: the full test set.
        device: device of scans, repairs and measurements.
    """

    def __init__(self, entry: Entry, folder: Path, clean: CleanData, test: RawImages, device: torch.device) -> None:
        self.name, self.clean, self.device = entry.name, clean, device
        self.path = weights_path(folder, entry.name)
        self.attack = entry.make_attack()
        self.truth = self.attack.target if self.attack else None
        self._test, self._num_classes = test, entry.num_classes
        self._trigger = load_trigger(entry, self.attack, folder, shape_of(test.images)) if self.attack else None

    def load(self) -> Model:
        """The model before any repair."""
        model = load(self.path)
        model.network.to(self.device)
        return model

    def recovered(self, result: Result, folder: Path) -> list[Row]:
        """The recovered triggers of a scan and their flips on the full test set; empty for a clean model."""
        if self._trigger is None:
            return []
        return recovered_rows(result, folder, self.load().module, self._test, self._trigger)

    def measure(self, model: Model) -> Row:
        """CA and ASR in per cent on the full test set; the ASR of a clean model is None."""
        found = measure(model.module, self._test, self._num_classes, self.attack, self._trigger)
        success = found.attack_success_rate
        return {"ca": 100 * found.clean_accuracy, "asr": None if success is None else 100 * success}


def scan_row(subject: Subject, seed: int, budget: str) -> Row:
    """The verdict, and the recovered triggers."""
    MEMO.clear()  # the seconds must include everything
    with tempfile.TemporaryDirectory() as folder:
        device = str(subject.device)
        result = scan(subject.path, subject.clean, seed=seed, device=device, budget=budget, attachments=folder)
        recovered = subject.recovered(result, Path(folder))
    return verdict_row(result) | {"recovered": recovered}


def repair_row(subject: Subject, method: str, seed: int) -> Row:
    """CA and ASR after one repair; the seed draws the clean images."""
    count, make = METHODS[method]
    per_class = max(count // len(subject.clean.class_counts), 1)
    data = subject.clean
    if count < len(data):
        data = data.sample(per_class, torch.Generator().manual_seed(seed))
    MEMO.clear()
    start = time.perf_counter()
    result: Repair = make(seed)(Case(subject.load(), data))
    seconds = time.perf_counter() - start
    pruned = sum(map(len, result.pruned.values()))
    threshold = None if math.isnan(result.threshold) else result.threshold
    row: Row = {"images": len(data), "pruned": pruned, "threshold": threshold, "rule": result.selection}
    return row | {"after": subject.measure(result.model), "seconds": seconds}


def run(record: Rows, subject: Subject, parts: list[str], methods: list[str], seeds: int, budget: str) -> None:
    """Makes all missing rows of one model."""
    base: Row = {"model": subject.name, "kind": subject.attack.kind if subject.attack else None, "truth": subject.truth}
    if "repairs" in parts and subject.attack:
        key = base | {"part": "before", "method": None, "seed": None}
        record.add(key, lambda: subject.measure(subject.load()))
    for seed in range(seeds):
        if "scans" in parts:
            key = base | {"part": "scan", "method": budget, "seed": seed}
            record.add(key, lambda seed=seed: scan_row(subject, seed, budget))  # type: ignore[misc]
        for method in methods if "repairs" in parts and subject.attack else []:
            key = base | {"part": "repair", "method": method, "seed": seed}
            record.add(key, lambda method=method, seed=seed: repair_row(subject, method, seed))  # type: ignore[misc]


def repair_table(rows: list[Row], before: dict[str, Row], method: str) -> str:
    """A Markdown table with mean and worst over the seeds, and a line for all models."""
    lines = [
        "| model | ASR before | after, mean (worst) | CA before | after, mean (worst) | pruned | RNP paper ASR / CA |",
        "|---|---|---|---|---|---|---|",
    ]
    means: list[tuple[float, float]] = []
    for name, mine in by([row for row in rows if row["method"] == method], "model").items():
        accuracy, success = ([row["after"][what] for row in mine] for what in ("ca", "asr"))
        first = before[name]
        means.append((statistics.mean(success), first["ca"] - statistics.mean(accuracy)))
        paper = PAPER.get(mine[0]["kind"]) if mine[0]["truth"] is not None else None
        lines.append(
            f"| {name} | {first['asr']:.2f} | {means[-1][0]:.2f} ({max(success):.2f}) | {first['ca']:.2f} "
            f"| {statistics.mean(accuracy):.2f} ({min(accuracy):.2f}) "
            f"| {min(row['pruned'] for row in mine)} to {max(row['pruned'] for row in mine)} "
            f"| {'–' if paper is None else f'{paper[0]:.2f} / {paper[1]:.2f}'} |"
        )
    if means:
        rates, drops = zip(*means, strict=True)
        lines.append(
            f"\n{method}, {len(means)} models: ASR {statistics.mean(rates):.2f} on average and {max(rates):.2f} at "
            f"worst; CA falls by {statistics.mean(drops):.2f} points on average and {max(drops):.2f} at worst."
        )
    return "\n".join(lines)


def defence_images(homes: Iterable[Path]) -> Path:
    """The clean images of the first folder that has any; a zoo may use those of an included zoo."""
    found = next((home / "defence.npz" for home in homes if (home / "defence.npz").exists()), None)
    return found or sys.exit("No folder of the zoo has a defence.npz; give clean images with --clean.")


def _environment() -> Row:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "commit": commit(),
    }


def main() -> None:
    """Makes the missing rows and prints the tables of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable (default: all)")
    parser.add_argument("--part", choices=["scans", "repairs", "both"], default="both")
    parser.add_argument(
        "--method", choices=list(METHODS), action="append", default=[], help="repeatable (default: all)"
    )
    parser.add_argument("--budget", choices=["fast", "default", "full"], default="default", help="of the scans")
    parser.add_argument("--clean", type=Path, help="clean images, for a zoo without a defence.npz")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    device = parse_device(options.device)
    record = Rows(options.rows, ("part", "model", "method", "seed"), {"device": device_name(device)})
    parts = ["scans", "repairs"] if options.part == "both" else [options.part]
    zoo = read_manifest(options.manifest)
    storage = Storage(zoo)
    sets: dict[str, RawImages] = {}
    skipped = []
    for entry in zoo.models:
        folder = storage.made(entry)
        if options.only and entry.name not in options.only:
            continue
        if folder is None:
            skipped.append(entry.name)
            continue
        if entry.dataset not in sets:
            sets[entry.dataset] = read_dataset(options.data, entry.dataset, "test")
        clean = load_clean(options.clean or defence_images([folder, zoo.home, *(one.home for one in zoo.models)]))
        run(
            record,
            Subject(entry, folder, clean, images_of(entry, sets[entry.dataset]), device),
            parts,
            options.method or list(METHODS),
            options.seeds,
            options.budget,
        )
    before = {row["model"]: row for row in record.where(part="before")}
    if skipped:
        print(f"Skipped models without weights: {', '.join(skipped)}.\n")
    scans = record.where(part="scan", method=options.budget)
    print(verdict_table(scans))
    if any(row.get("recovered") for row in scans):
        print(f"\nRecovered triggers\n\n{recovered_table(scans)}")
    for method in METHODS:
        print(f"\n{method}\n\n{repair_table(record.where(part='repair'), before, method)}")
    print(f"\n{json.dumps(_environment())}")


if __name__ == "__main__":
    main()
