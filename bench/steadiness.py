"""Whether a verdict hangs on the seed: scans of the small zoos over many seeds, at the command line's defaults.

    python bench/steadiness.py --data DIR [--seeds 20] [--only MODEL] [--rows FILE]

DIR holds gtsrb/train.parquet. The CIFAR-10 images are those of zoo/demo/defence.npz, and 50 of every class are taken,
as ``--per-class`` has it: of CIFAR-10 that is all 500, so that a seed changes order and augmentation alone; of GTSRB a
seed draws the images as well. The models are the clean ones of zoo/cifar10-w8.toml and zoo/gtsrb-w8.toml, and those
backdoored ones that docs/evaluation/detection.md had as found on every seed before the detector repeated its runs.

Every row is appended to FILE (JSON lines) as it is done; rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bdprune.analysis import MEMO
from bdprune.fleet import scan

Row = dict[str, Any]
PER_CLASS = 50
LEADER = "bdprune.unlearning"
ZOO = Path(__file__).parents[1] / "zoo"
CIFAR, GTSRB = "cifar10-w8", "gtsrb-w8"
TRUTH = {
    (CIFAR, "clean"): None,
    (GTSRB, "clean"): None,
    (GTSRB, "clean-2"): None,
    (CIFAR, "badnets"): 7,
    (CIFAR, "adv-t"): 7,
    (CIFAR, "trojan-neuron"): 8,
    (CIFAR, "wanet"): 2,
    (CIFAR, "trojan"): 4,
    (CIFAR, "ablend"): 3,
    (CIFAR, "adapt-d"): 3,
    (GTSRB, "badnets"): 14,
}


def scan_row(zoo: str, name: str, data: Path, seed: int) -> Row:
    """Verdict, label and lead of one scan, and what that took."""
    images = ZOO / "demo" / "defence.npz" if zoo == CIFAR else data / "gtsrb" / "train.parquet"
    MEMO.clear()
    result = scan(ZOO / zoo / f"{name}.safetensors", images, per_class=PER_CLASS, seed=seed)
    leader = next(one for one in result.detectors if one.detector == LEADER)
    return {
        "zoo": zoo,
        "model": name,
        "truth": TRUTH[zoo, name],
        "seed": seed,
        "verdict": result.verdict,
        "label": result.target_label,
        "lead": leader.score,
        "threshold": leader.threshold,
        "leads": leader.details["leads"],
        "near": leader.details["near"],
        "unlearning_seconds": leader.seconds,
        "seconds": result.seconds,
        "commit": _commit(),
    }


def missing(only: list[str], seeds: int, rows: list[Row]) -> Iterator[tuple[str, str, int]]:
    """What is not there yet, seed by seed."""
    done = {(row["zoo"], row["model"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for zoo, name in TRUTH:
            if (not only or f"{zoo}/{name}" in only) and (zoo, name, seed) not in done:
                yield zoo, name, seed


def table(rows: list[Row]) -> str:
    """Markdown: one line a model. Seconds are the median; of one run, those of the unlearning over its runs."""
    lines = [
        "| model | truth | verdicts | labels | lead, min to max | runs, mean (most) | near | seconds | of one run |",
        "|" + "---|" * 9,
    ]
    for zoo, name in TRUTH:
        mine = [row for row in rows if (row["zoo"], row["model"]) == (zoo, name)]
        if not mine:
            continue
        leads, runs = [row["lead"] for row in mine], [len(row["leads"]) for row in mine]
        each = statistics.median(row["unlearning_seconds"] / len(row["leads"]) for row in mine)
        truth = "clean" if TRUTH[zoo, name] is None else TRUTH[zoo, name]
        lines.append(
            f"| {zoo}/{name} | {truth} | {_tally(row['verdict'] for row in mine)} "
            f"| {_tally(row['label'] for row in mine if row['label'] is not None)} "
            f"| {min(leads):.2f} to {max(leads):.2f} | {statistics.fmean(runs):.1f} ({max(runs)}) "
            f"| {sum(row['near'] for row in mine)} | {statistics.median(row['seconds'] for row in mine):.0f} "
            f"| {each:.0f} |"
        )
    return "\n".join(lines)


def _tally(values: Iterable[object]) -> str:
    counts = Counter(map(str, values))
    return ", ".join(f"{count} x {value}" for value, count in counts.most_common()) or "–"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    """Runs what is missing and prints the table of everything in the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", action="append", default=[], help="a model, such as cifar10-w8/clean; repeatable")
    parser.add_argument("--rows", type=Path, help="JSON lines that the rows are kept in")
    options = parser.parse_args()
    rows: list[Row] = []
    if options.rows and options.rows.exists():
        rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    for zoo, name, seed in missing(options.only, options.seeds, rows):
        row = scan_row(zoo, name, options.data, seed)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
