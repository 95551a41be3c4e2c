"""The errors that bdprune raises on purpose.

Each error states the problem in one sentence, and what to do about it in ``hint``. The command line prints both and
turns the class into an exit code; nothing else in the package may end a program.
"""

from __future__ import annotations


class BdpruneError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what was wrong, in one sentence, with the value that was found.
        hint: what the reader can do about it, in one sentence; empty if there is nothing to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ArtifactError(BdpruneError):
    """A file cannot be read safely as a checkpoint: it is damaged, hostile, or of impossible size."""


class UnsupportedError(ArtifactError):
    """A file is not a model checkpoint, or its format is not supported."""


class NoWeightsError(UnsupportedError):
    """A readable file without weights: the state of an optimiser or a scheduler, arguments, random state."""


class HubError(ArtifactError):
    """A repository on the Hugging Face Hub, or a file in it, does not exist or cannot be downloaded."""


class ArchitectureError(BdpruneError):
    """The architecture of a checkpoint is unknown or ambiguous, or its tensors do not fit it."""


class DataError(BdpruneError):
    """The clean data cannot be read or does not fit the model."""


class SanityError(DataError):
    """The model's accuracy on the clean data is too low to trust any result that depends on them."""


class OptionError(BdpruneError):
    """An option has an invalid value; the command line exits with its usage code."""


class OutputError(BdpruneError):
    """A result cannot be written to the requested place."""


class StoreError(OutputError):
    """A store of results cannot be opened, read or written."""


class TrainingError(BdpruneError):
    """An optimisation produced NaN or infinite values and could not recover."""


class BudgetError(BdpruneError):
    """The time of the budget does not suffice for a piece of work, which was not done or not finished."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters of it, for use in a message."""
    return (str(error).strip().splitlines() or [""])[0][:300]
