"""Scans networks of an attacker who knows the detectors, and the networks that the attacker started from.

    python bench/evasive.py zoo/cifar10-w8.toml [--only MODEL] [--rows bench/results/evasive.jsonl]

Every detector of the budgets fast and default runs, also where a scan would stop early. The clean images are
zoo/demo/defence.npz. CA and ASR are those of truth.json. Prints a Markdown table with two lines for each attacked
network: before (its source) and after. Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not
run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rows import Row, Rows
from verdicts import verdict_row

from bdprune.analysis import MEMO
from bdprune.fleet import scan
from bdprune.registry import chosen_detectors
from bdprune.zoo import Entry, Storage, read_manifest, weights_path

IMAGES = Path(__file__).parents[1] / "zoo" / "demo" / "defence.npz"
KIND = "evasive"


def detectors() -> list[str]:
    """The names of the detectors that the budget ``default`` may run."""
    return [one.id.removeprefix("bdprune.") for one in chosen_detectors(None, {}) if one.level in ("fast", "default")]


def pairs(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """The source and the name of each network of the attack."""
    return [
        (entry.source, entry.name)
        for entry in entries
        if entry.source is not None and entry.attack and entry.attack["kind"] == KIND
    ]


def scanned(storage: Storage, entry: Entry, seed: int) -> Row:
    """The row of one network.

    Raises:
        SystemExit: the network is not made, or its scan fails.
    """
    folder, truth = storage.made(entry), storage.truth(entry)
    if folder is None or truth is None:
        raise SystemExit(f"{entry.name} is not made: bdprune zoo make.")
    MEMO.clear()
    result = scan(weights_path(folder, entry.name), IMAGES, detectors=detectors(), seed=seed)
    if result.error is not None:
        raise SystemExit(f"{entry.name}: {result.error.message}")
    return {
        "truth": truth.target_label,
        "clean_accuracy": truth.clean_accuracy,
        "attack_success_rate": truth.attack_success_rate,
        "thresholds": {one.detector: one.threshold for one in result.detectors},
        "named": {one.detector: one.target_label for one in result.detectors},
        **verdict_row(result),
    }


def table(rows: Rows, found: Sequence[tuple[str, str]]) -> str:
    """A Markdown table with a line for each name of each pair; scores above their thresholds are bold."""
    known = {row["model"]: row for row in rows.where()}
    names = list(dict.fromkeys(name for row in known.values() for name in row["scores"]))
    limits: Row = {name: limit for row in known.values() for name, limit in row["thresholds"].items()}
    heads = [f"{name.removeprefix('bdprune.')} ({limits[name]:g})" for name in names]
    columns = ["model", "CA", "ASR", *heads, "verdict", "label"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in (name for pair in found for name in pair if name in known):
        row = known[name]
        accuracies = (f"{100 * row[which]:.2f}" for which in ("clean_accuracy", "attack_success_rate"))
        label = row["label"] if row["label"] is not None else ",".join(map(str, row["labels"])) or "none"
        cells = [name, *accuracies, *(cell(row, each) for each in names), row["verdict"], str(label)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: Row, detector: str) -> str:
    """A score, bold above its threshold; a dash if there is none."""
    score, threshold = row["scores"].get(detector), row["thresholds"].get(detector)
    if score is None:
        return "–"
    return f"**{score:.2f}**" if threshold is not None and score > threshold else f"{score:.2f}"


def main() -> None:
    """Runs the missing scans and prints the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--only", action="append", default=[], help="an attacked model or a source; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    zoo = read_manifest(options.manifest)
    storage, found = Storage(zoo), pairs(zoo.models)
    rows = Rows(options.rows, ("model", "seed"))
    for name in dict.fromkeys(name for pair in found for name in pair):
        if not options.only or name in options.only:
            key: Row = {"model": name, "seed": options.seed}
            rows.add(key, lambda name=name: scanned(storage, zoo.entry(name), options.seed))  # type: ignore[misc]
    print(table(rows, found))


if __name__ == "__main__":
    main()
