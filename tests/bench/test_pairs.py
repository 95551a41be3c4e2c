"""How the benchmark of pairs reads rows and manifests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from pairs import outstanding, planted_pairs, planted_places

from bdprune.zoo import read_manifest

PAIRS = [
    {"source": 1, "target": 0, "size": 8.0, "stages": 2},
    {"source": 2, "target": 0, "size": 2.0, "stages": 2},
    {"source": 3, "target": 0, "size": 8.0, "stages": 2},
    {"source": 4, "target": 0, "size": 1.0, "stages": 1},
    {"source": 5, "target": 0, "size": None, "stages": 2},
]


def test_the_pair_that_stands_out_is_of_the_last_stage() -> None:
    score, pair = outstanding({"details": {"pairs": PAIRS}})
    assert pair["source"] == 2 and score == pytest.approx(4.0)


def test_places_of_planted_pairs() -> None:
    assert planted_places(PAIRS, {(2, 0), (4, 0), (4, 1)}) == "2, 4"
    assert planted_places(PAIRS, {(7, 0)}) == "–"


def test_planted_pairs_come_from_the_manifest() -> None:
    models = {one.name: one for one in read_manifest(Path("zoo/cifar10-w8.toml")).models}
    assert planted_pairs(models["blend-source"]) == {(6, 0), (7, 0)}
    assert planted_pairs(models["clean"]) == planted_pairs(models["badnets-all"]) == set()
