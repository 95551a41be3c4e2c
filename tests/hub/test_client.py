"""The requests to the Hub, and its errors in plain words, on a server of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bdprune.errors import HubError, OptionError
from bdprune.hub import client
from bdprune.hub.names import HubName

from ..hub_server import Hub, commit_of

COMMIT = commit_of(1)
FILE = HubName("org/name", COMMIT, "model.bin")


def ignored(got: int) -> None:
    pass


def test_the_files_of_a_branch_are_listed_with_sizes_and_a_commit(hub: Hub) -> None:
    hub.add("org/name", {"model.bin": b"12345", "sub/a.md": b""})
    tree = client.tree_of(HubName("org/name", "main"))
    assert tree == client.Tree(COMMIT, {"model.bin": 5, "sub/a.md": 0})
    assert client.tree_of(HubName("org/name")) == client.tree_of(HubName("org/name", COMMIT)) == tree


def test_a_file_is_downloaded_once_with_reports(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, seen = os.urandom(300_000), list[int]()
    hub.add("org/name", {"model.bin": content})
    assert not client.is_cached(FILE)
    path = client.download(FILE, seen.append)
    assert path.read_bytes() == content and path.is_relative_to(tmp_path / "cache") and client.is_cached(FILE)
    assert client.download(FILE, seen.append) == path and hub.downloads() == ["model.bin"]
    assert seen and all(0 < one <= len(content) for one in seen)
    assert capfd.readouterr() == ("", "")  # no bars


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        (HubName("org/none"), "no repository org/none, or it is private", "HF_TOKEN"),
        (HubName("org/private"), "no repository org/private, or it is private", "HF_TOKEN"),
        (HubName("org/name", "nothing"), "org/name has no revision 'nothing'", "branch"),
    ],
)
def test_what_cannot_be_listed_is_one_error(hub: Hub, name: HubName, message: str, hint: str) -> None:
    hub.add("org/name", {})
    hub.add("org/private", {}, token="secret")
    with pytest.raises(HubError, match=message) as caught:
        client.tree_of(name)
    assert hint in caught.value.hint


def test_the_token_of_the_environment_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/private", {"model.bin": b"1"}, token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert client.tree_of(HubName("org/private")).sizes == {"model.bin": 1}
    assert client.download(HubName("org/private", COMMIT, "model.bin"), ignored).read_bytes() == b"1"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(HubError, match="private"):
        client.tree_of(HubName("org/private"))


def test_a_gated_repository_says_where_to_ask(hub: Hub) -> None:
    hub.add("org/name", {"model.bin": b"1"}, gated=True)
    with pytest.raises(HubError, match="restricted") as caught:
        client.download(FILE, ignored)
    assert "Ask for access" in caught.value.hint


def test_a_file_that_is_not_there_is_one_error(hub: Hub) -> None:
    hub.add("org/name", {})
    with pytest.raises(HubError, match=r"no model\.bin of org/name"):
        client.download(FILE, ignored)


def test_a_download_that_breaks_off_is_not_taken_for_the_file(hub: Hub) -> None:
    repository = hub.add("org/name", {"model.bin": b"1" * 100_000}, cut={"model.bin"})
    with pytest.raises(HubError, match="broke off") as caught:
        client.download(FILE, ignored)
    assert "again" in caught.value.hint and not client.is_cached(FILE)
    repository.cut.clear()
    assert client.download(FILE, ignored).read_bytes() == b"1" * 100_000


@pytest.mark.parametrize(("status", "word"), [(401, "denied"), (403, "denied"), (429, "limits"), (500, "failed")])
def test_other_failures_say_what_the_hub_answered(hub: Hub, status: int, word: str) -> None:
    hub.add("org/name", {})
    hub.status = status
    with pytest.raises(HubError, match=word):
        client.tree_of(HubName("org/name"))


def test_without_a_network_the_address_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 cannot be reached") as caught:
        client.tree_of(HubName("org/name"))
    assert "HF_ENDPOINT" in caught.value.hint


def test_offline_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        client.tree_of(HubName("org/name"))


def test_a_hub_without_commits_is_refused(hub: Hub) -> None:
    hub.add("org/name", {}).branches["main"] = "../../x"
    hub.repositories["org/name"].commits["../../x"] = {}
    with pytest.raises(HubError, match="names no commit"):
        client.tree_of(HubName("org/name"))


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"id": "x", "sha": null}'])
def test_an_answer_that_is_no_list_is_one_error(hub: Hub, answer: bytes) -> None:
    hub.add("org/name", {}, answer=answer)
    with pytest.raises(HubError, match=r"gives no list|names no commit") as caught:
        client.tree_of(HubName("org/name"))
    assert "HF_ENDPOINT" in caught.value.hint


def test_names_that_are_no_text_get_question_marks(hub: Hub) -> None:
    answer = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": "a\ud800.bin", "size": 1}]}
    hub.add("org/name", {}, answer=json.dumps(answer).encode())
    assert client.tree_of(HubName("org/name")).sizes == {"a?.bin": 1}


@pytest.mark.parametrize("size", [None, -1, "1", 1.5])
def test_sizes_must_be_known(hub: Hub, size: Any) -> None:
    hub.add("org/name", {"a.bin": b""}, lies={"a.bin": size})
    with pytest.raises(HubError, match="does not name the sizes"):
        client.tree_of(HubName("org/name"))


def test_a_hub_that_does_not_answer_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(client, "_PATIENCE", 0.2)
        with pytest.raises(HubError, match="gives no list"):
            client.tree_of(HubName("org/name"))


@pytest.mark.parametrize("version", [None, "0.36.0"])
def test_without_the_extra_the_install_is_named(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    if version is None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    else:
        monkeypatch.setattr(huggingface_hub, "__version__", version)
    with pytest.raises(OptionError) as caught:
        client.tree_of(HubName("org/name"))
    assert "pip install 'bdprune[hub]'" in caught.value.hint


def test_the_variables_of_the_hub_hold(hub: Hub, tmp_path: Path) -> None:
    """In a program of its own, because ``huggingface_hub`` reads them when it is imported."""
    hub.add("org/name", {"model.bin": b"1"})
    code = (
        "from bdprune.hub import listed\n"
        "found = listed('hf:org/name')\n"
        "print(found.cache, found.files[0].fetch(), sep='\\n')"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": ""}
    environment.pop("HF_HUB_CACHE")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    folder, file = done.stdout.splitlines()
    assert folder == str(tmp_path / "home" / "hub") and file.startswith(folder) and Path(file).read_bytes() == b"1"
