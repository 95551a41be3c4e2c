"""The files of attachments: what is written, and what an unfinished change leaves."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from bdprune.errors import OutputError
from bdprune.store.attachments import Attachments

ONE, TWO = b"one", b"two"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> Attachments:
    return Attachments(tmp_path / "attachments")


def names(files: Attachments) -> set[str]:
    return {path.name for path in files.folder.iterdir()}


def test_nothing_to_write_makes_no_folder(files: Attachments) -> None:
    files.done(files.write({}))
    files.drop_unnamed(lambda digest: False)
    assert not files.folder.exists() and files.read([]) == {}


def test_what_is_there_and_sound_is_not_written_again(files: Attachments) -> None:
    files.done(files.write({digest(ONE): ONE}))
    before = (files.folder / digest(ONE)).stat().st_ino
    assert files.write({digest(ONE): ONE}) is None and (files.folder / digest(ONE)).stat().st_ino == before
    (files.folder / digest(ONE)).write_bytes(b"eno")
    files.done(files.write({digest(ONE): ONE}))
    assert files.read([digest(ONE)]) == {digest(ONE): ONE} and names(files) == {digest(ONE)}


def test_an_unfinished_change_is_undone_and_a_finished_one_stays(files: Attachments) -> None:
    files.done(files.write({digest(ONE): ONE}))
    files.write({digest(TWO): TWO})  # and never done
    for later in (files, Attachments(files.folder)):
        later.drop_unnamed(lambda one: one == digest(ONE))
        assert names(files) == {digest(ONE)}


def test_what_the_database_names_stays_even_if_the_change_was_not_noted_as_done(files: Attachments) -> None:
    files.write({digest(ONE): ONE})
    Attachments(files.folder).drop_unnamed(lambda one: True)
    assert names(files) == {digest(ONE)}


def test_a_list_of_pending_files_cannot_remove_others(files: Attachments) -> None:
    files.done(files.write({digest(ONE): ONE}))
    other = files.folder.parent / "precious"
    other.touch()
    (files.folder / "pending-x").write_bytes(b"../precious\n" + os.fsencode(other) + b"\n\xff\n.\n")
    Attachments(files.folder).drop_unnamed(lambda one: False)
    assert other.exists() and names(files) == {digest(ONE)}


def test_a_full_disk_is_one_error(files: Attachments, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        files.write({digest(ONE): ONE})
    assert "Free some space" in caught.value.hint and names(files) == set()
