"""Files with several sets of weights: each has its own result, and a repair reports every set that it skips."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.analysis import Case
from bdprune.errors import SanityError
from bdprune.fleet.scans import scan, scan_many
from bdprune.methods import Detector, Purifier, Repair
from bdprune.model.edit.pruning import prune
from bdprune.pipeline.open import load
from bdprune.pipeline.repair import purify
from bdprune.record import Evidence, Result, Sign
from bdprune.report import html_page, writer


@dataclass(frozen=True)
class Marked(Detector):
    """A detector that flags networks whose first bias is not zero."""

    id: str = "x.marked"
    sign: Sign = "collapse"

    title = "a mark"

    def __call__(self, case: Case) -> Evidence:
        mark = float(case.model.network.get_parameter("head.bias")[0].detach().abs())
        return self.evidence(mark, 0.5, target_label=0 if mark > 0.5 else None)


BOTH = [Marked(), Marked("x.marked2", "trigger")]


@dataclass(frozen=True)
class Cut(Purifier):
    """A purifier that prunes the last filter."""

    id = "x.cut"
    title = "cut the last"

    def __call__(self, case: Case) -> Repair:
        pruned = {"conv": [7]}
        return Repair(
            model=prune(case.model, pruned),
            method=self.id,
            change="pruned",
            selection="the last",
            accuracy_before=1.0,
            accuracy_after=1.0,
            pruned=pruned,
            num_filters=8,
            threshold=1.0,
        )


@pytest.fixture
def good(tiny: Any) -> dict[str, torch.Tensor]:
    return dict(tiny.module.state_dict())


@pytest.fixture
def bad(good: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return copy.deepcopy(good) | {"head.bias": torch.tensor([0.6, 0.0, 0.0])}


@pytest.fixture
def options(tiny: Any) -> dict[str, Any]:
    return {"arch": tiny.arch, "input_shape": tiny.input_shape}


def many(path: Path, tiny: Any, options: dict[str, Any], **more: Any) -> list[Result]:
    return list(scan_many([path], tiny.data, detectors=BOTH, **options, **more))


def test_each_set_has_a_result_and_a_name(tiny: Any, good: Any, bad: Any, options: dict[str, Any]) -> None:
    path = tiny.folder / "ema.pth.tar"
    torch.save({"state_dict": good, "state_dict_ema": bad, "metric": 0.7}, path)
    found = many(path, tiny, options)
    assert [one.error for one in found] == [None, None]
    assert [(one.verdict, one.name) for one in found] == [
        ("clean", f"{path}#state_dict"),
        ("backdoored", f"{path}#state_dict_ema"),
    ]
    assert found[0].artifact and found[0].artifact.sets == ("state_dict", "state_dict_ema")


def test_a_scan_of_one_file_gives_the_worst_of_its_sets(
    tiny: Any, good: Any, bad: Any, options: dict[str, Any]
) -> None:
    for number, sets in enumerate(({"model": good, "ema": bad}, {"model": bad, "ema": good})):
        path = tiny.folder / f"{number}.pth"
        torch.save(sets, path)
        assert scan(path, tiny.data, detectors=BOTH, **options).verdict == "backdoored"


def test_a_key_selects_a_set_and_the_other_sets_are_named(
    tiny: Any, good: Any, bad: Any, options: dict[str, Any]
) -> None:
    path = tiny.folder / "ema.pth"
    torch.save({"model": good, "ema": bad}, path)
    (only,) = many(path, tiny, options, state_key="model")
    assert only.verdict == "clean" and only.coverage and only.coverage.left_out == ("ema: not chosen",)
    assert [(one.rule_id, one.severity) for one in only.findings] == [("BD001", "info")]
    assert "ema: not chosen" in writer("text").render([only]) and "ema: not chosen" in html_page([only])
    (wrong,) = many(path, tiny, options, state_key="swa")
    assert wrong.error and "it holds 'model', 'ema'" in wrong.error.message


def test_a_set_without_a_match_is_not_scanned_and_not_clean(tiny: Any, good: Any, options: dict[str, Any]) -> None:
    path = tiny.folder / "gan.pth"
    torch.save({"netC": good, "netG": {"up.weight": torch.ones(3, 4)}}, path)
    clean, other = many(path, tiny, options)
    assert (clean.verdict, other.verdict) == ("clean", "inconclusive") and other.name == f"{path}#netG"
    assert "not checked" in other.findings[0].message and other.findings[0].rule_id == "BD001"
    (skipped,) = many(path, tiny, options, skip_unknown=True)
    assert skipped.verdict == "clean" and skipped.coverage and skipped.coverage.left_out[0].startswith("netG: ")


def test_weights_outside_the_network_prevent_a_clean_verdict(tiny: Any, good: Any, options: dict[str, Any]) -> None:
    path = tiny.folder / "projector.pth"
    torch.save({**{f"net.{name}": value for name, value in good.items()}, "projector.weight": torch.ones(4, 8)}, path)
    (found,) = many(path, tiny, options)
    assert found.verdict == "inconclusive" and found.coverage and found.coverage.unscanned == ("projector.weight",)
    assert "projector.weight" in writer("text").render([found]) and "projector.weight" in html_page([found])
    (skipped,) = many(path, tiny, options, skip_unknown=True)
    assert skipped.verdict == "clean" and skipped.coverage and skipped.coverage.unscanned == ("projector.weight",)


def test_entries_without_weights_are_named_and_change_nothing(tiny: Any, good: Any, options: dict[str, Any]) -> None:
    path = tiny.folder / "loss.pth"
    torch.save({**{f"net.{name}": value for name, value in good.items()}, "loss.weight": torch.ones(3)}, path)
    (found,) = many(path, tiny, options)
    assert found.verdict == "clean" and found.coverage and found.coverage.kept == ("loss.weight",)
    assert found.coverage.scanned == sum(value.numel() for value in good.values() if value.is_floating_point())
    assert "loss.weight" in writer("text").render([found])


def test_sets_are_scanned_in_a_separate_process(tiny: Any, good: Any, bad: Any, options: dict[str, Any]) -> None:
    path = tiny.folder / "ema.pth"
    torch.save({"model": good, "ema": bad}, path)
    settings: dict[str, Any] = {"detectors": ["lipschitz"], "timeout": 100}
    found = list(scan_many([path, path], tiny.data, **settings, **options))
    assert [one.name.partition("#")[2] for one in found] == ["model", "ema", "model", "ema"]


def test_one_repair_repairs_every_set(tiny: Any, good: Any, bad: Any, options: dict[str, Any]) -> None:
    path, out = tiny.folder / "ema.pth", tiny.folder / "out.pth"
    torch.save({"model": good, "ema": bad, "epoch": 3}, path)
    repair = purify(path, tiny.data, method=Cut(), output=out, **options)
    records = [repair.result, *(other.result for other in repair.others)]
    assert [one.name for one in records] == [f"{path}#model", f"{path}#ema"]
    assert all(one.left == () and one.output == records[0].output for one in records)
    assert writer("text").render([records[0]]).startswith("CHANGED, NOT CHECKED")
    written = torch.load(out, weights_only=True)
    assert written["epoch"] == 3
    for key, old in (("model", good), ("ema", bad)):
        assert list(written[key]) == list(old)
        assert written[key]["norm.weight"][7] == 0 and torch.equal(written[key]["head.bias"], old["head.bias"])


def test_a_dict_in_two_places_is_repaired_in_both(tiny: Any, bad: Any, options: dict[str, Any]) -> None:
    path, out = tiny.folder / "both.pth", tiny.folder / "out.pth"
    torch.save({"state_dict": bad, "state_dict_ema": bad}, path)
    repair = purify(path, tiny.data, method=Cut(), output=out, **options)
    assert repair.others == () and repair.result.left == ()
    written = torch.load(out, weights_only=True)
    assert written["state_dict"]["norm.weight"][7] == 0 and written["state_dict_ema"]["norm.weight"][7] == 0
    (found,) = many(path, tiny, options)
    assert (
        found.coverage
        and found.coverage.same == ("state_dict_ema",)
        and "state_dict_ema" in writer("text").render([found])
    )


def test_a_repair_lists_the_sets_that_it_skipped(tiny: Any, good: Any, bad: Any, options: dict[str, Any]) -> None:
    path, out = tiny.folder / "three.pth", tiny.folder / "out.pth"
    broken = copy.deepcopy(good) | {"head.weight": -good["head.weight"]}
    torch.save({"model": good, "ema": broken, "netG": {"up.weight": torch.ones(3, 4)}}, path)
    result = purify(path, tiny.data, method=Cut(), output=out, **options).result
    assert [one.partition(":")[0] for one in result.left] == ["netG", "ema"]
    assert writer("text").render([result]).startswith("PARTLY CHANGED, NOT CHECKED")
    assert "partly changed, not checked" in html_page([result])
    written = torch.load(out, weights_only=True)
    assert torch.equal(written["ema"]["head.weight"], broken["head.weight"])
    chosen = purify(path, tiny.data, method=Cut(), output=out, state_key="model", **options).result
    assert [one.partition(":")[0] for one in chosen.left] == ["ema", "netG"]


def test_weights_outside_of_any_set_are_left(tiny: Any, good: Any, bad: Any, options: dict[str, Any]) -> None:
    path, gate = tiny.folder / "gate.pth", {"gate.weight": torch.ones(3, 4)}
    for sets in ({"model": good, "ema": bad | gate}, {"model": good | gate, "ema": bad}):
        torch.save(sets, path)
        (left,) = purify(path, tiny.data, method=Cut(), **options).result.left
        assert left == "weights outside the recognised networks: gate.weight"


def test_a_file_without_a_repairable_set_is_an_error(tiny: Any, good: Any, options: dict[str, Any]) -> None:
    path, out = tiny.folder / "two.pth", tiny.folder / "out.pth"
    broken = copy.deepcopy(good) | {"head.weight": -good["head.weight"]}
    torch.save({"model": broken, "ema": broken | {"head.bias": torch.ones(3)}}, path)
    with pytest.raises(SanityError):
        purify(path, tiny.data, method=Cut(), output=out, **options)
    assert not out.exists()


def test_python_accepts_the_options_of_the_command_line(tiny: Any, good: Any, bad: Any) -> None:
    path = tiny.folder / "ema.pth"
    torch.save({"model": good, "ema": bad}, path)
    model = load(
        path, arch=tiny.arch, input_shape=(3, 8, 8), normalize="cifar10", state_key="ema", device="cpu", seed=1
    )
    assert model.normalization.mean[0] == 0.4914 and model.artifact and model.artifact.state_key == "ema"
    assert load(path, arch=tiny.arch, num_classes=3, normalize="0.5,0.25").normalization.std == (0.25,)
