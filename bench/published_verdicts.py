"""What a scan says of five checkpoints that others published, over several seeds.

    python bench/published_verdicts.py --data DIR [--seeds 5] [--json FILE]

DIR holds checkpoints/, cifar10/train.parquet and gtsrb/train.parquet. Each seed draws its own clean images from the
training set: 50 of every class for CIFAR-10, 12 for GTSRB (signs cropped as the network was trained on).
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.data.parquet import read_parquet
from bdprune.scan.engine import scan

CHECKPOINTS = {
    "ibau-cifar10-badnets-target8.pth": ("cifar10", "none", 8),
    "ibau-cifar10-trojanwm-target2.pth": ("cifar10", "none", 2),
    "ibau-gtsrb-badnets-target8.pth": ("gtsrb", "none", 8),
    "akamaster-resnet20-clean.th": ("cifar10", "imagenet", None),
    "akamaster-resnet56-clean.th": ("cifar10", "imagenet", None),
}


def cifar10(data: Path) -> Callable[[int], CleanData]:
    """Draws 500 training images by seed."""
    raw = read_parquet(data / "cifar10" / "train.parquet")

    def draw(seed: int) -> CleanData:
        index = _balanced(raw.labels, 50, seed)
        return CleanData(raw.images[index].float() / 255, raw.labels[index], source="cifar10/train")

    return draw


def gtsrb(data: Path) -> Callable[[int], CleanData]:
    """Draws 516 sign crops by seed."""
    columns = ["image", "label", "width", "height", "roi_x1", "roi_y1", "roi_x2", "roi_y2"]
    table = pq.read_table(data / "gtsrb" / "train.parquet", columns=columns)
    labels = torch.tensor(table["label"].to_pylist())

    def draw(seed: int) -> CleanData:
        index = _balanced(labels, 12, seed)
        images = [_crop(row) for row in table.take(index.tolist()).to_pylist()]
        return CleanData(torch.stack(images), labels[index], source="gtsrb/train, signs cropped")

    return draw


def _crop(row: dict[str, Any]) -> Tensor:
    picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
    x, y = 32 / row["width"], 32 / row["height"]
    box = (row["roi_x1"] * x, row["roi_y1"] * y, (row["roi_x2"] + 1) * x, (row["roi_y2"] + 1) * y)
    sign = picture.resize((32, 32), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.asarray(sign).copy()).permute(2, 0, 1).float() / 255


def _balanced(labels: Tensor, per_class: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picks = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten()
        picks.append(index[torch.randperm(len(index), generator=generator)[:per_class]])
    return torch.cat(picks)


def verdicts(data: Path, seeds: int, only: str) -> Iterator[dict[str, Any]]:
    """One row a checkpoint and seed."""
    draws = {"cifar10": cifar10(data), "gtsrb": gtsrb(data)}
    for name, (dataset, normalize, truth) in CHECKPOINTS.items():
        if only not in name:
            continue
        for seed in range(seeds):
            clean = draws[dataset](seed)
            result = scan(data / "checkpoints" / name, clean, seed=seed, normalize=normalize)
            details = next((one.details for one in result.detectors if one.id == "bdprune.unlearning"), {})
            yield {
                "checkpoint": name,
                "truth": truth,
                "seed": seed,
                "verdict": result.verdict,
                "label": result.target_label,
                "scores": {one.id: (one.score, one.target_label) for one in result.detectors},
                "flip_shares": details.get("flip_shares"),
                "lr": details.get("lr"),
                "collapsed": details.get("collapsed"),
                "steps": len(details.get("trajectory", [])),
                "clean_accuracy": result.data.clean_accuracy if result.data else None,
                "seconds": result.seconds,
            }


def main() -> None:
    """Prints a Markdown table, one line a checkpoint and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="checkpoints whose name has this in it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        "| checkpoint | truth | seed | verdict | label | flip share | rate | steps | lipschitz z | susp. z | seconds |"
    )
    print("|" + "---|" * 11)
    rows = []
    for row in verdicts(options.data, options.seeds, options.only):
        rows.append(row)
        score = {name: "–" if value[0] is None else f"{value[0]:.2f}" for name, value in row["scores"].items()}
        named = row["scores"].get("bdprune.unlearning", (None, None))[1]
        print(
            f"| {row['checkpoint']} | {row['truth']} | {row['seed']} | {row['verdict']} | {row['label']} "
            f"| {score.get('bdprune.unlearning')} to {named} | {row['lr']} | {row['steps']} "
            f"| {score.get('bdprune.lipschitz')} | {score.get('bdprune.suspiciousness')} | {row['seconds']:.1f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
