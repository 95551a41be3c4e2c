"""A calibrated probability that a model is backdoored, from the scores of its detectors. The tables are data files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdprune.record import Count, Evidence, Level, Record

LEAST_REFERENCES = 19
"""With fewer clean references, the smallest possible p-value is above 0.05 and says little."""

_WEAKEST, _STRONGEST = -3.0, 2.0
_NEVER = -20.0  # logarithm for a score of 0


class Input(Record, frozen=True):
    """How the score of one detector enters the log-odds: ``weight * (strength - centre) / scale``.

    Attributes:
        detector: its id.
        centre: mean strength of the networks of the table.
        scale: standard deviation.
        weight: change of the log-odds for one standard deviation.
    """

    detector: str
    centre: float
    scale: float
    weight: float


class Reference(Record, frozen=True):
    """Clean networks of one architecture.

    Attributes:
        arch: name of the architecture.
        log_odds: of each network, by a table that was fitted without it.
    """

    arch: str
    log_odds: tuple[float, ...]


class Calibration(Record, frozen=True):
    """A table that turns scores into a probability.

    Attributes:
        name: of the zoo that it was fitted to.
        budget: of the scans.
        inputs: one for each detector.
        agreement: change of the log-odds if two strong kinds of evidence name the same label.
        bias: log-odds of a network whose scores are all average, without agreement.
        clean: clean references.
        networks: number of networks that it was fitted to.
        backdoored: number of backdoored ones among them.
    """

    name: str
    budget: Level
    inputs: tuple[Input, ...]
    agreement: float
    bias: float
    clean: tuple[Reference, ...]
    networks: Count
    backdoored: Count

    def log_odds(self, strengths: Mapping[str, float], agreement: bool) -> float:
        """The log-odds of a model with these strengths by detector. A missing one counts as average."""
        terms = (
            one.weight * (strengths[one.detector] - one.centre) / one.scale
            for one in self.inputs
            if one.detector in strengths
        )
        return self.bias + self.agreement * agreement + sum(terms)

    def estimate(self, evidence: Sequence[Evidence], agreement: bool, arch: str) -> Estimate:
        """The probability of a model.

        Args:
            evidence: of its detectors.
            agreement: whether two strong kinds of evidence name the same label.
            arch: its architecture.
        """
        value = self.log_odds(strengths_of(evidence), agreement)
        own = next((one.log_odds for one in self.clean if one.arch == arch), ())
        p_value = conformal_p(value, own) if len(own) >= LEAST_REFERENCES else None
        return Estimate(_logistic(value), p_value, len(own), _note(self.name, arch, own))


@dataclass(frozen=True)
class Estimate:
    """What a table says about one model.

    Attributes:
        probability: that it is backdoored, in [0, 1], if as many such models are backdoored as in the table.
        p_value: share of clean networks of its architecture that look at least as suspicious; None with too few.
        references: number of clean networks of its architecture in the table.
        note: how far the probability can be trusted, in a sentence; empty without reservation.
    """

    probability: float
    p_value: float | None
    references: int
    note: str


def strengths_of(evidence: Sequence[Evidence]) -> dict[str, float]:
    """The strength of each detector that works on the model: the logarithm of score / threshold, in [-3, 2]."""
    usable = [one for one in evidence if one.valid and not one.not_applicable]
    return {one.detector: _strength(one) for one in usable}


def _strength(one: Evidence) -> float:
    assert one.score is not None and one.threshold is not None
    if one.threshold <= 0:
        return _STRONGEST if one.flagged else _WEAKEST
    ratio = one.score / one.threshold
    value = math.log(ratio) if ratio > 0 else _NEVER
    return min(max(value, _WEAKEST), _STRONGEST)


def conformal_p(value: float, clean: Sequence[float]) -> float:
    """The conformal p-value of ``value``: (1 + number of clean values at least as large) / (1 + number of all)."""
    return (1 + sum(one >= value for one in clean)) / (1 + len(clean))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _note(table: str, arch: str, own: Sequence[float]) -> str:
    if not own:
        return (
            f"The table {table} has no reference for the architecture {arch}; the probability is not calibrated for it."
        )
    if len(own) < LEAST_REFERENCES:
        return (
            f"The table {table} has only {len(own)} clean networks of the architecture {arch}, too few for a p-value."
        )
    return ""
