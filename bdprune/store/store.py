"""The store of a fleet: the results of scans, and the evidence of their detectors, by what they depend on.

A scan is known by the digests of the model's file and of the clean data, all settings that change the result, and the
version of bdprune. The same scan of the same bytes is kept once, under all its names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from bdprune.errors import DataError, StoreError
from bdprune.record import ArtifactInfo, Evidence, Result, finite
from bdprune.store.attachments import Attachments
from bdprune.store.database import WAIT, Database, damaged


@dataclass(frozen=True)
class ScanKey:
    """Everything that the results of a scan depend on.

    Args:
        model: SHA-256 of the model's file.
        data: digest of the clean data; empty without data.
        settings: the options and detectors, JSON values only.
        version: of bdprune.
    """

    model: str
    data: str
    settings: Mapping[str, Any]
    version: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, in hex digits."""
        return _digest([self.model, self.data, finite(self.settings), self.version])


@dataclass(frozen=True)
class EvidenceKey:
    """Everything that the evidence of a detector depends on.

    Args:
        model: digest of the weights and of everything else that determines the outputs.
        data: digest of the images that the detector sees; empty for none.
        detector: id and settings, JSON values only.
        settings: of the scan: budget, device, attachments.
        version: of bdprune.
    """

    model: str
    data: str
    detector: Mapping[str, Any]
    settings: Mapping[str, Any]
    version: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, in hex digits."""
        return _digest([self.model, self.data, finite(self.detector), finite(self.settings), self.version])


@dataclass(frozen=True)
class Kept:
    """The scan of one file.

    Attributes:
        name: the path that the file had.
        model: SHA-256 of the file.
        data: digest of the clean data; empty without data.
        settings: options and detectors.
        version: of bdprune.
        results: one for each set of weights.
    """

    name: str
    model: str
    data: str
    settings: Mapping[str, Any]
    version: str
    results: tuple[Result, ...] = field(repr=False)


_SCANS = "SELECT id, key, model, data, settings, version, failed, seal FROM scans"


class Store:
    """Results and evidence in one SQLite file, and attachments by digest in a folder next to it.

    Several threads and processes may use one store. Each scan is written in one transaction, so a process that dies
    leaves no part of one. Damage to the file raises an error. A store needs a local disk: several machines that share a
    network disk need one store each.

    Args:
        path: the file; it is created if it does not exist.
        writes: False opens an existing store only to read it.
        wait: seconds to wait for another process that writes.

    Raises:
        StoreError: the file is no store, has another schema, is damaged or locked, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, writes: bool = True, wait: float = WAIT) -> None:
        if not os.fspath(path):
            raise StoreError("The name of the store is empty.", "Give the name of a file, such as scans.db.")
        self.path = Path(path)
        self._wait, self._writes = wait, writes
        self.database = Database(self.path, writes=writes, wait=wait)
        self._files = Attachments(self.path.with_name(f"{self.path.name}.attachments"))
        if writes and self._files.has_unfinished():
            with contextlib.suppress(StoreError), self.database.transaction() as connection:
                self._drop_unnamed(connection)  # a run that takes everything from the store saves nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file itself."""
        return _reopened, (self.path, self._writes, self._wait)

    def close(self) -> None:
        """Closes the file."""
        self.database.close()

    @property
    def attachments(self) -> Path:
        """The folder of the attachments; each file has the SHA-256 of its content as its name."""
        return self._files.folder

    def save(
        self,
        key: ScanKey,
        name: str,
        results: Sequence[Result],
        *,
        contents: Mapping[str, bytes] | None = None,
        evidence: Sequence[tuple[EvidenceKey, Evidence]] = (),
    ) -> None:
        """Writes the results of one file in one transaction, in place of a failed scan under the same key.

        Args:
            key: what the results depend on.
            name: path of the file.
            results: one for each set of weights.
            contents: bytes of the attachments by their SHA-256.
            evidence: of detectors, for later scans with other detectors.

        Raises:
            StoreError: it cannot be written, and the store is as before; or it is damaged.
            OutputError: an attachment cannot be written.
        """
        with self.database.transaction() as connection:
            self._drop_unnamed(connection)
            pending = self._files.write(contents or {})
            _write(connection, key, results)
            rows = [(one.digest, seen.to_json(indent=None)) for one, seen in evidence]
            sealed = [(digest, text, seal_of(digest, text)) for digest, text in rows]
            connection.executemany("INSERT OR REPLACE INTO evidence VALUES (?, ?, ?)", sealed)
            _name(connection, plain_name(name), _scan_of(connection, key), key.digest)
        self._files.done(pending)

    def _drop_unnamed(self, connection: sqlite3.Connection) -> None:
        self._files.drop_unnamed(lambda digest: _is_named(connection, digest))

    def find(self, key: ScanKey, name: str) -> tuple[Result, ...]:
        """The results under ``key``, with ``name`` as the path of their file, which the store notes; none if there is
        no such scan, or if it failed.

        Raises:
            StoreError: the store cannot be read or written.
        """
        with self.database.reading() as connection:
            row = connection.execute(f"{_SCANS} WHERE key = ? AND NOT failed", (key.digest,)).fetchone()
            documents = () if row is None else self._documents(connection, row)
        try:
            found = tuple(_renamed(Result.from_json(text), name) for text in documents)
        except DataError:  # of another schema of results
            return ()
        if found:
            self._note(plain_name(name), row[0], key.digest)
        return found

    def find_evidence(self, key: EvidenceKey) -> Evidence | None:
        """The evidence under ``key``; None if there is none.

        Raises:
            StoreError: the store cannot be read.
        """
        with self.database.reading() as connection:
            row = connection.execute("SELECT document, seal FROM evidence WHERE key = ?", (key.digest,)).fetchone()
        if row is None:
            return None
        if row[1] != seal_of(key.digest, row[0]):
            raise damaged(self.path)
        try:
            return Evidence.from_json(row[0])
        except DataError:
            return None

    def contents(self, evidence: Sequence[Evidence]) -> dict[str, bytes] | None:
        """Bytes of the attachments of this evidence by their SHA-256; None if a file is missing or has changed."""
        return self._files.read({one.sha256 for seen in evidence for one in seen.attachments})

    def scans(self, name: str | None = None) -> Iterator[Kept]:
        """The latest scan of every file, in the order of their names.

        Args:
            name: only of this file; all of its scans, the latest first.

        Raises:
            StoreError: the store cannot be read, or holds results of another version.
        """
        latest = "AND seen = (SELECT max(seen) FROM sources AS other WHERE other.name = sources.name)"
        query = (
            f"SELECT name, scan, seen, seal FROM sources WHERE {'name = ?' if name is not None else f'1 {latest}'} "
            "ORDER BY name, seen DESC"
        )
        if name is None:
            self.database.check()
        with self.database.reading() as connection:
            rows = connection.execute(query, () if name is None else (plain_name(name),)).fetchall()
        for row in rows:
            yield self._kept(*row)

    def knows(self, name: str) -> bool:
        """Whether the store has a scan of a file of this name."""
        with self.database.reading() as connection:
            query = "SELECT 1 FROM sources WHERE name = ? LIMIT 1"
            return connection.execute(query, (plain_name(name),)).fetchone() is not None

    def names(self) -> list[str]:
        """The names of all files."""
        with self.database.reading() as connection:
            return [name for (name,) in connection.execute("SELECT DISTINCT name FROM sources ORDER BY name")]

    def _kept(self, name: str, scan: int, seen: int, seal: str) -> Kept:
        """The scan that a row of the sources names."""
        with self.database.reading() as connection:
            row = connection.execute(f"{_SCANS} WHERE id = ?", (scan,)).fetchone()
            if row is None or seal != seal_of(name, row[1], seen):
                raise damaged(self.path)
            documents = self._documents(connection, row)
        _, _, model, data, settings, version, _, _ = row
        return Kept(name, model, data, json.loads(settings), version, self._results(documents, name))

    def _documents(self, connection: sqlite3.Connection, row: tuple[Any, ...]) -> list[str]:
        """The documents of a scan, which must be those that were written with it."""
        scan, *values, seal = row
        query = "SELECT document FROM results WHERE scan = ? ORDER BY place"
        documents = [text for (text,) in connection.execute(query, (scan,))]
        if seal != seal_of(*values, *documents):
            raise damaged(self.path)
        return documents

    def _results(self, documents: Sequence[str], name: str) -> tuple[Result, ...]:
        try:
            return tuple(_renamed(Result.from_json(text), name) for text in documents)
        except DataError as error:
            what = f"The store {self.path} holds a result that cannot be read: {error.message}"
            raise StoreError(what, "Read it with the version of bdprune that made it.") from None

    def _note(self, name: str, scan: int, key: str) -> None:
        """Notes that ``name`` is a name of this scan, unless it is the latest note of this name already."""
        query = "SELECT scan FROM sources WHERE name = ? ORDER BY seen DESC LIMIT 1"
        with self.database.reading() as connection:
            latest = connection.execute(query, (name,)).fetchone()
        if latest != (scan,):
            with self.database.transaction() as connection:
                _name(connection, name, scan, key)


