"""The errors that bdprune raises on purpose.

Each carries one sentence on what was wrong and, as ``hint``, one on what to do about it. The command line prints
both and turns the class into an exit code; nothing else in the package may end a program.
"""

from __future__ import annotations


class BdpruneError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what was wrong, in one sentence, with the value that was found.
        hint: what the reader can do about it, in one sentence; empty when there is nothing to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ArtifactError(BdpruneError):
    """A file is not a checkpoint that can be read safely: damaged, hostile, or of impossible size."""


class UnsupportedError(ArtifactError):
    """A file is no model checkpoint at all, or one of a format that bdprune does not read."""


class NoWeightsError(UnsupportedError):
    """A file can be read and holds no weights: the state of an optimiser or a scheduler, arguments, random state."""


class ArchitectureError(BdpruneError):
    """The architecture of a checkpoint is unknown or ambiguous, or its tensors do not fit it."""


class DataError(BdpruneError):
    """The clean data cannot be read or does not fit the model."""


class SanityError(DataError):
    """The model does not do its clean job on the clean data, so nothing that rests on them could be trusted."""


class OptionError(BdpruneError):
    """An option has a value that cannot work; the command line exits with its usage code."""


class OutputError(BdpruneError):
    """A result cannot be written where it was asked for."""


class TrainingError(BdpruneError):
    """An optimisation left the finite numbers and could not be brought back."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters of it: what fits into a message."""
    return (str(error).strip().splitlines() or [""])[0][:300]
