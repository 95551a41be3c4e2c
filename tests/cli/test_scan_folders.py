"""``bdprune scan`` of folders with many kinds of files: each skipped file is reported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result as Ran

from bdprune.analysis import Case
from bdprune.methods import Detector
from bdprune.record import Evidence, Sign

Run = Callable[..., Ran]
ONNX = b"\x08\x07\x12\x07pytorch\x1a\x032.0" + bytes(range(64))


@pytest.fixture
def scan(run: Run, tiny: Any, model_args: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``bdprune scan`` on the tiny data, with a detector that flags models whose first bias is not zero."""

    @dataclass(frozen=True)
    class Marked(Detector):
        id: str = "x.marked"
        sign: Sign = "collapse"

        title = "a mark"

        def __call__(self, case: Case) -> Evidence:
            mark = float(case.model.network.get_parameter("head.bias")[0].detach())
            return self.evidence(mark, 0.5, target_label=0)

    monkeypatch.setattr(
        "bdprune.fleet.scans.chosen_detectors", lambda chosen, defaults: [Marked(), Marked("x.marked2", "trigger")]
    )
    return lambda *args: run("scan", *args, "--data", tiny.data, *model_args, "--stack", "1")


@pytest.fixture
def good(tiny: Any) -> dict[str, Any]:
    return dict(tiny.module.state_dict())


