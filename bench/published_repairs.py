"""Repairs published checkpoints of other authors with several seeds, and measures them on the full test sets.

    python bench/published_repairs.py --data DIR [--seeds 3] [--methods auto,rnp] [--rows FILE]

DIR holds checkpoints/, cifar10/ and gtsrb/. Each seed draws its own clean images from the training set, as
bench/published_verdicts.py does; methods see these images only. The true triggers (a white square, a watermark) and
the test images are used for measuring only. Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are
not run again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from published_verdicts import CHECKPOINTS, draw
from repairs import missing_rows, parse_method, repair_row, repair_table, retuned
from rows import Row, Rows
from torch import Tensor, nn
from verdicts import by

import bdprune
from bdprune.attacks.badnets import BadNets, Patch
from bdprune.data import CleanData, RawImages, read_dataset
from bdprune.model import Model
from bdprune.zoo import measure


class Watermark(nn.Module):
    """Adds a picture ``[C, H, W]`` in [0, 1] to images, and clips."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.register_buffer("picture", picture)

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.get_buffer("picture").to(images)).clamp(0, 1)


def trigger_of(name: str, folder: Path) -> nn.Module | None:
    """The true trigger of a checkpoint; None for a clean one."""
    if "trojanwm" in name:
        return Watermark(_picture(folder / "ibau-trojanwm-trigger.png"))
    return Patch(torch.ones(3, 4, 4), margin=1) if "badnets" in name else None


def _picture(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def measured(model: Model, test: RawImages, truth: int | None, trigger: nn.Module | None) -> Row:
    """CA, ASR and RA in per cent on the full test set; ASR and RA of a clean model are None."""
    attack = None if truth is None else BadNets(target=truth)  # only its target counts here
    found = measure(model.module, test, model.num_classes, attack, trigger)
    success, robust = found.attack_success_rate, found.robust_accuracy
    return {
        "ca": 100 * found.clean_accuracy,
        "asr": None if success is None else 100 * success,
        "ra": None if robust is None else 100 * robust,
    }


@dataclass(frozen=True)
class Subject:
    """One checkpoint and its truth.

    Attributes:
        model: before any repair.
        test: the full test set.
        truth: label of the backdoor; None for a clean model.
        trigger: the true trigger; None for a clean model.
    """

    model: Model
    test: RawImages
    truth: int | None
    trigger: nn.Module | None

    def measure(self, model: Model) -> Row:
        """CA, ASR and RA in per cent of a model."""
        return measured(model, self.test, self.truth, self.trigger)

    def repaired_row(self, clean: CleanData, method: str, seed: int) -> Row:
        """The figures of one repair, and ASR after an attacker's retuning."""
        row = repair_row(self.model, clean, method, seed, self.measure)
        after: Model = row.pop("model_after")
        if self.truth is None or self.trigger is None:
            return row | {"retuned": None}
        again = retuned(after, clean, self.test, self.trigger, BadNets(target=self.truth), seed)
        return row | {"retuned": self.measure(again)["asr"]}


def main() -> None:
    """Makes the missing rows, and prints a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="auto")
    parser.add_argument("--only", default="", help="only checkpoints whose name contains this")
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    methods = options.methods.split(",")
    for one in methods:
        parse_method(one)
    record = Rows(options.rows, ("part", "model", "method", "seed"))
    sets: dict[tuple[str, str], RawImages] = {}
    for name, (dataset, per_class, normalize, truth) in CHECKPOINTS.items():
        if options.only not in name:
            continue
        for part in ("train", "test"):
            if (dataset, part) not in sets:
                sets[dataset, part] = read_dataset(options.data, dataset, part)
        folder = options.data / "checkpoints"
        model = bdprune.load(folder / name, normalize=normalize)
        subject = Subject(model, sets[dataset, "test"], truth, trigger_of(name, folder))
        base: Row = {"model": name, "kind": None if truth is None else "published", "truth": truth}
        record.add(base | {"part": "before", "method": None, "seed": None}, partial(subject.measure, model))
        for seed in range(options.seeds):
            clean = draw(sets[dataset, "train"], per_class, seed)
            for method in methods:
                key = base | {"part": "repair", "method": method, "seed": seed}
                record.add(key, partial(subject.repaired_row, clean, method, seed))
    before = {row["model"]: row for row in record.where(part="before")}
    for method, mine in by(record.where(part="repair"), "method").items():
        print(f"\n{method}\n\n{repair_table(mine, before)}")
    print(f"\n{missing_rows(record, list(CHECKPOINTS), methods, options.seeds)}")
    sys.exit(1 if record.failed else 0)


if __name__ == "__main__":
    main()
