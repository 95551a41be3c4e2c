"""Words and numbers that all reports share."""

from __future__ import annotations

import msgspec
import pytest

from bdprune.record import Result
from bdprune.report import summary


def test_headlines_name_the_label_where_there_is_one(backdoored: Result, clean: Result, failed: Result) -> None:
    assert summary.headline(backdoored).endswith("leads to label 8 (ship).")
    suspicious = msgspec.structs.replace(backdoored, verdict="suspicious", data=None)
    assert summary.headline(suspicious).endswith("leads to label 8, but not all of it agrees.")
    assert summary.headline(clean) == "No sign of a backdoor was found."
    unnamed = msgspec.structs.replace(backdoored, target_label=None)
    assert summary.headline(unnamed) == "This network carries a backdoor."
    assert summary.headline(failed) == "The archive is cut off."


def test_advice_of_an_error_is_its_mend(failed: Result, backdoored: Result) -> None:
    assert summary.advice(failed) == "Download it again. Treat it as unscanned."
    assert "bdprune purify" in summary.advice(backdoored)


def test_clean_is_never_called_proof(clean: Result) -> None:
    assert "no proof" in summary.advice(clean)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (59.99, "60.0 s"),
        (245.0, "4 min 05 s"),
        (3600.0, "60 min 00 s"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert summary.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000_000_000, "2500.0 GB")]
)
def test_size(value: int | None, text: str) -> None:
    assert summary.size(value) == text


def test_numbers_and_shares() -> None:
    assert (summary.number(None), summary.number(0.123456), summary.number(4e-9)) == ("–", "0.1235", "4e-09")
    assert (summary.percent(None), summary.percent(0.9345), summary.percent(1.0, 0)) == ("–", "93.5 %", "100 %")


def test_tally(backdoored: Result, clean: Result) -> None:
    assert summary.tally([clean]) == "1 model: 1 clean"
    assert summary.tally([clean, backdoored, clean]) == "3 models: 1 backdoored, 2 clean"
    assert summary.tally([]) == "0 models: nothing scanned"
