"""A checkpoint on the Hub, which stands for its local copy wherever a path is read."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bdprune.errors import BdpruneError, HubError
from bdprune.hub import client
from bdprune.hub.names import HubName, without_commit


@dataclass(eq=False)
class HubFile(os.PathLike[str]):
    """A checkpoint at one commit of a repository. As text it is its name, as a path its local copy.

    Attributes:
        name: ``hf:ORG/NAME@COMMIT/FILE``, or what the user gave if that cannot be found.
        repo: ``ORG/NAME``.
        commit: the commit, in 40 hex digits.
        sizes: the file, then all that is read with it, such as the shards of an index: path in the repository -> bytes.
        error: why it cannot be read; None if nothing is known against it.
    """

    name: str
    repo: str = ""
    commit: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    error: BdpruneError | None = None
    _local: Path | None = None

    def __str__(self) -> str:
        return self.name

    def __fspath__(self) -> str:
        return os.fspath(self.fetch())

    @property
    def place(self) -> str:
        """The name without the commit, which several machines that list the same branch share."""
        return without_commit(self.name)

    def names(self) -> list[HubName]:
        """The names of the file and all that is read with it."""
        return [HubName(self.repo, self.commit, path) for path in self.sizes]

    def fetch(self, progress: Callable[[str], None] | None = None) -> Path:
        """The local copy; it is downloaded if the cache does not hold it.

        Raises:
            BdpruneError: it cannot be downloaded; a second call does not try again.
        """
        if self.error is not None:
            raise self.error
        if self._local is None:
            try:
                first, *_ = [self._part(name, progress) for name in self.names()]
            except BdpruneError as error:
                self.error = error
                raise
            self._local = first
        return self._local

    def _part(self, name: HubName, progress: Callable[[str], None] | None) -> Path:
        size, title = self.sizes[name.file], posixpath.basename(name.file)

        def check(got: int) -> None:
            if got > size:
                what = f"{name.file} of {self.repo} has more bytes than the {size} that the Hub names."
                raise HubError(what, "Do not trust this Hub.")

        def report(got: int) -> None:
            check(got)
            if progress is not None:
                progress(f"downloading {title}: {bytes_text(got)} of {bytes_text(size)}")

        path = client.download(name, report)
        check(path.stat().st_size)
        return path


def bytes_text(count: float) -> str:
    """A number of bytes as people read it: ``44.7 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
