"""Screens with a store: a file whose screen is there is not screened again."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator

import msgspec

import bdprune
from bdprune.errors import DataError, StoreError
from bdprune.record import ScreenResult
from bdprune.store.database import Database, damaged
from bdprune.store.store import Store, plain_name, seal_of


class Screens:
    """The screens in a store, by the SHA-256 of the file and the version of bdprune. Failed screens are not
    kept, and remove the earlier screen under the same name.

    Args:
        store: it may hold scans, too.

    Attributes:
        taken: how many screens came from the store so far.

    Example:
        >>> with Store("screens.db") as store:
        ...     for result in Screens(store).run(["model.pth"]):
        ...         print(result.outcome)
        nothing found
    """

    def __init__(self, store: Store) -> None:
        self._database: Database = store.database
        self.taken = 0

    def run(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[ScreenResult]:
        """One result for each path, in order; new ones are written before they are given out.

        Raises:
            StoreError: the store cannot be read or written.
        """
        from bdprune.screening import screen  # only here: the other commands on a store do not need numpy

        for path in paths:
            before = self.taken
            result = screen(path, recall=self._recall)
            if result.error is not None:
                self._forget(result.name)
            elif self.taken == before:
                self._save(result)
            else:
                self._name(result)
            yield result

    def all(self) -> Iterator[ScreenResult]:
        """The latest screen of every file, in the order of their names.

        Raises:
            StoreError: the store cannot be read, or holds screens of another version.
        """
        self._database.check()
        query = (
            "SELECT name, model, version, screened.seal, document, screens.seal FROM screened "
            "JOIN screens USING (model, version) WHERE name > ? ORDER BY name LIMIT 256"
        )
        last = ""
        while True:
            with self._database.reading() as connection:
                rows = connection.execute(query, (last,)).fetchall()
            for name, model, version, seal, document, own in rows:
                if seal != seal_of(name, model, version):
                    raise damaged(self._database.path)
                result = self._parsed(model, version, document, own)
                if result is None:
                    what = f"The store {self._database.path} holds a screen of bdprune {version} that cannot be read."
                    raise StoreError(what, "Screen the files again, or read it with that version.")
                yield _renamed(result, name)
            if not rows:
                return
            last = rows[-1][0]

    def names(self) -> list[str]:
        """The names of all screened files."""
        with self._database.reading() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM screened ORDER BY name")]

    def _recall(self, sha256: str) -> ScreenResult | None:
        query, row = "SELECT document, seal FROM screens WHERE model = ? AND version = ?", (sha256, bdprune.__version__)
        with self._database.reading() as connection:
            known = connection.execute(query, row).fetchone()
        found = None if known is None else self._parsed(*row, *known)
        self.taken += found is not None
        return found

    def _parsed(self, model: str, version: str, document: str, seal: str) -> ScreenResult | None:
        """The result; None if another version of the schema wrote it.

        Raises:
            StoreError: it is not what was written.
        """
        if seal != seal_of(model, version, document):
            raise damaged(self._database.path)
        try:
            return ScreenResult.from_json(document)
        except DataError:
            return None

    def _save(self, result: ScreenResult) -> None:
        row = (result.artifact.sha256 or "", bdprune.__version__, result.to_json(indent=None))
        with self._database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO screens VALUES (?, ?, ?, ?)", (*row, seal_of(*row)))
            _note(connection, plain_name(result.name), *row[:2])

    def _forget(self, name: str) -> None:
        """Removes the earlier screen under this name: it is not that of the file as it is now."""
        if plain_name(name) in self.names():
            with self._database.transaction() as connection:
                connection.execute("DELETE FROM screened WHERE name = ?", (plain_name(name),))

    def _name(self, result: ScreenResult) -> None:
        """Notes the file's name, unless it is known."""
        row = (plain_name(result.name), result.artifact.sha256 or "", bdprune.__version__)
        query = "SELECT 1 FROM screened WHERE name = ? AND model = ? AND version = ?"
        with self._database.reading() as connection:
            known = connection.execute(query, row).fetchone()
        if known is None:
            with self._database.transaction() as connection:
                _note(connection, *row)


def _note(connection: sqlite3.Connection, *row: str) -> None:
    connection.execute("INSERT OR REPLACE INTO screened VALUES (?, ?, ?, ?)", (*row, seal_of(*row)))


def _renamed(result: ScreenResult, name: str) -> ScreenResult:
    return msgspec.structs.replace(result, artifact=msgspec.structs.replace(result.artifact, path=name))
