"""Scans of repositories on the Hub from Python."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import bdprune
from bdprune.errors import HubError
from bdprune.fleet.executors.stack import StackOptions
from bdprune.fleet.scans import Scanner
from bdprune.model import build
from bdprune.store import Store

from ..hub_server import Hub, commit_of

START = f"hf:org/name@{commit_of(1)}/"


@pytest.fixture(scope="module")
def weights() -> tuple[bytes, bytes]:
    """The same network as safetensors and as a pickle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = build("resnet18_cifar", 3, width=4).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    return save(state), file.getvalue()


@pytest.fixture
def filled(hub: Hub, weights: tuple[bytes, bytes]) -> Hub:
    hub.add("org/name", {"model.safetensors": weights[0], "pytorch_model.bin": weights[1], "other/b.pth": weights[1]})
    return hub


@pytest.mark.parametrize("more", [{"stack": 1}, {"stack": StackOptions(2)}, {"timeout": 60.0, "stack": 1}])
def test_a_name_gives_the_results_of_all_its_files(filled: Hub, more: dict[str, object]) -> None:
    found = list(bdprune.scan_many(["hf:org/name"], detectors="lipschitz", **more))  # type: ignore[arg-type]
    assert [one.name for one in found] == [f"{START}model.safetensors", f"{START}other/b.pth"]
    assert all(one.error is None and one.artifact and one.artifact.sha256 for one in found)
    for one in found:
        (finding,) = [seen for seen in one.findings if seen.rule_id == "BD001"]
        assert f"{START}pytorch_model.bin (not downloaded: a pickle next to model.safetensors" in finding.message


def test_a_file_that_is_named_has_no_finding(filled: Hub) -> None:
    result = bdprune.scan("hf:org/name@main/pytorch_model.bin", detectors="lipschitz")
    assert result.name == f"{START}pytorch_model.bin" and not [one for one in result.findings if "BD001" in one.rule_id]


def test_a_repository_that_fails_does_not_stop_the_others(filled: Hub) -> None:
    filled.add("org/gated", {"model.safetensors": b"1"}, gated=True)
    names = ["hf:org/none", "hf:../..", "hf:org/gated", "hf:org/name/other/*"]
    *failed, good = bdprune.scan_many(names, detectors="lipschitz")
    assert [one.verdict for one in failed] == ["error"] * 3 and good.error is None
    assert [one.error and one.error.type for one in failed] == ["HubError", "OptionError", "HubError"]
    assert [one.name for one in failed] == [*names[:2], f"hf:org/gated@{commit_of(1)}/model.safetensors"]
    assert all(one.error and one.error.hint for one in failed)


def test_the_limit_of_a_scan_holds(filled: Hub) -> None:
    result = bdprune.scan("hf:org/name", detectors="lipschitz", max_download=1000)
    assert result.error and "more than the limit of 1000 bytes" in result.error.message and filled.downloads() == []


def test_a_store_knows_the_content_and_the_name(filled: Hub, tmp_path: Path) -> None:
    db = tmp_path / "scans.db"
    first = list(bdprune.scan_many(["hf:org/name"], detectors="lipschitz", store=db))
    repository = filled.repositories["org/name"]
    repository.commits = {commit_of(2): repository.commits[commit_of(1)]}  # another commit with the same files
    repository.branches = {"main": commit_of(2)}
    with Scanner(detectors="lipschitz", store=db) as scanner:
        second = list(scanner.scan_many(["hf:org/name"]))
        assert scanner.taken == 2
    assert [one.detectors for one in second] == [one.detectors for one in first]
    assert [one.findings for one in second] != [one.findings for one in first]  # they name the commit
    with Store(db) as store:
        assert store.names() == sorted(one.name for one in [*first, *second])


def test_a_repair_and_other_functions_take_a_name(filled: Hub) -> None:
    name = "hf:org/name/pytorch_model.bin"
    assert bdprune.load(name).artifact.path == Path(f"{START}pytorch_model.bin")  # type: ignore[union-attr]
    scored = bdprune.score(name)
    assert scored.artifact and scored.artifact.path == f"{START}pytorch_model.bin"
    screened = bdprune.screen(name)
    assert screened.name == f"{START}pytorch_model.bin" and screened.error is None
    with pytest.raises(HubError, match="no repository org/none"):
        bdprune.load("hf:org/none")
    missing = bdprune.screen("hf:org/none")
    assert missing.outcome == "error" and missing.name == "hf:org/none"


def test_errors_of_a_file_call_it_by_its_name(hub: Hub) -> None:
    hub.add("org/name", {"model.safetensors": b"12345"})
    result = bdprune.scan("hf:org/name", detectors="lipschitz")
    assert result.error and result.error.message.startswith(f"Cannot load {START}model.safetensors: ")
    screened = bdprune.screen("hf:org/name").error
    assert screened and f" {START}model.safetensors: " in screened.message
