"""Repairs that reuse a scan: they unlearn once, and refuse another model or other images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import bdprune
from bdprune.analysis import MEMO, SCAN_UNLEARNING
from bdprune.data import RawImages
from bdprune.detectors.unlearning import UnlearningDetector
from bdprune.errors import DataError, OptionError
from bdprune.model import build
from bdprune.record import Result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.pth``, a narrow ResNet for red, green and blue, another one, and clean images."""
    from bdprune.loops import Schedule, fit

    folder = tmp_path_factory.mktemp("start_from")
    labels = torch.arange(120) % 3
    noise = torch.rand(120, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    noise[torch.arange(120), labels] += 0.4
    images = (noise * 255).to(torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build("resnet18_cifar", 3, width=4)
    schedule = Schedule(epochs=8, batch_size=30, peak_lr=0.05, padding=0, bf16=False)
    fit(network, RawImages(images, labels), schedule, seed=0)
    torch.save(network.state_dict(), folder / "model.pth")
    torch.save({"model": network.state_dict(), "epoch": 1}, folder / "same.pth")
    with torch.no_grad():
        network.linear.bias[0] += 0.001
    torch.save(network.state_dict(), folder / "other.pth")
    np.savez(folder / "clean.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return folder


@pytest.fixture
def unlearned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Every call of the loop that unlearns: the number of images, and the settings."""
    from bdprune.analysis import unlearned

    calls: list[tuple[int, Any]] = []
    real = unlearned.unlearn

    def counted(model: Any, data: Any, settings: Any, *more: Any) -> Any:
        calls.append((len(data), settings))
        return real(model, data, settings, *more)

    monkeypatch.setattr(unlearned, "unlearn", counted)
    return calls


OPTIONS: dict[str, Any] = {"input_shape": (3, 16, 16), "seed": 3}


def scan(files: Path, **options: Any) -> Result:
    """A scan by unlearning only; its verdict does not matter here."""
    detector = UnlearningDetector(seed=OPTIONS["seed"], max_runs=1)
    return bdprune.scan(files / "model.pth", files / "clean.npz", detectors=[detector], **(OPTIONS | options))


def repair(files: Path, model: str = "model.pth", **options: Any) -> bdprune.Repaired:
    settings = {"recovery": bdprune.RecoverSettings(epochs=1), "fine_tuning": None}
    chosen = {"method": "rnp", "settings": settings} | OPTIONS | options
    return bdprune.purify(files / model, files / "clean.npz", **chosen)


def test_the_scan_unlearns_and_the_repair_does_not(files: Path, unlearned: list[Any]) -> None:
    start = scan(files)
    assert start.error is None and unlearned == [(120, SCAN_UNLEARNING)]
    done = repair(files, start_from=start)
    assert unlearned == [(120, SCAN_UNLEARNING)], "the repair reuses the scan"
    assert done.result.params["unlearn_on"] == "all"
    assert done.result.phases["unlearn"] is not None and done.result.phases["unlearn"] < 1.0


def test_the_repair_equals_one_that_unlearns_again(files: Path, unlearned: list[Any], tmp_path: Path) -> None:
    """In another process, or after the memo was cleared, it does the same once more."""
    start = scan(files)
    near = repair(files, start_from=start)
    MEMO.clear()
    path = tmp_path / "scan.json"
    path.write_text(start.to_json())
    far = repair(files, start_from=path)
    assert len(unlearned) == 2
    assert near.repair.pruned == far.repair.pruned
    assert all(torch.equal(near.repair.masks[name], far.repair.masks[name]) for name in near.repair.masks)


def test_without_a_scan_a_repair_unlearns_on_the_images_that_are_not_held_out(
    files: Path, unlearned: list[Any]
) -> None:
    scan(files)
    repair(files)
    assert [count for count, _ in unlearned] == [120, 84]


def test_a_requested_preset_is_used(files: Path, unlearned: list[Any]) -> None:
    start = scan(files)
    done = repair(files, start_from=start, preset="robust")
    assert done.result.params["unlearn_on"] == "rest" and len(unlearned) == 2


def test_other_weights_are_an_error(files: Path) -> None:
    start = scan(files)
    with pytest.raises(DataError, match="is of another model") as caught:
        repair(files, "other.pth", start_from=start)
    assert str(files / "model.pth") in str(caught.value)


def test_equal_weights_in_another_file_are_accepted(files: Path, unlearned: list[Any]) -> None:
    start = scan(files)
    repair(files, "same.pth", start_from=start)
    assert len(unlearned) == 1


def test_every_set_of_weights_finds_its_own_scan(files: Path, tmp_path: Path, unlearned: list[Any]) -> None:
    sets = {"model": torch.load(files / "model.pth"), "ema": torch.load(files / "other.pth")}
    torch.save(sets, tmp_path / "two.pth")
    detector = UnlearningDetector(seed=OPTIONS["seed"], max_runs=1)
    results = list(bdprune.scan_many([tmp_path / "two.pth"], files / "clean.npz", detectors=[detector], **OPTIONS))
    (tmp_path / "scans.json").write_text("".join(f"{one.to_json(indent=None)}\n" for one in results))
    settings = {"recovery": bdprune.RecoverSettings(epochs=1), "fine_tuning": None}
    start = tmp_path / "scans.json"
    options = {"start_from": start, "method": "rnp", "settings": settings} | OPTIONS
    done = bdprune.purify(tmp_path / "two.pth", files / "clean.npz", **options)
    assert len(done.others) == 1 and done.result.left == () and len(unlearned) == 2


def test_a_purifier_object_takes_no_settings(files: Path) -> None:
    with pytest.raises(OptionError, match="takes no settings"):
        bdprune.purify(files / "model.pth", files / "clean.npz", method=bdprune.purifier("rnp"), mode="weights")


@pytest.mark.parametrize("options", [{"per_class": 5}, {"seed": 4}])
def test_other_images_are_an_error(files: Path, options: dict[str, Any]) -> None:
    start = scan(files, per_class=35)
    with pytest.raises(DataError, match="used other clean images"):
        repair(files, start_from=start, **{"per_class": 35, **options})


def test_equal_images_in_another_order_are_accepted(files: Path, unlearned: list[Any]) -> None:
    start = scan(files)
    clean = dict(np.load(files / "clean.npz"))
    order = np.random.default_rng(0).permutation(len(clean["labels"]))
    images = torch.from_numpy(clean["images"][order]).permute(0, 3, 1, 2)
    data = bdprune.CleanData(images, torch.from_numpy(clean["labels"][order]))
    settings = {"recovery": bdprune.RecoverSettings(epochs=1), "fine_tuning": None}
    bdprune.purify(files / "model.pth", data, start_from=start, method="rnp", settings=settings, **OPTIONS)
    assert len(unlearned) == 1


def test_a_scan_without_images_is_an_error(files: Path) -> None:
    start = bdprune.scan(files / "model.pth", detectors=["lipschitz"], **OPTIONS)
    with pytest.raises(DataError, match="used other clean images"):
        repair(files, start_from=start)


def test_other_results_than_a_scan_are_errors(files: Path, tmp_path: Path) -> None:
    for content in ("{}", "[]", repair(files).result.to_json()):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(OptionError, match=r"wrong\.json (does not hold results of|holds no result of a scan)"):
            repair(files, start_from=tmp_path / "wrong.json")
    with pytest.raises(OptionError, match="Cannot read"):
        repair(files, start_from=tmp_path / "none.json")


def test_a_module_in_memory_is_compared_by_its_images_only(files: Path) -> None:
    model = bdprune.load(files / "model.pth", **OPTIONS)
    start = bdprune.scan(model.network, files / "clean.npz", detectors=["lipschitz"], **OPTIONS)
    assert start.artifact is None
    settings = {"recovery": bdprune.RecoverSettings(epochs=1), "fine_tuning": None}
    done = bdprune.purify(
        model.network, files / "clean.npz", start_from=start, method="rnp", settings=settings, **OPTIONS
    )
    assert done.result.params["unlearn_on"] == "all"
    changed = msgspec.structs.replace(start, data=None)
    with pytest.raises(DataError, match="used other clean images"):
        bdprune.purify(
            model.network, files / "clean.npz", start_from=changed, method="rnp", settings=settings, **OPTIONS
        )


@pytest.mark.parametrize("next_to_it", [False, True])
def test_another_process_reuses_the_kept_unlearning_of_a_scan(
    files: Path, tmp_path: Path, unlearned: list[Any], next_to_it: bool
) -> None:
    start = scan(files, attachments=tmp_path)
    near = repair(files, start_from=start)
    (tmp_path / "result.json").write_text(start.to_json())
    MEMO.clear()
    far = repair(files, start_from=tmp_path / "result.json", **({} if next_to_it else {"attachments": tmp_path}))
    assert len(unlearned) == 1, "it does not unlearn again"
    assert near.repair.target_label == far.repair.target_label and near.repair.pruned == far.repair.pruned
    assert all(torch.equal(near.repair.masks[name], far.repair.masks[name]) for name in near.repair.masks)


def test_a_damaged_kept_file_is_an_error(files: Path, tmp_path: Path) -> None:
    start = scan(files, attachments=tmp_path)
    (tmp_path / "result.json").write_text(start.to_json())
    (kept,) = tmp_path.glob("unlearned-*")
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    MEMO.clear()
    with pytest.raises(DataError, match="has changed since the scan wrote it"):
        repair(files, start_from=tmp_path / "result.json")


def test_large_files_are_kept_only_on_request(files: Path) -> None:
    assert [one.name for one in scan(files).detectors[0].attachments] == []
