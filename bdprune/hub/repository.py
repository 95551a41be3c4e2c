"""What a name of the Hub stands for: the checkpoints to scan, and the files that are left out, with reasons."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from bdprune.errors import ArtifactError, HubError, OptionError, UnsupportedError
from bdprune.files import MAX_INDEX_BYTES, description_path, shard_names
from bdprune.hub import client
from bdprune.hub.choice import chosen, is_index
from bdprune.hub.file import HubFile, bytes_text
from bdprune.hub.names import PREFIX, HubName, parse_name

MOST_BYTES = 10 << 30
"""How many bytes of one repository may be downloaded unless the user allows more."""


@dataclass(frozen=True)
class Listed:
    """The files that a name stands for, at one commit.

    Attributes:
        files: the checkpoints, in order.
        count: number of all files that were looked at, also of those in ``skipped``.
        skipped: (reason, whether it may hold weights) -> names of files.
        download: bytes that the cache does not hold.
        cache: the folder where files go.
    """

    files: tuple[HubFile, ...]
    count: int
    skipped: Mapping[tuple[str, bool], Sequence[str]]
    download: int
    cache: str

    @property
    def unscanned(self) -> list[str]:
        """Names of skipped files that may hold weights, with the reason."""
        return [
            f"{name} ({reason})" for (reason, possible), names in self.skipped.items() if possible for name in names
        ]


def listed(text: str, limit: int | None = None) -> Listed:
    """The files that ``text`` stands for. The revision becomes a commit, so that no file changes afterwards.

    Only indices of shards are downloaded here.

    Args:
        text: ``hf:ORG/NAME[@REVISION][/FILE]``.
        limit: maximum number of bytes to download; None is ``MOST_BYTES``.

    Raises:
        OptionError: the name is invalid, more would be downloaded, or ``huggingface_hub`` is not installed.
        HubError: the repository, the revision or the file does not exist or cannot be read.
        UnsupportedError: there are no checkpoints.
    """
    name = parse_name(text)
    tree = client.tree_of(name)
    choice = chosen(sorted(tree.sizes), name.file)
    if not choice.files:
        raise _nothing(name, choice.skipped)
    start = f"{PREFIX}{name.repo}@{tree.commit}/"
    parts = {path: _parts(HubName(name.repo, tree.commit, path), tree.sizes) for path in choice.files}
    shards = {part for path, more in parts.items() for part in more if part != path}
    files = tuple(
        HubFile(f"{start}{path}", name.repo, tree.commit, {one: tree.sizes[one] for one in (path, *parts[path])})
        for path in choice.files
        if path not in shards
    )
    skipped = {reason: [f"{start}{path}" for path in paths] for reason, paths in choice.skipped.items()}
    count = len({*choice.files, *shards}) + sum(map(len, skipped.values()))
    missing = {one: file.sizes[one.file] for file in files for one in file.names() if not client.is_cached(one)}
    _check_limit(name, sum(missing.values()), MOST_BYTES if limit is None else limit)
    return Listed(files, count, skipped, sum(missing.values()), client.cache_folder())


def one_file(text: str, limit: int | None = None) -> HubFile:
    """The only checkpoint that ``text`` stands for.

    Raises:
        OptionError: it stands for several; and the errors of :func:`listed`.
    """
    files = listed(text, limit).files
    if len(files) > 1:
        names = ", ".join(next(iter(one.sizes)) for one in files[:5]) + (", ..." if len(files) > 5 else "")
        hint = f"Name one of them, as in {files[0].name}."
        raise OptionError(f"{text} holds {len(files)} checkpoints: {names}.", hint)
    return files[0]


def _parts(name: HubName, sizes: Mapping[str, int]) -> list[str]:
    """What is read with a file: the shards of an index, the description of a compact network."""
    described = str(description_path(PurePosixPath(name.file)))
    found = [described] if described in sizes else []
    if not is_index(name.file) or sizes[name.file] > MAX_INDEX_BYTES:
        return found
    index = HubFile("", name.repo, name.revision or "", {name.file: sizes[name.file]}).fetch()
    try:
        names = shard_names(index.read_bytes())
    except (OSError, ArtifactError):
        return found  # loading the index raises the error
    folder = posixpath.dirname(name.file)
    shards = [posixpath.join(folder, shard) for shard in dict.fromkeys(names.values())]
    return found + [path for path in shards if path in sizes]


def _check_limit(name: HubName, needed: int, limit: int) -> None:
    if needed > limit:
        raise OptionError(
            f"{name.repo} needs a download of {bytes_text(needed)}, more than the limit of {bytes_text(limit)}.",
            "Allow more with --max-download, or name single files.",
        )


def _nothing(name: HubName, skipped: Mapping[tuple[str, bool], Sequence[str]]) -> HubError | UnsupportedError:
    if name.file:
        return HubError(f"{name.repo} has no checkpoint {name.file!r}.", "Check the name of the file or the pattern.")
    found = ", ".join(f"{reason} ({len(paths)})" for (reason, _), paths in sorted(skipped.items())[:5])
    return UnsupportedError(
        f"No checkpoint in {PREFIX}{name.repo}. Found {found or 'no files'}.",
        "Give a repository with a checkpoint saved with torch.save or as safetensors.",
    )
