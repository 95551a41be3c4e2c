"""``bdprune`` on repositories of the Hugging Face Hub."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result as Ran
from safetensors.torch import save

from bdprune.hub import client
from bdprune.model import build

from ..hub_server import Hub, commit_of

Run = Callable[..., Ran]
START = f"hf:org/name@{commit_of(1)}/"
LIPSCHITZ = ("--detectors", "lipschitz", "--stack", "1")


@pytest.fixture(scope="module")
def weights() -> dict[str, bytes]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = build("resnet18_cifar", 3, width=4).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    return {"model.safetensors": save(state), "pytorch_model.bin": file.getvalue()}


@pytest.fixture
def filled(hub: Hub, weights: dict[str, bytes]) -> Hub:
    hub.add("org/name", weights | {"README.md": b"# x", "b/c.pth": weights["pytorch_model.bin"]})
    return hub


def documents(done: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_repository_is_scanned_with_coverage(run: Run, filled: Hub) -> None:
    done = run("scan", "hf:org/name@main", *LIPSCHITZ, "-f", "jsonl")
    *results, coverage = documents(done)
    assert [one["artifact"]["path"] for one in results] == [f"{START}b/c.pth", f"{START}model.safetensors"]
    assert coverage["kind"] == "coverage" and (coverage["files"], coverage["scanned"]) == (4, 2)
    paths = {path: one["may_hold_weights"] for one in coverage["passed_over"] for path in one["paths"]}
    assert paths == {f"{START}pytorch_model.bin": True, f"{START}README.md": False}
    assert done.exit_code == 5
    note = f"hf:org/name@main: 2 checkpoints at {commit_of(1)[:12]}; "
    assert done.stderr.startswith(note) and client.cache_folder() in done.stderr


def test_quiet_says_nothing_and_the_second_scan_downloads_nothing(run: Run, filled: Hub) -> None:
    assert run("scan", "hf:org/name", *LIPSCHITZ, "-q", "-f", "json").stderr == ""
    filled.requests.clear()
    assert "all in the cache" in run("scan", "hf:org/name", *LIPSCHITZ).stderr and filled.downloads() == []


def test_a_single_file_gives_a_single_result(run: Run, filled: Hub) -> None:
    done = run("scan", "hf:org/name/pytorch_model.bin", *LIPSCHITZ, "-f", "json")
    assert json.loads(done.stdout)["artifact"]["path"] == f"{START}pytorch_model.bin"
    assert isinstance(json.loads(run("scan", "hf:org/name", *LIPSCHITZ, "-f", "json").stdout), list)


def test_lists_hold_names_and_a_failure_does_not_stop_the_others(run: Run, filled: Hub, tmp_path: Path) -> None:
    local = tmp_path / "local.safetensors"
    local.write_bytes(filled.repositories["org/name"].commits[commit_of(1)]["model.safetensors"])
    (tmp_path / "list.txt").write_text(f"hf:org/none\nhf:../..\nhf:org/name/b/*\n{local}\n")
    done = run("scan", f"@{tmp_path / 'list.txt'}", *LIPSCHITZ, "-f", "jsonl")
    found = {one["artifact"]["path"]: one["verdict"] for one in documents(done)}
    good = {str(local): "inconclusive", f"{START}b/c.pth": "inconclusive"}
    assert found == {"hf:org/none": "error", "hf:../..": "error"} | good and done.exit_code == 2


def test_shards_take_each_file_once_on_any_commit(run: Run, filled: Hub) -> None:
    repository = filled.repositories["org/name"]
    found = []
    for part in range(1, 4):
        done = run("scan", "hf:org/name/**", "hf:org/none", "--shard", f"{part}/3", *LIPSCHITZ, "-f", "jsonl")
        found += [one["artifact"]["path"] for one in documents(done) if one["kind"] == "scan"]
        repository.commits[commit_of(part + 1)] = repository.commits[commit_of(1)]
        repository.branches["main"] = commit_of(part + 1)
    assert sorted(one.rpartition("/")[2] for one in found) == [
        "c.pth",
        "model.safetensors",
        "none",
        "pytorch_model.bin",
    ]


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("hf:../..", 4, "Invalid name"),
        ("hf:org/none", 2, "no repository"),
        ("hf:org/name@v9", 2, "no revision"),
        ("hf:org/name/no.bin", 2, "no checkpoint"),
        ("hf:org/text", 3, "No checkpoint"),
    ],
)
@pytest.mark.parametrize("command", [("scan", *LIPSCHITZ), ("score",), ("screen",)], ids=lambda one: one[0])
def test_a_bad_name_is_one_error(
    run: Run, filled: Hub, command: tuple[str, ...], name: str, code: int, word: str
) -> None:
    filled.add("org/text", {"README.md": b""})
    done = run(command[0], name, *command[1:])
    assert done.exit_code == code and word in done.stderr and len(done.stderr.splitlines()) == 2 and done.stdout == ""


def test_the_limit_is_an_option_of_all_commands(run: Run, filled: Hub, tmp_path: Path) -> None:
    for command in (("scan", *LIPSCHITZ), ("score",), ("screen",)):
        done = run(command[0], "hf:org/name", *command[1:], "--max-download", "10KB")
        assert done.exit_code == 4 and "limit of 9.77 KiB" in done.stderr, command
    done = run("purify", "hf:org/name", "--data", tmp_path, "-o", tmp_path / "out.pth", "--max-download", "1B")
    assert done.exit_code == 4 and "more than the limit of 1 bytes" in done.stderr


def test_a_screen_and_a_score_name_the_file(run: Run, filled: Hub) -> None:
    *screened, coverage = documents(run("screen", "hf:org/name", "-f", "jsonl"))
    assert [one["artifact"]["path"] for one in screened] == [f"{START}b/c.pth", f"{START}model.safetensors"]
    assert coverage["files"] == 4
    scored = json.loads(run("score", "hf:org/name/model.safetensors", "-f", "json").stdout)
    assert scored["artifact"]["path"] == f"{START}model.safetensors"


def test_a_local_file_with_such_a_name_is_given_with_a_dot(
    run: Run, weights: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf:org").mkdir()
    (tmp_path / "hf:org" / "name").write_bytes(weights["model.safetensors"])
    monkeypatch.chdir(tmp_path)
    for command in (("scan", *LIPSCHITZ), ("score",)):
        done = run(command[0], "./hf:org/name", *command[1:], "-f", "json")
        assert json.loads(done.stdout)["artifact"]["path"] == "hf:org/name"


def test_hostile_names_of_files_are_not_written_raw(run: Run, hub: Hub, weights: dict[str, bytes]) -> None:
    hub.add("org/name", {"\x1b[31mred.safetensors": weights["model.safetensors"], "\x1b[2J.onnx": b"1"})
    done = run("scan", "hf:org/name", *LIPSCHITZ)
    assert "\x1b" not in done.stdout + done.stderr and "red.safetensors" in done.stdout


@pytest.fixture
def tiny_args(hub: Hub, tiny: Any, model_args: list[str]) -> list[object]:
    """A model on the Hub with its data and options."""
    hub.add("org/tiny", {"model.pth": tiny.path.read_bytes()})
    return ["hf:org/tiny", "--data", tiny.data, *model_args]


def test_a_repair_of_a_model_on_the_hub_is_a_local_file(run: Run, tiny_args: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out.pth"
    done = run("purify", *tiny_args, "--method", "suspiciousness", "-o", output, "-f", "json")
    result = json.loads(done.stdout)
    assert result["artifact"]["path"] == f"hf:org/tiny@{commit_of(1)}/model.pth"
    assert result["output"]["path"] == str(output) and output.stat().st_size > 1000


def test_an_inspection_and_an_inversion_take_a_name(run: Run, tiny: Any, tiny_args: list[object]) -> None:
    inspected = run("inspect", *tiny_args, "--images", tiny.data, "-f", "json")
    inverted = run("invert", *tiny_args, "--label", "0", "--budget", "1", "-f", "json")
    for done in (inspected, inverted):
        assert json.loads(done.stdout)["artifact"]["path"] == f"hf:org/tiny@{commit_of(1)}/model.pth", done.stderr
