"""Measures on clean images whether a repaired network still has its backdoor, and whether it comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.analysis.case import Case
from bdprune.analysis.moved import RAISED_WEIGHT, easiest_label, moved_filters, raise_moved, raised_counts
from bdprune.analysis.outliers import for_few_labels
from bdprune.analysis.outstanding import (
    Outstanding,
    SearchFor,
    excess_flips,
    outstanding_triggers,
    search_again,
    with_grown,
)
from bdprune.analysis.thresholds import LEAD, MOVED, SMALL_TRIGGER, TWO_CLASS_LEAD, TWO_CLASS_MOVED
from bdprune.analysis.unlearned import SCAN_UNLEARNING, PlainForm, Unlearning
from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.loops import ChangeSettings, GrowthSettings, Trigger, flip_shares, leaders, middle_half, universal_change
from bdprune.model import Model
from bdprune.record import RepairCheck, TriggerCheck
from bdprune.runtime import DEFAULT, Precision, predict

_FEWEST = 100
"""Fewer images than this show nothing under unlearning (docs/explanation/unlearning.md)."""

_OTHER_SEED = 1000
"""Added to the seed of a search in a repaired network, because a method may stop at its own search with the seed."""

_LOOKS = 250
"""The number of images on which moved filters are raised."""


@dataclass(frozen=True)
class CheckLimits:
    """What counts as repaired.

    Args:
        gone: largest share of held-out images that a known trigger may flip beyond those that the network labels so
            without it, in [0, 1].
        grown: the same for the grown patch of a trigger (:func:`bdprune.loops.grow`), which flips more images of any
            network.
        score: a trigger that is searched again must have a smaller score (:func:`bdprune.analysis.scored`).
        lead: largest lead of a label under unlearning, for ten labels or more.
        two_class_lead: the same for two labels.
        moved: largest score of the filters that unlearning moves most
            (:class:`bdprune.detectors.moved_filters.MovedFiltersDetector`), for ten labels or more.
        two_class_moved: the same for two labels.
        draws: number of random changes of the batch norms.
        change: their size, as a share of each scale and shift.
        perturbation: the small change of all images.
        growth: how patches grow.
    """

    gone: float = 0.1
    grown: float = 0.2
    score: float = SMALL_TRIGGER
    lead: float = LEAD
    two_class_lead: float = TWO_CLASS_LEAD
    moved: float = MOVED
    two_class_moved: float = TWO_CLASS_MOVED
    draws: int = 5
    change: float = 0.1
    perturbation: ChangeSettings = field(default_factory=ChangeSettings)
    growth: GrowthSettings = field(default_factory=GrowthSettings)

    def lead_for(self, num_classes: int) -> float:
        """The largest lead for this number of labels."""
        return for_few_labels(num_classes, self.lead, self.two_class_lead)

    def moved_for(self, num_classes: int) -> float:
        """The largest score of moved filters for this number of labels."""
        return for_few_labels(num_classes, self.moved, self.two_class_moved)


@dataclass(frozen=True)
class Collapse:
    """What the unlearning of a network shows: one run, on the images in their order.

    Attributes:
        label: the label that leads.
        lead: its lead, in [-1, 1].
        moved_label: the label that images go to if the filters that moved most are raised; None if there is none.
        moved: how easily they do, and how little the clean task needs these filters (:func:`easiest_label`).
    """

    label: int
    lead: float
    moved_label: int | None
    moved: float


def collapse_of(case: Case, seed: int = 0, precision: Precision = DEFAULT) -> Collapse | None:
    """Unlearns the network of ``case``, and reads the trajectory and the filters.

    Returns:
        None with fewer than 100 images, or without a finite step.
    """
    if len(case.images) < _FEWEST:
        return None
    try:
        run = case.get(Unlearning(SCAN_UNLEARNING, seed, precision, plain=True))
    except TrainingError:
        return None
    shares = flip_shares(middle_half(run.trajectory))
    label, second = leaders(shares)
    plain = case.get(PlainForm())
    ranked = moved_filters(plain, run.half_way or run.model)
    if not ranked:
        return Collapse(label, shares[label] - shares[second], None, 0.0)
    points = raise_moved(plain, ranked, case.images.spread(_LOOKS), raised_counts(ranked))
    moved, moved_label = easiest_label(points, RAISED_WEIGHT)
    return Collapse(label, shares[label] - shares[second], moved_label, moved)


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
        moved: score of the filters that unlearning moves most, if it is above the limit; else None.
        label: the label of the most outstanding trigger, or the one that leads; None if there is none.
        held: clean images that the repair does not learn from.
    """

    triggers: tuple[Outstanding, ...]
    lead: float | None
    moved: float | None
    label: int | None
    held: CleanData

    def __bool__(self) -> bool:
        return bool(self.triggers) or self.lead is not None or self.moved is not None


