"""Every variant of every benchmark runs on tiny shapes and computes the same as the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.speed import benchmark as benchmark_module
from bench.speed import startup
from bench.speed.__main__ import SUBJECTS, _fitting, main
from bench.speed.benchmark import Benchmark, Variant
from bench.speed.filter_spectral_norms import resnet18_shapes, vgg19_shapes
from bench.speed.networks import conv_flops, resnet18
from bench.speed.plan import quick_plan
from bench.speed.rnp import PRUNED, THRESHOLDS, published_masks
from bench.speed.stack import with_tf32

from .helpers import quick_benchmarks

LOOSE = 2e-2
"""Some eager variants are inaccurate by design: raw float32 sums with a large mean."""
TIGHT = {
    "Spectral norms": 1e-5,
    "Masked convolution": 1e-4,
    "3x3 convolution": 1e-5,
    "Stamped images": 1e-5,
    "Trigger inversion width 8": 1e-4,
    "File to data-free scores": 1e-5,
}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes longer than all other variants. Trials of stacks must not use the user's cache."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmark_module, "can_compile", lambda device: False)


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "startup"])
def test_every_variant_agrees(subject: str, device: str) -> None:
    for benchmark in quick_benchmarks(subject, device):
        kinds = {variant.kind for variant in benchmark.variants}
        assert {"author", "eager", "ours"} <= kinds
        assert len({variant.name for variant in benchmark.variants}) == len(benchmark.variants)
        assert all(work.bytes > 0 for work in benchmark.work)
        assert benchmark.error is not None
        for variant in benchmark.variants:
            output = variant.call()
            if variant.exact:
                limit = TIGHT.get(benchmark.name, LOOSE)
                assert benchmark.error(output) < limit, f"{benchmark.name}, {benchmark.case}: {variant.name}"


def test_tf32_is_allowed_only_while_a_variant_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    variant = Variant("asks", "ours", lambda: torch.backends.cudnn.allow_tf32)
    found = with_tf32(Benchmark("name", "case", (variant,)))
    assert found.case == "case, TF32 in every variant" and found.variants[0].call() is True
    assert torch.backends.cudnn.allow_tf32 is False and variant.call() is False


def test_tasks_in_pytorch_have_at_least_three_eager_variants() -> None:
    for subject in ("spectral", "moments", "stamp", "inversion", "suspiciousness", "rnp", "loading"):
        for benchmark in quick_benchmarks(subject):
            assert sum(variant.kind == "eager" for variant in benchmark.variants) >= 3, benchmark.name


def test_the_peak_of_a_child_process_excludes_ours() -> None:
    ours = bytearray(b"1") * (300 << 20)
    bare = startup.peak_bytes(("-c", "pass"))
    large = startup.peak_bytes(("-c", "bytearray(b'1') * (200 << 20)"))
    assert len(ours) > 5 * bare > 5e6
    assert large - bare == pytest.approx(200 << 20, rel=0.05)


def test_a_child_process_that_fails_is_an_error() -> None:
    assert startup.start("-c", "pass") == ("-c", "pass")
    with pytest.raises(RuntimeError, match="ended with 3"):
        startup.start("-c", "raise SystemExit(3)")


def test_the_command_writes_a_record(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.json"
    before = torch.get_num_threads()
    try:
        main(["--quick", "--threads", "1", "--only", "masked_conv", "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    record = json.loads(out.read_text())
    assert record["quick"] and record["machine"]["device"] == "cpu"
    (run,) = record["runs"]
    assert [benchmark["name"] for benchmark in run["benchmarks"]] == ["Masked convolution"] * 5
    assert all(
        row["failure"] == "" and row["seconds"] > 0 for benchmark in run["benchmarks"] for row in benchmark["rows"]
    )


def test_processor_time_needs_one_thread(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--threads 1"):
        main(["--quick", "--clock", "cpu", "--threads", "2", "--out", str(tmp_path / "benchmarks.json")])


def test_only_a_complete_plan_has_slow_variants() -> None:
    variants = tuple(Variant(kind, kind, lambda: None) for kind in ("author", "compile", "ours", "alternative"))
    plan = quick_plan(torch.device("cpu"))
    for complete, kinds in ((False, ["author", "ours"]), (True, ["author", "compile", "ours", "alternative"])):
        left = _fitting(Benchmark("op", "case", variants), replace(plan, complete=complete)).variants
        assert [variant.kind for variant in left] == kinds


def test_without_time_every_benchmark_is_listed_as_skipped(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.json"
    before = torch.get_num_threads()
    try:
        main(["--quick", "--threads", "1", "--only", "spectral", "--minutes", "0", "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    (run,) = json.loads(out.read_text())["runs"]
    assert run["benchmarks"] == []
    assert len(run["skipped"]) == 2


def test_sizes_of_the_networks_are_correct() -> None:
    small, large = resnet18_shapes(64), vgg19_shapes(64)
    assert (len(small), sum(shape[0] for shape in small)) == (20, 4800)
    assert (len(large), sum(shape[0] for shape in large)) == (16, 5504)
    assert sum(torch.Size(shape).numel() for shape in small) == 11_159_232
    # FLOPs grow with the square of the width: a quarter of the width needs about a sixteenth.
    assert conv_flops(resnet18(16, torch.device("cpu")).network) == pytest.approx(1.11e9 / 16, rel=0.02)


def test_published_masks_prune_the_published_share() -> None:
    model = resnet18(8, torch.device("cpu"))
    masks = published_masks(model)
    total = sum(map(len, masks.values()))
    assert total == 600
    for threshold, count in zip(THRESHOLDS, PRUNED, strict=True):
        pruned = sum(int((mask <= threshold).sum()) for mask in masks.values())
        assert pruned == round(count * total / 4800)
