"""Finds the models to scan below the paths of a command, and records which files it skips and why.

The content of a file decides whether it is a model; of a file on the Hugging Face Hub, it is the name. Each skipped
file is marked if it may hold weights.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from bdprune.errors import ArtifactError, BdpruneError, OptionError
from bdprune.files import APPLE_DOUBLE, INDEX, MAX_INDEX_BYTES, SPECIAL, SUFFIXES, is_shard, kind_of_file, shard_names
from bdprune.hub import HubFile, Listed, is_hub_name, listed, parse_name
from bdprune.record import CoverageResult, PassedOver

Source: TypeAlias = Path | HubFile
"""A model of a command: a local file, or a file on the Hub."""

_NO_MODELS = {
    ".git": "a folder of version control",
    ".hg": "a folder of version control",
    ".svn": "a folder of version control",
    "__pycache__": "compiled Python",
}
_MOST_NAMED = 100
_REQUESTS = 8  # repositories that are listed at a time
ANOTHER_NAME = "another name of a file that is scanned"
_UNREADABLE_LINK = "a link that cannot be read"


@dataclass
class Sources:
    """The files that were found: models in order, and skipped files by reason.

    Attributes:
        models: checkpoints and indices of shards, without repeats; those on the Hub come last.
        files: number of files; a skipped folder counts as one.
        parts: number of files of a model, of those in ``files``.
        skipped: (reason, whether it may hold weights) -> paths.
    """

    models: list[Source] = field(default_factory=list)
    files: int = 0
    parts: dict[Source, int] = field(default_factory=dict)
    skipped: dict[tuple[str, bool], list[Source]] = field(default_factory=dict)

    @property
    def local(self) -> list[Path]:
        """The models on this machine."""
        return [path for path in self.models if isinstance(path, Path)]

    def skip(self, path: Source, reason: str, may_hold_weights: bool = False) -> None:
        """Records that ``path`` is skipped."""
        self.skipped.setdefault((reason, may_hold_weights), []).append(path)

    @property
    def may_hold_weights(self) -> bool:
        """Whether a skipped file may hold weights."""
        return any(possible for _, possible in self.skipped)

    def keep_shard(self, part: int, parts: int) -> None:
        """Keeps one of ``parts`` shards of the models, numbered from 1. The hash of a model's name gives its shard,
        for a file on the Hub without the commit.

        Raises:
            OptionError: there is no such shard.
        """
        if not 1 <= part <= parts:
            raise OptionError(f"There is no shard {part} of {parts}.", "Give i/n with i from 1 to n, as in 2/8.")
        mine = {path: _hash(path) % parts == part - 1 for path in self.models}
        self.files -= sum(self.parts.get(path, 1) for path, is_mine in mine.items() if not is_mine)
        self.models = [path for path, is_mine in mine.items() if is_mine]

    def record(self) -> CoverageResult | None:
        """The coverage for the report; None if no file was skipped."""
        if not self.skipped:
            return None
        groups = sorted(self.skipped.items(), key=lambda item: (not item[0][1], item[0][0]))
        return CoverageResult(
            files=self.files,
            scanned=self.files - sum(map(len, self.skipped.values())),
            passed_over=tuple(
                PassedOver(
                    reason=reason,
                    may_hold_weights=possible,
                    count=len(paths),
                    paths=tuple(map(str, paths[: None if possible else _MOST_NAMED])),
                )
                for (reason, possible), paths in groups
            ),
        )


def expand(
    paths: Sequence[str | Path],
    ignored: Iterable[Path] = (),
    max_download: int | None = None,
    note: Callable[[str, Listed], None] | None = None,
    may_miss: bool = False,
) -> Sources:
    """The models that ``paths`` name, and the skipped files.

    A single file always counts as a model. In a folder (with all folders below it, links followed), in the matches of
    a glob and among several paths, the content decides whether a file is a model. Shards and their index are one
    model, and a file with several names is one file.

    Args:
        paths: files, folders, globs, and names of repositories on the Hub (``hf:ORG/NAME``) as texts. A repository
            among several paths that cannot be listed becomes a model whose loading raises the error.
        ignored: files with another role in the run, such as the clean data.
        max_download: maximum number of bytes to download from one repository; None is the default.
        note: called with the name and the files of each repository.
        may_miss: a path that does not exist, such as one of a list, becomes a model that cannot be loaded.

    Raises:
        OptionError: a path does not exist, a glob matches nothing, or the only path is an ignored file.
        BdpruneError: the only path is a repository that cannot be listed.
    """
    sources = Sources()
    hidden = {_real(path) for path in ignored} - {None}
    alone = len(paths) == 1
    candidates: list[Path] = []
    remote = list(dict.fromkeys(path for path in paths if is_hub_name(path)))
    for path in dict.fromkeys(str(path) for path in paths if not is_hub_name(path)):
        if may_miss and not _is_there(path) and not (glob.has_magic(path) and glob.glob(path, recursive=True)):
            sources.files += 1
            candidates.append(Path(path))  # loading it fails; the others are scanned
            continue
        for file, chosen in _files(path, sources):
            sources.files += 1
            real = _real(file)
            if real is None:
                sources.skip(file, _UNREADABLE_LINK, True)
            elif real in hidden:
                if chosen and alone:
                    raise OptionError(f"{path} is given as the model and as --data.", "Give two different files.")
                sources.skip(file, "the clean data of this scan")
            elif (chosen and alone) or _is_model(file, sources):
                candidates.append(file)
    sources.parts |= Counter(_by_index(candidates, alone, sources))
    sources.models = [*_without_repeats([path for path in sources.parts if isinstance(path, Path)], sources)]
    _add_remote(remote, alone, sources, max_download, note)
    return sources


def _is_there(path: str) -> bool:
    """Whether ``path`` exists; a link that leads nowhere does not."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _add_remote(
    names: Sequence[str],
    alone: bool,
    sources: Sources,
    max_download: int | None,
    note: Callable[[str, Listed], None] | None,
) -> None:
    """Adds the files of repositories on the Hub."""
    seen: set[str] = set()
    with ThreadPoolExecutor(_REQUESTS) as pool:
        for name, found in zip(names, pool.map(partial(_listed, limit=max_download), names), strict=True):
            if isinstance(found, BdpruneError):
                if alone:
                    raise found
                sources.files += 1
                sources.models.append(HubFile(name, error=found))
                continue
            sources.files += found.count
            for (reason, possible), files in found.skipped.items():
                for file in files:
                    sources.skip(HubFile(file), reason, possible)
            for model in found.files:
                if model.name in seen:
                    sources.skip(model, ANOTHER_NAME)
                else:
                    sources.models.append(model)
                    sources.parts[model] = len(model.sizes)
                seen.add(model.name)
            if note is not None:
                note(name, found)


