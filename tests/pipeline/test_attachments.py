"""Attachments: bytes that come with a result; if a folder is given, each is written to a file named by its digest."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as read_tensors

import bdprune
from bdprune.analysis import Case
from bdprune.errors import OutputError
from bdprune.fleet import scan, scan_many
from bdprune.methods import Detector
from bdprune.pipeline import purify
from bdprune.pipeline.attachments import save_attachments
from bdprune.record import Attachment, Evidence, Result

PICTURES = """
from dataclasses import dataclass

import torch

from bdprune.analysis import Lipschitz
from bdprune.methods import Detector
from bdprune.record import Needs


@dataclass(frozen=True)
class Pictures(Detector):
    name: str = "trigger"

    id = "x.pictures"
    title = "a picture and a tensor"
    needs = Needs(images="none", minimum=0)

    def steps(self, case):
        scores = yield Lipschitz()
        bias = list(case.model.network.parameters())[-1]
        picture = case.attach_bytes(self.name, b"a picture of " + repr(bias.tolist()).encode(), "image/png")
        return self.evidence(1.0, 2.0, attachments=(picture, case.attach("bias", {"bias": bias})))
"""


@pytest.fixture
def pictures(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A detector, importable in any process, that attaches a picture and a tensor of its model."""
    (tiny.folder / "pictures.py").write_text(PICTURES)
    monkeypatch.delitem(sys.modules, "pictures", raising=False)
    return importlib.import_module("pictures").Pictures


@pytest.fixture
def files(tiny: Any) -> list[Path]:
    found = []
    for index in range(3):
        found.append(tiny.folder / f"model{index}.pth")
        torch.save(tiny.module.state_dict() | {"head.bias": torch.tensor([index / 10, 0.0, 0.0])}, found[-1])
    return found


def check(results: list[Result], folder: Path) -> None:
    """Every result names its own files, and the files match their digests."""
    named = set()
    for index, result in enumerate(results):
        picture, tensor = result.detectors[0].attachments
        for one, suffix in ((picture, ".png"), (tensor, ".safetensors")):
            content = (folder / one.file).read_bytes()
            assert one.file == f"{one.name}-{one.sha256[:16]}{suffix}"
            assert hashlib.sha256(content).hexdigest() == one.sha256 and len(content) == one.bytes
            named.add(one.file)
        bias = read_tensors((folder / tensor.file).read_bytes())["bias"]
        assert bias.tolist() == pytest.approx([index / 10, 0, 0])
        assert (folder / picture.file).read_bytes() == b"a picture of " + repr(bias.tolist()).encode()
        assert Result.from_json(result.to_json()) == result
    assert {path.name for path in folder.iterdir()} == named and len(named) == 2 * len(results)


@pytest.mark.parametrize(
    "options",
    [{"stack": 1}, {"stack": 3}, {"stack": 1, "timeout": 200}, {"stack": 3, "timeout": 200}],
    ids=["alone", "stack", "process", "stack in a process"],
)
def test_every_executor_returns_the_attachments(
    tiny: Any, files: list[Path], pictures: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "attached"
    settings = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [pictures()]}
    results = list(scan_many(files, tiny.data, attachments=folder, **settings, **options))
    assert [one.detectors[0].details.get("stack", 1) for one in results] == [options["stack"]] * 3
    check(results, folder)


def test_without_a_folder_attachments_are_named_and_not_written(tiny: Any, pictures: Any, files: list[Path]) -> None:
    before = sorted(tiny.folder.rglob("*"))
    found = scan(files[0], arch=tiny.arch, input_shape=tiny.input_shape, detectors=[pictures()])
    assert [one.file for one in found.detectors[0].attachments] == ["", ""]
    assert [path for path in sorted(tiny.folder.rglob("*")) if path not in before] == []