def _reopened(path: Path, writes: bool, wait: float) -> Store:
    return Store(path, writes=writes, wait=wait)


def _write(connection: sqlite3.Connection, key: ScanKey, results: Sequence[Result]) -> None:
    """Writes the results under ``key``, unless there are good ones."""
    row = (key.digest, key.model, key.data, _text(key.settings), key.version)
    connection.execute("INSERT OR IGNORE INTO scans VALUES (NULL, ?, ?, ?, ?, ?, 1, '')", row)
    found = connection.execute("SELECT id FROM scans WHERE key = ? AND failed", (key.digest,)).fetchone()
    if found is None:
        return
    (scan,) = found
    failed = any(one.verdict == "error" or any(seen.error for seen in one.detectors) for one in results)
    documents = [one.to_json(indent=None) for one in results]
    seal = seal_of(*row, int(failed), *documents)
    connection.execute("UPDATE scans SET failed = ?, seal = ? WHERE id = ?", (int(failed), seal, scan))
    connection.execute("DELETE FROM results WHERE scan = ?", (scan,))
    rows = [(scan, place, text) for place, text in enumerate(documents)]
    connection.executemany("INSERT INTO results VALUES (?, ?, ?)", rows)


def _is_named(connection: sqlite3.Connection, digest: str) -> bool:
    """Whether a result or evidence names an attachment; it reads all documents."""
    queries = (f"SELECT 1 FROM {table} WHERE instr(document, ?) LIMIT 1" for table in ("results", "evidence"))
    return any(connection.execute(query, (digest,)).fetchone() for query in queries)


