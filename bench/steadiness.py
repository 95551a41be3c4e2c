"""Measures how much verdicts depend on the seed: scans the small zoos with many seeds and default settings.

    python bench/steadiness.py --data DIR [--seeds 20] [--only MODEL] [--rows FILE]

DIR holds gtsrb/train.parquet. The CIFAR-10 images are zoo/demo/defence.npz. A scan uses 50 images per class, as with
``--per-class``: for CIFAR-10 these are all 500, so a seed changes order and augmentation only; for GTSRB, a seed also
draws the images. The models are the clean ones of zoo/cifar10-w8.toml and zoo/gtsrb-w8.toml, and the backdoored ones
that every seed found before the detector repeated its runs.

Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rows import commit

from bdprune.analysis import MEMO
from bdprune.fleet import scan

Row = dict[str, Any]
PER_CLASS = 50
LEADER_NAME = "unlearning"
LEADER = f"bdprune.{LEADER_NAME}"
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
    """Verdict, label, lead and time of one scan."""
    images = ZOO / "demo" / "defence.npz" if zoo == CIFAR else data / "gtsrb" / "train.parquet"
    MEMO.clear()
    # With other detectors a scan may be sure before it unlearns.
    result = scan(ZOO / zoo / f"{name}.safetensors", images, detectors=[LEADER_NAME], per_class=PER_CLASS, seed=seed)
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
        "commit": commit(),
    }


def missing(only: list[str], seeds: int, rows: list[Row]) -> Iterator[tuple[str, str, int]]:
    """Zoo, model and seed of each missing row, ordered by seed."""
    done = {(row["zoo"], row["model"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for zoo, name in TRUTH:
            if (not only or f"{zoo}/{name}" in only) and (zoo, name, seed) not in done:
                yield zoo, name, seed


def table(rows: list[Row]) -> str:
    """A Markdown table with one line per model. Seconds are medians; the last column is per unlearning run."""
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


def main() -> None:
    """Runs the missing scans and prints the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", action="append", default=[], help="a model, such as cifar10-w8/clean; repeatable")
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
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
