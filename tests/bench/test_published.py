"""Published figures next to ours: of the method itself, else of RNP, and none where nothing was published."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from published import ALL_TO_ALL, PRUNED, REPAIRS, published

from bdprune.registry import names


@pytest.mark.parametrize(
    ("method", "kind", "all_to_all", "text"),
    [
        ("rnp", "badnets", False, "0.20 / 92.22, 41 filters"),
        ("nad", "wanet", False, "17.46 / 82.41"),
        ("anp", "adv-t", False, "54.01 / 83.06"),
        ("nu_nc_abl", "dynamic", False, "46.86 / 81.19"),
        ("auto", "sig", False, "0.43 / 94.62, 73 filters (RNP)"),
        ("nu_fine_pruning", "lira", False, "13.51 / 92.26, 112 filters (RNP)"),
        ("anp", "blend", True, "13.81 / 86.26"),
        ("auto-100", "trojan", True, "–"),
        ("auto", "trojan", True, "8.78 / 90.67 (RNP)"),
        ("rnp", "pruning-aware", False, "–"),
        ("rnp", None, True, "–"),
    ],
)
def test_figures_are_those_of_the_papers(method: str, kind: str | None, all_to_all: bool, text: str) -> None:
    assert published(method, kind, all_to_all) == text


def test_averages_are_those_of_the_paper() -> None:
    means = {"fine_pruning": 56.45, "nad": 13.65, "ibau": 21.77, "anp": 14.25, "rnp": 5.03}
    for method, mean in means.items():
        figures = [pair[0] for kind, pair in REPAIRS[method].items() if kind in PRUNED["rnp"]]
        assert len(figures) == 12 and sum(figures) / 12 == pytest.approx(mean, abs=0.01)


def test_every_method_is_one_of_ours() -> None:
    assert set(REPAIRS) | set(ALL_TO_ALL) <= set(names("purifier"))
