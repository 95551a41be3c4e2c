"""Measures on clean images whether a repaired network still has its backdoor, and whether it comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis.case import Case
from bdprune.analysis.outliers import for_few_labels
from bdprune.analysis.outstanding import Outstanding, SearchFor, excess_flips, outstanding_triggers, search_again
from bdprune.analysis.unlearned import SCAN_UNLEARNING, Unlearning
from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.loops import Trigger, flip_shares, leaders, middle_half
from bdprune.model import Model
from bdprune.record import RepairCheck, TriggerCheck
from bdprune.runtime import DEFAULT, Precision, predict


@dataclass(frozen=True)
class CheckLimits:
    """What counts as repaired.

    Args:
        gone: largest share of held-out images that a known trigger may flip beyond those that the network labels so
            without it, in [0, 1].
        score: a trigger that is searched again must have a smaller score (:func:`bdprune.analysis.scored`).
        lead: largest lead of a label under unlearning, for ten labels or more.
        two_class_lead: the same for two labels.
        draws: number of random changes of the batch norms.
        change: their size, as a share of each scale and shift.
    """

    gone: float = 0.1
    score: float = 1.5
    lead: float = 0.09
    two_class_lead: float = 0.65
    draws: int = 5
    change: float = 0.1

    def lead_for(self, num_classes: int) -> float:
        """The largest lead for this number of labels."""
        return for_few_labels(num_classes, self.lead, self.two_class_lead)


def lead_of(case: Case, seed: int = 0, precision: Precision = DEFAULT) -> tuple[int, float] | None:
    """The label that leads while the network unlearns, and its lead (:class:`Unlearning`); None without a finite step.

    One run, on the images of the case in their order.
    """
    try:
        run = case.get(Unlearning(SCAN_UNLEARNING, seed, precision))
    except TrainingError:
        return None
    shares = flip_shares(middle_half(run.trajectory))
    label, second = leaders(shares)
    return label, shares[label] - shares[second]


def flips_of(model: Model, trigger: Trigger, data: CleanData) -> float:
    """Share of the images of ``data`` that a trigger flips beyond those labelled so without it, in [0, 1]."""
    own = trigger.takes(data.labels)
    images, labels = data.images[own], data.labels[own]
    return excess_flips(trigger, predict(model.module, images), predict(model.module, trigger.apply(images)), labels)


@dataclass(frozen=True, eq=False)
class Signs:
    """Signs of a backdoor in a network before its repair.

    Attributes:
        triggers: recovered triggers that stand out.
        lead: lead of a label under unlearning, if it is above the limit; else None.
        label: the label of the most outstanding trigger, or the one that leads; None if there is none.
        held: clean images that the repair does not learn from.
    """

    triggers: tuple[Outstanding, ...]
    lead: float | None
    label: int | None
    held: CleanData


def signs_of(case: Case, held: CleanData, limits: CheckLimits, search: SearchFor, seed: int = 0) -> Signs:
    """The signs of a backdoor in the network of ``case``.

    Args:
        case: the network with all clean images.
        held: the images that the repair does not learn from.
        limits: what counts as a sign.
        search: which triggers are searched.
        seed: of the search and the unlearning.
    """
    known = tuple(outstanding_triggers(case, search, limits.score, seed))
    led = lead_of(case, seed)
    leads = led is not None and led[1] > limits.lead_for(case.model.num_classes)
    label = known[0].trigger.target if known else (led[0] if led and leads else None)
    return Signs(known, led[1] if led and leads else None, label, held)


def check_repair(
    case: Case, repaired: Model, signs: Signs, limits: CheckLimits, search: SearchFor, seed: int = 0
) -> RepairCheck:
    """Measures the known triggers, searches them again, and unlearns again if a label led before.

    Args:
        case: the case before the repair.
        repaired: the repaired network.
        signs: from :func:`signs_of`.
        limits: what counts as repaired.
        search: which triggers were searched.
        seed: of the search, the unlearning and the random changes.
    """
    after = case.with_model(repaired)
    triggers, left = [], []
    for one in signs.triggers:
        again = search_again(after, one, search, seed)
        found = _trigger_check(case.model, repaired, one, again, signs.held, limits, seed)
        triggers.append(found)
        left += _what_is_left(found, again, limits)
    new = lead_of(after, seed) if signs.lead is not None else None
    if new is not None and new[1] > limits.lead_for(case.model.num_classes):
        left.append(f"label {new[0]} still leads under unlearning, by {new[1]:.2f}")
    return RepairCheck(
        triggers=tuple(triggers), lead_before=signs.lead, lead_after=new[1] if new else None, left=tuple(left)
    )


def _what_is_left(found: TriggerCheck, again: Outstanding, limits: CheckLimits) -> list[str]:
    """What the check of one trigger shows, in a phrase; empty if nothing is left."""
    if found.flips_after > limits.gone:
        return [f"the {found.name} flips {found.flips_after:.0%} of the images"]
    if again.score >= limits.score and (again.trigger.flip_rate or 0.0) > limits.gone:
        return [f"a new search finds a small {found.name}, with the score {again.score:.1f}"]
    if found.reactivated > 2 * limits.gone:
        return [f"after small changes of the batch norms, the {found.name} flips {found.reactivated:.0%}"]
    return []


def _trigger_check(
    model: Model,
    repaired: Model,
    known: Outstanding,
    again: Outstanding,
    held: CleanData,
    limits: CheckLimits,
    seed: int,
) -> TriggerCheck:
    forms = _changed(repaired, limits, seed)
    return TriggerCheck(
        name=known.name,
        flips_before=flips_of(model, known.trigger, held),
        flips_after=flips_of(repaired, known.trigger, held),
        score_before=known.score,
        score_after=again.score,
        reactivated=max((flips_of(form, known.trigger, held) for form in forms), default=0.0),
    )


@torch.no_grad()
def _changed(model: Model, limits: CheckLimits, seed: int) -> list[Model]:
    """The network with randomly changed scales and shifts of its batch norms, ``draws`` times."""
    generator = torch.Generator().manual_seed(seed)
    forms = []
    for _ in range(limits.draws):
        form = model.clone()
        for norm in _norms(form.network):
            for value in (norm.weight, norm.bias):
                noise = 2 * torch.rand(value.shape, generator=generator) - 1
                value.mul_(1 + limits.change * noise.to(value))
        forms.append(form)
    return forms


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [one for one in network.modules() if isinstance(one, _BatchNorm) and one.weight is not None]