@pytest.fixture
def bad(good: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(good) | {"head.bias": torch.tensor([0.6, 0.0, 0.0])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def names(documents: list[dict[str, Any]]) -> list[str]:
    return [Path(one["artifact"]["path"]).name for one in documents if one["kind"] == "scan"]


def test_checkpoints_without_a_known_suffix_are_scanned(scan: Run, folder: Path, good: Any, bad: Any) -> None:
    torch.save(good, folder / "a.pth")
    for name in ("best_model", "b.checkpoint", "c.pth.bak", "d.weights"):
        torch.save(bad, folder / name)
    done = scan(folder, "-f", "json")
    assert done.exit_code == 1
    assert names(json.loads(done.stdout)) == ["a.pth", "b.checkpoint", "best_model", "c.pth.bak", "d.weights"]


def test_files_that_may_hold_weights_are_named_in_every_format_and_exit_with_5(
    scan: Run, folder: Path, good: Any, tmp_path: Path
) -> None:
    torch.save(good, folder / "a.pth")
    (folder / "e.onnx").write_bytes(ONNX)
    (folder / "README.md").write_text("# Models\n")
    page, lines = tmp_path / "r.html", tmp_path / "r.jsonl"
    done = scan(folder, "-f", "json", "-f", f"html={page}", "-f", f"jsonl={lines}")
    assert done.exit_code == 5
    result, coverage = json.loads(done.stdout)
    assert result["verdict"] == "clean" and coverage["kind"] == "coverage"
    assert (coverage["files"], coverage["scanned"]) == (3, 1)
    risky, text = coverage["passed_over"]
    assert risky["may_hold_weights"] and risky["paths"] == [str(folder / "e.onnx")] and "ONNX" in risky["reason"]
    assert not text["may_hold_weights"] and text["paths"] == [str(folder / "README.md")]
    assert "e.onnx" in page.read_text() and "README.md" in page.read_text()
    assert json.loads(lines.read_text().splitlines()[-1]) == coverage
    plain = scan(folder)
    assert plain.exit_code == 5 and "MAY HOLD WEIGHTS" in plain.stdout and "README.md" in plain.stdout
    streamed = scan(folder, "-f", "jsonl")
    assert json.loads(streamed.stdout.splitlines()[-1]) == coverage
    skipped = scan(folder, "--skip-unknown")
    assert skipped.exit_code == 0 and "e.onnx" in skipped.stdout


def test_files_of_a_trainer_are_named_without_a_failure(scan: Run, folder: Path, good: Any) -> None:
    torch.save(good, folder / "pytorch_model.bin")
    moments = {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(4, 4)}}
    torch.save({"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}, folder / "optimizer.pt")
    torch.save({"base_lrs": [0.1], "last_epoch": 5}, folder / "scheduler.pt")
    torch.save({"python": (3, (1, 2)), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text("{}")
    done = scan(folder, "-f", "json")
    result, coverage = json.loads(done.stdout)
    assert done.exit_code == 0 and result["verdict"] == "clean"
    reasons = {Path(path).name: one["reason"] for one in coverage["passed_over"] for path in one["paths"]}
    assert set(reasons) == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert "optimiser" in reasons["optimizer.pt"] and "random" in reasons["rng_state.pth"]
    alone = scan(folder / "optimizer.pt")
    assert alone.exit_code == 3 and "the state of an optimiser" in alone.stdout


def test_training_arguments_are_skipped_and_other_code_is_an_error(scan: Run, folder: Path, good: Any) -> None:
    torch.save(good, folder / "model.pth")
    arguments = b"\x80\x02cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrG?\xb9\x99\x99\x99\x99\x99\x9asb."
    (folder / "training_args.bin").write_bytes(arguments)
    done = scan(folder)
    assert done.exit_code == 0 and "argparse.Namespace" in done.stdout
    (folder / "evil.bin").write_bytes(arguments.replace(b"cargparse\nNamespace", b"cposix\nsystem"))
    done = scan(folder)
    assert done.exit_code == 2 and "os.system" in done.stdout and "1 error, 1 clean" in done.stdout


@pytest.mark.parametrize("more", [(), ("--timeout", "100")])
def test_a_bad_model_does_not_stop_the_others(
    run: Run, tiny: Any, folder: Path, good: Any, tmp_path: Path, model_args: list[str], more: tuple[str, ...]
) -> None:
    grey = dict(good) | {"conv.weight": good["conv.weight"].sum(1, keepdim=True)}
    for name, state in (("a.pth", good), ("b.pth", grey), ("c.pth", good)):
        torch.save(state, folder / name)
    page = tmp_path / "r.html"
    settings = [*model_args, "--detectors", "lipschitz", "-f", "json", "-f", f"html={page}", *more]
    done = run("scan", folder, "--data", tiny.data, *settings)
    first, second, third = json.loads(done.stdout)
    assert done.exit_code == 2 and second["verdict"] == "error" and second["error"]["hint"]
    assert first["detectors"] and third["detectors"] and "3 models" in page.read_text()


def test_several_sets_in_one_file_are_an_array(scan: Run, tmp_path: Path, good: Any, bad: Any) -> None:
    path = tmp_path / "ema.pth.tar"
    torch.save({"state_dict": good, "state_dict_ema": bad}, path)
    done = scan(path, "-f", "json")
    assert done.exit_code == 1
    assert [one["artifact"]["state_key"] for one in json.loads(done.stdout)] == ["state_dict", "state_dict_ema"]
    assert f"{path}#state_dict_ema" in scan(path).stdout
    torch.save(good, tmp_path / "other.pth")
    counted = [line.partition(" ")[0] for line in scan(path, tmp_path / "other.pth").stderr.splitlines()]
    assert counted == ["[1/2]", "[1/2]", "[2/2]"]
    chosen = scan(path, "--state-key", "state_dict", "-f", "json")
    assert chosen.exit_code == 0 and json.loads(chosen.stdout)["coverage"]["left_out"] == ["state_dict_ema: not chosen"]


def test_a_folder_without_checkpoints_is_an_error_that_lists_its_files(scan: Run, folder: Path) -> None:
    (folder / "README.md").write_text("# Models\n")
    done = scan(folder)
    assert done.exit_code == 3 and "Found 1 file: text (1)." in done.stderr
    (folder / "README.md").unlink()
    assert "Found no files." in scan(folder).stderr


def test_a_repair_that_leaves_a_set_out_exits_with_5(
    run: Run, tiny: Any, tmp_path: Path, good: Any, model_args: list[str]
) -> None:
    path, out = tmp_path / "gan.pth", tmp_path / "out.pth"
    torch.save({"netC": good, "netG": {"up.weight": torch.ones(3, 4)}}, path)
    settings = [*model_args, "--method", "suspiciousness"]
    done = run("purify", path, "--data", tiny.data, "-o", out, *settings)
    assert done.exit_code == 5 and "not repaired" in done.stdout and "netG: " in done.stdout
    torch.save({"model": good, "ema": dict(good)}, path)
    done = run("purify", path, "--data", tiny.data, "-o", out, *settings, "-f", "json")
    assert done.exit_code == 0
    assert [one["artifact"]["state_key"] for one in json.loads(done.stdout)] == ["model", "ema"]
