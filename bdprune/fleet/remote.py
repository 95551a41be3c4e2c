"""Models on the Hugging Face Hub in a run: names become files, and each file is downloaded before it is scanned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from torch import nn

from bdprune.errors import BdpruneError, OptionError
from bdprune.hub import PREFIX, HubFile, listed
from bdprune.model import Model
from bdprune.pipeline import ModelSource, Progress
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

    def sources(self, models: Iterable[ModelSource]) -> Iterator[ModelSource]:
        """The same models, with downloaded files in place of repositories."""
        for given in models:
            model = given if isinstance(given, str | os.PathLike | nn.Module | Model) else _no_model(given)
            if isinstance(model, HubFile):
                yield self.fetched(model)
            elif isinstance(model, str) and model.startswith(PREFIX):
                yield from map(self.fetched, self.files(model))
            else:
                yield model

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
