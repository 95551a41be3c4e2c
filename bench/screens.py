"""Measures the screens: how well each detector's score separates backdoored networks from clean ones, by attack.

    python bench/screens.py zoo/cifar10-w8.toml zoo/gtsrb-w8.toml --data DIR [--detectors df_tnd,latent_margin]
                            [--models DIR] [--only MODEL] [--seeds 1] [--rows bench/results/screens.jsonl]

DIR holds the data sets of the manifests. The clean images are zoo/demo/defence.npz for CIFAR-10, and 10 (GTSRB) or 40
images of each class of the training set for others. Prints a Markdown table for each detector: the AUROC of every
attack family against all clean networks, the mean and the worst family, and how often the label with the largest score
is the target. A detector that learns nothing from a family can be judged on it, so each family counts as held out. The
AUROC needs no threshold.

Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import Row, Rows, auroc

from bdprune.analysis import MEMO, Case
from bdprune.data import CleanData, load_clean, read_dataset
from bdprune.methods import Detector
from bdprune.model import Model, load
from bdprune.record import Evidence
from bdprune.registry import method_class
from bdprune.zoo import Entry, Storage, images_of, read_manifest, weights_path

ROOT = Path(__file__).parents[1]
DETECTORS = ("latent_margin", "feature_margin", "df_tnd", "dl_tnd")
PER_CLASS = {"gtsrb": 10}
OTHERS_PER_CLASS = 40


def images_for(entry: Entry, model: Model, data: Path, seed: int) -> CleanData:
    """The clean images of a model."""
    if entry.dataset == "cifar10" and not entry.classes:
        return load_clean(ROOT / "zoo" / "demo" / "defence.npz", input_shape=model.input_shape)
    if entry.classes:
        train = images_of(entry, read_dataset(data, entry.dataset, "train"))
        whole = CleanData(train.images.float() / 255, train.labels)
        return whole.sample(PER_CLASS.get(entry.dataset, OTHERS_PER_CLASS), torch.Generator().manual_seed(seed))
    return load_clean(
        data / entry.dataset / "train.parquet",
        per_class=PER_CLASS.get(entry.dataset, OTHERS_PER_CLASS),
        seed=seed,
        input_shape=model.input_shape,
        num_classes=model.num_classes,
    )


def measured(entry: Entry, case: Case, key: Row) -> Row:
    """The score and the leading label of one detector on one model."""
    kind = method_class("detector", key["detector"])
    detector = kind(seed=key["seed"]) if "seed" in kind.settings() else kind()
    assert isinstance(detector, Detector)
    MEMO.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    evidence = detector(case)
    attack = entry.make_attack()
    return {
        "family": None if attack is None else attack.family,
        "target": None if attack is None else attack.target,
        "score": evidence.score,
        "label": leading(evidence),
        "not_applicable": evidence.not_applicable,
        "details": evidence.details,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def leading(evidence: Evidence) -> int | None:
    """The label with the largest score."""
    scores = [-float("inf") if one is None or one != one else one for one in evidence.label_scores]
    return max(range(len(scores)), key=scores.__getitem__) if scores else None


def by_score(row: Row) -> float:
    """The score of a row; detectors that do not apply say nothing."""
    return float(row["score"] or 0.0)


def table(mine: list[Row], name: str) -> str:
    """The Markdown table of one detector."""
    clean = [by_score(row) for row in mine if row["family"] is None]
    families = sorted({row["family"] for row in mine} - {None})
    if not clean or not families:
        return f"{name}: {len(mine)} rows\n"
    lines = [f"### {name}", "", "| attack | networks | AUROC | scores | label right |", "|" + "---|" * 5]
    values = []
    for family in families:
        its = [row for row in mine if row["family"] == family]
        values.append(auroc([by_score(row) for row in its], clean))
        known = [row for row in its if row["target"] is not None and row["label"] is not None]
        right = f"{sum(row['label'] == row['target'] for row in known)} of {len(known)}" if known else "–"
        scores = ", ".join(f"{by_score(row):.2f}" for row in its)
        lines.append(f"| {family} | {len(its)} | {values[-1]:.2f} | {scores} | {right} |")
    lines.append(f"| clean | {len(clean)} | | {', '.join(f'{one:.2f}' for one in sorted(clean))} | |")
    known = [row for row in mine if row["target"] is not None and row["label"] is not None]
    overall = auroc([by_score(row) for row in mine if row["family"] is not None], clean)
    seconds = statistics.median(row["cpu_seconds"] for row in mine)
    lines += [
        "",
        f"Mean of the families {statistics.fmean(values):.2f}, worst {min(values):.2f}, over all {overall:.2f}. "
        f"Label right: {sum(row['label'] == row['target'] for row in known)} of {len(known)}. "
        f"Median {seconds:.1f} s of one core.",
        "",
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace, rows: Rows) -> None:
    """Makes the missing rows."""
    for seed in range(options.seeds):
        for zoo, entry, case in cases(options, seed):
            for name in options.detectors:
                key = {"zoo": zoo, "model": entry.name, "detector": name, "seed": seed}
                rows.add(key, lambda entry=entry, case=case, key=key: measured(entry, case, key))  # type: ignore[misc]


def cases(options: argparse.Namespace, seed: int) -> Iterator[tuple[str, Entry, Case]]:
    """The name of the zoo, the entry and the case of every chosen network that is made."""
    for path in options.manifests:
        zoo = read_manifest(path)
        storage = Storage(zoo, options.models)
        for entry in zoo.models:
            folder = storage.made(entry)
            if folder is None or (options.only and entry.name not in options.only):
                continue
            model = load(weights_path(folder, entry.name), arch=entry.arch, num_classes=entry.num_classes)
            yield zoo.name, entry, Case(model, images_for(entry, model, options.data, seed))


def main() -> None:
    """Runs the missing measurements and prints the tables of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder of the models, if not beside the manifest")
    parser.add_argument("--detectors", type=lambda text: text.split(","), default=list(DETECTORS))
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    rows = Rows(options.rows, ("zoo", "model", "detector", "seed"))
    run(options, rows)
    for name in options.detectors:
        print(table(rows.where(detector=name), name))


if __name__ == "__main__":
    main()
