"""Scans five published checkpoints of other authors with several seeds.

    python bench/published_verdicts.py --data DIR [--seeds 5] [--budget full] [--rows FILE]

DIR holds checkpoints/, cifar10/train.parquet and gtsrb/train.parquet. Each seed draws its own clean images from the
training set: 50 per class for CIFAR-10, 12 per class for GTSRB (cropped as in the training of the network). Prints a
Markdown table. Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rows import Row, Rows
from torch import Tensor
from verdicts import verdict_row, verdict_table

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


def scan_row(path: Path, clean: CleanData, normalize: str, seed: int, budget: str) -> Row:
    """The verdict on one checkpoint."""
    MEMO.clear()  # the seconds must include everything
    result = scan(path, clean, seed=seed, normalize=normalize, budget=budget)
    return verdict_row(result) | {"clean_accuracy": result.data.clean_accuracy if result.data else None}


def main() -> None:
    """Makes the missing rows, and prints a table with one line for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="only checkpoints whose name contains this")
    parser.add_argument("--budget", choices=["fast", "default", "full"], default="default", help="of the scans")
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    record = Rows(options.rows, ("model", "budget", "seed"))
    sets: dict[str, RawImages] = {}
    for name, (dataset, per_class, normalize, truth) in CHECKPOINTS.items():
        if options.only not in name:
            continue
        if dataset not in sets:
            sets[dataset] = read_dataset(options.data, dataset, "train")
        for seed in range(options.seeds):
            kind = None if truth is None else "published"
            key: Row = {"model": name, "kind": kind, "truth": truth, "budget": options.budget, "seed": seed}
            path, clean = options.data / "checkpoints" / name, draw(sets[dataset], per_class, seed)
            record.add(key, partial(scan_row, path, clean, normalize, seed, options.budget))
    print(verdict_table(record.where(budget=options.budget)))


if __name__ == "__main__":
    main()
