"""A file on the Hub stands for its local copy."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from bdprune.errors import HubError, OptionError
from bdprune.hub.file import HubFile, bytes_text

from ..hub_server import Hub, commit_of

COMMIT = commit_of(1)


@pytest.fixture
def file(hub: Hub) -> HubFile:
    hub.add("org/name", {"a/model.bin": b"123", "a/part.bin": b"4567"})
    return HubFile(f"hf:org/name@{COMMIT}/a/model.bin", "org/name", COMMIT, {"a/model.bin": 3, "a/part.bin": 4})


def test_as_text_it_is_its_name_and_as_a_path_its_copy(hub: Hub, file: HubFile) -> None:
    assert str(file) == f"{file}" == file.name and file.place == "hf:org/name/a/model.bin"
    assert hub.downloads() == []
    path = Path(file)
    assert path.read_bytes() == b"123" and path.with_name("part.bin").read_bytes() == b"4567"
    assert os.fspath(file) == str(path) and hub.downloads() == ["a/model.bin", "a/part.bin"]


def test_another_process_gets_the_copy_or_the_error(hub: Hub, file: HubFile) -> None:
    file.fetch()
    hub.repositories.clear()
    assert Path(pickle.loads(pickle.dumps(file))).read_bytes() == b"123"
    failed = HubFile("hf:x/y", error=OptionError("No.", "Yes."))
    with pytest.raises(OptionError, match="No"):
        pickle.loads(pickle.dumps(failed)).fetch()


def test_a_download_that_failed_is_not_tried_again(hub: Hub, file: HubFile) -> None:
    hub.repositories.clear()
    with pytest.raises(HubError):
        file.fetch()
    asked = len(hub.requests)
    with pytest.raises(HubError):
        os.fspath(file)
    assert len(hub.requests) == asked


def test_stages_say_how_far_the_download_is(file: HubFile) -> None:
    stages: list[str] = []
    file.fetch(stages.append)
    assert stages == ["downloading model.bin: 3 bytes of 3 bytes", "downloading part.bin: 4 bytes of 4 bytes"]


def test_more_bytes_than_the_list_says_are_refused(hub: Hub) -> None:
    hub.add("org/name", {"model.bin": b"1" * 1000})
    file = HubFile("hf:x", "org/name", COMMIT, {"model.bin": 10})
    with pytest.raises(HubError, match="more bytes than the 10"):
        file.fetch()
    again = HubFile("hf:x", "org/name", COMMIT, {"model.bin": 10})
    with pytest.raises(HubError, match="more bytes than the 10"):  # also from the cache
        again.fetch()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (10 << 30, "10.0 GiB")],
)
def test_sizes_are_written_in_units(count: int, text: str) -> None:
    assert bytes_text(count) == text
