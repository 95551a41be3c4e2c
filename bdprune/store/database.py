"""One SQLite file with a known schema, safe for several threads and processes, and its errors in plain words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from bdprune.errors import StoreError

SCHEMA = 2
"""Version of the tables, in ``PRAGMA user_version``."""

APPLICATION = 0x62647072
"""``PRAGMA application_id`` of a store: ``bdpr`` in ASCII."""

WAIT = 60.0
"""Seconds to wait for another process that writes."""

_HEADER = b"SQLite format 3\0"
_TABLES = """
CREATE TABLE scans (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, model TEXT NOT NULL, data TEXT NOT NULL, settings TEXT NOT NULL,
    version TEXT NOT NULL, failed INTEGER NOT NULL, seal TEXT NOT NULL
);
CREATE TABLE results (
    scan INTEGER NOT NULL REFERENCES scans (id), place INTEGER NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (scan, place)
);
CREATE TABLE sources (
    name TEXT NOT NULL, scan INTEGER NOT NULL REFERENCES scans (id), seen INTEGER NOT NULL, seal TEXT NOT NULL,
    PRIMARY KEY (name, scan)
);
CREATE TABLE evidence (key TEXT PRIMARY KEY, document TEXT NOT NULL, seal TEXT NOT NULL);
CREATE TABLE screens (
    model TEXT NOT NULL, version TEXT NOT NULL, document TEXT NOT NULL, seal TEXT NOT NULL,
    PRIMARY KEY (model, version)
);
CREATE TABLE screened (name TEXT PRIMARY KEY, model TEXT NOT NULL, version TEXT NOT NULL, seal TEXT NOT NULL);
CREATE INDEX sources_by_scan ON sources (scan);
CREATE INDEX sources_by_seen ON sources (seen);
"""
_Value = TypeVar("_Value")


class Database:
    """The SQLite file. Threads share one connection, one after another; each process opens its own.

    Args:
        path: the file; it is created if it does not exist.
        writes: False opens an existing file only to read it.
        wait: seconds to wait for another process that writes.

    Raises:
        StoreError: the file is a folder, is no store, has another schema, is damaged, locked or cannot be opened, or
            does not exist and is only to be read.
    """

    def __init__(self, path: Path, *, writes: bool = True, wait: float = WAIT) -> None:
        self.path, self._wait, self._writes = path, wait, writes
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        _check_file(path, writes)
        with self._told():
            self._connection = self._opened()

    def close(self) -> None:
        """Closes the file; closing it again does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for statements that only read; they all see the store as it is at the first of them.

        Raises:
            StoreError: the store is closed, damaged or locked.
        """
        with self._lock, self._told():
            connection = self._open_connection()
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection in one transaction: either everything is written, or nothing.

        Raises:
            StoreError: the store is closed, damaged, locked or read-only, or the disk is full.
        """
        with self._lock, self._told():
            connection = self._open_connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite rolls back by itself after some errors
                    connection.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Reads the whole file, and compares its tables with their indices.

        Raises:
            StoreError: they do not match.
        """
        with self.reading() as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != ("ok",):
            raise damaged(self.path)

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"The store {self.path} is closed.", "Open it again.")
        return self._connection

    def _opened(self) -> sqlite3.Connection:
        connection = self._connect("rwc" if self._writes else "rw")
        try:
            if self._writes:
                self._waited(lambda: _prepare(connection))
            else:
                connection = self._readable(connection)
            _check_schema(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        file = Path(os.path.abspath(self.path)).as_uri()
        return sqlite3.connect(
            f"{file}?mode={mode}", uri=True, timeout=self._wait, isolation_level=None, check_same_thread=False
        )

    def _readable(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """A connection that can only read. It may open the file for writing, and so removes the log when it closes.

        A store in a folder that cannot be written has no shared memory; without a log, nobody writes it either.
        """
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            if Path(f"{self.path}-wal").exists():
                raise
            connection.close()
            return self._connect("ro&immutable=1")
        return connection

    def _waited(self, run: Callable[[], _Value]) -> _Value:
        """The value of ``run``; it tries again while another process creates the store.

        SQLite itself does not wait for a change of the journal's mode.
        """
        deadline = time.monotonic() + self._wait
        while True:
            try:
                return run()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns an error of SQLite into one that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise _explained(error, self.path) from error
        except UnicodeDecodeError as error:  # SQLite quotes damaged text in its message
            raise damaged(self.path) from error


def _check_file(path: Path, writes: bool) -> None:
    try:
        if path.is_dir():
            raise StoreError(f"{path} is a folder, not a store.", "Give the name of a file.")
        if not path.exists():
            if not writes:
                raise StoreError(f"There is no store {path}.", "Make one with `bdprune scan --store`.")
            if not path.absolute().parent.is_dir():
                raise StoreError(f"The folder of the store {path} does not exist.", "Create it first.")
            return
        if not path.is_file():  # opening a pipe would wait for its writer
            raise StoreError(f"{path} is a device or a pipe, not a store.", "Give the name of a file.")
        with path.open("rb") as file:
            start = file.read(len(_HEADER))
    except OSError as error:
        raise StoreError(f"The store {path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    if start and start != _HEADER:
        raise StoreError(f"{path} is not a store of bdprune.", "Give another file; this one was not changed.")


def _prepare(connection: sqlite3.Connection) -> None:
    """Creates the tables of a new store."""
    version, tables = _version(connection)
    if version or tables:
        return
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _version(connection) == (0, 0):  # no other process was faster
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> tuple[int, int]:
    """The version of the schema, and the number of tables."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return version, tables


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application == 0 and _version(connection) == (0, 0):
        raise StoreError(f"The store {path} is empty.", "Run the scan that was to fill it again.")
    if application != APPLICATION:
        raise StoreError(f"{path} is another SQLite database.", "Give another file; this one was not changed.")
    version, _ = _version(connection)
    if version != SCHEMA:
        made = "a newer" if version > SCHEMA else "an older"
        raise StoreError(
            f"{path} was made by {made} version of bdprune: it has schema {version}, this one reads {SCHEMA}.",
            "Use that version, or another store.",
        )


def damaged(path: Path) -> StoreError:
    """The error for a store whose content does not fit together."""
    return StoreError(f"The store {path} is damaged.", "Move it away, and scan again into a new one.")


def _explained(error: sqlite3.Error, path: Path) -> StoreError:
    text = str(error)
    causes = {
        "full": (f"The disk of the store {path} is full.", "Free some space, and run the same command again."),
        "readonly": (f"The store {path} cannot be written.", "Check the permissions of the file and of its folder."),
        "unable to open": (f"The store {path} cannot be opened.", "Check the permissions of the file and its folder."),
        "locked": (f"The store {path} is locked by another process.", "Wait until it ends, or use another store."),
    }
    for word, (message, hint) in causes.items():
        if word in text:
            return StoreError(message, hint)
    if any(word in text for word in ("malformed", "not a database", "decode", "no such table", "no such column")):
        return damaged(path)
    return StoreError(f"The store {path} failed: {text}.", "Check the disk, or use another store.")
