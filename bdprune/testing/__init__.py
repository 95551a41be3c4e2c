"""Conformance checks for methods, both those of bdprune and those of other packages."""

from bdprune.testing.detectors import check_detector as check_detector
from bdprune.testing.detectors import detector_checks as detector_checks
from bdprune.testing.planted import Planted as Planted
from bdprune.testing.planted import planted as planted
from bdprune.testing.promises import Check as Check
from bdprune.testing.purifiers import check_purifier as check_purifier
from bdprune.testing.purifiers import purifier_checks as purifier_checks