def test_equal_contents_are_one_file(tiny: Any, pictures: Any, files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "attached"
    settings = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [pictures()]}
    results = list(scan_many([files[0], files[0]], attachments=folder, stack=1, **settings))
    assert results[0].detectors[0].attachments == results[1].detectors[0].attachments
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("name", ["../../up", "/tmp/up", "a/b"])
def test_a_detector_cannot_leave_the_folder(
    tiny: Any, pictures: Any, files: list[Path], tmp_path: Path, name: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = scan(
        files[0],
        arch=tiny.arch,
        input_shape=tiny.input_shape,
        detectors=[pictures(name)],
        attachments=tmp_path / "attached",
    )
    assert found.verdict == "inconclusive" and "invalid name of an attachment" in found.detectors[0].error
    assert set(sorted(tmp_path.rglob("*"))) - set(before) <= {tmp_path / "attached"}


class Forger(Detector):
    """A plug-in that makes its record by hand."""

    id = "x.forger"
    title = "forges"

    def __init__(self, make: Callable[[Case], Attachment]) -> None:
        self.make = make

    @property
    def params(self) -> dict[str, Any]:
        return {}

    def __call__(self, case: Case) -> Evidence:
        return self.evidence(1.0, 2.0, attachments=(self.make(case),))


def forged(case: Case, **changes: Any) -> Attachment:
    content = b"content"
    digest = hashlib.sha256(content).hexdigest()
    case.attachments[digest] = content
    return Attachment(**{"name": "a", "media_type": "image/png", "sha256": digest, "bytes": len(content), **changes})


@pytest.mark.parametrize("changes", [{"name": "../../up"}, {"name": "/up"}, {"name": ""}, {"sha256": "../up"}])
def test_a_handmade_record_cannot_leave_the_folder(tiny: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "deep" / "attached"
    detector = Forger(lambda case: forged(case, **changes))
    found = scan(
        tiny.path, tiny.data, arch=tiny.arch, input_shape=tiny.input_shape, detectors=[detector], attachments=folder
    )
    assert found.verdict == "inconclusive" and "of an attachment" in found.detectors[0].error
    assert not list(tmp_path.rglob("*up*"))


def test_an_attachment_without_content_makes_its_model_inconclusive(tiny: Any, tmp_path: Path) -> None:
    detector = Forger(lambda case: forged(case, sha256="0" * 64))
    options = {"arch": tiny.arch, "input_shape": tiny.input_shape, "detectors": [detector]}
    found = list(scan_many([tiny.path, tiny.path], tiny.data, attachments=tmp_path / "attached", stack=1, **options))
    assert [one.verdict for one in found] == ["inconclusive", "inconclusive"]


def one(media_type: str, content: bytes = b"content") -> tuple[Attachment, Mapping[str, bytes]]:
    digest = hashlib.sha256(content).hexdigest()
    return Attachment(name="a", media_type=media_type, sha256=digest, bytes=len(content)), {digest: content}


def test_another_media_type_gets_the_suffix_bin(tmp_path: Path) -> None:
    record, contents = one("text/html")
    (saved,) = save_attachments([record], contents, tmp_path)
    assert saved.file.endswith(".bin") and (tmp_path / saved.file).read_bytes() == b"content"
    assert save_attachments([record], contents, None) == (record,)


def test_an_impossible_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    record, contents = one("image/png")
    with pytest.raises(OutputError):
        save_attachments([record], contents, tmp_path / "file")


def test_a_repair_writes_its_attachments(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "attached"
    repair = purify(
        tiny.path,
        tiny.data,
        method="suspiciousness",
        arch=tiny.arch,
        input_shape=tiny.input_shape,
        attachments=folder,
    )
    (attached,) = repair.result.attachments
    scores = read_tensors((folder / attached.file).read_bytes())
    assert torch.equal(scores["conv"], repair.repair.masks["conv"])
    (named,) = bdprune.purify(
        tiny.path, tiny.data, method="suspiciousness", arch=tiny.arch, input_shape=tiny.input_shape
    ).result.attachments
    assert (named.sha256, named.file) == (attached.sha256, "")