def _listed(name: str, limit: int | None) -> Listed | BdpruneError:
    try:
        return listed(name, limit)
    except BdpruneError as error:
        return error


def _hash(path: Source) -> int:
    name = path.place.encode(errors="surrogateescape") if isinstance(path, HubFile) else os.fsencode(path)
    return int.from_bytes(hashlib.sha256(name).digest()[:8])


def check_exists(path: str | Path) -> None:
    """Checks that ``path`` exists; of a name on the Hub, only that it is valid.

    Raises:
        OptionError: it does not exist, or it cannot be accessed.
    """
    if is_hub_name(path):
        parse_name(path)
        return
    try:
        os.stat(path)
    except OSError as error:
        raise _path_error(path, error) from error


def _files(path: str, sources: Sources) -> Iterator[tuple[Path, bool]]:
    """The files that ``path`` names, each with whether ``path`` is the file itself."""
    if glob.has_magic(path) and not os.path.exists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise OptionError(f"No file matches {path!r}.", "Check the pattern.")
        for match in matches:
            for file in _below(Path(match), sources):
                yield file, False
        return
    check_exists(Path(path))
    is_folder = os.path.isdir(path)
    for file in _below(Path(path), sources):
        yield file, not is_folder


def _below(path: Path, sources: Sources) -> Iterator[Path]:
    """``path`` itself, or all files below it, sorted; it follows links and detects loops."""
    if not os.path.isdir(path):
        yield path
        return
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        sources.skip(Path(error.filename), f"a folder that cannot be read: {error.strerror}", True)
        sources.files += 1

    for parent, folders, names in os.walk(path, onerror=fail, followlinks=True):
        try:
            place = os.stat(parent)
        except OSError as error:
            fail(error)
            folders.clear()
            continue
        if (place.st_dev, place.st_ino) in seen:
            sources.skip(Path(parent), "a link to a folder that is scanned")
            sources.files += 1
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        reasons = {name: _NO_MODELS.get(name) or _is_of_store(parent, name) for name in folders}
        for name in [name for name in folders if reasons[name]]:
            sources.skip(Path(parent, name), reasons[name])
            sources.files += 1
        folders[:] = sorted(name for name in folders if not reasons[name])
        found += [Path(parent, name) for name in names]
    yield from sorted(found)


