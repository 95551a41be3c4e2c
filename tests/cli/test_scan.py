"""``bdprune scan``: formats, exit codes, and every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import Result as Ran

from bdprune.analysis import Case
from bdprune.fleet import Scanner, StackOptions
from bdprune.methods import Detector
from bdprune.record import Evidence, Needs, Result, Sign

Run = Callable[..., Ran]


@pytest.fixture
def fake_score(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Replaces all detectors by one that reports a given score, with threshold 0.5 and label 2."""

    def tell(score: float) -> None:
        @dataclass(frozen=True)
        class Fake(Detector):
            id: str = "x.fake"
            sign: Sign = "collapse"

            title = "a fixed verdict"

            def __call__(self, case: Case) -> Evidence:
                print("a detector that prints")
                return self.evidence(score, 0.5, target_label=2)

        monkeypatch.setattr(
            "bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: [Fake(), Fake("x.fake2", "trigger")]
        )

    tell(0.1)
    return tell


@pytest.fixture
def scan(run: Run, fake_score: object, tiny: Any, model_args: list[str]) -> Run:
    """``bdprune scan`` of the tiny network on its data, with more arguments."""

    def call(*args: object, path: object = None, data: object = None) -> Ran:
        return run("scan", path or tiny.path, "--data", data or tiny.data, *model_args, *args)

    return call


def test_text_shows_the_verdict_first_and_stdout_has_nothing_else(scan: Run, tiny: Any) -> None:
    done = scan()
    assert done.exit_code == 0
    assert done.stdout.startswith(f"CLEAN  {tiny.path}\n")
    assert "a detector that prints" not in done.stdout and "a detector that prints" in done.stderr


def test_json_of_one_file_is_one_strict_result(scan: Run) -> None:
    done = scan("--format", "json", "--seed", "7", "--per-class", "20")
    found = Result.from_json(done.stdout)
    assert (found.verdict, found.env.seed) == ("clean", 7)
    assert found.data and found.data.count == 60


