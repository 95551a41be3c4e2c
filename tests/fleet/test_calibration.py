"""A calibration from the scans of a zoo: which networks count, where a scan ends, resumed rows, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.data import CleanData, RawImages
from bdprune.errors import DataError, OutputError
from bdprune.fleet import (
    ReferenceScan,
    ReferenceZoo,
    as_scanned,
    calibrate,
    calibration_page,
    references,
    scan_references,
)
from bdprune.fleet.references import level_detectors, read_rows
from bdprune.pipeline.describe import env
from bdprune.record import Evidence, Result
from bdprune.registry import chosen_detectors
from bdprune.zoo import read_manifest
from bdprune.zoo.store import Truth, write_truth

HEAD = """
name = "tiny"
dataset = "tiny"
arch = "resnet18_cifar"
width = 4
num_classes = 3
schedules = [{epochs = 1}]
"""
CLEAN, BAD, WEAK = ("clean-1", "clean-2", "clean-3"), ("bad-1", "bad-2", "sig-1"), "bad-weak"


def entry(name: str) -> str:
    kind = "" if name in CLEAN or name == "waits" else "sig" if name == "sig-1" else "badnets"
    attack = f'attack = {{kind = "{kind}", target = 1}}\n' if kind else ""
    return f'[[models]]\nname = "{name}"\nseed = 1\n{attack}'


@pytest.fixture
def zoo(tmp_path: Path) -> ReferenceZoo:
    """Three clean networks, three backdoored ones, one whose attack failed, and one that is not made."""
    names = (*CLEAN, *BAD, WEAK)
    path = tmp_path / "tiny.toml"
    path.write_text(HEAD + "".join(map(entry, (*names, "waits"))))
    folder = tmp_path / "tiny"
    folder.mkdir()
    truths = {}
    for name in names:
        (folder / f"{name}.safetensors").write_bytes(name.encode())
        success = None if name in CLEAN else 0.2 if name == WEAK else 0.9
        truths[name] = Truth(name, None if name in CLEAN else 1, 0.9, success, None, 1.0)
    write_truth(folder, truths)
    return ReferenceZoo(read_manifest(path), tmp_path)


def evidence(name: str) -> tuple[Evidence, ...]:
    """Of all detectors; two kinds name label 1 for a backdoored network."""
    scores = {"inversion": 3.0, "unlearning": 0.9} if name not in CLEAN else {"inversion": 1.0, "unlearning": 0.1}
    scores["moved_filters"] = 0.2 + 0.1 * len(name)
    limits = {"inversion": 1.7, "unlearning": 0.5}
    return tuple(
        Evidence(
            detector=f"bdprune.{one}",
            score=(score := scores.get(one, 0.2)),
            threshold=(limit := limits.get(one, 1.0)),
            flagged=score > limit,
            target_label=1 if score > limit else None,
        )
        for one in level_detectors("default")
    )


def scanned(name: str, **changes: Any) -> ReferenceScan:
    fields = {"network": name, "sha256": "0", "budget": "default", "seed": 0, "arch": "resnet18_cifar"}
    fields |= {"verdict": "clean", "accuracy": 0.9, "evidence": evidence(name)}
    return ReferenceScan(**{**fields, **changes})


def test_a_scan_ends_once_its_verdict_is_sure() -> None:
    detectors = chosen_detectors(level_detectors("default"), {})
    short, judgement = as_scanned(evidence("bad-1"), detectors)
    assert judgement.verdict == "backdoored" and judgement.target_label == 1
    assert short[-1].detector == "bdprune.unlearning" and len(short) < len(evidence("bad-1"))
    every, judgement = as_scanned(evidence("clean-1"), detectors)
    assert every == evidence("clean-1") and judgement.verdict == "clean"


def test_networks_without_a_usable_scan_or_attack_are_left_out_and_named(zoo: ReferenceZoo) -> None:
    scans = [scanned(name) for name in (*CLEAN, *BAD, WEAK)]
    scans[0] = scanned("clean-1", verdict="inconclusive", reason="It labels 20 % correctly.")
    found = calibrate(zoo, scans)
    assert found.left == {
        "clean-1": "It labels 20 % correctly.",
        "bad-weak": "Its trigger works on only 20 % of the test images.",
    }
    assert found.not_run == ("waits",)
    assert [one.name for one in found.known] == [*CLEAN[1:], *BAD]
    assert [one.family for one in found.known] == ["", "", "badnets", "badnets", "sig"]
    assert (found.table.name, found.table.networks, found.table.backdoored) == ("tiny", 5, 3)
    assert found.table.probability(evidence("bad-1"), True) > 0.5 > found.table.probability(evidence("clean-2"), False)


def test_an_attack_that_failed_is_named_although_its_weights_are_gone(zoo: ReferenceZoo) -> None:
    zoo.path(zoo.manifest.entry(WEAK)).unlink()
    found = calibrate(zoo, [scanned(name) for name in (*CLEAN, *BAD)])
    assert found.left == {"bad-weak": "Its trigger works on only 20 % of the test images."}
    assert found.not_run == ("waits",)


def test_the_page_shows_measures_verdicts_and_what_was_not_run(zoo: ReferenceZoo) -> None:
    page = calibration_page(calibrate(zoo, [scanned(name) for name in (*CLEAN, *BAD, WEAK)]))
    assert "Fitted to 6 networks, 3 of them backdoored, of 1 architectures." in page
    assert "Verdicts on the 3 backdoored networks: 3 backdoored." in page
    assert "3 of 3 have the right label" in page
    assert "| badnets | 2 | 2 | 0 | 0 | 0 | 2 |" in page and "| none | 3 | 0 | 0 | 3 | 0 | – |" in page
    assert "`bad-weak` was left out" in page and "are missing: `waits`" in page
    assert "| AUROC | 1.000" in page


def test_a_calibration_needs_networks_of_both_kinds(zoo: ReferenceZoo) -> None:
    with pytest.raises(DataError, match="There are 3 clean ones and 2 backdoored ones of 1 attacks"):
        calibrate(zoo, [scanned(name) for name in (*CLEAN, "bad-1", "bad-2")])


def test_evidence_of_an_unknown_detector_is_refused(zoo: ReferenceZoo) -> None:
    odd = Evidence(detector="x.gone", score=1.0, threshold=0.5, flagged=True)
    scans = [scanned(name) for name in (*CLEAN[1:], *BAD)]
    with pytest.raises(DataError, match="evidence of x"):
        calibrate(zoo, [scanned("clean-1", evidence=(odd,)), *scans])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """Replaces scans; the list grows by each."""
    seen = []

    def read_dataset(root: Path, name: str, part: str) -> RawImages:
        assert part == "train"
        return RawImages(torch.zeros(90, 3, 8, 8, dtype=torch.uint8), torch.arange(90) % 3)

    def scan(path: Path, data: CleanData, *, detectors: Any, progress: Any, **more: Any) -> Result:
        seen.append((path.stem, len(data), tuple(detectors)))
        progress("loading")
        result: Any = dict(started="", seconds=1.0, artifact=None, model=None, data=None, risk=0.1, target_label=None)
        return Result(**result, env=env(torch.device("cpu"), 0), verdict="clean", detectors=evidence(path.stem))

    monkeypatch.setattr(references, "read_dataset", read_dataset)
    monkeypatch.setattr(references, "scan", scan)
    return seen


def test_scans_are_kept_and_not_repeated(zoo: ReferenceZoo, calls: list[Any], tmp_path: Path) -> None:
    rows, stages = tmp_path / "rows.jsonl", []
    entries = zoo.made()
    assert [one.name for one in entries] == [*CLEAN, *BAD, WEAK]

    def progress(one: Any, stage: str) -> None:
        stages.append((one.name, stage))

    first = list(scan_references(zoo, entries[:2], rows, progress=progress))
    assert stages == [("clean-1", "loading"), ("clean-2", "loading")]
    assert list(scan_references(zoo, entries[:3], rows))[:2] == first
    assert [name for name, *_ in calls] == ["clean-1", "clean-2", "clean-3"]
    assert calls[0][1:] == (90, tuple(level_detectors("default"))), "at most 500 / 3 images of each label"
    assert len(read_rows(rows)) == 3
    zoo.path(entries[0]).write_bytes(b"trained again")
    list(scan_references(zoo, entries[:1], rows))
    list(scan_references(zoo, entries[:1], rows, seed=1))
    assert len(calls) == 5, "another file or seed is another scan"


def test_without_a_file_every_network_is_scanned(zoo: ReferenceZoo, calls: list[Any]) -> None:
    found = list(scan_references(zoo, zoo.made(), None))
    assert len(found) == len(calls) == 7


def test_damaged_rows_are_refused(zoo: ReferenceZoo, calls: list[Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"network": "x"')
    assert len(list(scan_references(zoo, zoo.made()[:1], rows))) == len(read_rows(rows)) == 1, "half a line is dropped"
    calls.clear()
    rows.write_text('{"network": "x"}\n')
    with pytest.raises(DataError, match="Cannot read the scans"):
        list(scan_references(zoo, zoo.made(), rows))
    with pytest.raises(OutputError):
        list(scan_references(zoo, zoo.made(), tmp_path / "missing" / "rows.jsonl"))
    assert not calls
