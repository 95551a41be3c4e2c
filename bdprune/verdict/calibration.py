"""A calibrated probability that a model is backdoored, from the scores of its detectors. The tables are data files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from bdprune.errors import DataError, OptionError
from bdprune.record import LEVELS, CalibrationInfo, Count, Evidence, Level, Record, some

LEAST_REFERENCES = 19
"""With fewer clean references, the smallest possible p-value is above 0.05 and says little."""

LARGEST_TABLE = 1 << 20
"""Bytes of the largest table that is read."""

_WEAKEST, _STRONGEST = -3.0, 2.0
_LARGEST, _SMALLEST = 1e4, 1e-6  # numbers and scales of a table
_NEVER = -20.0  # logarithm for a score of 0


class Input(Record, frozen=True):
    """How the score of one detector enters the log-odds: ``weight * (strength - centre) / scale``.

    Attributes:
        detector: its id.
        centre: mean strength of the networks of the table.
        scale: standard deviation.
        weight: change of the log-odds for one standard deviation, not negative.
    """

    detector: str
    centre: float
    scale: float
    weight: float


class References(Record, frozen=True):
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
        clean: clean references by architecture.
        networks: number of networks that it was fitted to.
        backdoored: number of backdoored ones among them.
    """

    name: str
    budget: Level
    inputs: tuple[Input, ...]
    agreement: float
    bias: float
    clean: tuple[References, ...]
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

    def probability(self, evidence: Sequence[Evidence], agreement: bool) -> float:
        """The probability, in [0, 1], that a model with this evidence is backdoored."""
        return logistic(self.log_odds(strengths_of(evidence), agreement))

    def estimate(
        self,
        evidence: Sequence[Evidence],
        agreement: bool,
        arch: str,
        budget: Level | None = None,
        all_labels: bool = True,
    ) -> CalibrationInfo:
        """What the table says about a model.

        Args:
            evidence: of its detectors.
            agreement: whether two strong kinds of evidence name the same label. The detectors that then did not run
                are not missed.
            arch: its architecture.
            budget: of the scan; None stands for that of the table.
            all_labels: whether each label has clean images, as in the scans of the table.
        """
        value = self.log_odds(strengths_of(evidence), agreement)
        clean = self._references(arch)
        reservation = self._reservation(arch, self._missing(evidence, agreement), budget or self.budget)
        if not (reservation or all_labels):
            reservation = "The probability is not calibrated: some labels have no clean image."
        enough = len(clean) >= LEAST_REFERENCES and not reservation
        return CalibrationInfo(
            table=self.name,
            prior=self.backdoored / self.networks,
            p_value=conformal_p(value, clean) if enough else None,
            references=len(clean) if enough else 0,
            reservation=reservation,
        )

    def rank(self, evidence: Sequence[Evidence], detector: str, budget: Level, all_labels: bool) -> float | None:
        """The p-value of a model among the clean networks of all architectures, without agreement of its evidence.

        It says how unusual the scores are. It is no calibrated p-value if the table lacks the model's architecture.

        Args:
            evidence: of its detectors.
            detector: id of a detector that must be an input of the table.
            budget: of the scan.
            all_labels: whether each label has clean images.

        Returns:
            None if the table does not fit such a scan, or has too few clean networks.
        """
        clean = [value for one in self.clean for value in one.log_odds]
        fits = budget == self.budget and all_labels and not self._missing(evidence, agreement=False)
        if not fits or len(clean) < LEAST_REFERENCES or all(one.detector != detector for one in self.inputs):
            return None
        return conformal_p(self.log_odds(strengths_of(evidence), False), clean)

    def _missing(self, evidence: Sequence[Evidence], agreement: bool) -> list[str]:
        """The detectors of the table that did not run to their end, unless the verdict was sure before."""
        ran = {one.detector for one in evidence if one.valid and not one.unseen}
        late = {one.detector for one in evidence} - ran
        wanted = [one.detector for one in self.inputs]
        return [one for one in wanted if one in late or (one not in ran and not agreement)]

    def _references(self, arch: str) -> tuple[float, ...]:
        """Log-odds of the clean networks of the architecture, or of all if these are too few; none if it is unknown."""
        own = next((one.log_odds for one in self.clean if one.arch == arch), ())
        if not own or len(own) >= LEAST_REFERENCES:
            return own
        return tuple(value for one in self.clean for value in one.log_odds)

    def _reservation(self, arch: str, missing: Sequence[str], budget: Level) -> str:
        if all(one.arch != arch for one in self.clean):
            return f"The probability is not calibrated: the table {self.name} has no reference for {arch}."
        if budget != self.budget:
            return f"The probability is not calibrated: the table {self.name} is for the budget {self.budget}."
        if missing:
            return f"The probability is not calibrated: the table {self.name} needs {some(missing)} to the end."
        return ""


def strengths_of(evidence: Sequence[Evidence]) -> dict[str, float]:
    """The strength of each detector that works on the model: the logarithm of score / threshold, in [-3, 2].

    The strength of a trigger that looks like features of its class is at most 0.
    """
    usable = [one for one in evidence if one.valid and not one.not_applicable]
    return {one.detector: min(_strength(one), 0.0) if one.natural else _strength(one) for one in usable}


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


def logistic(value: float) -> float:
    """The probability of these log-odds."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@cache
def own_table(budget: Level) -> Calibration | None:
    """The table of this package for a budget; None if it has none."""
    place = files("bdprune.verdict") / "tables" / f"{budget}.json"
    return Calibration.from_json(place.read_bytes()) if place.is_file() else None


def read_table(path: Path) -> Calibration:
    """A table that ``bdprune calibrate`` wrote.

    Raises:
        OptionError: the file cannot be read, or is no table.
    """
    hint = "Give a table that `bdprune calibrate` wrote."
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise OptionError(f"{path} is too large for a table of a calibration.", hint)
        table = Calibration.from_json(path.read_bytes())
    except OSError as error:
        raise OptionError(f"Cannot read the table {path}: {error.strerror}.", hint) from None
    except DataError as error:
        raise OptionError(f"{path} is no table of a calibration: {error.message}", hint) from None
    _check(table, path)
    return table


def _check(table: Calibration, path: Path) -> None:
    numbers = [table.bias, table.agreement, *(value for one in table.clean for value in one.log_odds)]
    numbers += [value for one in table.inputs for value in (one.centre, one.scale, one.weight)]
    usual = all(math.isfinite(one) and abs(one) <= _LARGEST for one in numbers) and table.agreement >= 0
    alone = len({one.detector for one in table.inputs}) == len(table.inputs)
    if not (usual and alone) or any(one.scale < _SMALLEST or one.weight < 0 for one in table.inputs):
        raise OptionError(
            f"{path} has weights, scales or detectors that no fit gives.", "Fit it again with `bdprune calibrate`."
        )
    if not 0 < table.backdoored < table.networks:
        raise OptionError(f"{path} was not fitted to networks of both kinds.", "Fit it again with `bdprune calibrate`.")


def table_for(level: Level, path: str | os.PathLike[str] | None = None) -> Calibration | None:
    """The table for a scan.

    Args:
        level: the budget. Without a table for it, the own table of the largest smaller budget that has one is used.
        path: the user's table, or ``none`` for no table; None for the own one.

    Raises:
        OptionError: the file cannot be read, or is no table.
    """
    if path is not None:
        return None if str(path) == "none" else read_table(Path(path))
    smaller = reversed(LEVELS[: LEVELS.index(level) + 1])
    return next((table for one in smaller if (table := own_table(one))), None)
