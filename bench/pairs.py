"""Prints, for each row of ``pair_inversion``, the pair that stands out most, whether or not its trigger works.

    python bench/pairs.py bench/results/candidates.jsonl
    python bench/pairs.py zoo/cifar10-w8.toml --data DIR --most-labels 5 [--only MODEL]

The rows of the first form come from bench/screens.py. Their own scores are those of the best pair whose trigger works.

The second form runs the detector on the models of a manifest. They have more labels than the limit, so that a first
search chooses the pairs. For each model it also prints the best pairs of the first search, and the place of the planted
pair among the chosen ones. The images are those of bench/screens.py.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from rows import Row
from screens import cases

from bdprune.detectors.pair_inversion import PairInversionDetector
from bdprune.loops import size_scores
from bdprune.runtime import Budget
from bdprune.zoo import Entry

_FIRST = 3  # pairs of the first search that are shown


def outstanding(row: Row) -> tuple[float, Row]:
    """The largest score among the pairs of the last stage, and the pair."""
    last = max(pair["stages"] for pair in row["details"]["pairs"])
    kept = [pair for pair in row["details"]["pairs"] if pair["stages"] == last]
    sizes = [math.inf if pair["size"] is None else pair["size"] for pair in kept]
    scores = size_scores(sizes, [True] * len(kept), most=max(one for one in sizes if math.isfinite(one)))
    best = max(range(len(kept)), key=scores.__getitem__)
    return scores[best], kept[best]


def planted_places(pairs: list[Row], planted: set[tuple[int, int]]) -> str:
    """The places of the planted pairs (source, target) among the chosen ones, from 1; a dash if none was chosen."""
    found = [place for place, pair in enumerate(pairs, 1) if (pair["source"], pair["target"]) in planted]
    return ", ".join(map(str, found)) or "–"


def planted_pairs(entry: Entry) -> set[tuple[int, int]]:
    """The pairs (source, target) of a source-specific attack with one target; none for other models."""
    attack = entry.make_attack()
    target = None if attack is None else attack.target
    return set() if attack is None or target is None else {(source, target) for source in attack.sources}


def print_rows(path: Path) -> None:
    """The table of the rows in a file."""
    print("| network | pair | score | images that it flips |\n|---|---|---|---|")
    for row in map(json.loads, path.read_text().splitlines()):
        if row["detector"] == "pair_inversion":
            score, pair = outstanding(row)
            print(f"| {row['model']} | {pair['source']} to {pair['target']} | {score:.2f} | {pair['flip_rate']:.0%} |")


def print_measured(options: argparse.Namespace) -> None:
    """Runs the detector on the models of a manifest and prints their table."""
    print("| network | planted | first search (pixels) | its place | pair | score | images that it flips | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for _, entry, case in cases(options, 0):
        start = time.perf_counter()
        found = PairInversionDetector(most_labels=options.most_labels)(case.with_budget(Budget("full")))
        seconds, planted = time.perf_counter() - start, planted_pairs(entry)
        targets = sorted(found.details["targets"], key=lambda one: one["size"])[:_FIRST]
        first = ", ".join(f"{one['sources'][0]} to {one['target']} ({one['size']:.1f})" for one in targets)
        named = ", ".join(f"{source} to {target}" for source, target in sorted(planted)) or "–"
        place, (score, pair) = planted_places(found.details["pairs"], planted), outstanding({"details": found.details})
        best = f"{pair['source']} to {pair['target']} | {score:.2f} | {pair['flip_rate'] or 0:.0%}"
        print(f"| {entry.name} | {named} | {first} | {place} | {best} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines file, or with --most-labels a manifest")
    parser.add_argument("--most-labels", type=int, help="limit of the detector, below the number of labels")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--models", type=Path, help="folder of the models, if it is not that of the manifest")
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable")
    options = parser.parse_args()
    if options.most_labels is None:
        print_rows(options.file)
        return
    options.manifests = [options.file]
    print_measured(options)


if __name__ == "__main__":
    main()
