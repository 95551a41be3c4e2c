"""Measures verdicts and repairs of a zoo's models with several seeds on the full test set.

    python bench/efficacy.py zoo/demo/manifest.toml --data DIR [--seeds 5] [--part scans] [--only MODEL] [--rows FILE]
                              [--methods auto,rnp:paper,rnp+nad] [--budget full]
                              [--clean zoo/demo/defence.npz] [--device cuda] [--skip-retuning]

DIR holds the zoo's dataset. Prints Markdown tables: the verdicts of every model; and for each method clean accuracy
(CA), attack success rate (ASR) and robust accuracy (RA, triggered images with their true label) before and after each
repair, the defence effectiveness rate (DER), the ASR after an attacker has fine-tuned the repaired model on five
triggered images, seconds, peak memory, and published figures (bench/published.py).
Seeds change the split, the order and the augmentation. The clean images are the zoo's, or those of --clean. Methods
decide on these images only, with the same settings for every attack. Triggers and test images are used for measuring
only.

Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not run again. A repair that fails stops
nothing: it is named with the missing rows at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from published import has_published_settings
from recovered import recovered_rows, recovered_table
from repairs import (
    comparison_table,
    missing_rows,
    parse_method,
    repair_row,
    repair_table,
    retuned,
    success_table,
    summary_table,
)
from rows import Row, Rows, commit
from verdicts import by, verdict_row, verdict_table

from bdprune.analysis import MEMO
from bdprune.attacks import shape_of
from bdprune.data import CleanData, RawImages, load_clean, read_dataset
from bdprune.fleet import scan
from bdprune.model import Model, load
from bdprune.ops import device_name
from bdprune.pipeline import parse_device
from bdprune.record import Result
from bdprune.zoo import Entry, Storage, images_of, load_trigger, measure, read_manifest, weights_path

DEFAULT_METHODS = ("auto", "rnp", "suspiciousness-100", "suspiciousness-10")


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
        """CA, ASR and RA in per cent on the full test set; ASR and RA of a clean model are None."""
        found = measure(model.module, self._test, self._num_classes, self.attack, self._trigger)
        success, robust = found.attack_success_rate, found.robust_accuracy
        return {
            "ca": 100 * found.clean_accuracy,
            "asr": None if success is None else 100 * success,
            "ra": None if robust is None else 100 * robust,
        }

    def retuned_success(self, model: Model, seed: int) -> float | None:
        """ASR in per cent after an attacker's retuning; None for a clean model."""
        if self._trigger is None or self.attack is None:
            return None
        again = retuned(model, self.clean, self._test, self._trigger, self.attack, seed)
        success: float | None = self.measure(again)["asr"]
        return success


def scan_row(subject: Subject, seed: int, budget: str) -> Row:
    """The verdict, and the recovered triggers."""
    MEMO.clear()  # the seconds must include everything
    with tempfile.TemporaryDirectory() as folder:
        device = str(subject.device)
        result = scan(subject.path, subject.clean, seed=seed, device=device, budget=budget, attachments=folder)
        recovered = subject.recovered(result, Path(folder))
    return verdict_row(result) | {"recovered": recovered}


def repaired_row(subject: Subject, method: str, seed: int, retuning: bool) -> Row:
    """CA, ASR and RA after one repair, and with ``retuning`` ASR after an attacker's retuning."""
    row = repair_row(subject.load(), subject.clean, method, seed, subject.measure)
    after: Model = row.pop("model_after")
    return row | {"retuned": subject.retuned_success(after, seed) if retuning else None}


@dataclass(frozen=True)
class Plan:
    """What is measured of every model: see the options of the command."""

    parts: list[str]
    methods: list[str]
    seeds: int
    budget: str
    retuning: bool


