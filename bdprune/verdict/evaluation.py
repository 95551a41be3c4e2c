"""Fits a table to networks that are known to be clean or backdoored, and measures it on networks it was not fitted to.

The networks are divided into groups, such as attack families. Each group gets its log-odds from a table that was fitted
to the other groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from msgspec.structs import replace as replaced

from bdprune.record import Evidence, Level
from bdprune.verdict.calibration import (
    LEAST_REFERENCES,
    Calibration,
    Input,
    References,
    conformal_p,
    logistic,
    strengths_of,
)
from bdprune.verdict.fitting import auroc, calibration_error, cross_entropy, fit_logistic, interval, upper_bound
from bdprune.verdict.judgement import Judgement, with_p_value

ENOUGH_FOR_ECE = 150
"""With fewer networks, the expected calibration error is mostly noise."""

ENOUGH_FOR_1 = 100
"""With fewer clean networks, none may pass at a false positive rate of 1 %."""


@dataclass(frozen=True)
class Known:
    """A network of which it is known whether it is backdoored.

    Attributes:
        name: of the network.
        arch: its architecture.
        family: of its attack; empty for a clean network.
        targets: labels that the backdoor leads to; empty for a clean network and for an all-to-all backdoor.
        evidence: that a scan gives, which ends once its verdict is sure.
        judgement: of this evidence.
        every: the evidence of all detectors.
    """

    name: str
    arch: str
    family: str
    targets: frozenset[int]
    evidence: tuple[Evidence, ...]
    judgement: Judgement
    every: tuple[Evidence, ...]

    @property
    def backdoored(self) -> bool:
        """Whether it is."""
        return bool(self.family)

    @property
    def agreement(self) -> bool:
        """Whether two strong kinds of evidence name the same label."""
        return self.judgement.verdict == "backdoored"

    @property
    def named(self) -> frozenset[int]:
        """The labels that the verdict names."""
        one = self.judgement.target_label
        return frozenset(self.judgement.targets if one is None else (one,))

    @property
    def label_right(self) -> bool:
        """Whether the verdict names the target; for an all-to-all backdoor, whether it names several labels."""
        return self.named == self.targets if self.targets else len(self.named) > 1


def fit_table(name: str, budget: Level, networks: Sequence[Known]) -> Calibration:
    """A table for these networks, with clean references that each come from a table without its own group.

    Raises:
        ValueError: all networks are of one kind, or all attacks are of one family.
    """
    if len({one.family for one in networks if one.backdoored}) < 2:
        raise ValueError("a table needs attacks of two families")
    values = held_out(networks, family_groups(networks))
    archs = sorted({one.arch for one in networks})
    clean = [
        References(
            arch=arch,
            log_odds=tuple(
                value
                for one, value in zip(networks, values, strict=True)
                if one.arch == arch and not one.backdoored and math.isfinite(value)
            ),
        )
        for arch in archs
    ]
    return _fitted(name, budget, networks, tuple(one for one in clean if one.log_odds))


def _fitted(name: str, budget: Level, networks: Sequence[Known], clean: tuple[References, ...] = ()) -> Calibration:
    """A logistic model whose weights are not negative: a higher score never makes a model look less suspicious."""
    strengths = [strengths_of(one.evidence) for one in networks]
    names = list(dict.fromkeys(one.detector for network in networks for one in network.every))
    inputs = [_standard(detector, [one[detector] for one in strengths if detector in one]) for detector in names]
    truth = torch.tensor([float(one.backdoored) for one in networks])
    kept, agree = [one for one in inputs if one is not None], True
    while True:
        columns = [[(row.get(one.detector, one.centre) - one.centre) / one.scale for row in strengths] for one in kept]
        columns += [[float(one.agreement) for one in networks]] if agree else []
        rows = list(zip(*columns, strict=True)) if columns else [()] * len(networks)
        weights, bias = fit_logistic(torch.tensor(rows, dtype=torch.float64).reshape(len(networks), -1), truth)
        lowest = int(weights.argmin()) if len(weights) else 0
        if not len(weights) or weights[lowest] >= 0:
            break
        if lowest < len(kept):
            del kept[lowest]
        else:
            agree = False
    final = [replaced(one, weight=weight) for one, weight in zip(kept, weights.tolist(), strict=False)]
    return Calibration(
        name=name,
        budget=budget,
        inputs=tuple(final),
        agreement=float(weights[-1]) if agree else 0.0,
        bias=bias,
        clean=clean,
        networks=len(networks),
        backdoored=sum(one.backdoored for one in networks),
    )


def _standard(detector: str, values: Sequence[float]) -> Input | None:
    """An input without weight; None if all networks have the same strength."""
    found = torch.tensor(values, dtype=torch.float64)
    if len(found) < 2 or float(found.std()) < 1e-6:
        return None
    return Input(detector=detector, centre=float(found.mean()), scale=float(found.std()), weight=0.0)


def family_groups(networks: Sequence[Known]) -> list[int]:
    """A group for each attack family. The clean networks are dealt out to these groups."""
    families = sorted({one.family for one in networks if one.backdoored})
    dealt = iter(range(len(networks)))
    return [families.index(one.family) if one.backdoored else next(dealt) % max(len(families), 1) for one in networks]


def arch_groups(networks: Sequence[Known]) -> list[int]:
    """A group for each architecture."""
    archs = sorted({one.arch for one in networks})
    return [archs.index(one.arch) for one in networks]


def held_out(networks: Sequence[Known], groups: Sequence[int]) -> list[float]:
    """The log-odds of each network by a table without its group; NaN if the other groups are all of one kind."""
    values = [math.nan] * len(networks)
    for group in set(groups):
        rest = [one for one, own in zip(networks, groups, strict=True) if own != group]
        if len({one.backdoored for one in rest}) < 2:
            continue
        table = _fitted("", "default", rest)
        for place, own in enumerate(groups):
            if own == group:
                one = networks[place]
                values[place] = table.log_odds(strengths_of(one.evidence), one.agreement)
    return values


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % bootstrap interval; NaN if it cannot be computed."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Measures:
    """How good the log-odds of known networks are.

    Attributes:
        auroc: probability that a backdoored network has higher log-odds than a clean one.
        found: share of backdoored networks above every clean one.
        found_at_1: share of backdoored networks above the threshold that 1 % of the clean ones pass; NaN with too few.
        error: expected calibration error; NaN with too few networks.
        entropy: cross-entropy in nats.
    """

    auroc: Measure
    found: Measure
    found_at_1: Measure
    error: Measure
    entropy: Measure


def measures(values: Sequence[float], truth: Sequence[bool]) -> Measures:
    """The measures of these log-odds; those that are not finite do not count."""
    known = [(value, bad) for value, bad in zip(values, truth, strict=True) if math.isfinite(value)]

    def measure(of: Callable[[list[float], list[bool]], float]) -> Measure:
        def on(places: Sequence[int]) -> float:
            return of([known[one][0] for one in places], [known[one][1] for one in places])

        return Measure(on(range(len(known))), *interval(on, len(known))) if known else Measure(math.nan)

    return Measures(
        auroc=measure(auroc),
        found=measure(lambda scores, bad: found_above(scores, bad, 0.0)),
        found_at_1=measure(_found_at_1),
        error=measure(_error),
        entropy=measure(lambda scores, bad: cross_entropy([logistic(one) for one in scores], bad)),
    )


def _error(scores: Sequence[float], truth: Sequence[bool]) -> float:
    enough = len(truth) >= ENOUGH_FOR_ECE
    return calibration_error([logistic(one) for one in scores], truth) if enough else math.nan


def _found_at_1(scores: Sequence[float], truth: Sequence[bool]) -> float:
    enough = len(truth) - sum(truth) >= ENOUGH_FOR_1
    return found_above(scores, truth, 0.01) if enough else math.nan


def found_above(scores: Sequence[float], truth: Sequence[bool], passed: float) -> float:
    """Share of backdoored networks above the lowest threshold that at most this share of the clean ones pass."""
    clean = sorted((one for one, bad in zip(scores, truth, strict=True) if not bad), reverse=True)
    backdoored = [one for one, bad in zip(scores, truth, strict=True) if bad]
    if not clean or not backdoored:
        return math.nan
    limit = clean[min(int(passed * len(clean)), len(clean) - 1)]
    return sum(one > limit for one in backdoored) / len(backdoored)


@dataclass(frozen=True)
class Rate:
    """How many of several networks, and the exact one-sided 95 % upper bound of the rate."""

    hits: int
    count: int

    @property
    def bound(self) -> float:
        """The upper bound, in [0, 1]; 1 without networks."""
        return upper_bound(self.hits, self.count) if self.count else 1.0


@dataclass(frozen=True)
class Evaluation:
    """What a table is worth.

    Attributes:
        by_family: measures with attack families held out in turn.
        by_arch: measures with architectures held out in turn.
        alone: AUROC of the score of each detector alone, and the number of its networks.
        false_backdoored: clean networks that the verdict calls backdoored.
        false_suspicious: clean networks that the verdict calls suspicious.
        verdicts: verdict -> number of backdoored networks with it.
        labels: of the backdoored networks that are called so, how many have the right label.
        networks: the networks with their verdicts, in view of the other clean networks.
        backdoored: number of backdoored ones among them.
    """

    by_family: Measures
    by_arch: Measures
    alone: Mapping[str, tuple[float, int]]
    false_backdoored: Rate
    false_suspicious: Rate
    verdicts: Mapping[str, int]
    labels: Rate
    networks: tuple[Known, ...]
    backdoored: int


def evaluate(networks: Sequence[Known]) -> Evaluation:
    """Measures the calibration and the verdicts on known networks.

    Raises:
        ValueError: all networks are of one kind.
    """
    if len({one.backdoored for one in networks}) < 2:
        raise ValueError("an evaluation needs clean and backdoored networks")
    truth = [one.backdoored for one in networks]
    values = held_out(networks, family_groups(networks))
    networks = _seen_among(networks, values)
    clean = [one.judgement.verdict for one in networks if not one.backdoored]
    bad = [one.judgement.verdict for one in networks if one.backdoored]
    called = [one for one in networks if one.backdoored and one.agreement]
    return Evaluation(
        by_family=measures(values, truth),
        by_arch=measures(held_out(networks, arch_groups(networks)), truth),
        alone=_alone(networks),
        false_backdoored=Rate(clean.count("backdoored"), len(clean)),
        false_suspicious=Rate(clean.count("suspicious"), len(clean)),
        verdicts={verdict: bad.count(verdict) for verdict in dict.fromkeys(sorted(bad))},
        labels=Rate(sum(one.label_right for one in called), len(called)),
        networks=tuple(networks),
        backdoored=sum(truth),
    )


def _seen_among(networks: Sequence[Known], values: Sequence[float]) -> list[Known]:
    """The networks with their verdicts in view of the other clean networks, as a scan gives them."""
    found = []
    for one, value in zip(networks, values, strict=True):
        others = [
            rest
            for other, rest in zip(networks, values, strict=True)
            if not other.backdoored and other is not one and math.isfinite(rest)
        ]
        p_value = conformal_p(value, others) if len(others) >= LEAST_REFERENCES and math.isfinite(value) else None
        found.append(replace(one, judgement=with_p_value(one.judgement, p_value, one.evidence, p_value)))
    return found


def _alone(networks: Sequence[Known]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for detector in dict.fromkeys(one.detector for network in networks for one in network.every):
        scored = [(strengths_of(one.every).get(detector), one.backdoored) for one in networks]
        known = [(value, bad) for value, bad in scored if value is not None]
        found[detector] = (auroc([value for value, _ in known], [bad for _, bad in known]), len(known))
    return found
