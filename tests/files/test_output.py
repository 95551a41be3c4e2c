"""Report files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bdprune.errors import OutputError
from bdprune.files.output import check_writable, make_folder, write_atomically, write_text


def test_written_text_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("first", "zweite Fassung: µ"):
        check_writable(path)
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_name_of_the_maximum_length_works(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"


def test_the_check_leaves_no_file(tmp_path: Path) -> None:
    check_writable(tmp_path / "r.json")
    assert os.listdir(tmp_path) == []


def test_impossible_paths_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "no" / "r.json", tmp_path / "file" / "r.json", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError):
            check_writable(path)
    with pytest.raises(OutputError):
        write_text(tmp_path / "no" / "r.json", "x")


def test_folders_are_created_or_are_errors(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        make_folder(tmp_path / "file" / "b")


def test_the_old_file_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["r.json"]


def test_devices_are_written_and_not_replaced(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(fifo)
        write_text(fifo, "through")
        assert os.read(reader, 100) == b"through"
        write_atomically(fifo, b"bytes")
        assert os.read(reader, 100) == b"bytes"
        assert fifo.is_fifo()
    finally:
        os.close(reader)
