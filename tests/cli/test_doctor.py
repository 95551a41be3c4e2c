"""``bdprune doctor`` and ``bdprune schema``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result as Ran

from bdprune.cli import doctor
from bdprune.ops import build_info
from bdprune.record import schema

Run = Callable[..., Ran]


def states(done: Ran) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_json_lists_what_runs(run: Run) -> None:
    done = run("doctor", "--format", "json")
    assert done.exit_code == 0
    found = states(done)
    assert found["torch"]["state"] == found["self-test"]["state"] == found["packages"]["state"] == "ok"
    assert torch.__version__ in found["torch"]["found"]
    assert json.loads(done.stdout)["build"]["backend"] == build_info()["backend"]


def test_text_has_one_line_per_check_and_the_fix_below(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = build_info() | {"backend": "reference", "requested": "auto", "reason": "bdprune._C was not built"}
    monkeypatch.setattr("bdprune.ops.build_info", lambda: reference)
    done = run("doctor")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if "CPU ops" in line)
    assert lines[at].split()[0] == "note" and "bdprune._C was not built" in lines[at]
    assert "pip install -e . --no-build-isolation" in lines[at + 1]


def test_the_compiler_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, words in (("12.2.0", "stable ABI 2.11, GCC 12.2.0"), ("Clang 16.0.6", "2.11, Clang 16.0.6")):
        built = {"backend": "native", "built_for_torch": "2.13.0", "stable_abi": "2.11", "cpu_features": "avx2"}
        native = build_info() | built | {"compiler": version}
        monkeypatch.setattr("bdprune.ops.build_info", lambda native=native: native)
        assert words in states(run("doctor", "--format", "json"))["CPU ops"]["found"]


def test_a_forced_reference_is_shown_with_how_to_undo_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = build_info() | {"backend": "reference", "requested": "reference", "reason": "BDPRUNE_BACKEND=reference"}
    monkeypatch.setattr("bdprune.ops.build_info", lambda: forced)
    assert states(run("doctor", "--format", "json"))["CPU ops"]["hint"] == "Unset BDPRUNE_BACKEND."


def test_cuda_that_runs_is_ok(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdprune.ops.build_info", lambda: build_info() | {"cuda": True})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    found = states(run("doctor", "--format", "json"))
    assert found["GPU"]["found"] == "NVIDIA H200" and found["CUDA ops"]["state"] == "ok"


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        (lambda weights: [torch.tensor([3.0]), torch.tensor([2.5])], "not [3, 2]"),
        (lambda weights: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_op_with_wrong_results_is_broken_and_exits_with_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, norms: Callable[[Sequence[Any]], Any], words: str
) -> None:
    monkeypatch.setattr("bdprune.ops.filter_spectral_norms", norms)
    done = run("doctor", "--format", "json")
    assert done.exit_code == 2
    assert states(done)["self-test"]["state"] == "broken" and words in states(done)["self-test"]["found"]


def test_the_results_of_tuning_are_shown(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    assert "no trial has run yet" in states(run("doctor", "--paths", "--format", "json"))["tuned"]["found"]
    asked = {"question": "stack", "device": "cpu", "shape": "3 x small", "reason": ""}
    conv = {**asked, "question": "conv", "shape": "x [2]", "seconds": {"kernel": 0.001, "library": 0.0025}}
    kept = {
        "1": {**asked, "winner": "loop", "seconds": {"stack": 0.5, "loop": 0.25}},
        "2": {**conv, "winner": "kernel"},
    }
    (tmp_path / "tuned.json").write_text(json.dumps(kept))
    found = states(run("doctor", "--paths", "--format", "json"))
    assert found["tuned stack"]["found"] == "loop: 3 x small on cpu: stack 500.00 ms, loop 250.00 ms"
    assert found["tuned conv"]["found"] == "kernel: x [2] on cpu: kernel 1.00 ms, library 2.50 ms"
    assert not any("tuned" in name for name in states(run("doctor", "--format", "json")))


def test_missing_packages_are_named_with_the_command_that_installs_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = doctor._version
    gone = ("rich", "pyarrow")
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in gone else known(name))
    done = run("doctor", "--format", "json")
    assert done.exit_code == 2
    assert states(done)["packages"]["hint"] == "pip install rich"
    assert states(done)["parquet"]["state"] == "note" and states(done)["parquet"]["hint"] == "pip install pyarrow"
    assert states(done)["images"]["state"] == "ok"


@pytest.mark.parametrize("kind", ["scan", "purify", "score", "invert"])
def test_schema_is_printed(run: Run, kind: str) -> None:
    done = run("schema", kind)
    assert done.exit_code == 0 and json.loads(done.stdout) == json.loads(json.dumps(schema(kind)))
    if kind == "scan":
        assert run("schema").stdout == done.stdout
