"""``bdprune score``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result as Ran

from bdprune.record import ScoreResult

Run = Callable[..., Ran]


def test_text_lists_layers_and_the_worst_filters(run: Run, tiny: Any, model_args: list[str]) -> None:
    assert "--top must be 0 or more, not -1." in run("score", tiny.path, "--top", "-1").stderr
    done = run("score", tiny.path, *model_args, "--top", "2")
    assert done.exit_code == 0 and done.stdout.startswith("lipschitz scores  ")
    assert done.stdout.count("conv[") == 2


def test_json_is_a_strict_result(run: Run, tiny: Any, model_args: list[str], tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    data = ["--data", tiny.data, "--per-class", "4"]
    done = run("score", tiny.path, *model_args, *data, "--method", "suspiciousness", "-f", "json", "-f", f"html={page}")
    found = ScoreResult.from_json(done.stdout)
    assert found.method == "suspiciousness" and found.data and found.data.count == 12
    assert "suspiciousness scores" in page.read_text()


def test_missing_data_and_files_have_their_exit_codes(
    run: Run, tiny: Any, model_args: list[str], tmp_path: Path
) -> None:
    done = run("score", tiny.path, *model_args, "--method", "suspiciousness")
    assert done.exit_code == 4 and "needs clean data" in done.stderr
    assert run("score", tmp_path / "missing.pth").exit_code == 4
