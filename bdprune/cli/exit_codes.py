"""The exit codes of the command line, for pipelines that act on them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

from bdprune import errors
from bdprune.record import InspectResult, PurifyResult, Result, ScreenResult

OK = 0
FOUND = 1
FAILED = 2
UNSUPPORTED = 3
USAGE = 4
INCONCLUSIVE = 5
INTERRUPTED = 130
BROKEN_PIPE = 141

CODES: Mapping[int, str] = {
    OK: "every model was scanned, and none reached --fail-on",
    FOUND: "at least one model reached --fail-on; or a repaired model still shows a sign of the backdoor",
    FAILED: "at least one scan failed or timed out",
    UNSUPPORTED: "no supported file was scanned",
    USAGE: "usage error, or an output that cannot be written",
    INCONCLUSIVE: "at least one model could not be judged; or, without --skip-unknown, a file that may hold weights "
    "was not scanned; or a repair could not be verified, or left a set of weights as it was",
    INTERRUPTED: "interrupted; no file is half-written",
    BROKEN_PIPE: "the reader of standard output closed it",
}
"""What each code means."""

ORDER = "If several apply, the first of 4, 1, 2, 5, 3, 0 wins."
"""Which code is returned where several apply."""


def _help(code: int, meaning: str) -> str:
    return textwrap.fill(meaning, 108, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)


HELP = "\n".join(["\b", "Exit codes:", *(_help(*one) for one in CODES.items()), ORDER])
"""The table as the last lines of ``--help``."""

_OF_IMAGES = {
    OK: "every image was judged, and none reached --fail-on",
    FOUND: "at least one image reached --fail-on",
    FAILED: "the model or the images could not be read",
    USAGE: CODES[USAGE],
    INCONCLUSIVE: "at least one image could not be judged, or the model labels too few clean images correctly",
}
IMAGES_HELP = "\n".join(["\b", "Exit codes:", *(_help(*one) for one in _OF_IMAGES.items())])
"""The table of an inspection of images."""

_SCREEN_ORDER = "If several apply, the first of 4, 1, 2, 5, 3, 0 wins."
_OF_SCREENS = {
    OK: "every file was screened, and none reached --fail-on; this is no verdict that a model is clean",
    FOUND: "at least one model needs a closer look",
    FAILED: "at least one file could not be screened",
    UNSUPPORTED: "no supported file was screened",
    USAGE: CODES[USAGE],
    INCONCLUSIVE: "a file that may hold weights was not screened",
}
SCREEN_HELP = "\n".join(["\b", "Exit codes:", *(_help(*one) for one in _OF_SCREENS.items()), _SCREEN_ORDER])
"""The table of a screen."""

FailOn = Literal["suspicious", "backdoored", "never"]


def of_scan(
    results: Sequence[Result],
    fail_on: FailOn = "suspicious",
    exit_zero: bool = False,
    *,
    unknown: bool = False,
    skip_unknown: bool = False,
) -> int:
    """The code for these results: the first that applies of 1, 2, 5, 3 and 0.

    Args:
        unknown: whether the scan skipped a file that may hold weights.
        skip_unknown: ignore files in unsupported formats if another file was scanned.
    """
    if exit_zero:
        return OK
    failing = {"suspicious": ("suspicious", "backdoored"), "backdoored": ("backdoored",), "never": ()}[fail_on]
    if {result.verdict for result in results} & set(failing):
        return FOUND
    supported = [result for result in results if not _is_unsupported(result)]
    if not supported:
        return UNSUPPORTED
    verdicts = {result.verdict for result in supported}
    if "error" in verdicts:
        return FAILED
    unknown = (unknown or len(supported) < len(results)) and not skip_unknown
    return INCONCLUSIVE if "inconclusive" in verdicts or unknown else OK


def of_repair(results: Sequence[PurifyResult]) -> int:
    """The code for the repairs of all sets of weights in a file: the first that applies of 1, 5 and 0."""
    outcomes = {one.outcome for one in results}
    if "unrepaired" in outcomes:
        return FOUND
    return INCONCLUSIVE if "unverified" in outcomes or any(one.left for one in results) else OK


InspectFailOn = Literal["suspicious", "excess", "never"]
EXCESS = 0.01
"""More suspicious images than clean ones explain: the largest probability of that many among clean images."""


def of_inspection(result: InspectResult, fail_on: InspectFailOn = "suspicious") -> int:
    """The code for the verdicts on images."""
    by_chance = fail_on == "excess" and result.chance is not None and result.chance > EXCESS
    if result.suspicious and fail_on != "never" and not by_chance:
        return FOUND
    return INCONCLUSIVE if result.unknown else OK


ScreenFailOn = Literal["look-closer", "never"]


def kind_of_screen(result: ScreenResult) -> str:
    """The outcome of a screen for :func:`of_screens`; ``unsupported`` for a file that is not a checkpoint."""
    return "unsupported" if _is_unsupported(result) else result.outcome


def of_screens(counts: Mapping[str, int], fail_on: ScreenFailOn = "look-closer", *, unknown: bool = False) -> int:
    """The code for screens, of which only the number of each kind is known: the first that applies of 1, 2, 5, 3, 0.

    Args:
        unknown: whether a file that may hold weights was skipped.
    """
    if counts.get("look closer") and fail_on != "never":
        return FOUND
    if not any(count for kind, count in counts.items() if kind != "unsupported"):
        return UNSUPPORTED
    if counts.get("error") or counts.get("unsupported"):
        return FAILED
    return INCONCLUSIVE if unknown else OK


def of_error(error: errors.BdpruneError) -> int:
    """The code for a command that ended with ``error``."""
    if isinstance(error, errors.OptionError | errors.OutputError):
        return USAGE
    if isinstance(error, errors.SanityError):
        return INCONCLUSIVE
    return UNSUPPORTED if isinstance(error, errors.UnsupportedError) else FAILED


def _is_unsupported(result: Result | ScreenResult) -> bool:
    unsupported = (errors.UnsupportedError.__name__, errors.NoWeightsError.__name__)
    return result.error is not None and result.error.type in unsupported
