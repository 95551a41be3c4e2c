"""Models on the Hugging Face Hub in a run: names become files, and each file is downloaded before it is scanned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import msgspec

from bdprune.errors import BdpruneError, OptionError
from bdprune.hub import HubFile, listed
from bdprune.pipeline import Progress
from bdprune.record import Finding, Result, some
from bdprune.verdict import NOT_SCANNED


def _no_model(value: object) -> HubFile:
    """A value that is neither a path nor a model, as a model that fails when it is loaded."""
    error = OptionError(f"{value!r:.80} is no model.", "Give a path, a module or a loaded model.")
    return HubFile(f"{value!r:.80}", error=error)


class RemoteModels:
    """The files of repositories on the Hub in one run.

    Args:
        limit: maximum number of bytes to download from one repository; None is the default.
        progress: called with a short text before each stage.
    """

    def __init__(self, limit: int | None, progress: Progress) -> None:
        self._limit, self._progress = limit, progress
        self._unscanned: dict[str, list[str]] = {}

    def sources(self, model: object) -> Iterator[HubFile]:
        """The downloaded files that ``model`` stands for; for a value that is no model, one that fails."""
        if isinstance(model, HubFile):
            return map(self.fetched, [model])
        return map(self.fetched, self.files(model) if isinstance(model, str) else [_no_model(model)])

    def files(self, name: str) -> Sequence[HubFile]:
        """The files that ``name`` stands for. If it cannot be listed, one that fails when it is loaded."""
        self._progress(f"listing {name}")
        try:
            found = listed(name, self._limit)
        except BdpruneError as error:
            return [HubFile(name, error=error)]
        self._unscanned |= {one.name: found.unscanned for one in found.files}
        return found.files

    def fetched(self, file: HubFile) -> HubFile:
        """The same file, downloaded. If that fails, it fails again when it is loaded.

        This happens in the process that started the run: a time limit is for the scan alone.
        """
        with contextlib.suppress(BdpruneError):  # the file keeps the error
            file.fetch(self._progress)
        return file

    def explained(self, result: Result) -> Result:
        """The result, with a finding if its repository holds files that were not scanned and may hold weights."""
        unscanned = self._unscanned.get(result.artifact.path) if result.artifact else None
        if not unscanned:
            return result
        message = f"These files of the repository were not scanned: {some(unscanned)}."
        finding = Finding(rule_id=NOT_SCANNED.id, severity="medium", message=message)
        return msgspec.structs.replace(result, findings=(*result.findings, finding))
