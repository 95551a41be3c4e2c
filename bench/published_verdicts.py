"""Scans five published checkpoints of other authors with several seeds.

    python bench/published_verdicts.py --data DIR [--seeds 5] [--rows FILE]

DIR holds checkpoints/, cifar10/train.parquet and gtsrb/train.parquet. Each seed draws its own clean images from the
training set: 50 per class for CIFAR-10, 12 per class for GTSRB (cropped as in the training of the network).
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

import torch
from torch import Tensor

from bdprune.analysis import MEMO
from bdprune.data import CleanData, RawImages, read_dataset
from bdprune.fleet import scan

CHECKPOINTS = {
    "ibau-cifar10-badnets-target8.pth": ("cifar10", 50, "none", 8),
    "ibau-cifar10-trojanwm-target2.pth": ("cifar10", 50, "none", 2),
    "ibau-gtsrb-badnets-target8.pth": ("gtsrb-signs", 12, "none", 8),
    "akamaster-resnet20-clean.th": ("cifar10", 50, "imagenet", None),
    "akamaster-resnet56-clean.th": ("cifar10", 50, "imagenet", None),
}
DETECTORS = ("unlearning", "suspiciousness", "lipschitz")


def draw(raw: RawImages, per_class: int, seed: int) -> CleanData:
    """Clean training images drawn with a seed, the same number per class."""
    index = _balanced(raw.labels, per_class, seed)
    return CleanData(raw.images[index].float() / 255, raw.labels[index], class_names=raw.class_names)


def _balanced(labels: Tensor, per_class: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picks = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten()
        picks.append(index[torch.randperm(len(index), generator=generator)[:per_class]])
    return torch.cat(picks)


def verdicts(data: Path, seeds: int, only: str, done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """One row per checkpoint and seed that is not in ``done``."""
    sets: dict[str, RawImages] = {}
    for name, (dataset, per_class, normalize, truth) in CHECKPOINTS.items():
        if only not in name:
            continue
        if dataset not in sets:
            sets[dataset] = read_dataset(data, dataset, "train")
        for seed in (seed for seed in range(seeds) if (name, seed) not in done):
            clean = draw(sets[dataset], per_class, seed)
            MEMO.clear()
            result = scan(data / "checkpoints" / name, clean, seed=seed, normalize=normalize)
            details = next((one.details for one in result.detectors if one.detector == "bdprune.unlearning"), {})
            yield {
                "checkpoint": name,
                "truth": truth,
                "seed": seed,
                "verdict": result.verdict,
                "label": result.target_label,
                "scores": {one.detector: (one.score, one.target_label) for one in result.detectors},
                "flip_shares": details.get("flip_shares"),
                "lr": details.get("lr"),
                "collapsed": details.get("collapsed"),
                "steps": len(details.get("trajectory", [])),
                "clean_accuracy": result.data.clean_accuracy if result.data else None,
                "seconds": result.seconds,
            }


def verdict_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one line per checkpoint."""
    lines = ["| checkpoint | truth | verdicts | labels | lead | susp. z | Lipschitz z | seconds |", "|" + "---|" * 8]
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        mine = [row for row in rows if row["checkpoint"] == name]
        truth = "clean" if mine[0]["truth"] is None else mine[0]["truth"]
        spans = (_span(row["scores"][f"bdprune.{one}"][0] for row in mine) for one in DETECTORS)
        lines.append(
            f"| {name} | {truth} | {_tally(row['verdict'] for row in mine)} "
            f"| {_tally(row['label'] for row in mine if row['label'] is not None)} | {' | '.join(spans)} "
            f"| {statistics.median(row['seconds'] for row in mine):.0f} |"
        )
    return "\n".join(lines)


def _span(values: Iterable[float]) -> str:
    low, *_, high = sorted([*values] * 2)
    return f"{low:.2f} to {high:.2f}"


def _tally(values: Iterable[object]) -> str:
    counts = Counter(map(str, values))
    return ", ".join(f"{count} x {value}" for value, count in counts.most_common()) or "–"


def main() -> None:
    """Prints a Markdown table with one line per checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="only checkpoints whose name contains this")
    parser.add_argument("--rows", type=Path, help="JSON lines file; rows in it are not run again")
    options = parser.parse_args()
    rows = (
        [json.loads(line) for line in options.rows.read_text().splitlines()]
        if options.rows and options.rows.exists()
        else []
    )
    done = {(row["checkpoint"], row["seed"]) for row in rows}
    for row in verdicts(options.data, options.seeds, options.only, done):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(verdict_table(rows))


if __name__ == "__main__":
    main()
