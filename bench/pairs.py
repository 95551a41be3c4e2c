"""Prints, for each row of ``pair_inversion``, the pair that stands out most, whether or not its trigger works.

    python bench/pairs.py bench/results/candidates.jsonl

The rows come from bench/screens.py. Their own scores are those of the best pair whose trigger works.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rows import Row

from bdprune.loops import size_scores


def outstanding(row: Row) -> tuple[float, Row]:
    """The largest score among the pairs of the last stage, and the pair."""
    last = max(pair["stages"] for pair in row["details"]["pairs"])
    kept = [pair for pair in row["details"]["pairs"] if pair["stages"] == last]
    sizes = [math.inf if pair["size"] is None else pair["size"] for pair in kept]
    scores = size_scores(sizes, [True] * len(kept), most=max(one for one in sizes if math.isfinite(one)))
    best = max(range(len(kept)), key=scores.__getitem__)
    return scores[best], kept[best]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines file")
    rows = [json.loads(line) for line in parser.parse_args().rows.read_text().splitlines()]
    print("| network | pair | score | images that it flips |\n|---|---|---|---|")
    for row in rows:
        if row["detector"] == "pair_inversion":
            score, pair = outstanding(row)
            print(f"| {row['model']} | {pair['source']} to {pair['target']} | {score:.2f} | {pair['flip_rate']:.0%} |")


if __name__ == "__main__":
    main()
