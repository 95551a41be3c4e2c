"""``bdprune purify``: the repaired file, the record, and errors before any work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Ran

from bdprune.model.loading import load
from bdprune.record import PurifyResult

Run = Callable[..., Ran]


@pytest.fixture
def purify(run: Run, tiny: Any, model_args: list[str]) -> Run:
    """``bdprune purify`` of the tiny network by its quick method, with more arguments."""

    def call(*args: object, method: str = "suspiciousness", data: object = None) -> Ran:
        return run("purify", tiny.path, "--method", method, "--data", data or tiny.data, *model_args, *args)

    return call


def test_text_shows_accuracy_before_and_after_and_the_file(purify: Run, tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    digest = hashlib.sha256(tiny.path.read_bytes()).hexdigest()
    done = purify("-o", output)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"UNCHANGED  {tiny.path}\n") and str(output) in done.stdout
    assert load(output, arch=tiny.arch).num_classes == 3
    assert hashlib.sha256(tiny.path.read_bytes()).hexdigest() == digest


def test_json_and_html_of_one_run(purify: Run, tmp_path: Path) -> None:
    output, page = tmp_path / "out.pth", tmp_path / "r.html"
    done = purify("-o", output, "-f", "json", "-f", f"html={page}", "--mode", "weights", "--seed", "3")
    record = PurifyResult.from_json(done.stdout)
    assert record.output and record.output.path == str(output) and record.env.seed == 3
    assert record.params["mode"] == "weights"
    assert "It is not safer than before" in page.read_text()


@pytest.mark.parametrize(("outcome", "code"), [("unrepaired", 1), ("unverified", 5), ("repaired", 0), ("unchecked", 0)])
def test_the_exit_code_follows_the_outcome(
    purify: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    from bdprune.pipeline import repair_data
    from bdprune.record import RepairCheck, TriggerCheck

    one = TriggerCheck(
        name="patch to label 1", flips_before=0.9, flips_after=0.5, score_before=4.0, score_after=3.0, reactivated=0.6
    )
    checks = {
        "unrepaired": RepairCheck(triggers=(one,), left=("the patch to label 1 flips 50% of the images",)),
        "unverified": RepairCheck(),
        "repaired": RepairCheck(triggers=(one,)),
    }
    monkeypatch.setattr(repair_data, "signs_of", lambda *args: None)
    monkeypatch.setattr(repair_data, "check_repair", lambda *args: checks[outcome])
    page = tmp_path / "r.html"
    checked = () if outcome == "unchecked" else ("--check",)
    done = purify("-o", tmp_path / "o.pth", *checked, "-f", "text", "-f", f"html={page}")
    assert done.exit_code == code, done.output
    assert (tmp_path / "o.pth").exists()
    words = {
        "unrepaired": ("UNREPAIRED", "flips 90.0 % → 50.0 %", "Do not deploy it"),
        "repaired": ("UNCHANGED", "flips 90.0 % → 50.0 %"),
        "unverified": ("UNVERIFIED", "No sign of a backdoor was found"),
    }.get(outcome, ("UNCHANGED",))
    assert all(one in done.stdout for one in words), done.stdout
    assert ("Signs of a backdoor" in page.read_text()) == (outcome != "unchecked")


def test_auto_is_the_default_and_says_what_it_tried(run: Run, tiny: Any, model_args: list[str], tmp_path: Path) -> None:
    args = ("--data", tiny.data, *model_args, "-f", "json", "-o", tmp_path / "o.pth")
    done = run("purify", tiny.path, *args)
    record = PurifyResult.from_json(done.stdout)
    assert record.method == "bdprune.auto" and record.check is not None and record.attempts
    assert done.exit_code == {"repaired": 0, "unrepaired": 1, "unverified": 5}[record.outcome]


def test_rnp_takes_its_preset_and_accuracy_guard(purify: Run, tmp_path: Path) -> None:
    settings = ("--preset", "robust", "--max-acc-drop", "0.5", "--precision", "auto")
    done = purify("-o", tmp_path / "o.pth", *settings, "-f", "json", method="rnp")
    assert done.exit_code == 0, done.output
    params = json.loads(done.stdout)["params"]
    assert params["max_drop"] == 0.5 and params["precision"] == "auto"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Missing option '-o'"),
        (["-o", "no/such/folder/out.pth"], "cannot be written"),
        (["-o", "."], "is a folder"),
        (["-o", "out.pth", "--preset", "paper"], "bdprune.suspiciousness has no preset 'paper'"),
        (["-o", "out.pth", "--max-acc-drop", "2"], "2.0 is not in the range"),
        (["-o", "out.pth", "--mode", "melt"], "'melt' is not one of"),
        (["-o", "out.pth", "--format", "xml"], "no format 'xml'"),
        (["-o", "out.pth", "--data", "none"], "needs clean data"),
        (["-o", "out.pth", "--method", "magic"], "no purifier 'magic'"),
    ],
)
def test_usage_errors_are_exit_4_and_write_nothing(
    purify: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    done = purify(*args)
    assert done.exit_code == 4 and words in done.stderr and done.stdout == "", done.output
    assert sorted(os.listdir()) == before


def test_checkpoint_is_never_overwritten(purify: Run, tiny: Any) -> None:
    before = tiny.path.read_bytes()
    done = purify("-o", tiny.path)
    assert done.exit_code == 4 and f"{tiny.path} is read and would be overwritten" in done.stderr
    assert tiny.path.read_bytes() == before


def test_no_output_overwrites_a_file_that_is_read_or_written(purify: Run, tiny: Any, tmp_path: Path) -> None:
    link = tmp_path / "link.pth"
    link.symlink_to(tiny.path)
    new = tmp_path / "new.pth"
    before = {path: path.read_bytes() for path in (tiny.path, tiny.data) if path.is_file()}
    for args in (["-o", link], ["-o", new, "-f", f"html={tiny.path}"], ["-o", new, "-f", f"html={new}"]):
        done = purify(*args)
        assert done.exit_code == 4 and done.stderr.splitlines()[-1] == "  Write to another file.", done.output
    assert before == {path: path.read_bytes() for path in before} and not new.exists()


def test_a_model_with_low_clean_accuracy_exits_with_5(purify: Run, tmp_path: Path) -> None:
    done = purify("-o", tmp_path / "o.pth", "--normalize", "5,1")
    assert done.exit_code == 5 and "Clean accuracy is" in done.stderr and "--normalize" in done.stderr
    assert not (tmp_path / "o.pth").exists()


def test_damaged_and_unsupported_files_exit_with_2_and_3(run: Run, tiny: Any, tmp_path: Path) -> None:
    broken, picture = tmp_path / "broken.pth", tmp_path / "cat.png"
    broken.write_bytes(tiny.path.read_bytes()[:-200])
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    for path, code in ((broken, 2), (picture, 3), (tmp_path / "missing.pth", 4)):
        done = run("purify", path, "--data", tiny.data, "-o", tmp_path / "o.pth")
        assert done.exit_code == code and len(done.stderr.splitlines()) <= 2, done.output
        assert not (tmp_path / "o.pth").exists()


def scanned(run: Run, tiny: Any, model_args: list[str], *args: object) -> Path:
    """The JSON of a scan of the tiny network."""
    path = tiny.folder / "scan.json"
    run("scan", tiny.path, "--data", tiny.data, *model_args, "--detectors", "lipschitz", "-f", f"json={path}", *args)
    return Path(path)


def test_a_repair_starts_from_a_scan(run: Run, purify: Run, tiny: Any, model_args: list[str], tmp_path: Path) -> None:
    start = scanned(run, tiny, model_args)
    done = purify("-o", tmp_path / "o.pth", "--from", start, "-f", "json", method="rnp")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["params"]["unlearn_on"] == "all", "the preset scan"
    own = purify("-o", tmp_path / "o.pth", "--from", start, "--preset", "robust", "-f", "json", method="rnp")
    assert json.loads(own.stdout)["params"]["unlearn_on"] == "rest", "another preset is kept"
    plain = purify("-o", tmp_path / "o.pth", "--from", start, "-f", "json")
    assert plain.exit_code == 0, "a method without that preset takes its defaults"


def test_a_scan_of_another_model_or_other_images_is_an_error(
    run: Run, purify: Run, tiny: Any, model_args: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    images = scanned(run, tiny, model_args, "--per-class", "7")
    cases = [
        (tmp_path / "none.json", "Cannot read", 4),
        (broken, f"{broken} does not hold results of bdprune (schema 2): it has no field `kind`", 4),
        (images, "other clean images", 2),
    ]
    for start, words, code in cases:
        done = purify("-o", tmp_path / "o.pth", "--from", start)
        assert done.exit_code == code and words in done.stderr and done.stdout == "", done.output
        assert not (tmp_path / "o.pth").exists()
    same = purify("-o", tmp_path / "o.pth", "--from", images, "--per-class", "7")
    assert same.exit_code == 0, same.output


def test_the_scan_file_is_never_overwritten(
    run: Run, purify: Run, tiny: Any, model_args: list[str], tmp_path: Path
) -> None:
    start = scanned(run, tiny, model_args)
    before = start.read_bytes()
    for args in (["-o", start], ["-o", tmp_path / "o.pth", "-f", f"json={start}"]):
        done = purify(*args, "--from", start)
        assert done.exit_code == 4 and "is read and would be overwritten" in done.stderr
    assert start.read_bytes() == before


def test_attachments_of_a_repair_are_written_and_named(purify: Run, tmp_path: Path) -> None:
    folder = tmp_path / "attached"
    done = purify("-o", tmp_path / "o.pth", "-f", "json", "--attachments", folder)
    (attached,) = PurifyResult.from_json(done.stdout).attachments
    assert attached.name == "filter_scores" and [path.name for path in folder.iterdir()] == [attached.file]
    assert hashlib.sha256((folder / attached.file).read_bytes()).hexdigest() == attached.sha256


def test_compact_writes_a_description_that_no_other_output_may_overwrite(purify: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    output = tmp_path / "out.pth"
    done = purify("-o", output, "--mode", "compact", "-f", f"json={output}.arch.json")
    assert done.exit_code == 4 and not output.exists(), done.output
    Path(f"{output}.arch.json").mkdir()
    done = purify("-o", output, "--mode", "compact")
    assert done.exit_code == 4 and "arch.json is a folder" in done.output and not output.exists()
    Path(f"{output}.arch.json").rmdir()
    done = purify("-o", output, "--mode", "compact", "-f", "json")
    assert done.exit_code == 0, done.output
    record = PurifyResult.from_json(done.stdout)
    assert record.compact and record.compact.filters_removed == 0 and record.output
    assert record.output.description == "" and not Path(f"{output}.arch.json").exists()