def test_a_backdoor_exits_with_1_and_is_named(scan: Run, fake_score: Callable[[float], None]) -> None:
    fake_score(0.9)
    done = scan("--format", "json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["target_label"] == 2
    assert scan("--fail-on", "never").exit_code == 0
    assert scan("--exit-zero").exit_code == 0


def test_a_folder_gives_an_array_and_a_report_of_all_models(scan: Run, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("b.pth", "a.pth"):
        (folder / name).write_bytes(tiny.path.read_bytes())
    (folder / "c.pth").write_bytes(b"nonsense")
    page = tmp_path / "r.html"
    done = scan("--format", "json", "-f", f"html={page}", path=folder)
    assert done.exit_code == 5
    assert [Path(one["artifact"]["path"]).name for one in json.loads(done.stdout)] == ["a.pth", "b.pth", "c.pth"]
    assert "3 models: 1 error, 2 clean" in page.read_text()
    assert "[2/3] clean" in done.stderr and "[3/3] error" in done.stderr
    quiet = scan("-q", path=folder)
    assert quiet.stderr.count("[") == 0


def test_text_of_several_models_shows_the_flagged_ones_and_a_table(scan: Run, tiny: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nonsense")
    done = scan(bad)
    assert done.stdout.startswith(f"ERROR  {bad}") and "2 models: 1 error, 1 clean" in done.stdout
    assert f"CLEAN  {tiny.path}" not in done.stdout


def test_json_lines_have_one_line_per_model(scan: Run, tiny: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(tiny.path.read_bytes())
    done = scan(other, "--format", "jsonl", "-o", "-")
    assert [Result.from_json(line).verdict for line in done.stdout.splitlines()] == ["clean", "clean"]
    target = tmp_path / "r.jsonl"
    scan(other, "-o", target)
    assert len(target.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("size", "count"), [("7", 7), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("3KiB", 3 << 10), ("5B", 5)]
)
def test_stack_and_its_memory_reach_the_scan(
    run: Run, tiny: Any, monkeypatch: pytest.MonkeyPatch, size: str, count: int
) -> None:
    asked: dict[str, Any] = {}

    class Recorder(Scanner):
        def __init__(self, data: Any, **rest: Any) -> None:
            asked.update(rest)
            super().__init__()

        def scan_many(self, models: Any, progress: Any = None) -> Iterator[Result]:
            return iter(())

    monkeypatch.setattr("bdprune.fleet.Scanner", Recorder)
    run("scan", tiny.path, "--stack", "8", "--stack-memory", size, "--exit-zero")
    assert asked["stack"] == StackOptions(8, count)
    run("scan", tiny.path, "--exit-zero")
    assert asked["stack"] == StackOptions(1), "a trial is useless for one model"
    (tiny.folder / "more.pth").write_bytes(tiny.path.read_bytes())
    run("scan", tiny.folder, "--exit-zero")
    assert asked["stack"] == StackOptions("auto")


def test_models_in_a_stack_keep_their_names(run: Run, tiny: Any, model_args: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a.pth", "b.pth"):
        (folder / name).write_bytes(tiny.path.read_bytes())
    done = run("scan", folder, *model_args, "--detectors", "lipschitz", "--stack", "2", "--format", "jsonl")
    found = [Result.from_json(line) for line in done.stdout.splitlines()]
    assert [Path(one.name).name for one in found] == ["a.pth", "b.pth"]
    assert [one.detectors[0].details["stack"] for one in found] == [2, 2]
    assert [line.rpartition("/")[2] for line in done.stderr.splitlines()] == ["a.pth", "b.pth"]


def test_glob_and_one_file_in_a_folder_stay_arrays(scan: Run, tiny: Any) -> None:
    assert isinstance(json.loads(scan("-f", "json", path=f"{tiny.folder}/*.pth").stdout), list)
    assert isinstance(json.loads(scan("-f", "json", path=tiny.folder).stdout), list)


def test_without_data_it_is_inconclusive_and_exit_5(run: Run, tiny: Any, model_args: list[str]) -> None:
    for data in ([], ["--data", "none"]):
        done = run("scan", tiny.path, *model_args, *data)
        assert done.exit_code == 5 and done.stdout.startswith("INCONCLUSIVE")


def test_a_file_name_that_is_not_utf8_is_reported_in_every_format(scan: Run, tiny: Any, tmp_path: Path) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/m\xff.pth")
    os.link(tiny.path, path)
    page = tmp_path / "r.html"
    done = scan("-f", f"html={page}", path=path)
    assert done.exit_code == 0 and done.stdout.splitlines()[0].endswith("m?.pth")
    assert "m?.pth" in page.read_text()
    found = scan("-f", "json", path=path)
    assert Result.from_json(found.stdout).name.endswith("m?.pth")


def test_a_wrong_normalisation_exits_with_5_and_names_the_one_that_fits(scan: Run) -> None:
    done = scan("--normalize", "5,1", "--format", "json")
    found = Result.from_json(done.stdout)
    assert done.exit_code == 5 and found.verdict == "inconclusive"
    assert found.data and found.data.sanity and found.data.sanity.hint


def test_detectors_are_chosen_by_name(run: Run, tiny: Any, model_args: list[str]) -> None:
    done = run("scan", tiny.path, "--data", tiny.data, *model_args, "--detectors", "lipschitz", "-f", "json")
    assert [one["detector"] for one in json.loads(done.stdout)["detectors"]] == ["bdprune.lipschitz"]


def test_names_of_detectors_may_have_spaces_and_repeats(run: Run, tiny: Any, model_args: list[str]) -> None:
    done = run("scan", tiny.path, *model_args, "--detectors", "lipschitz, lipschitz", "--format", "json")
    assert [one["detector"] for one in json.loads(done.stdout)["detectors"]] == ["bdprune.lipschitz"]


def test_a_report_never_overwrites_an_input(scan: Run, tiny: Any, tmp_path: Path) -> None:
    before = tiny.path.read_bytes()
    done = scan("-f", f"html={tiny.path}")
    assert done.exit_code == 4 and "is read and would be overwritten" in done.stderr and done.stdout == ""
    assert tiny.path.read_bytes() == before


def test_only_unsupported_files_exit_with_3(scan: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    done = scan(path=empty)
    assert done.exit_code == 3 and done.stdout == "" and "No checkpoint in" in done.stderr
    done = scan("--exit-zero", path=empty)
    assert done.exit_code == 0 and done.stdout == "0 models: nothing scanned\n"
    done = scan("--exit-zero", path=f"{empty}/*.pth")
    assert done.exit_code == 4 and done.stdout == "" and "No file matches" in done.stderr
    done = scan(path=picture)
    assert done.exit_code == 3 and "PNG" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--format", "xml"], "no format 'xml'"),
        (["--normalize", "1,2,3"], "'1,2,3' has 3 numbers, an odd count."),
        (["--device", "warp"], "Unknown device"),
        (["--detectors", "magic"], "no detector"),
        (["--input-shape", "32"], "Invalid input shape"),
        (["--per-class", "0"], "--per-class must be 1 or more, not 0."),
        (["--timeout", "-1"], "timeout of -1 seconds"),
        (["--timeout", "nan"], "timeout of nan seconds"),
        (["--timeout", "inf"], "timeout of inf seconds"),
        (["--stack", "0"], "Invalid stack size '0'"),
        (["--stack", "1.5"], "Invalid stack size '1.5'"),
        (["--stack", "2", "--timeout", "0"], "timeout of 0 seconds"),
        (["--executor", "cloud"], "'cloud' is not one of"),
        (["--executor", "inline", "--workers", "2"], "inline takes no limits"),
        (["--executor", "processes", "--address", "auto"], "Only the executor ray takes an address"),
        (["--workers", "0"], "Invalid number of workers '0'"),
        (["--workers", "5000"], "Invalid number of workers 5000"),
        (["--memory-limit", "0"], "Invalid memory limit of 0 bytes"),
        (["--memory-limit", "4 elephants"], "Invalid size '4 elephants'"),
        (["--stack-memory", "much"], "Invalid size 'much'"),
        (["--stack-memory", "0"], "at least 1 byte of memory, not 0"),
        (["--data", "x" * 300], "no clean data at"),
        (["-f", "html=" + "x" * 300], "File name too long"),
        (["-f", "html=same", "-f", "json=same"], "same is written already"),
        (["--data", "nowhere"], "no clean data at 'nowhere'"),
        (["--fail-on", "always"], "'always' is not one of"),
        (["--no-such-option"], "No such option"),
        (["-o", "no/such/folder/r.json"], "cannot be written"),
        (["missing.pth"], "no file or folder 'missing.pth'"),
    ],
)
def test_usage_errors_are_exit_4_in_two_lines(run: Run, tiny: Any, args: list[str], words: str) -> None:
    done = run("scan", tiny.path, "--exit-zero", *args)
    assert done.exit_code == 4, done.output
    assert done.stdout == "" and words in done.stderr
    assert done.stderr.startswith("bdprune: ") and len(done.stderr.splitlines()) <= 2


def test_missing_path_is_exit_4(run: Run) -> None:
    done = run("scan")
    assert done.exit_code == 4 and "Missing argument 'PATH...'" in done.stderr


class Payload:
    """Unpickling it would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


BAD_FILES = ("truncated", "payload", "nan", "integers", "shapes", "huge", "bomb")


def _bad_files(folder: Path, good: Path, state: dict[str, torch.Tensor]) -> dict[str, Path]:
    paths = {name: folder / f"{name}.pth" for name in BAD_FILES}
    paths["truncated"].write_bytes(good.read_bytes()[:-200])
    torch.save({"state_dict": Payload(folder / "executed")}, paths["payload"])
    torch.save({**state, "head.bias": torch.full((3,), float("nan"))}, paths["nan"])
    torch.save({name: value.to(torch.int32) for name, value in state.items()}, paths["integers"])
    torch.save({**state, "head.weight": torch.zeros(3, 9)}, paths["shapes"])
    header = json.dumps({"w": {"dtype": "F32", "shape": [2_684_354_560], "data_offsets": [0, 10_737_418_240]}}).encode()
    paths["huge"].write_bytes(len(header).to_bytes(8, "little") + header + bytes(900))
    with zipfile.ZipFile(paths["bomb"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    return paths


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_checkpoint_is_one_message_and_exit_2(
    run: Run, tiny: Any, model_args: list[str], tmp_path: Path, name: str
) -> None:
    path = _bad_files(tmp_path, tiny.path, tiny.module.state_dict())[name]
    before = sorted(os.listdir(tmp_path))
    done = run("scan", path, "--data", tiny.data, *model_args, "--format", "json")
    assert done.exit_code == 2, done.output
    found = Result.from_json(done.stdout)
    assert found.verdict == "error" and found.error and found.error.hint
    assert not found.error.message.startswith("Unexpected") and "\n" not in found.error.message
    assert "Traceback" not in done.output
    assert sorted(os.listdir(tmp_path)) == before and not (tmp_path / "executed").exists()


def _bad_data(folder: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    arrays = {
        "none": (colour[:0], labels[:0]),
        "one": (colour[:1], labels[:1]),
        "one_class": (colour, np.zeros(6, np.int64)),
        "grey": (colour[..., :1], labels),
        "out_of_range": (colour, labels + 5),
    }
    paths = {}
    for name, (images, classes) in arrays.items():
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], images=images, labels=classes)
    paths["empty_folder"] = folder / "empty_folder"
    paths["empty_folder"].mkdir()
    return paths


@pytest.mark.parametrize("name", ["none", "one", "one_class", "grey", "out_of_range", "empty_folder"])
def test_bad_data_is_one_message_and_exit_2(scan: Run, tmp_path: Path, name: str) -> None:
    done = scan("--format", "json", data=_bad_data(tmp_path)[name])
    assert done.exit_code == 2, done.output
    found = Result.from_json(done.stdout)
    assert found.error and found.error.type == "DataError" and found.error.hint
    assert "Traceback" not in done.output


def test_a_bug_in_a_detector_is_reported_without_a_traceback(scan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Buggy(Detector):
        id = "x.buggy"
        title = "a bug"
        needs = Needs(images="none", minimum=0)

        def __call__(self, case: Case) -> Evidence:
            raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: [Buggy()])
    done = scan()
    assert done.exit_code == 5 and "Unexpected ZeroDivisionError" in done.stdout
    assert "Traceback" not in done.output


def test_the_option_offers_all_precisions() -> None:
    from bdprune.cli.scan import scan as command
    from bdprune.runtime.precision import DEFAULT, PRECISIONS

    (option,) = (one for one in command.params if one.name == "precision")
    assert isinstance(option, click.Option) and isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == PRECISIONS
    assert f"[default: {DEFAULT}]" in (option.help or "")


def test_a_stack_may_have_a_time_limit(run: Run, tiny: Any, model_args: list[str]) -> None:
    (tiny.folder / "more.pth").write_bytes(tiny.path.read_bytes())
    args = ["--detectors", "lipschitz", "--stack", "2", "--timeout", "200", "-f", "json"]
    found = json.loads(run("scan", tiny.path, tiny.folder / "more.pth", *model_args, *args).stdout)
    assert [one["detectors"][0]["details"]["stack"] for one in found] == [2, 2]


def test_attachments_are_written_and_named(run: Run, tiny: Any, model_args: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "attached"
    args = [*model_args, "--detectors", "lipschitz", "-f", "json"]
    (plain,) = Result.from_json(run("scan", tiny.path, *args).stdout).detectors[0].attachments
    assert plain.file == ""
    (attached,) = (
        Result.from_json(run("scan", tiny.path, *args, "--attachments", folder).stdout).detectors[0].attachments
    )
    assert [path.name for path in folder.iterdir()] == [attached.file]
    assert attached.file.startswith("filter_scores-") and attached.file.endswith(".safetensors")
    assert hashlib.sha256((folder / attached.file).read_bytes()).hexdigest() == attached.sha256 == plain.sha256


def test_attachments_that_cannot_be_written_are_exit_4(run: Run, tiny: Any, model_args: list[str]) -> None:
    done = run("scan", tiny.path, *model_args, "--detectors", "lipschitz", "--attachments", tiny.path)
    assert done.exit_code == 4 and done.stdout == "" and len(done.stderr.splitlines()) <= 3, done.output


def test_the_budget_reaches_the_scan_and_its_result(scan: Run, fake_score: Callable[[float], None]) -> None:
    for budget, recorded in (("fast", "fast"), ("full", "full"), ("90s", "90 s"), ("5m", "300 s")):
        assert json.loads(scan("--budget", budget, "-f", "json").stdout)["budget"] == recorded
    assert json.loads(scan("-f", "json").stdout)["budget"] == "default"
    for wrong in ("slow", "-3", "0"):
        done = scan("--budget", wrong)
        assert done.exit_code == 4 and "Invalid budget" in done.stderr
