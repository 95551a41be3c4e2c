"""Names of repositories on the Hugging Face Hub and of files in them: ``hf:ORG/NAME[@REVISION][/FILE]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeGuard

from bdprune.errors import OptionError

PREFIX = "hf:"

_PART = r"(?!\.)(?![\w.-]*(?:--|\.\.))[\w.-]{1,96}(?<![.-])"
_REVISION = r"refs/(?:pr|convert)/[\w.+-]+|[\w.+%-]+"
_NAME = re.compile(rf"hf:({_PART}/{_PART})(?:@({_REVISION}))?(?:/(.+))?", re.ASCII | re.DOTALL)
_AT_COMMIT = re.compile(rf"\A(hf:{_PART}/{_PART})@[0-9a-f]{{40}}/", re.ASCII)
_GIVE = "Give hf:ORG/NAME, hf:ORG/NAME@REVISION, or one of them with /FILE or a pattern such as /*.safetensors."


@dataclass(frozen=True)
class HubName:
    """A parsed name.

    Attributes:
        repo: ``ORG/NAME``.
        revision: a branch, tag or commit; None is the main branch.
        file: a file in the repository, or a glob; empty stands for all its checkpoints.
    """

    repo: str
    revision: str | None = None
    file: str = ""


def is_hub_name(source: object) -> TypeGuard[str]:
    """Whether ``source`` is a text that names something on the Hub; a ``Path`` always names a local file."""
    return isinstance(source, str) and source.startswith(PREFIX)


def without_commit(name: str) -> str:
    """The name of a file without its commit, which stays the same when a branch moves; other names as they are."""
    return _AT_COMMIT.sub(r"\1/", name)


def parse_name(text: str) -> HubName:
    """The parts of a name.

    In a revision, ``%2F`` stands for a slash, as in the addresses of the Hub.

    Raises:
        OptionError: it is no valid name.
    """
    found = _NAME.fullmatch(text)
    if found is None or not (found[3] is None or is_safe(found[3])):
        raise OptionError(f"Invalid name of a repository {text[:200]!r}.", _GIVE)
    revision = found[2] and re.sub("%2f", "/", found[2], flags=re.IGNORECASE)
    if revision and ("%" in revision or not is_safe(revision)):
        raise OptionError(f"Invalid revision in {text[:200]!r}.", "Give a branch, a tag or a commit.")
    return HubName(found[1], revision or None, found[3] or "")


def is_safe(path: str) -> bool:
    """Whether a path in a repository stays below it, and is the same path on every system."""
    return not set("\\\0") & set(path) and all(part not in ("", ".", "..") for part in path.split("/"))
