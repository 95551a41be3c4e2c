"""The attachments of a store: files in a folder, each with the SHA-256 of its content as its name.

Only the process that holds the lock of the store for writing changes the folder. So everything that is unfinished there
at the start of a change was left by a process that died, and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bdprune.files import TEMPORARY, make_folder, write_atomically

_PENDING = "pending-"
"""How a file's name begins that lists the attachments of one change, until the database names them."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Attachments:
    """The files of one store.

    Args:
        folder: it is created with the first attachment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked = False

    def read(self, digests: Iterable[str]) -> dict[str, bytes] | None:
        """Contents by their SHA-256; None if a file is missing or has changed."""
        found: dict[str, bytes] = {}
        for digest in digests:
            try:
                found[digest] = (self.folder / digest).read_bytes()
            except OSError:
                return None
            if hashlib.sha256(found[digest]).hexdigest() != digest:
                return None
        return found

    def write(self, contents: Mapping[str, bytes]) -> Path | None:
        """Writes what is missing or damaged. The caller names the contents in the database, then calls :meth:`done`.

        Returns:
            A file that lists what was written; None if nothing was.

        Raises:
            OutputError: a file cannot be written; the next :meth:`drop_unnamed` removes those before it.
        """
        missing = {digest: content for digest, content in contents.items() if not self._holds(digest, len(content))}
        if not missing:
            return None
        make_folder(self.folder)
        self._checked = False  # until the change is done
        pending = self.folder / f"{_PENDING}{secrets.token_hex(8)}"
        write_atomically(pending, "\n".join(missing).encode())
        for digest, content in missing.items():
            write_atomically(self.folder / digest, content)
        return pending

    def done(self, pending: Path | None) -> None:
        """Notes that the database names all that was written."""
        if pending is not None:
            pending.unlink(missing_ok=True)
            self._checked = True

    def has_unfinished(self) -> bool:
        """Whether another process writes at the moment, or died before its change was done."""
        return any(any(self.folder.glob(f"{start}*")) for start in (TEMPORARY, _PENDING))

    def drop_unnamed(self, is_named: Callable[[str], bool]) -> None:
        """Removes what an unfinished change has left: temporary files, and contents that the database does not name.

        Args:
            is_named: whether the database names a digest.
        """
        if self._checked:
            return
        self._checked = True
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            for path in self.folder.glob(f"{TEMPORARY}*"):
                path.unlink(missing_ok=True)
            for path in self.folder.glob(f"{_PENDING}*"):
                digests = path.read_text(errors="replace").split()
                for digest in filter(_DIGEST.fullmatch, digests):
                    if not is_named(digest):
                        (self.folder / digest).unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def _holds(self, digest: str, size: int) -> bool:
        """Whether the file is there and sound. A damaged file may have the right size."""
        path = self.folder / digest
        try:
            if path.stat().st_size != size:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False
