"""Checks that hold every method to what it promises: ours, and those of other packages."""

from bdprune.testing.detectors import check_detector, detector_checks
from bdprune.testing.planted import Planted, planted
from bdprune.testing.promises import Check
from bdprune.testing.purifiers import check_purifier, purifier_checks
