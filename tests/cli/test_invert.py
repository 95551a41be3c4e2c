"""``bdprune invert``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result as Ran

from bdprune.record import InvertResult

from ..pipeline.test_inversion import Engine

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine()
    monkeypatch.setattr("bdprune.pipeline.inversion.run_engine", found)
    return found


@pytest.fixture
def args(tiny: Any, model_args: list[str]) -> list[Any]:
    return ["invert", tiny.path, *model_args, "--data", tiny.data]


def test_a_table_is_printed_and_files_are_written(run: Run, args: list[Any], tmp_path: Path) -> None:
    folder, page = tmp_path / "triggers", tmp_path / "r.html"
    done = run(*args, "--label", "1", "-o", folder, "-f", f"html={page}")
    assert done.exit_code == 0 and done.stdout.startswith("TRIGGERS  ")
    assert "patch  label 1   other labels         1     1  1x1 pixels at (0, 0)  50 % of 60" in done.stdout
    assert {one.name for one in folder.iterdir()} == {
        "trigger-1.safetensors",
        *(f"trigger-1-{name}.png" for name in ("mask", "pattern", "stamped", "difference")),
    }
    assert page.read_text().count("data:image/png;base64,") == 4


def test_json_is_a_strict_result(run: Run, args: list[Any]) -> None:
    done = run(*args, "--label", "2", "--label", "any", "--source", "0", "--kind", "all", "-f", "json")
    found = InvertResult.from_json(done.stdout)
    assert [(one.kind, one.target_label, one.source_labels) for one in found.triggers] == [
        ("patch", 2, (0,)),
        ("patch", None, (0,)),
        ("additive", 2, (0,)),
        ("additive", None, (0,)),
        ("warp", 2, (0,)),
        ("warp", None, (0,)),
    ]
    assert found.folder == ""


def test_all_labels_are_the_default(run: Run, args: list[Any], engine: Engine) -> None:
    assert run(*args, "-q").exit_code == 0
    assert [one.target for one in engine.hypotheses] == [0, 1, 2, None]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--label", "3"], 4, "There is no label '3'."),
        (["--label", "-1"], 4, "--label must be 0 or more, not -1."),
        (["--label", "ship"], 4, "'ship' is not a valid integer"),
        (["--source", "9"], 4, "There is no label '9'."),
        (["--kind", "blend"], 4, "'blend' is not one of"),
        (["--label", "1", "--source", "1"], 4, "Label 1 is both the target and the only source."),
        (["--budget", "0"], 4, "Invalid budget 0 seconds."),
        (["--data", "none"], 4, "needs clean data"),
        (["-f", "jsonl=x", "-f", "sarif"], 4, "no format 'sarif'"),
    ],
)
def test_errors_have_their_exit_codes(run: Run, args: list[Any], more: list[str], code: int, message: str) -> None:
    done = run(*args, *more)
    assert done.exit_code == code and message in done.stderr and done.stdout == ""


def test_no_input_is_overwritten(run: Run, args: list[Any], tiny: Any, tmp_path: Path) -> None:
    done = run(*args, "-o", tiny.data)
    assert done.exit_code == 4 and "would be overwritten" in done.stderr
    (tmp_path / "file").touch()
    assert run(*args, "-o", tmp_path / "file").exit_code == 4
    assert run("invert", tmp_path / "missing.pth", "--data", tiny.data).exit_code == 4
