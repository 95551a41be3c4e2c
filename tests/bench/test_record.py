"""Lower bounds, and the record of a benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.speed import machine
from bench.speed.__main__ import share
from bench.speed.benchmark import Benchmark, Variant, Work, absolute_error, max_or_nan, relative_error
from bench.speed.lower_bound import PeakRates, lower_bound_seconds, measure_peak_rates
from bench.speed.record import benchmark_record, number, write
from bench.speed.timing import Sample

RATES = PeakRates(copy=100.0, gemm=1000.0)


def sample(kind: Any, seconds: list[float], output: Any = 1.0, **fields: Any) -> Sample:
    variant = Variant(kind, kind, lambda: None, **fields)
    return Sample(variant, first=50.0, seconds=seconds, peak=7, output=output)


def test_the_lower_bound_adds_up_parts_and_takes_the_slower_of_bytes_and_flops_in_each() -> None:
    work = [Work(bytes=200.0, flops=1000.0), Work(bytes=10.0, flops=5000.0)]
    assert lower_bound_seconds(work, RATES) == (2.0 + 5.0, "FLOPs")
    assert lower_bound_seconds(work[:1], RATES) == (2.0, "bytes")


def test_peak_rates_are_plausible(device: str) -> None:
    rates = measure_peak_rates(torch.device(device), quick=True)
    assert 1e6 < rates.copy < 1e14
    assert 1e6 < rates.gemm < 1e16


def test_a_row_has_time_share_of_the_lower_bound_error_and_compile_time() -> None:
    benchmark = Benchmark("op", "case", (), (Work(100.0),), error=lambda found: found / 10)
    samples = [sample("author", [4.0]), sample("compile", [2.0, 2.0]), sample("required", [1.0]), sample("ours", [2.0])]
    found = benchmark_record(benchmark, samples, RATES)
    assert found["lower_bound_seconds"] == 1.0
    author, compiled, bound, ours = found["rows"]
    assert author["lower_bound_percent"] == 25.0
    assert compiled["compile_seconds"] == 48.0
    assert [row["error"] for row in found["rows"]] == [0.1, 0.1, None, 0.1]
    assert ours["peak_bytes"] == 7
    assert bound["compile_seconds"] is None
    assert all(one.output is None for one in samples)


def test_scaled_rows_show_whole_runs() -> None:
    found = benchmark_record(Benchmark("op", "case", (), (Work(100.0),)), [sample("ours", [2.0], scale=80.0)], RATES)
    assert found["rows"][0]["seconds"] == 160.0
    assert found["rows"][0]["lower_bound_percent"] == number(100 / 160)


def test_a_variant_can_be_the_lower_bound_and_outputs_can_give_the_peak() -> None:
    benchmark = Benchmark("start", "case", (), lower_bound_variant="required", peak=lambda output: output)
    found = benchmark_record(benchmark, [sample("ours", [4.0], 11), sample("required", [1.0], 12)], RATES)
    assert [row["lower_bound_percent"] for row in found["rows"]] == [25.0, 100.0]
    assert [row["peak_bytes"] for row in found["rows"]] == [11, 12]


def test_not_a_number_stays_visible_and_json_stays_json(tmp_path: Path) -> None:
    benchmark = Benchmark("op", "case", (), (Work(100.0),), error=lambda found: math.nan)
    broken = Sample(Variant("b", "eager", lambda: None), failure="RuntimeError: no")
    found = benchmark_record(benchmark, [sample("ours", [2.0]), broken], RATES)
    path = tmp_path / "new" / "record.json"
    write(path, found)
    ours, failed = json.loads(path.read_text())["rows"]
    assert ours["error"] == "nan"
    assert (failed["seconds"], failed["error"], failed["failure"]) == (None, None, "RuntimeError: no")
    assert [one.name for one in path.parent.iterdir()] == ["record.json"]


def test_errors_by_hand() -> None:
    truth = [torch.tensor([4.0, -2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)]
    found = [torch.tensor([4.0, -1.0]), torch.tensor([0.625])]
    assert relative_error(found, truth) == 0.25
    assert absolute_error(found, truth) == 1.0
    assert math.isnan(relative_error([torch.tensor([4.0, math.nan]), found[1]], truth))
    assert math.isnan(max_or_nan([1.0, math.nan, 2.0]))


@pytest.mark.parametrize(("threads", "part"), [([1], 1.0), ([1, 2], 2 / 3), ([2], 1.0), ([1, 1], 0.5)])
def test_time_is_shared_by_work(threads: list[int], part: float) -> None:
    assert share(threads) == pytest.approx(part)


def test_the_machine_is_described() -> None:
    found = machine.describe(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["hardware"] and found["build"]["backend"] in ("native", "reference")
    json.dumps(found, allow_nan=False)
