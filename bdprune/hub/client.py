"""The calls of ``huggingface_hub``, with its errors in plain words. Nothing else in bdprune imports it.

Files go to the cache of the Hub, and ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and the other variables of
``huggingface_hub`` hold. Nothing that is downloaded is executed.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdprune.errors import BdpruneError, HubError, OptionError, first_line
from bdprune.hub.names import HubName

_INSTALL = "Install it: pip install 'bdprune[hub]'."
_OLDEST = (1, 3)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_CHECK_ENDPOINT = "Check HF_ENDPOINT if it is set."
_PATIENCE = 60.0  # seconds to wait for the list of files
_EVERY = 0.1  # seconds between two reports of a download

Report = Callable[[int], None]
"""Called with the number of bytes that were received so far."""


@dataclass(frozen=True)
class Tree:
    """The files of a repository at one commit: path -> bytes."""

    commit: str
    sizes: dict[str, int]


def tree_of(name: HubName) -> Tree:
    """The files at the commit to which the revision leads now.

    Raises:
        HubError: there is no such repository or revision, it is private, or the Hub cannot be reached.
        OptionError: ``huggingface_hub`` is not installed.
    """
    api = _library().HfApi(library_name="bdprune")
    try:
        # The other calls that list files have no time limit.
        found = api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=_PATIENCE)
        if not isinstance(found.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", found.sha):
            raise HubError(f"The Hub names no commit of {name.repo}.", _CHECK_ENDPOINT)
        # A name that is no Unicode text gets question marks, and so cannot be downloaded.
        sizes = {one.rfilename.encode(errors="replace").decode(): one.size for one in found.siblings or ()}
        if not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
            raise HubError(f"The Hub does not name the sizes of the files of {name.repo}.", _CHECK_ENDPOINT)
        return Tree(found.sha, sizes)
    except BdpruneError:
        raise
    except Exception as error:
        raise _explained(error, name) from error


def download(name: HubName, report: Report) -> Path:
    """The local path of a file, whose revision is a commit; it is downloaded if the cache does not hold it.

    Raises:
        HubError: the file cannot be downloaded.
    """
    hub = _library()
    more = {"library_name": "bdprune", "tqdm_class": _bar(hub, report)}
    try:
        return Path(hub.hf_hub_download(name.repo, name.file, revision=name.revision, **more))
    except BdpruneError:
        raise
    except Exception as error:
        raise _explained(error, name) from error


def is_cached(name: HubName) -> bool:
    """Whether the cache holds a file, whose revision is a commit."""
    found = _library().try_to_load_from_cache(name.repo, name.file, cache_dir=cache_folder(), revision=name.revision)
    return isinstance(found, str)


def cache_folder() -> str:
    """Where the files go."""
    _library()
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise OptionError("Models on the Hugging Face Hub need huggingface_hub.", _INSTALL) from None
    version = str(huggingface_hub.__version__)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        raise OptionError(f"huggingface_hub {version} is too old.", _INSTALL)
    return huggingface_hub


def _bar(hub: Any, report: Report) -> type:
    """A progress bar that draws nothing and reports instead."""

    class Bar(hub.utils.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"disable": True}))
            self._got, self._last = int(settings.get("initial") or 0), 0.0

        def update(self, n: float | None = 1) -> None:
            self._got += int(n or 0)
            now = time.monotonic()
            if now - self._last >= _EVERY:
                self._last = now
                report(self._got)

    return Bar


def _explained(error: Exception, name: HubName) -> HubError:
    """What went wrong, and what to do."""
    from huggingface_hub import constants, errors

    what = f"{name.file} of {name.repo}" if name.file else name.repo
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the reason why the Hub did not answer
    if isinstance(error, errors.GatedRepoError):
        hint = f"Ask for access on the page of the repository; then {_LOG_IN}."
        return HubError(f"Access to {name.repo} is restricted.", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{name.repo} has no revision {name.revision!r}.", "Give a branch, a tag or a commit of it.")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"Access to {name.repo} is disabled by the Hub.", "Choose another repository.")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"Check the name. For a private repository, {_LOG_IN}."
        return HubError(f"There is no repository {name.repo}, or it is private.", hint)
    if isinstance(error, errors.HFValidationError):
        return HubError(f"The Hub does not accept the name {name.repo}.", "Give hf:ORG/NAME.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"{what} cannot be read: HF_HUB_OFFLINE is set.", "Unset it, or give a local file.")
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(error.response.status_code, what)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        hint = f"Files go to {constants.HF_HUB_CACHE}; HF_HOME or HF_HUB_CACHE names another folder."
        return HubError(f"{what} cannot be stored: {error.strerror}.", hint)
    hint = "Check the network, and HF_ENDPOINT and the proxy if they are set."
    if any(word in type(error).__name__ for word in ("Connect", "Proxy", "Network")):
        return HubError(f"{constants.ENDPOINT} cannot be reached for {what}: {_text(error)}.", hint)
    if name.file:
        return HubError(f"The download of {what} broke off: {_text(error)}.", "Run the same command again.")
    return HubError(f"{constants.ENDPOINT} gives no list of the files of {what}: {_text(error)}.", hint)


def _of_status(status: int, what: str) -> HubError:
    if status in (401, 403):
        return HubError(f"Access to {what} is denied (HTTP {status}).", f"Check the token; {_LOG_IN}.")
    if status == 404:
        return HubError(f"There is no {what} on the Hub.", "Check the name.")
    if status == 429:
        return HubError(f"The Hub limits the number of requests (HTTP 429), at {what}.", "Try again later.")
    return HubError(f"The Hub failed with HTTP {status} at {what}.", "Try again later.")


def _text(error: Exception) -> str:
    return (first_line(error) or type(error).__name__).rstrip(".")
