"""The targets of the speed benchmarks, from records made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.speed import stack
from bench.speed.__main__ import SUBJECTS
from bench.speed.page import Records, page, target_figures
from bench.speed.plan import quick_plan
from bench.speed.targets import TARGETS, best, whole_rnp

from .helpers import measurement, quick_benchmarks, record, row


def figures(made: dict[str, Any]) -> dict[str, tuple[float | None, bool, float | None]]:
    """Target -> first figure, whether it meets the limit, and the best possible figure."""
    return {what: found[0] for _, what, _, found in target_figures(made)}


def test_the_best_row_is_the_fastest_that_worked_and_ours_is_the_first() -> None:
    rows = [row("one", "eager", 3.0), row("two", "eager", 2.0), row("three", "eager", None, failure="RuntimeError")]
    made = measurement("Norms", "small", *rows, row("op", "ours", 2.0), row("fast op", "ours", 1.0))
    assert best(made, "eager") == rows[1]
    assert best(made, "ours") == row("op", "ours", 2.0)
    assert best(made, "alternative") is None


def test_targets_are_computed_from_the_rows() -> None:
    rows = [row("a", "author", 40.0), row("e", "eager", 30.0), row("b", "required", 0.5), row("o", "ours", 2.0)]
    norms = record(measurement("Spectral norms", "net", *rows))
    assert figures(norms) == {
        "faster than the best eager PyTorch": (15.0, True, 30.0),
        "faster than the author's loop": (20.0, False, 40.0),
        "time over one reading of the weights": (4.0, True, None),
    }
    lines = page(Records({"n.json": norms}, {}, {})).split("## Targets")[1].splitlines()
    assert "2 of 3 measurements meet their targets:" in lines
    assert "| Spectral norms: faster than the author's loop | `n.json` | at least 50 x | 20 | 40 | **no** |" in lines


def test_figures_of_one_benchmark_share_a_line() -> None:
    cases = [measurement("Spectral norms", "net", row("e", "eager", one), row("o", "ours", 2.0)) for one in (10.0, 40)]
    made = record(*cases)
    (line,) = [line for line in page(Records({"n.json": made}, {}, {})).splitlines() if "best eager PyTorch |" in line]
    assert line.endswith("| at least 10 x | 5 to 20 | 10 to 40 | **1 of 2** |")


def test_each_alternative_has_a_target_and_a_failed_variant_misses_it() -> None:
    rows = [row("ANP, 2000 iterations", "alternative", 90.0), row("CLP, data-free", "alternative", 5.0)]
    assert figures(record(measurement("Suspiciousness score", "net", *rows))) == {}
    rows.append(row("o", "ours", 2.0))
    found = figures(record(measurement("Suspiciousness score", "net", *rows)))
    assert found == {"faster than ANP": (45.0, True, 90.0), "faster than CLP": (2.5, False, 5.0)}
    rows.append(row("NAD, 30 epochs", "alternative", None, failure="RuntimeError: no memory"))
    found = figures(record(measurement("Suspiciousness score", "net", *rows)))
    assert found["faster than NAD"] == (None, False, None)


@pytest.mark.parametrize(("error", "met"), [("nan", False), (1e-6, True), (1e-3, False)])
def test_an_error_of_nan_misses_its_target(error: float | str, met: bool) -> None:
    found = figures(record(measurement("Channel moments", "one layer, mean = 30", row("o", "ours", 1.0, error=error))))
    assert [ok for _, ok, _ in found.values()] == [met]


def test_a_whole_rnp_needs_all_three_phases() -> None:
    phases = [
        measurement(f"RNP width 8: {name}", "case", row("a", "author", 3.0), row("o", "ours", seconds))
        for name, seconds in (("unlearning", 2.0), ("recovery", 1.5), ("sweep of 19 thresholds", 1.0))
    ]
    assert whole_rnp({"benchmarks": phases[:2]}) == []
    assert whole_rnp({"benchmarks": phases}) == [("RNP width 8", 2.0)]
    assert figures(record(*phases))["all three phases faster than the published loops"] == (2.0, False, None)


def test_every_target_applies_to_a_benchmark() -> None:
    made = [one for subject in SUBJECTS for one in quick_benchmarks(subject)]
    cpu = torch.device("cpu")
    for width in (16, 32, 64):
        made.append(stack.conv_benchmark(quick_plan(cpu), stack.problem(1, 1, width, 4, cpu), width))
    found = [{"name": one.name, "case": one.case} for one in made]
    for target in TARGETS:
        assert any(target.concerns(one) for one in found), target


def test_targets_for_a_gpu_apply_to_a_gpu_only() -> None:
    rows = [row("loop", "author", 9.0), row("vmap", "eager", 3.0), row("fast", "compile", 2.0), row("o", "ours", 1.5)]
    conv = measurement("Stack of models, masked convolution", "64 x [128, 16, 32, 32], of ResNet-18 width 16", *rows)
    assert figures(record(conv)) == {}
    ((figure, met, _),) = figures(record(conv, device="cuda")).values()
    assert figure == pytest.approx(4 / 3) and not met
    scores = measurement("Stack of models, data-free scores", "64 x ResNet-18 width 64", row("o", "ours", 0.25))
    assert figures(record(scores, device="cuda")) == {"scored models": (256.0, True, None)}
    rows = [row("svdvals", "eager", 150.0), row("o", "ours", 2.0)]
    norms = figures(record(measurement("Stack of models, spectral norms", "64 x", *rows), device="cuda"))
    assert norms == {"time over the lower bound": (2.0, True, None), "faster than svdvals": (75.0, False, 150.0)}
