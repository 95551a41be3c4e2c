"""Exit codes and their priority."""

from __future__ import annotations

import itertools

import pytest

from bdprune import errors
from bdprune.cli import exit_codes
from bdprune.record import Env, ErrorInfo, Result

ENV = Env(
    tool="bdprune", version="0", torch="0", cuda=None, device="cpu", backend="native", threads=1, seed=0, python="3",
    platform="x",
)  # fmt: skip


def one(verdict: str, kind: str = "ArtifactError") -> Result:
    error = ErrorInfo(type=kind, message="m") if verdict == "error" else None
    return Result(
        started="", seconds=0, artifact=None, model=None, data=None, env=ENV, verdict=verdict, risk=None,  # type: ignore[arg-type]
        target_label=None, error=error,
    )  # fmt: skip


CLEAN, SUSPICIOUS, BACKDOORED = one("clean"), one("suspicious"), one("backdoored")
FAILED, UNSUPPORTED, INCONCLUSIVE = one("error"), one("error", "UnsupportedError"), one("inconclusive")


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([CLEAN], 0),
        ([SUSPICIOUS], 1),
        ([BACKDOORED], 1),
        ([FAILED], 2),
        ([UNSUPPORTED], 3),
        ([UNSUPPORTED, UNSUPPORTED], 3),
        ([], 3),
        ([INCONCLUSIVE], 5),
        ([CLEAN, UNSUPPORTED], 5),
        ([FAILED, UNSUPPORTED], 2),
        ([CLEAN, INCONCLUSIVE], 5),
        ([INCONCLUSIVE, FAILED], 2),
        ([FAILED, INCONCLUSIVE, BACKDOORED, CLEAN], 1),
    ],
)
def test_the_results_determine_the_exit_code(results: list[Result], code: int) -> None:
    for order in itertools.permutations(results):
        assert exit_codes.of_scan(order) == code


def test_unscanned_files_count_unless_they_may_be_skipped() -> None:
    assert exit_codes.of_scan([CLEAN], unknown=True) == 5
    assert exit_codes.of_scan([CLEAN], unknown=True, skip_unknown=True) == 0
    assert exit_codes.of_scan([CLEAN, UNSUPPORTED], skip_unknown=True) == 0
    assert exit_codes.of_scan([UNSUPPORTED], skip_unknown=True) == 3
    assert exit_codes.of_scan([INCONCLUSIVE], skip_unknown=True) == 5
    assert exit_codes.of_scan([BACKDOORED], unknown=True) == 1


def test_fail_on_changes_only_the_verdicts_that_fail() -> None:
    assert exit_codes.of_scan([SUSPICIOUS], "backdoored") == 0
    assert exit_codes.of_scan([BACKDOORED], "backdoored") == 1
    assert exit_codes.of_scan([BACKDOORED], "never") == 0
    assert exit_codes.of_scan([BACKDOORED, FAILED], "never") == 2
    assert exit_codes.of_scan([BACKDOORED, INCONCLUSIVE], "never") == 5


def test_exit_zero_accepts_all_results() -> None:
    for result in (SUSPICIOUS, BACKDOORED, FAILED, UNSUPPORTED, INCONCLUSIVE):
        assert exit_codes.of_scan([result], exit_zero=True) == 0


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.OptionError, 4),
        (errors.OutputError, 4),
        (errors.SanityError, 5),
        (errors.UnsupportedError, 3),
        (errors.ArtifactError, 2),
        (errors.ArchitectureError, 2),
        (errors.DataError, 2),
        (errors.TrainingError, 2),
        (errors.BdpruneError, 2),
    ],
)
def test_the_error_determines_the_exit_code(kind: type[errors.BdpruneError], code: int) -> None:
    assert exit_codes.of_error(kind("m")) == code


def test_help_lists_every_code() -> None:
    for code in ("0", "1", "2", "3", "4", "5", "130"):
        assert f"\n  {code} " in exit_codes.HELP
