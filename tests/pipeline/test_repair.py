"""Repairs: the record of a purifier, and the repaired file."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.errors import ArchitectureError, ArtifactError, DataError, OptionError, OutputError, SanityError
from bdprune.fleet import scan
from bdprune.methods import CurvePoint, Purifier, Repair, retraining
from bdprune.model import Model
from bdprune.model.edit.pruning import prune
from bdprune.model.loading import load
from bdprune.pipeline import repair as repair_module
from bdprune.pipeline.repair import purify
from bdprune.purifiers import awm
from bdprune.purifiers.fine_tuning import FineTuning
from bdprune.record import PurifyResult


@dataclass(frozen=True)
class Fake(Purifier):
    """Prunes the two last filters of the tiny network and reports made-up numbers."""

    masks: tuple[float, ...] = (1.0, 1.0, 0.92, 0.5, 0.31, 0.3, 0.1, 0.0)
    id = "x.fake"
    title = "cut the last two"

    def __call__(self, case: Case) -> Repair:
        pruned = {"conv": [6, 7]}
        return Repair(
            model=prune(case.model, pruned),
            method=self.id,
            pruned=pruned,
            num_filters=8,
            masks={"conv": torch.tensor(self.masks)},
            threshold=float("nan"),
            change="pruned",
            selection="the last two",
            accuracy_before=1.0,
            accuracy_after=0.975,
            curve=(CurvePoint(0.1, 1.0, 1), CurvePoint(float("inf"), float("nan"), 8)),
            target_label=2,
            seconds={"cut": 0.5},
            params={"odd": float("nan"), "path": Path("x")},
        )


@pytest.fixture
def options(tiny: Any) -> dict[str, Any]:
    return {"arch": tiny.arch, "input_shape": tiny.input_shape}


def test_the_record_describes_the_repair(tiny: Any, options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    digest = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    repair = purify(tiny.path, tiny.data, method=Fake(), output=output, seed=5, per_class=20, **options)
    record = repair.result
    assert (record.method, record.accuracy_before, record.accuracy_after) == ("x.fake", 1.0, 0.975)
    assert (record.threshold, record.selection, record.target_label) == (None, "the last two", 2)
    assert record.change == "pruned"
    assert (record.filters, record.filters_pruned, record.pruned) == (8, 2, {"conv": (6, 7)})
    assert [point.filters_pruned for point in record.curve] == [1, 8]
    assert (record.curve[1].threshold, record.curve[1].clean_accuracy) == (None, None)
    assert record.params == {"odd": None, "path": "x"}
    assert record.data and record.data.count == 60 and record.env.seed == 5
    assert record.output and record.output.path == str(output) and record.output.format == "torch-zip"
    assert record.output.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert record.output.bytes == output.stat().st_size
    assert record.artifact and record.artifact.sha256 == digest == hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    assert PurifyResult.from_json(record.to_json()) == record
    assert "NaN" not in record.to_json() and json.loads(record.to_json())["kind"] == "purify"


def test_a_notebook_shows_the_repairs_of_all_sets_of_weights(tiny: Any, options: dict[str, Any]) -> None:
    found = purify(tiny.path, tiny.data, method="suspiciousness", **options)
    one = found._repr_html_()
    assert "bdprune.suspiciousness" in one and str(tiny.path) in one and "clean accuracy" in one
    assert replace(found, others=(found,))._repr_html_() == one + one


def test_the_histogram_counts_masks_and_pruned_filters(tiny: Any, options: dict[str, Any]) -> None:
    masks = purify(tiny.path, tiny.data, method=Fake(), **options).result.masks
    assert masks and len(masks.edges) == 21 and (masks.edges[0], masks.edges[-1]) == (0.0, 1.0)
    # 0.0, 0.1, 0.3 and 0.31, 0.5, 0.92, and twice 1.0, in bins of 0.05; the pruned filters have 0.1 and 0.0
    assert {i: count for i, count in enumerate(masks.counts) if count} == {0: 1, 2: 1, 6: 2, 10: 1, 18: 1, 19: 2}
    assert {i: count for i, count in enumerate(masks.pruned) if count} == {0: 1, 2: 1}


def test_the_histogram_of_scores_covers_all_finite_scores(tiny: Any, options: dict[str, Any]) -> None:
    scores = replace(Fake(), masks=(2.0, 4.0, 4.0, 6.0, 8.0, float("nan"), 12.0, float("inf")))
    masks = purify(tiny.path, tiny.data, method=scores, **options).result.masks
    assert masks and (masks.edges[0], masks.edges[-1], sum(masks.counts), sum(masks.pruned)) == (2.0, 12.0, 6, 1)
    nothing = replace(Fake(), masks=(float("nan"),) * 8)
    assert purify(tiny.path, tiny.data, method=nothing, **options).result.masks is None


def test_the_written_file_loads_and_has_the_filters_pruned(tiny: Any, options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    repair = purify(tiny.path, tiny.data, method=Fake(), output=output, **options)
    again = load(output, arch=tiny.arch, input_shape=(3, 8, 8))
    gamma = again.network.state_dict()["norm.weight"]
    assert gamma[6:].tolist() == [0, 0] and bool((gamma[:6] == 1).all())
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(again.module(images), repair.model.module(images))


def test_a_model_in_memory_is_unchanged_and_nothing_is_written(tiny: Any) -> None:
    before = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    repair = purify(tiny.module, tiny.data, method=Fake(), input_shape=(3, 8, 8))
    assert repair.result.output is None and repair.result.artifact is None
    assert all(torch.equal(value, before[name]) for name, value in tiny.module.state_dict().items())


def test_a_module_is_written_as_safetensors(tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    repair = purify(tiny.module, tiny.data, method=Fake(), output=output, input_shape=(3, 8, 8))
    assert repair.result.output and repair.result.output.format == "safetensors"
    assert load(output, arch=tiny.arch).artifact.format == "safetensors"  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["rnp", "suspiciousness"])
def test_real_methods_run_on_a_tiny_network(tiny: Any, options: dict[str, Any], method: str) -> None:
    record = purify(tiny.path, tiny.data, method=method, **options).result
    assert record.method == f"bdprune.{method}" and record.accuracy_before == 1.0
    assert PurifyResult.from_json(record.to_json()) == record


def test_errors_are_raised_and_nothing_is_written(tiny: Any, options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError):
        purify(broken, tiny.data, output=output)
    with pytest.raises(DataError):
        purify(tiny.path, tmp_path / "nowhere", output=output, **options)
    with pytest.raises(OptionError, match="needs clean data"):
        purify(tiny.path, None, output=output, **options)
    with pytest.raises(SanityError, match=r"Clean accuracy is 33\.3 %"):
        purify(tiny.path, tiny.data, output=output, normalize="5,1", **options)
    with pytest.raises(OutputError):
        purify(tiny.path, tiny.data, method=Fake(), output=tmp_path / "no" / "out.pth", **options)
    with pytest.raises(OutputError, match="is the input checkpoint"):
        purify(tiny.path, tiny.data, method=Fake(), output=tiny.path, **options)
    assert not output.exists()


def test_outputs_are_checked_before_the_work(tiny: Any, options: dict[str, Any], tmp_path: Path) -> None:
    def stop(text: str) -> None:
        raise AssertionError(f"The work has started: {text}")

    for output in (tmp_path / "no" / "out.pth", tmp_path, tiny.path):
        with pytest.raises(OutputError):
            purify(tiny.path, tiny.data, method=Fake(), output=output, progress=stop, **options)


def test_attachments_in_the_folder_of_the_clean_data_leave_no_folder_there(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    with pytest.raises(OptionError, match="in the folder"):
        purify(tiny.path, tmp_path / "data", method=Fake(), attachments=tmp_path / "data" / "kept")
    assert [one.name for one in (tmp_path / "data").iterdir()] == ["cat"]


def test_compact_removes_the_pruned_filters_and_describes_the_file(
    tiny: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("torch_pruning")
    output = tmp_path / "out.pth"
    done = purify(tiny.path, tiny.data, method=Fake(), mode="compact", output=output, **options)
    info = done.result.compact
    assert info and (info.filters_removed, info.whole) == (2, ())
    # A filter has 3 weights, 2 values of the norm and 3 of the head.
    assert info.parameters_before - info.parameters_after == 2 * 8
    # Two operations for each weight: of the conv at 64 pixels, and of the head.
    assert info.flops_before == 2 * (8 * 3 * 64 + 8 * 3) and info.flops_after == 2 * (6 * 3 * 64 + 6 * 3)
    assert info.ms_before and info.ms_after and info.difference is not None and info.difference < 1e-5
    assert done.result.output and done.result.output.description == f"{output}.arch.json"
    assert PurifyResult.from_json(done.result.to_json()) == done.result
    again = load(output, arch=tiny.arch, input_shape=tiny.input_shape)
    images = torch.rand(4, *tiny.input_shape)
    assert torch.equal(again.module(images), done.model.module(images))
    whole = purify(tiny.path, tiny.data, method=Fake(), **options)
    assert torch.allclose(whole.model.module(images), done.model.module(images), atol=1e-5)
    assert whole.result.compact is None


def test_compact_prunes_by_name_so_that_filters_output_zero(tiny: Any, options: dict[str, Any]) -> None:
    pytest.importorskip("torch_pruning")
    done = purify(tiny.path, tiny.data, method="suspiciousness", mode="compact", settings={"mu": 9.0}, **options)
    assert done.result.params["mode"] == "zero_gamma_beta" and done.result.filters_pruned == 0
    info = done.result.compact
    assert info and info.filters_removed == 0 and info.parameters_before == info.parameters_after


def test_compact_needs_its_library_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(OptionError, match="needs Torch-Pruning"):
        purify("missing.pth", "missing", mode="compact")


def test_a_compact_file_can_be_scanned_and_repaired_again(tiny: Any, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    output = tmp_path / "out.pth"
    first = purify(tiny.path, tiny.data, method=Fake(), mode="compact", output=output, **options)
    scanned = scan(output, tiny.data, detectors=["suspiciousness", "lipschitz"], **options)
    assert scanned.error is None and scanned.model and scanned.model.parameters == first.result.compact.parameters_after
    assert all(one.score is not None for one in scanned.detectors)
    again = purify(
        output, tiny.data, method="suspiciousness", settings={"mu": 9.0}, output=tmp_path / "b.pth", **options
    )
    assert again.result.output and again.result.output.description == f"{tmp_path / 'b.pth'}.arch.json"
    assert load(tmp_path / "b.pth", **options).compact == load(output, **options).compact


def test_the_accuracy_is_that_of_the_weights_in_a_file_of_half_precision(
    tiny: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    source, output = tmp_path / "half.pth", tmp_path / "out.pth"
    torch.save({name: value.bfloat16() for name, value in tiny.module.state_dict().items()}, source)
    repair = purify(source, tiny.data, method="fine_tuning", max_acc_drop=1.0, output=output, **options)
    assert repair.result.change == "retrained"
    written = load(output, arch=tiny.arch).network.state_dict()
    assert all(torch.equal(value, written[name]) for name, value in repair.model.network.state_dict().items())


@pytest.mark.parametrize("method", ["rnp", "anp", "clp", "auto"])
def test_a_conv_whose_weight_is_computed_is_refused(bright: Any, method: str) -> None:
    """Filters were reported as pruned, and the next forward pass computed them again."""
    network = copy.deepcopy(bright.model.network)
    torch.nn.utils.parametrizations.weight_norm(network[3])
    with pytest.raises(ArchitectureError, match="The weight of 3 is computed from other parameters") as caught:
        purify(network, bright.data, method=method, input_shape=bright.model.input_shape)
    assert "remove_parametrizations" in caught.value.hint


@pytest.mark.parametrize("method", ["rnp", "anp", "awm"])
def test_a_network_without_convs_is_one_clear_error(bright: Any, method: str) -> None:
    with pytest.raises(ArchitectureError, match="no conv"):
        purify(linear(bright), bright.data, method=method, input_shape=bright.model.input_shape)


def test_auto_takes_a_network_without_convs(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*args: Any) -> Any:
        raise AssertionError("It needs no images for another check.")

    monkeypatch.setattr(repair_module, "with_images_for_check", held)
    found = purify(linear(bright), bright.data, check=True, input_shape=bright.model.input_shape).result
    assert found.outcome in ("unverified", "repaired", "unrepaired")
    if found.outcome == "unverified":
        assert "I-BAU" in found.selection and found.accuracy_after >= found.accuracy_before - 0.01


def linear(bright: Any) -> nn.Module:
    """A network without convs that has learned the task."""
    images, labels = bright.data.images.flatten(1), bright.data.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(images.shape[1], 16), nn.ReLU(), nn.Linear(16, 3))
    tuning = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(200):
        tuning.zero_grad()
        nn.functional.cross_entropy(network(bright.data.images), labels).backward()
        tuning.step()
    return network.eval()


@pytest.mark.parametrize("method", ["rnp", "trigger_pruning"])
def test_a_limit_that_is_given_holds_after_the_fine_tuning_too(bright: Any, method: str) -> None:
    params = purify(bright.model, bright.data, method=method, max_acc_drop=0.013).result.params
    assert params["max_drop"] == params["regained_drop"] == 0.013


def test_two_seeds_that_differ_are_an_error(bright: Any) -> None:
    """The seed of the call did nothing, and the record named it."""
    method = FineTuning(seed=4)
    assert purify(bright.model, bright.data, method=method).result.env.seed == 4
    assert purify(bright.model, bright.data, method=method, seed=4).result.env.seed == 4
    assert purify(bright.model, bright.data, method="fine_tuning", settings={"seed": 4}).result.env.seed == 4
    for given in ({"method": method}, {"method": "fine_tuning", "settings": {"seed": 4}}):
        with pytest.raises(OptionError, match="The seed 5 differs from that of the method"):
            purify(bright.model, bright.data, seed=5, **given)


@pytest.mark.parametrize("method", ["fine_tuning", "ft_sam", "nad", "awm"])
def test_a_file_of_half_precision_holds_what_was_decided_on(
    bright: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variance above 65504 was written as infinite, after the decision on the finite one."""
    network = copy.deepcopy(bright.model.network)
    with torch.no_grad():
        network[1].running_var.fill_(60000.0)
        network[1].weight.mul_(60000.0**0.5 / bright.model.network[1].running_var.sqrt())
    torch.save({name: value.half() for name, value in network.state_dict().items()}, tmp_path / "half.pth")
    maker = SimpleNamespace(make=lambda: copy.deepcopy(bright.model.network))
    monkeypatch.setitem(sys.modules, "bright_net", maker)  # type: ignore[arg-type]
    judged: list[Model] = []
    for module in (retraining, awm):
        monkeypatch.setattr(module, "views_drop", lambda before, after, *more: judged.append(after) or 0.0)
    done = purify(
        tmp_path / "half.pth",
        bright.data,
        method=method,
        output=tmp_path / "out.pth",
        arch="bright_net:make",
        input_shape=bright.model.input_shape,
    )
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(value.isfinite().all() for value in written.values() if value.is_floating_point())
    (one,), found = judged, done.model.network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in one.network.state_dict().items())


def test_an_error_about_too_few_images_counts_the_copies(bright: Any) -> None:
    few = bright.data.subset(torch.arange(3).repeat(20))
    with pytest.raises(DataError, match=r"3 clean images, .* 57 of 60 images are copies of others and were left out"):
        purify(bright.model, few, method="fine_tuning")


def test_one_scan_serves_repairs_with_several_seeds(bright: Any) -> None:
    found = scan(bright.model, bright.data, per_class=50, detectors="lipschitz")
    for seed in (0, 4):
        done = purify(bright.model, bright.data, method=FineTuning(seed=seed), start_from=found, per_class=50)
        assert done.result.env.seed == seed and done.result.data.count == 150
