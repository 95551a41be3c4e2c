"""Applies the table of the package to recorded scans of networks that it was not fitted to.

    python bench/risks.py bench/results/scans-cifar10-w32.jsonl [...] [--table TABLE.json]

Prints a Markdown table: for each model its truth, and on each seed the recorded verdict, the probability, and the
p-value among the clean networks of the table. The rows are those of bench/efficacy.py and bench/published_verdicts.py,
of networks of ten classes or more; those of other budgets than default are left out. They hold no remark that a trigger
is natural, so the trigger of a model that is called clean counts as natural.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

from rows import Row
from verdicts import by

from bdprune.record import Evidence
from bdprune.registry import method_class
from bdprune.verdict import Calibration, own_table, read_table
from bdprune.verdict.calibration import conformal_p, strengths_of

TRIGGER = "bdprune.inversion"


def of_default(rows: Sequence[Row]) -> list[Row]:
    """The rows of scans with the budget default, those of a model in the order of their seeds."""
    scans = [row for row in rows if row.get("part", "scan") == "scan"]
    found = [row for row in scans if "default" in (row.get("method"), row.get("budget"))]
    models = list(dict.fromkeys(row["model"] for row in found))
    return sorted(found, key=lambda row: (models.index(row["model"]), row["seed"]))


def threshold_of(detector: str) -> float:
    """The default threshold of a detector."""
    kind = method_class("detector", detector.removeprefix("bdprune."))
    return float(inspect.signature(kind).parameters["threshold"].default)


def evidence_of(row: Row) -> list[Evidence]:
    """The evidence behind a recorded scan, as far as a table uses it."""
    found = []
    for detector, score in row["scores"].items():
        limit = threshold_of(detector)
        flagged = score is not None and score > limit
        natural = "It is natural." if flagged and detector == TRIGGER and row["verdict"] == "clean" else ""
        found.append(Evidence(detector=detector, score=score, threshold=limit, flagged=flagged, natural=natural))
    return found


def risk_of(row: Row, table: Calibration) -> float:
    """The probability of one recorded scan."""
    return table.probability(evidence_of(row), row["verdict"] == "backdoored")


def p_value_of(row: Row, table: Calibration) -> float:
    """The p-value among the clean networks of all architectures, which is (1 + k) / (1 + n)."""
    value = table.log_odds(strengths_of(evidence_of(row)), row["verdict"] == "backdoored")
    return conformal_p(value, [one for group in table.clean for one in group.log_odds])


def page(rows: Sequence[Row], table: Calibration) -> str:
    """The Markdown table, in the order of the rows."""
    lines = ["| model | truth | verdicts | probabilities | p-values |", "|---|---|---|---|---|"]
    for name, mine in by(rows, "model").items():
        clean = mine[0]["kind"] is None or (mine[0]["kind"] == "published" and mine[0]["truth"] is None)
        verdicts = ", ".join(row["verdict"] for row in mine)
        risks = ", ".join(f"{risk_of(row, table):.3f}" for row in mine)
        shares = ", ".join(f"{p_value_of(row, table):.2f}" for row in mine)
        lines.append(f"| {name} | {'clean' if clean else 'backdoored'} | {verdicts} | {risks} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--table", type=Path, help="a table of `bdprune calibrate`, if not that of the package")
    options = parser.parse_args()
    table = read_table(options.table) if options.table else own_table("default")
    if table is None:
        parser.error("the package has no table for the budget default")
    for path in options.files:
        rows = of_default([json.loads(line) for line in path.read_text().splitlines()])
        print(f"{path.stem}\n\n{page(rows, table)}\n")


if __name__ == "__main__":
    main()