def seal_of(*values: str | int) -> str:
    """A digest of what belongs together in the database, which finds damage that SQLite does not."""
    return hashlib.blake2b(json.dumps(values, default=repr).encode(), digest_size=16).hexdigest()


def _scan_of(connection: sqlite3.Connection, key: ScanKey) -> int:
    (scan,) = connection.execute("SELECT id FROM scans WHERE key = ?", (key.digest,)).fetchone()
    return int(scan)


def _name(connection: sqlite3.Connection, name: str, scan: int, key: str) -> None:
    """Notes that ``name`` is a name of the scan under ``key``, and the latest note of all."""
    (seen,) = connection.execute("SELECT 1 + coalesce(max(seen), 0) FROM sources").fetchone()
    connection.execute(
        "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?)", (name, scan, seen, seal_of(name, key, seen))
    )


def _renamed(result: Result, name: str) -> Result:
    """The result with another path of its file."""
    artifact = result.artifact
    if artifact is None or artifact.path == name:
        return result
    named: ArtifactInfo = msgspec.structs.replace(artifact, path=name)
    return msgspec.structs.replace(result, artifact=named)


def plain_name(name: str) -> str:
    r"""A name that the database can hold: bytes that are not UTF-8 are written as in ``\xe9``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _digest(parts: object) -> str:
    return hashlib.sha256(_text(parts).encode()).hexdigest()


def _text(value: object) -> str:
    """Canonical JSON."""
    return json.dumps(finite(value), sort_keys=True, separators=(",", ":"))
