"""Triggers in files, and the files of triggers that a scan attaches."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.errors import ArtifactError, OutputError, UnsupportedError
from bdprune.fleet import scan
from bdprune.loops import Trigger
from bdprune.pipeline import load_trigger, save_trigger
from bdprune.record import Result

FINDER = """
from dataclasses import dataclass

import torch

from bdprune import Detector, Needs, Trigger, attach_triggers


@dataclass(frozen=True)
class Finder(Detector):
    id = "x.finder"
    title = "finds a fixed trigger"
    needs = Needs(images="none", minimum=0)

    def __call__(self, case):
        mask = torch.zeros(1, 8, 8)
        mask[0, 5:, 5:] = 1
        added = Trigger(None, torch.zeros(3, 8, 8), None, kind="additive")
        found = Trigger(mask, torch.full((3, 8, 8), 0.5), 2, (0,), 0.9, 20), added
        triggers, attachments = attach_triggers(case, *found)
        return self.evidence(1.0, 2.0, triggers=triggers, attachments=attachments, targets=(1, 2), sources=(0,))
"""


@pytest.fixture
def trigger() -> Trigger:
    mask = torch.zeros(1, 8, 8)
    mask[0, 5:, 5:] = 1
    return Trigger(mask, torch.rand(3, 8, 8), target=2, sources=(0,), flip_rate=0.9, images=20)


def test_a_trigger_is_written_and_read_back(trigger: Trigger, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "triggers"
    path = save_trigger(trigger, folder, torch.rand(3, 3, 8, 8))
    assert path == folder / "trigger-2-from-0.safetensors"
    pictures = {f"trigger-2-from-0-{name}.png" for name in ("mask", "pattern", "stamped", "difference")}
    assert {one.name for one in folder.iterdir()} == {path.name, *pictures}
    found = load_trigger(path)
    assert found.info == trigger.info and torch.equal(found.pattern, trigger.pattern)


def test_a_trigger_can_have_a_name_and_no_images(trigger: Trigger, tmp_path: Path) -> None:
    assert save_trigger(trigger, tmp_path, name="mine").name == "mine.safetensors"
    assert {one.name for one in tmp_path.iterdir()} == {"mine.safetensors", "mine-mask.png", "mine-pattern.png"}


def test_files_cannot_leave_the_folder(trigger: Trigger, tmp_path: Path) -> None:
    for name in ("../up", "a/b", "/up"):
        with pytest.raises(OutputError, match="cannot start the names"):
            save_trigger(trigger, tmp_path / "in", name=name)
    (tmp_path / "file").touch()
    for folder in ("", tmp_path / "file"):
        with pytest.raises(OutputError):
            save_trigger(trigger, folder)


def test_files_without_a_trigger_are_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path in (tmp_path / "missing", tmp_path, tiny.path, tmp_path / "text.safetensors"):
        with pytest.raises(ArtifactError, match=r"^Cannot load .* as a trigger: ") as caught:
            load_trigger(path)
        assert caught.value.hint


def test_weights_are_not_a_trigger(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="without a trigger"):
        load_trigger(tmp_path / "model.safetensors")


def test_a_very_large_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.truncate((1 << 28) + 1)  # sparse: it takes no space on the disk
    with pytest.raises(ArtifactError, match="it has 268435457 bytes"):
        load_trigger(tmp_path / "large.safetensors")


@pytest.mark.parametrize("options", [{}, {"timeout": 200}], ids=["inline", "process"])
def test_a_scan_keeps_triggers_with_their_pictures_and_files(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any]
) -> None:
    (tiny.folder / "finder.py").write_text(FINDER)
    monkeypatch.delitem(sys.modules, "finder", raising=False)
    finder = importlib.import_module("finder").Finder()
    settings = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [finder], **options}
    found = scan(tiny.path, tiny.data, attachments=tmp_path / "kept", **settings)
    evidence = found.detectors[0]
    patch, additive = evidence.triggers
    assert set(patch.pictures) == {"mask", "pattern", "stamped", "difference"} and "mask" not in additive.pictures
    assert (evidence.targets, evidence.sources) == ((1, 2), (0,))
    assert patch.file and patch.file == evidence.attachments[0].file
    assert load_trigger(tmp_path / "kept" / patch.file).info.target_label == 2
    assert load_trigger(tmp_path / "kept" / additive.file).kind == "additive"
    assert Result.from_json(found.to_json()) == found
    without = scan(tiny.path, tiny.data, **settings).detectors[0].triggers
    assert [one.file for one in without] == ["", ""] and without[0].pictures == patch.pictures