def run(record: Rows, subject: Subject, plan: Plan) -> None:
    """Makes all missing rows of one model."""
    base: Row = {"model": subject.name, "kind": subject.attack.kind if subject.attack else None, "truth": subject.truth}
    if "repairs" in plan.parts:
        key = base | {"part": "before", "method": None, "seed": None}
        record.add(key, lambda: subject.measure(subject.load()))
    for seed in range(plan.seeds):
        if "scans" in plan.parts:
            key = base | {"part": "scan", "method": plan.budget, "seed": seed}
            record.add(key, partial(scan_row, subject, seed, plan.budget))
        for method in plan.methods if "repairs" in plan.parts else []:
            key = base | {"part": "repair", "method": method, "seed": seed}
            record.add(key, partial(repaired_row, subject, method, seed, plan.retuning))


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
        "--methods",
        default=",".join(DEFAULT_METHODS),
        help="purifiers, separated by commas, as in rnp,rnp:paper,auto-100,rnp+nad (preset; 100 images; two in turn); "
        f"default: {','.join(DEFAULT_METHODS)}",
    )
    parser.add_argument("--budget", choices=["fast", "default", "full"], default="default", help="of the scans")
    parser.add_argument("--clean", type=Path, help="clean images, for a zoo without a defence.npz")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    parser.add_argument("--skip-retuning", action="store_true", help="leave out the attacker's fine-tuning")
    options = parser.parse_args()
    device = parse_device(options.device)
    record = Rows(options.rows, ("part", "model", "method", "seed"), {"device": device_name(device)})
    methods = [one for one in options.methods.split(",") if one]
    for one in methods:
        parse_method(one)
    parts = ["scans", "repairs"] if options.part == "both" else [options.part]
    plan = Plan(parts, methods, options.seeds, options.budget, not options.skip_retuning)
    zoo = read_manifest(options.manifest)
    storage = Storage(zoo)
    made = [(entry, folder) for entry in zoo.models if (folder := storage.made(entry)) is not None]
    sets: dict[str, RawImages] = {}
    for entry, folder in made:
        if options.only and entry.name not in options.only:
            continue
        if entry.dataset not in sets:
            sets[entry.dataset] = read_dataset(options.data, entry.dataset, "test")
        clean = load_clean(options.clean or defence_images([folder, zoo.home, *(one.home for one in zoo.models)]))
        run(record, Subject(entry, folder, clean, images_of(entry, sets[entry.dataset]), device), plan)
    if skipped := {entry.name for entry in zoo.models} - {entry.name for entry, _ in made}:
        print(f"Skipped models without weights: {', '.join(sorted(skipped))}.\n")
    print_tables(record, [entry for entry, _ in made], plan)
    print(f"\n{json.dumps(_environment())}")
    sys.exit(1 if record.failed else 0)


def print_tables(record: Rows, entries: Sequence[Entry], plan: Plan) -> None:
    """Prints the tables of all rows, and names the repairs that have none.

    Args:
        entries: the models that have weights.
    """
    scans = record.where(part="scan", method=plan.budget)
    if scans:
        print(verdict_table(scans))
    if any(row.get("recovered") for row in scans):
        print(f"\nRecovered triggers\n\n{recovered_table(scans)}")
    before, repairs = {row["model"]: row for row in record.where(part="before")}, record.where(part="repair")
    as_published = {entry.name for entry in entries if has_published_settings(entry.make_attack())}
    by_method = by(repairs, "method")
    for method, mine in by_method.items():
        print(f"\n{method}\n\n{repair_table(mine, before, as_published)}")
    for name, mine in by(repairs, "model").items():
        if before[name]["asr"] is not None and len(by(mine, "method")) > 1:
            print(f"\n{name}\n\n{comparison_table(mine, before[name])}")
    if repairs:
        backdoored = {entry.name for entry in entries if entry.attack}
        print(f"\nASR (fall of CA)\n\n{success_table(repairs, before, list(by_method))}")
        print(f"\n{summary_table(repairs, before, list(dict.fromkeys([*by_method, *plan.methods])), backdoored)}")
    if "repairs" in plan.parts:
        print(f"\n{missing_rows(record, [entry.name for entry in entries], plan.methods, plan.seeds)}")


if __name__ == "__main__":
    main()