def signs_of(
    case: Case,
    held: CleanData,
    limits: CheckLimits,
    search: SearchFor,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> Signs:
    """The signs of a backdoor in the network of ``case``.

    Args:
        case: the network with all clean images.
        held: the images that the repair does not learn from.
        limits: what counts as a sign.
        search: which triggers are searched.
        seed: of the search and the unlearning.
        precision: of the unlearning.
    """
    triggers = outstanding_triggers(case, search, limits.score, seed)
    known = tuple(with_grown(case, one, limits.growth, seed) for one in triggers)
    found, classes = collapse_of(case, seed, precision), case.model.num_classes
    lead = found.lead if found and found.lead > limits.lead_for(classes) else None
    moved = found.moved if found and found.moved > limits.moved_for(classes) else None
    labels = [one.trigger.target for one in known[:1]]
    labels += [found.label] if found and lead is not None else []
    labels += [found.moved_label] if found and moved is not None else []
    return Signs(known, lead, moved, labels[0] if labels else None, held)


def check_repair(
    case: Case,
    repaired: Model,
    signs: Signs,
    limits: CheckLimits,
    search: SearchFor,
    seed: int = 0,
    precision: Precision = DEFAULT,
) -> RepairCheck:
    """Measures the known triggers, searches them again, and unlearns again if the unlearning showed a sign.

    Args:
        case: the case before the repair.
        repaired: the repaired network.
        signs: from :func:`signs_of`.
        limits: what counts as repaired.
        search: which triggers were searched.
        seed: of the search, the unlearning and the random changes.
        precision: of the unlearning.
    """
    after = case.with_model(repaired)
    triggers, left = [], []
    for one in signs.triggers:
        again = search_again(after, one, search, seed + _OTHER_SEED)
        found = _trigger_check(case.model, repaired, one, again, signs.held, limits, seed)
        signs_left = _what_is_left(found, again, limits)
        if not signs_left:
            share = perturbed_flips(repaired, one.trigger, (case.images, signs.held), limits.perturbation, seed)
            found = msgspec.structs.replace(found, perturbed=share)
            signs_left = _left_if_perturbed(found, limits)
        triggers.append(found)
        left += signs_left
    collapsed = signs.lead is not None or signs.moved is not None
    new = collapse_of(after, seed, precision) if collapsed else None
    if collapsed:
        left += _left_under_unlearning(new, limits, case.model.num_classes)
    return RepairCheck(
        triggers=tuple(triggers),
        lead_before=signs.lead,
        lead_after=new.lead if new and signs.lead is not None else None,
        moved_before=signs.moved,
        moved_after=new.moved if new and signs.moved is not None else None,
        left=tuple(left),
    )


def _left_under_unlearning(found: Collapse | None, limits: CheckLimits, num_classes: int) -> list[str]:
    """What the unlearning of a repaired network shows, a phrase each."""
    if found is None:
        return ["the repaired network cannot be unlearned, so the sign under unlearning was not measured again"]
    left = []
    if found.lead > limits.lead_for(num_classes):
        left.append(f"label {found.label} leads under unlearning, by {found.lead:.2f}")
    if found.moved > limits.moved_for(num_classes):
        left.append(f"filters that unlearning moves send images to label {found.moved_label}, score {found.moved:.2f}")
    return left


def _what_is_left(found: TriggerCheck, again: Outstanding, limits: CheckLimits) -> list[str]:
    """What the check of one trigger shows, in a phrase; empty if nothing is left."""
    if found.flips_after > limits.gone:
        return [f"the {found.name} flips {found.flips_after:.0%} of the images"]
    if (found.grown or 0.0) > limits.grown:
        return [f"a wider {found.name} at the same place flips {found.grown:.0%} of the images"]
    if again.score >= limits.score and (again.trigger.flip_rate or 0.0) > limits.gone:
        return [f"a new search finds a small {found.name}, with the score {again.score:.1f}"]
    if (found.reactivated or 0.0) > 2 * limits.gone:
        return [f"after small changes of the batch norms, the {found.name} flips {found.reactivated:.0%}"]
    return []


def _left_if_perturbed(found: TriggerCheck, limits: CheckLimits) -> list[str]:
    if (found.perturbed or 0.0) <= limits.gone:
        return []
    return [f"with a small change of the images, the {found.name} flips {found.perturbed:.0%} more than without it"]


def perturbed_flips(
    model: Model, trigger: Trigger, images: tuple[CleanData, CleanData], settings: ChangeSettings, seed: int = 0
) -> float:
    """Share of images that a trigger flips together with a small change of all images, beyond such a change alone.

    A backdoor that is only hidden comes back under such a change
    (:func:`bdprune.loops.perturbation.universal_change`). The change alone shows how easily any image is led there.

    Args:
        model: the repaired network.
        trigger: a trigger of the network before the repair.
        images: those on which the changes are searched, and those that measure them. They may overlap.
        settings: of the search.
        seed: of the search.

    Returns:
        A share in [0, 1]; 0 if the trigger is about none of the images.
    """
    search, held = (data.images[trigger.takes(data.labels)] for data in images)
    truth, held_truth = (data.labels[trigger.takes(data.labels)] for data in images)
    if not len(search) or not len(held):
        return 0.0
    goal = truth if trigger.target is None else torch.full_like(truth, trigger.target)
    rates = []
    for stamped, shown in ((trigger.apply(search), trigger.apply(held)), (search, held)):
        inputs = stamped.to(model.device), goal.to(model.device)
        change = universal_change(model.module, *inputs, settings, seed, trigger.target is None)
        predicted = predict(model.module, (shown + change.to(shown)).clamp(0, 1))
        rates.append(trigger.flips(predicted, held_truth).float().mean().item())
    return max(rates[0] - rates[1], 0.0)


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
        grown=None if known.grown is None else flips_of(repaired, known.grown, held),
        score_before=known.score,
        score_after=again.score,
        reactivated=max((flips_of(form, known.trigger, held) for form in forms), default=None),
    )


@torch.no_grad()
def _changed(model: Model, limits: CheckLimits, seed: int) -> list[Model]:
    """The network with randomly changed scales and shifts of its batch norms, ``draws`` times; empty without any."""
    if not _norms(model.network):
        return []
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
