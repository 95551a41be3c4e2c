"""Every registered detector and purifier passes the conformance checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bdprune.registry import detector, names, purifier
from bdprune.testing.detectors import detector_checks
from bdprune.testing.purifiers import purifier_checks

DETECTORS = [(name, *check) for name in names("detector") for check in detector_checks(detector(name))]
PURIFIERS = [(name, *check) for name in names("purifier") for check in purifier_checks(purifier(name))]


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=f"{name}: {what}") for name, what, check in DETECTORS + PURIFIERS]
)
def test_every_method_passes_the_check(check: Callable[[], str]) -> None:
    if reason := check():
        pytest.skip(reason)
