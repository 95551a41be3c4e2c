"""The SQLite file: bad files, other schemas, locks, a full disk, and several processes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bdprune.errors import StoreError
from bdprune.store import Store
from bdprune.store.database import APPLICATION, SCHEMA, Database

from .conftest import key, result


def refused(path: Path, **options: object) -> StoreError:
    with pytest.raises(StoreError) as caught:
        Database(path, **options)  # type: ignore[arg-type]
    assert caught.value.hint and str(path) in caught.value.message
    return caught.value


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for one in statements:
        connection.execute(one)
    connection.close()


def test_bad_files_are_refused_and_not_changed(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("These are my notes, not a store.")
    assert "is a folder" in refused(tmp_path).message
    assert "is not a store" in refused(text).message
    assert text.read_text() == "These are my notes, not a store."
    assert "folder of the store" in refused(tmp_path / "none" / "scans.db").message
    assert "There is no store" in refused(tmp_path / "none.db", writes=False).message
    assert not (tmp_path / "none.db").exists()


def test_another_database_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    change(path, "CREATE TABLE mine (x)")
    before = path.read_bytes()
    for writes in (True, False):
        assert "another SQLite database" in refused(path, writes=writes).message
    assert path.read_bytes() == before


@pytest.mark.parametrize(("version", "word"), [(SCHEMA + 1, "newer"), (-1, "older")])
def test_another_schema_is_refused(tmp_path: Path, version: int, word: str) -> None:
    path = tmp_path / "scans.db"
    Database(path).close()
    change(path, f"PRAGMA user_version = {version}")
    for writes in (True, False):
        assert word in refused(path, writes=writes).message


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "scans.db"
    path.touch()
    Database(path).close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@pytest.mark.parametrize("writes", [True, False])
def test_a_pipe_or_a_device_is_no_store(tmp_path: Path, writes: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        assert "device or a pipe" in refused(path, writes=writes).message


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "scans.db"
    with Store(path) as store:
        for place in range(20):
            store.save(key(str(place)), f"{place}.pth", [result()])
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"), Store(path) as store:
        list(store.scans())


def test_a_locked_store_is_one_error_and_later_works(tmp_path: Path) -> None:
    path = tmp_path / "scans.db"
    store = Store(path, wait=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process"):
        store.save(key(), "a.pth", [result()])
    other.execute("COMMIT")
    other.close()
    store.save(key(), "a.pth", [result()])
    assert store.names() == ["a.pth"]
    store.close()


def test_a_store_that_waits_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "scans.db"
    store = Store(path, wait=20)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    free = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    free.start()
    store.save(key(), "a.pth", [result()])
    free.join()
    other.close()
    store.close()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "scans.db"
    with Store(path) as store:
        store.save(key("1"), "a.pth", [result()])
        with store.database.reading() as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="is full") as caught:
            store.save(key("2"), "b.pth", [result("b.pth", findings=()), result("b.pth", not_run=("x" * 100_000,))])
        assert caught.value.hint
        assert store.names() == ["a.pth"] and store.find(key("2"), "b.pth") == ()
        with store.database.reading() as connection:
            connection.execute("PRAGMA max_page_count = 1000000")
        store.save(key("2"), "b.pth", [result("b.pth")])
        assert store.names() == ["a.pth", "b.pth"]


def test_a_store_that_is_only_read_refuses_to_write(tmp_path: Path) -> None:
    path = tmp_path / "scans.db"
    with Store(path) as store:
        store.save(key(), "a.pth", [result()])
    with Store(path, writes=False) as store:
        assert store.names() == ["a.pth"]
        with pytest.raises(StoreError, match="cannot be written"):
            store.save(key("2"), "b.pth", [result()])
    assert [one.name for one in tmp_path.iterdir()] == ["scans.db"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir()
    with Store(folder / "scans.db") as store:
        store.save(key(), "a.pth", [result()])
    (folder / "scans.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        with Store(folder / "scans.db", writes=False) as store:
            assert store.names() == ["a.pth"]
        with pytest.raises(StoreError, match="permissions"), Store(folder / "scans.db") as store:
            store.save(key("2"), "b.pth", [result()])
    finally:
        folder.chmod(0o755)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "scans.db")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.names()


def test_threads_share_a_store(tmp_path: Path) -> None:
    with Store(tmp_path / "scans.db") as store:
        run_in_threads(4, lambda place: store.save(key(str(place)), f"{place}.pth", [result(f"{place}.pth")]))
        assert store.names() == [f"{place}.pth" for place in range(4)]


def test_threads_create_one_store(tmp_path: Path) -> None:
    def make(place: int) -> None:
        with Store(tmp_path / "scans.db") as store:
            store.save(key(str(place)), f"{place}.pth", [result(f"{place}.pth")])

    run_in_threads(6, make)
    with Store(tmp_path / "scans.db") as store:
        assert store.names() == [f"{place}.pth" for place in range(6)]


def run_in_threads(count: int, run: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


WRITER = """
import sys
from bdprune.store import Store
from tests.store.conftest import key, result
for place in range(20):
    with Store(sys.argv[1]) as store:
        name = f"{sys.argv[2]}-{place}.pth"
        store.save(key(name), name, [result(name)])
"""


def test_processes_share_a_store(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent.parent)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "scans.db"), name],
            cwd=root,
            env=os.environ | {"PYTHONPATH": root},
        )
        for name in "ab"
    ]
    assert [one.wait(60) for one in running] == [0, 0]
    with Store(tmp_path / "scans.db") as store:
        assert len(store.names()) == 40


def test_a_reader_sees_one_state_of_the_store(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as one, Store(tmp_path / "s.db") as other:
        one.save(key(), "a.pth", [result()])
        with one.database.reading() as connection:
            count = "SELECT count(*) FROM scans"
            assert connection.execute(count).fetchone() == (1,)
            other.save(key("9" * 64), "b.pth", [result()])
            assert connection.execute(count).fetchone() == (1,)
            with one.database.reading() as inner:
                assert inner.execute(count).fetchone() == (1,), "a reading in a reading is the same one"
        with one.database.reading() as connection:
            assert connection.execute(count).fetchone() == (2,)
