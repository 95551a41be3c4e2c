"""From what was typed to the models that will be scanned, and to what is passed over and why.

Files are known by their content. What could hold weights and is not read is told apart from what holds none.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bdprune.errors import ArtifactError, OptionError
from bdprune.files import APPLE_DOUBLE, INDEX, MAX_INDEX_BYTES, SPECIAL, is_shard, kind_of_file, shard_names
from bdprune.record import CoverageResult, PassedOver

SUFFIXES = (".pt", ".pth", ".th", ".tar", ".ckpt", ".bin", ".pkl", ".safetensors")
"""Names that promise a checkpoint: a file with one is always read, so that a damaged one is noticed."""

_NO_MODELS = {
    ".git": "a folder of version control",
    ".hg": "a folder of version control",
    ".svn": "a folder of version control",
    "__pycache__": "compiled Python",
}
_MOST_NAMED = 100
ANOTHER_NAME = "another name of a file that is scanned"


@dataclass
class Sources:
    """What was found: models in order, and everything else by reason.

    Attributes:
        models: checkpoints and indices of shards, without repeats.
        files: number of files that were found; a folder that is passed over counts as one.
        passed_over: (reason, whether it may hold weights) -> paths.
    """

    models: list[Path] = field(default_factory=list)
    files: int = 0
    passed_over: dict[tuple[str, bool], list[Path]] = field(default_factory=dict)

    def pass_over(self, path: Path, reason: str, may_hold_weights: bool = False) -> None:
        """Remembers that ``path`` is not scanned."""
        self.passed_over.setdefault((reason, may_hold_weights), []).append(path)

    @property
    def may_hold_weights(self) -> bool:
        """Whether something that was passed over may hold weights."""
        return any(possible for _, possible in self.passed_over)

    def record(self) -> CoverageResult | None:
        """What the report says of it; None where nothing was passed over."""
        if not self.passed_over:
            return None
        groups = sorted(self.passed_over.items(), key=lambda item: (not item[0][1], item[0][0]))
        return CoverageResult(
            files=self.files,
            scanned=self.files - sum(map(len, self.passed_over.values())),
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


def expand(paths: Sequence[str | Path], ignored: Iterable[Path] = ()) -> Sources:
    """The models that ``paths`` name, and what is passed over.

    A single file is a model whatever it holds. In a folder (with all folders below it, links followed), in the matches
    of a glob and where several paths are given, files are told by their content. Shards are one model by their index,
    and a file that several names lead to is one file.

    Args:
        paths: files, folders and globs.
        ignored: files that have another part in the run, such as the clean data.

    Raises:
        OptionError: something was named that does not exist.
    """
    sources = Sources()
    hidden = {os.path.realpath(path) for path in ignored}
    alone = len(paths) == 1
    candidates: list[Path] = []
    for path in map(str, paths):
        for file, chosen in _files(path, sources):
            sources.files += 1
            if os.path.realpath(file) in hidden:
                sources.pass_over(file, "the clean data of this scan")
            elif (chosen and alone) or _is_model(file, sources):
                candidates.append(file)
    sources.models = _without_repeats(_by_index(candidates, alone, sources), sources)
    return sources


def check_exists(path: str | Path) -> None:
    """Makes sure that there is something at ``path``.

    Raises:
        OptionError: there is nothing, or nothing that may be looked at.
    """
    try:
        os.stat(path)
    except OSError as error:
        raise _lost(path, error) from error


def _files(path: str, sources: Sources) -> Iterator[tuple[Path, bool]]:
    """Files that ``path`` names, each with whether it was named itself."""
    if glob.has_magic(path) and not os.path.exists(path):
        for match in sorted(glob.glob(path, recursive=True)):
            for file in _below(Path(match), sources):
                yield file, False
        return
    check_exists(path)
    is_folder = os.path.isdir(path)
    for file in _below(Path(path), sources):
        yield file, not is_folder


def _below(path: Path, sources: Sources) -> Iterator[Path]:
    """``path`` itself, or all files below the folder that it is, sorted; links are followed, loops are found."""
    if not path.is_dir():
        yield path
        return
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        sources.pass_over(Path(error.filename), f"a folder that cannot be read: {error.strerror}", True)
        sources.files += 1

    for parent, folders, names in os.walk(path, onerror=fail, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:
            sources.pass_over(Path(parent), "a link to a folder that is scanned")
            sources.files += 1
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        for name in [name for name in folders if name in _NO_MODELS]:
            sources.pass_over(Path(parent, name), _NO_MODELS[name])
            sources.files += 1
        folders[:] = sorted(name for name in folders if name not in _NO_MODELS)
        found += [Path(parent, name) for name in names]
    yield from sorted(found)


def _is_model(file: Path, sources: Sources) -> bool:
    """Whether ``file`` is to be loaded; what is not is remembered with the reason."""
    kind = kind_of_file(file)
    # A promised checkpoint is read whatever it holds: a link that leads nowhere or a failed download must be noticed.
    promised = file.suffix.lower() in SUFFIXES and kind not in (SPECIAL, APPLE_DOUBLE)
    if kind.weights == "checkpoint" or promised:
        return True
    sources.pass_over(file, kind.name, kind.weights == "possible")
    return False


def _by_index(candidates: Sequence[Path], alone: bool, sources: Sources) -> list[Path]:
    """Shards give way to the index that names them."""
    indices = [path for path in candidates if kind_of_file(path) == INDEX]
    if not alone or len(candidates) > 1 or sources.files > 1:
        folders = {path.parent for path in candidates if is_shard(path)}
        indices += [path for folder in folders for path in folder.glob("*.index.json") if kind_of_file(path) == INDEX]
    home = {shard: index for index in dict.fromkeys(indices) for shard in _shards(index)}
    return list(dict.fromkeys(home.get(path, path) for path in candidates))


def _shards(index: Path) -> list[Path]:
    try:
        with index.open("rb") as file:
            names = shard_names(file.read(MAX_INDEX_BYTES))
    except (OSError, ArtifactError):
        return []  # loading the index says what is wrong with it
    return [index.parent / name for name in dict.fromkeys(names.values())]


def _without_repeats(candidates: Sequence[Path], sources: Sources) -> list[Path]:
    """One path for each file: links inside of a Hugging Face cache lead to files that lie there as well."""
    parts = {os.path.realpath(part) for path in candidates if kind_of_file(path) == INDEX for part in _shards(path)}
    best: dict[str, Path] = {}
    for path in candidates:
        real = os.path.realpath(path)
        if real not in best or _preference(path) > _preference(best[real]):
            best[real] = path
    chosen = {path for real, path in best.items() if real not in parts}
    for path in candidates:
        if path not in chosen:
            sources.pass_over(path, ANOTHER_NAME)
    return [path for path in candidates if path in chosen]


def _preference(path: Path) -> int:
    """Which of several names of a file to scan: an index among its shards, then a name that promises a checkpoint."""
    if kind_of_file(path) == INDEX:
        return 2 if all(shard.exists() for shard in _shards(path)) else 0
    return int(path.suffix.lower() in SUFFIXES)


def _lost(path: str | Path, error: OSError) -> OptionError:
    if isinstance(error, FileNotFoundError):
        return OptionError(f"There is no file or folder {str(path)!r}.", "Check the path.")
    return OptionError(f"{str(path)[:200]!r} cannot be read: {error.strerror}.", "Check the path and its permissions.")
