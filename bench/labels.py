"""Measures how often Neural Cleanse (NC), unlearning (NU) and NU+NC name the backdoor label (RNP, Table 16).

    python bench/labels.py zoo/cifar10-w8.toml [--clean zoo/demo/defence.npz] [--seeds 1] [--only MODEL] [--rows FILE]
    python bench/labels.py zoo/cifar10-w8.toml --only badnets --figure FILE.png     # RNP, Figure 7

Each method names the label that its statistic puts first, as in the paper, also where it does not flag the model. The
models are those of the zoo with one target label, and its clean ones, which show how often a method flags a clean
model. The published figures are for ResNet-18 of width 64. Seeds change the order of the images and the search.

Each row is appended to the rows (JSON lines) when it is done. Rows in the file are not run again. With --figure, one
picture is drawn of one model and no rows are made: a clean image with the original trigger, with that of NC and with
that of NU+NC for the target label; below, what each changes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rows import Row, Rows
from torch import Tensor

from bdprune.analysis import Case
from bdprune.attacks import Attack, apply_trigger, shape_of
from bdprune.data import CleanData, load_clean
from bdprune.detectors.neural_cleanse import NeuralCleanseDetector
from bdprune.detectors.nu_neural_cleanse import NUNeuralCleanseDetector
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.files import encode_png
from bdprune.loops import Trigger
from bdprune.methods import Detector
from bdprune.model import load
from bdprune.zoo import Entry, Storage, load_trigger, read_manifest, weights_path

RESULTS = Path(__file__).parent / "results" / "labels.jsonl"
METHODS: dict[str, Callable[[int], Detector]] = {
    "NC": lambda seed: NeuralCleanseDetector(seed=seed),
    "NU": lambda seed: UnlearningDetector(seed=seed),
    "NU+NC half-way": lambda seed: NUNeuralCleanseDetector(seed=seed),
    "NU+NC at the end": lambda seed: NUNeuralCleanseDetector(seed=seed, depth="end"),
}
LABEL = {"NU": "final_label"}  # detail with the label that comes first; "label" of the others
# Table 16: NC, NU+NC, NU; in per cent.
PAPER = {
    "badnets": (65, 100, 100),
    "trojan": (95, 100, 100),
    "blend": (90, 100, 100),
    "label-consistent": (90, 100, 100),
    "sig": (15, 100, 100),
    "dynamic": (80, 100, 100),
    "wanet": (85, 100, 100),
    "feature-collision": (0, 90, 100),
    "dfst": (20, 95, 100),
    "awp": (95, 100, 100),
}
_SCALE, _GAP = 5, 8  # pixels of the figure for one of an image, and white ones between the cells
_MEASURED = 100  # images over which a change is averaged


def examine(case: Case, method: str, seed: int) -> Row:
    """The label that a method puts first, whether it flags the model, and its score."""
    found = METHODS[method](seed)(case)
    return {
        "first": found.details[LABEL.get(method, "label")],
        "flagged": found.flagged,
        "named": found.target_label,
        "score": found.score,
        "sizes": found.details.get("sizes"),
    }


def table(labels: Rows, zoo: str, entries: Iterable[Entry]) -> str:
    """A Markdown table with one line for each model: accuracy of the label in per cent, and how often it is flagged."""
    lines = [
        f"| model | truth | {' | '.join(METHODS)} | Table 16: NC, NU+NC, NU |",
        "|" + "---|" * (3 + len(METHODS)),
    ]
    right: dict[str, list[float]] = {method: [] for method in METHODS}
    for entry in sorted(entries, key=_place):
        attack = entry.make_attack()
        cells = []
        for method in METHODS:
            mine = labels.where(zoo=zoo, model=entry.name, method=method)
            hits = [100.0 * (row["first"] == row["truth"]) for row in mine]
            flagged = f"{sum(row['flagged'] for row in mine)} of {len(mine)} flagged"
            cells.append("–" if not mine else f"{statistics.mean(hits):.0f} ({flagged})" if attack else flagged)
            right[method] += [statistics.mean(hits)] if attack and hits else []
        paper = PAPER.get(attack.kind) if attack else None
        truth = "clean" if attack is None else str(attack.target)
        published = "–" if paper is None else ", ".join(map(str, paper))
        lines.append(f"| {entry.name} | {truth} | {' | '.join(cells)} | {published} |")
    means = [f"{statistics.mean(right[method]):.0f}" if right[method] else "–" for method in METHODS]
    columns = [f"{statistics.mean(column):.1f}" for column in zip(*PAPER.values(), strict=True)]
    lines.append(f"| all backdoored | | {' | '.join(means)} | {', '.join(columns)} |")
    return "\n".join(lines)


def _place(entry: Entry) -> int:
    """Its place in the table: the attacks in the order of Table 16, then clean models, then other attacks."""
    order = [*PAPER, None]
    kind = entry.attack and entry.attack["kind"]
    return order.index(kind) if kind in order else len(order)


def figure(case: Case, original: Callable[[Tensor], Tensor], attack: Attack) -> bytes:
    """A PNG: the original trigger, that of NC and that of NU+NC; on an image, and the mean change below.

    The changes are scaled so that the largest is white.
    """
    case = case.in_order()
    nc, nu = NeuralCleanseDetector(), NUNeuralCleanseDetector()
    other = case.with_model(nu.unlearned(case))
    found = [of_label(one, where, int(attack.target)) for one, where in ((nc, case), (nu, other))]
    images = case.images.images[case.images.labels != int(attack.target)][:_MEASURED]
    rows: list[list[Tensor]] = [[], []]
    for stamp in (original, *(one.apply for one in found)):
        change = (stamp(images) - images).abs().mean(0)
        rows[0].append(stamp(images[:1])[0])
        rows[1].append(change / change.max().clamp(min=1e-6))
    for name, one in zip(("NC", "NU+NC"), found, strict=True):
        print(f"{name}: {one.size:.1f} pixels, flips {one.flip_rate}, lies at {one.box}", file=sys.stderr)
    return encode_png(sheet(rows).mul(255).round().to(torch.uint8).numpy())


def of_label(method: NeuralCleanseDetector, case: Case, label: int) -> Trigger:
    """The trigger that the method recovers for a label."""
    found = case.get(method.triggers(case))
    return next(one.trigger for one in found.recoveries if one.hypothesis.target == label)


def sheet(rows: list[list[Tensor]]) -> Tensor:
    """Images ``[C, h, w]`` in rows, enlarged, with white between them: ``[height, width, C]`` in [0, 1]."""
    lines = []
    for row in rows:
        cells = [_enlarged(one) for one in row]
        channels, height, _ = cells[0].shape
        white = torch.ones(channels, height, _GAP)
        line = torch.cat([part for cell in cells for part in (white, cell)][1:], 2)
        lines += [torch.ones(channels, _GAP, line.shape[2]), line]
    return torch.cat(lines[1:], 1).permute(1, 2, 0).clamp(0, 1)


def _enlarged(image: Tensor) -> Tensor:
    return image.repeat_interleave(_SCALE, 1).repeat_interleave(_SCALE, 2)


def has_one_target(entry: Entry) -> bool:
    """Whether it is clean or has one target label."""
    attack = entry.make_attack()
    return attack is None or isinstance(attack.target, int)


def main() -> None:
    """Makes the missing rows and prints the table of all rows, or draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--clean", type=Path, default=Path("zoo/demo/defence.npz"), help="clean images")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable (default: all)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="JSON lines file for the rows")
    parser.add_argument("--figure", type=Path, help="draw the triggers of the one model of --only into this file")
    options = parser.parse_args()
    zoo = read_manifest(options.manifest)
    storage, clean = Storage(zoo), load_clean(options.clean)
    made = [(one, storage.made(one)) for one in zoo.models if has_one_target(one)]
    subjects = [(one, folder) for one, folder in made if folder and (not options.only or one.name in options.only)]
    if options.figure:
        if len(subjects) != 1 or subjects[0][0].attack is None:
            sys.exit("Name one backdoored model with one target label: --only badnets.")
        options.figure.write_bytes(drawn(*subjects[0], clean))
        return
    labels = Rows(options.rows, ("zoo", "model", "method", "seed"))
    for seed in range(options.seeds):
        for entry, folder in sorted(subjects, key=lambda one: _place(one[0])):
            run(labels, zoo.name, entry, Case(load(weights_path(folder, entry.name)), clean), seed)
    print(table(labels, zoo.name, [entry for entry, _ in subjects]))


def run(labels: Rows, zoo: str, entry: Entry, case: Case, seed: int) -> None:
    """Makes the missing rows of one model and seed."""
    attack = entry.make_attack()
    truth = attack.target if attack else None
    for method in METHODS:
        row = {"zoo": zoo, "model": entry.name, "method": method, "seed": seed, "truth": truth}
        labels.add(row, lambda method=method: examine(case, method, seed))  # type: ignore[misc]


def drawn(entry: Entry, folder: Path, clean: CleanData) -> bytes:
    """The figure of one model."""
    attack = entry.make_attack()
    assert attack is not None
    trigger = load_trigger(entry, attack, folder, shape_of(clean.images)).eval()
    case = Case(load(weights_path(folder, entry.name)), clean)
    return figure(case, lambda images: apply_trigger(trigger, images), attack)


if __name__ == "__main__":
    main()
