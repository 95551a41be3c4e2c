"""The section about the rule that chooses between Winograd's and direct convolutions."""

from __future__ import annotations

from collections.abc import Mapping

from bench.speed.tables import table
from bench.speed.targets import Record
from bench.winograd_rule import Outcome, costs

_TEXT = """## Winograd's or direct convolutions

bdprune chooses by shape, so that repeated runs give the same bits. `python -m bench.winograd_rule` times both
algorithms on many shapes. The figures are the time of a choice divided by the time of the faster algorithm, as a
geometric mean.
"""


def rule_section(rule: Mapping[str, Record]) -> str:
    """One line per record of ``bench.winograd_rule``; empty without records."""
    rows = []
    for source, record in rule.items():
        outcomes = [Outcome(**{**one, "shape": tuple(one["shape"])}) for one in record["outcomes"]]
        by_rule, direct, winograd = costs(outcomes)
        worst = max(one.cost for one in outcomes)
        rows.append([f"`{source}`", *(f"{one:.2f}" for one in (by_rule, worst, direct, winograd))])
    head = ["Record", "By the rule", "By the rule, worst shape", "Always direct", "Always Winograd's"]
    return f"{_TEXT}\n{table(head, rows)}" if rows else ""
