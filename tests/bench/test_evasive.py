"""The table of networks before and after an attack on the detectors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from evasive import cell, detectors, pairs, table
from rows import Rows

from bdprune.zoo import read_manifest

ROOT = Path(__file__).resolve().parents[2]


def _row(model: str, score: float, **fields: Any) -> dict[str, Any]:
    row = {"model": model, "seed": 0, "clean_accuracy": 0.757, "attack_success_rate": 1.0, "verdict": "backdoored"}
    scores = {"bdprune.inversion": score, "bdprune.lipschitz": None}
    limits = {"bdprune.inversion": 1.7, "bdprune.lipschitz": 6.0}
    return row | {"scores": scores, "thresholds": limits, "label": 7, "labels": []} | fields


def test_each_attacked_network_follows_its_source(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [_row("evasive-a", 1.25, verdict="clean", label=None, labels=[1, 2]), _row("a", 8.614)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = table(Rows(path, ("model", "seed")), [("a", "evasive-a"), ("b", "evasive-b")]).splitlines()
    assert lines[0] == "| model | CA | ASR | inversion (1.7) | lipschitz (6) | verdict | label |"
    assert lines[2:] == [
        "| a | 75.70 | 100.00 | **8.61** | – | backdoored | 7 |",
        "| evasive-a | 75.70 | 100.00 | 1.25 | – | clean | 1,2 |",
    ]


def test_scores_above_their_threshold_are_bold() -> None:
    assert cell(_row("a", 1.7), "bdprune.inversion") == "1.70"
    assert cell(_row("a", 1.71), "bdprune.inversion") == "**1.71**"
    assert cell(_row("a", 1.7), "bdprune.other") == "–"


def test_the_pairs_are_those_of_the_small_zoo_and_every_detector_of_a_scan_runs() -> None:
    entries = read_manifest(ROOT / "zoo" / "cifar10-w8.toml").models
    assert pairs(entries) == [(name, f"evasive-{name}") for name in ("badnets", "blend", "trojan")]
    assert set(detectors()) == {
        "lipschitz", "suspiciousness", "inversion", "unlearning", "trigger_pruning", "moved_filters"
    }  # fmt: skip


def test_the_record_has_both_networks_of_each_pair() -> None:
    rows = Rows(ROOT / "bench" / "results" / "evasive.jsonl", ("model", "seed"))
    entries = read_manifest(ROOT / "zoo" / "cifar10-w8.toml").models
    assert {row["model"] for row in rows.where(seed=0)} == {name for pair in pairs(entries) for name in pair}
