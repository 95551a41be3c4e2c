"""Thresholds that a detector and the check of a repair share (measurements: docs/evaluation/detection.md)."""

LEAD, TWO_CLASS_LEAD = 0.09, 0.65
"""Lead of a label under unlearning, for ten labels or more and for two."""

MOVED, TWO_CLASS_MOVED = 0.3, 0.6
"""Score of the filters that unlearning moves most, for ten labels or more and for two."""

SMALL_TRIGGER = 1.7
"""Score of a recovered trigger."""
