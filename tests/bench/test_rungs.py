"""Every rung of every ladder on tiny shapes: it runs, and it computes what the others compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.ladders import ladder as ladder_module
from bench.ladders import startup
from bench.ladders.__main__ import SUBJECTS, _fitting, main
from bench.ladders.filter_spectral_norms import resnet18_shapes, vgg19_shapes
from bench.ladders.ladder import Ladder, Rung
from bench.ladders.networks import conv_flops, resnet18
from bench.ladders.plan import quick_plan
from bench.ladders.rnp import PRUNED, THRESHOLDS, published_masks
from bench.ladders.stack import with_tf32

LOOSE = 2e-2
"""Some eager rungs lose digits on purpose of being listed: raw float32 sums where the mean is large."""
TIGHT = {"Spectral norms": 1e-5, "Masked convolution": 1e-4, "3x3 convolution": 1e-5, "File to data-free scores": 1e-5}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes longer than all other rungs together. Trials of stacks are kept where no user's cache is."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(ladder_module, "can_compile", lambda device: False)


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "startup"])
def test_every_rung_agrees(subject: str, device: str) -> None:
    for ladder in SUBJECTS[subject](quick_plan(torch.device(device))):
        kinds = {rung.kind for rung in ladder.rungs}
        assert {"author", "eager", "ours"} <= kinds
        assert len({rung.name for rung in ladder.rungs}) == len(ladder.rungs)
        assert all(work.bytes > 0 for work in ladder.work)
        assert ladder.error is not None
        for rung in ladder.rungs:
            output = rung.call()
            if rung.exact:
                limit = TIGHT.get(ladder.name, LOOSE)
                assert ladder.error(output) < limit, f"{ladder.name}, {ladder.case}: {rung.name}"


def test_tf32_is_allowed_while_a_rung_runs_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    rung = Rung("asks", "ours", lambda: torch.backends.cudnn.allow_tf32)
    found = with_tf32(Ladder("name", "case", (rung,)))
    assert found.case == "case, TF32 on every rung" and found.rungs[0].call() is True
    assert torch.backends.cudnn.allow_tf32 is False and rung.call() is False


def test_at_least_three_eager_rungs_for_what_is_computed_in_pytorch() -> None:
    for subject in ("spectral", "moments", "suspiciousness", "rnp", "loading"):
        for ladder in SUBJECTS[subject](quick_plan(torch.device("cpu"))):
            assert sum(rung.kind == "eager" for rung in ladder.rungs) >= 3, ladder.name


def test_a_child_process_tells_its_own_memory_and_not_ours() -> None:
    ours = bytearray(b"1") * (300 << 20)
    bare = startup.peak_bytes(("-c", "pass"))
    large = startup.peak_bytes(("-c", "bytearray(b'1') * (200 << 20)"))
    assert len(ours) > 5 * bare > 5e6
    assert large - bare == pytest.approx(200 << 20, rel=0.05)


def test_a_child_process_that_breaks_down_is_no_measurement() -> None:
    assert startup.start("-c", "pass") == ("-c", "pass")
    with pytest.raises(RuntimeError, match="ended with 3"):
        startup.start("-c", "raise SystemExit(3)")


def test_the_command_writes_a_record(tmp_path: Path) -> None:
    out = tmp_path / "ladders.json"
    before = torch.get_num_threads()
    try:
        main(["--quick", "--threads", "1", "--only", "masked_conv", "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    record = json.loads(out.read_text())
    assert record["quick"] and record["machine"]["device"] == "cpu"
    (run,) = record["runs"]
    assert [ladder["name"] for ladder in run["ladders"]] == ["Masked convolution"] * 5
    assert all(row["failure"] == "" and row["seconds"] > 0 for ladder in run["ladders"] for row in ladder["rows"])


def test_processor_time_is_for_one_thread(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--threads 1"):
        main(["--quick", "--clock", "cpu", "--threads", "2", "--out", str(tmp_path / "ladders.json")])


def test_what_takes_long_is_left_to_a_complete_plan() -> None:
    rungs = tuple(Rung(kind, kind, lambda: None) for kind in ("author", "compile", "ours", "rival"))
    plan = quick_plan(torch.device("cpu"))
    for complete, kinds in ((False, ["author", "ours"]), (True, ["author", "compile", "ours", "rival"])):
        left = _fitting(Ladder("op", "case", rungs), replace(plan, complete=complete)).rungs
        assert [rung.kind for rung in left] == kinds


def test_without_time_everything_is_named_as_left_out(tmp_path: Path) -> None:
    out = tmp_path / "ladders.json"
    before = torch.get_num_threads()
    try:
        main(["--quick", "--threads", "1", "--only", "spectral", "--minutes", "0", "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    (run,) = json.loads(out.read_text())["runs"]
    assert run["ladders"] == []
    assert len(run["left_out"]) == 2


def test_sizes_of_the_networks_are_the_known_ones() -> None:
    small, large = resnet18_shapes(64), vgg19_shapes(64)
    assert (len(small), sum(shape[0] for shape in small)) == (20, 4800)
    assert (len(large), sum(shape[0] for shape in large)) == (16, 5504)
    assert sum(torch.Size(shape).numel() for shape in small) == 11_159_232
    # Twice the multiplications: a quarter of the width takes about a sixteenth.
    assert conv_flops(resnet18(16, torch.device("cpu")).network) == pytest.approx(1.11e9 / 16, rel=0.02)


def test_published_masks_prune_the_published_share() -> None:
    model = resnet18(8, torch.device("cpu"))
    masks = published_masks(model)
    total = sum(map(len, masks.values()))
    assert total == 600
    for threshold, count in zip(THRESHOLDS, PRUNED, strict=True):
        pruned = sum(int((mask <= threshold).sum()) for mask in masks.values())
        assert pruned == round(count * total / 4800)
