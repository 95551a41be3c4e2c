"""Verdicts and repairs of the shipped models over several seeds, on the full CIFAR-10 test set.

    python bench/demo_efficacy.py --data DIR [--seeds 5] [--only MODEL] [--part scans] [--json FILE]

DIR holds cifar10/test.parquet. Prints two Markdown tables: what a scan says of every model of zoo/demo, and clean
accuracy (CA) and attack success rate (ASR) before and after each repair. Seeds change the split, the order and the
augmentation; the 500 clean images are the shipped ones. The triggers and the test images are used to measure only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bdprune.attacks.base import Attack, shape_of
from bdprune.data.clean import CleanData
from bdprune.data.load import load_clean
from bdprune.data.parquet import RawImages, read_parquet
from bdprune.model.handle import Model
from bdprune.model.load import load
from bdprune.purify.rnp import RNP
from bdprune.purify.suspiciousness import SuspiciousnessPruning
from bdprune.scan.engine import scan
from bdprune.training.evaluate import attack_success_rate, clean_accuracy
from bdprune.zoo.manifest import Entry, read_manifest

ZOO = Path(__file__).parent.parent / "zoo" / "demo"
Row = dict[str, Any]


def measure(model: Model, attack: Attack | None, test: RawImages) -> Row:
    """CA and ASR in per cent on the full test set; the ASR of a clean model is None."""
    images = test.images.float() / 255
    accuracy = 100 * clean_accuracy(model.module, images, test.labels)
    if attack is None:
        return {"ca": accuracy, "asr": None}
    trigger, goal = attack.new_trigger(shape_of(images)), attack.goal(test.labels, model.num_classes)
    return {"ca": accuracy, "asr": 100 * attack_success_rate(model.module, images, test.labels, trigger, goal)}


def scans(entries: list[Entry], seeds: int, clean: CleanData) -> Iterator[Row]:
    """One row a model and seed: verdict, label, every detector's score."""
    for entry in entries:
        attack = entry.make_attack()
        for seed in range(seeds):
            result = scan(ZOO / f"{entry.name}.safetensors", clean, seed=seed)
            row = {
                "model": entry.name,
                "seed": seed,
                "truth": attack.target if attack else None,
                "verdict": result.verdict,
                "label": result.target_label,
                "risk": result.risk,
                "scores": {one.id: one.score for one in result.detectors},
                "seconds": result.seconds,
            }
            print(f"{row}", flush=True)
            yield row


def repairs(entries: list[Entry], seeds: int, clean: CleanData, test: RawImages) -> Iterator[Row]:
    """One row a backdoored model, method and seed: CA and ASR before and after."""
    for entry in entries:
        attack = entry.make_attack()
        model = load(ZOO / f"{entry.name}.safetensors")
        before = measure(model, attack, test)
        for seed in range(seeds):
            for method, images in (("rnp", 500), ("suspiciousness", 100), ("suspiciousness", 10)):
                few = clean.sample(images // 10, torch.Generator().manual_seed(seed))
                data = clean if images == len(clean) else few
                start = time.perf_counter()
                purifier = RNP(seed=seed) if method == "rnp" else SuspiciousnessPruning(seed=seed)
                result = purifier(model, data)
                seconds = time.perf_counter() - start
                row = {"model": entry.name, "method": method, "images": images, "seed": seed, "before": before}
                row |= {"after": measure(result.model, attack, test), "seconds": seconds}
                row |= {"pruned": sum(map(len, result.pruned.values())), "threshold": result.threshold}
                print(f"{row}", flush=True)
                yield row


def scan_table(rows: list[Row]) -> str:
    """Markdown: one line a model."""
    lines = ["| model | truth | verdicts | labels | lead, min to max | seconds |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        shares = [row["scores"]["bdprune.unlearning"] for row in mine]
        lines.append(
            f"| {name} | {mine[0]['truth']} | {', '.join(row['verdict'] for row in mine)} "
            f"| {', '.join(str(row['label']) for row in mine)} | {min(shares):.2f} to {max(shares):.2f} "
            f"| {statistics.median(row['seconds'] for row in mine):.1f} |"
        )
    return "\n".join(lines)


def repair_table(rows: list[Row]) -> str:
    """Markdown: mean and worst over the seeds."""
    lines = [
        "| model | method | images | ASR before | after, mean (worst) | CA before | after, mean (worst) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["model"], row["method"], row["images"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["method"], row["images"]) == key]
        accuracy = [row["after"]["ca"] for row in mine]
        success = [row["after"]["asr"] for row in mine if row["after"]["asr"] is not None]
        before = mine[0]["before"]
        asr = (f"{before['asr']:.2f}", f"{statistics.mean(success):.2f} ({max(success):.2f})") if success else ("", "")
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {asr[0]} | {asr[1]} | {before['ca']:.2f} "
            f"| {statistics.mean(accuracy):.2f} ({min(accuracy):.2f}) "
            f"| {statistics.median(row['seconds'] for row in mine):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs both parts and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--part", choices=["scans", "repairs", "both"], default="both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clean = load_clean(ZOO / "defence.npz")
    test = read_parquet(options.data / "cifar10" / "test.parquet")
    entries = [entry for entry in read_manifest(ZOO / "manifest.toml").models if options.only in entry.name]
    scanned = list(scans(entries, options.seeds, clean)) if options.part != "repairs" else []
    repaired = list(repairs(entries, options.seeds, clean, test)) if options.part != "scans" else []
    print(scan_table(scanned))
    print(repair_table(repaired))
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        env = {"torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit}
        options.json.write_text(json.dumps({"env": env, "scans": scanned, "repairs": repaired}, indent=1) + "\n")


if __name__ == "__main__":
    main()