def _is_of_store(parent: str, name: str) -> str:
    """Why a folder holds no models if it is that of a store's attachments; empty if it is another folder."""
    store = Path(parent, name.removesuffix(".attachments"))
    is_store = name.endswith(".attachments") and store.is_file() and kind_of_file(store).name == "an SQLite database"
    return "the attachments of a store" if is_store else ""


def _is_model(file: Path, sources: Sources) -> bool:
    """Whether to load ``file``; otherwise it records the file as skipped, with the reason."""
    kind = kind_of_file(file)
    # A file with a checkpoint's suffix is always loaded: a broken link or a failed download must cause an error.
    promised = file.suffix.lower() in SUFFIXES and kind not in (SPECIAL, APPLE_DOUBLE)
    if kind.weights == "checkpoint" or promised:
        return True
    sources.skip(file, kind.name, kind.weights == "possible")
    return False


def _by_index(candidates: Sequence[Path], alone: bool, sources: Sources) -> list[Path]:
    """The model that each candidate belongs to: of a shard its index, else the candidate itself."""
    indices = [path for path in candidates if kind_of_file(path) == INDEX]
    if not alone or len(candidates) > 1 or sources.files > 1:
        folders = {path.parent for path in candidates if is_shard(path)}
        indices += [path for folder in folders for path in folder.glob("*.index.json") if kind_of_file(path) == INDEX]
    home = {shard: index for index in dict.fromkeys(indices) for shard in _shards(index)}
    return [home.get(path, path) for path in candidates]


def _shards(index: Path) -> list[Path]:
    try:
        with index.open("rb") as file:
            names = shard_names(file.read(MAX_INDEX_BYTES))
    except (OSError, ArtifactError):
        return []  # loading the index raises the error
    return [index.parent / name for name in dict.fromkeys(names.values())]


def _without_repeats(candidates: Sequence[Path], sources: Sources) -> list[Path]:
    """One path for each file; in a Hugging Face cache, links point to files in the same folder."""
    parts = {_real(part) for path in candidates if kind_of_file(path) == INDEX for part in _shards(path)}
    best: dict[str, Path] = {}
    for path in candidates:
        real = _real(path) or str(path)
        if real not in best or _preference(path) > _preference(best[real]):
            best[real] = path
    chosen = {path for real, path in best.items() if real not in parts}
    for path in candidates:
        if path not in chosen:
            sources.skip(path, ANOTHER_NAME)
    return [path for path in candidates if path in chosen]


def _preference(path: Path) -> int:
    """Ranks several names of a file: first an index among its shards, then a name with a checkpoint's suffix."""
    if kind_of_file(path) == INDEX:
        return 2 if all(os.path.exists(shard) for shard in _shards(path)) else 0
    return int(path.suffix.lower() in SUFFIXES)


def _real(path: str | Path) -> str | None:
    """The path with all links resolved; None if a link on it cannot be read, such as ``/proc/1/cwd``."""
    try:
        return os.path.realpath(path)
    except OSError:
        return None


def _path_error(path: str | Path, error: OSError) -> OptionError:
    if isinstance(error, FileNotFoundError):
        return OptionError(f"There is no file or folder {str(path)!r}.", "Check the path.")
    return OptionError(f"{str(path)[:200]!r} cannot be read: {error.strerror}.", "Check the path and its permissions.")
