"""What clean images show about a repair."""

from __future__ import annotations

from typing import Literal, get_args

from bdprune.record.base import Record, Share

Outcome = Literal["repaired", "unrepaired", "unverified", "unchecked"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class TriggerCheck(Record, frozen=True, kw_only=True):
    """A recovered trigger before and after a repair.

    Attributes:
        name: its kind and the label that it leads to.
        flips_before: share of held-out images that it flips, less the share that is labelled so without it.
        flips_after: the same in the repaired network.
        grown: the same for the strongest patch around it, one that was found in the network before the repair; None if
            the trigger is not a small patch.
        score_before: how far it stands out from the triggers of other labels.
        score_after: the same for the trigger that a new search finds in the repaired network.
        reactivated: largest share of held-out images that the trigger flips after small random changes of the batch
            norms of the repaired network; None if it has none.
        perturbed: share of held-out images that the trigger flips together with a small change that is the same for
            all images, less the share that such a change flips without the trigger; None if another sign was left.
    """

    name: str
    flips_before: Share
    flips_after: Share
    score_before: float
    score_after: float
    reactivated: Share | None = None
    perturbed: Share | None = None
    grown: Share | None = None


class RepairCheck(Record, frozen=True, kw_only=True):
    """Whether clean images still show signs of the backdoor after a repair.

    Attributes:
        triggers: the recovered triggers that stood out before the repair.
        lead_before: lead of a label under unlearning before the repair; None if none led.
        lead_after: the same after the repair; None if it was not measured.
        moved_before: score of the filters that unlearning moves most, before the repair; None if it was no sign.
        moved_after: the same after the repair; None if it was not measured.
        left: signs that are left, a phrase each.
    """

    triggers: tuple[TriggerCheck, ...] = ()
    lead_before: float | None = None
    lead_after: float | None = None
    moved_before: float | None = None
    moved_after: float | None = None
    left: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """``unrepaired`` if a sign is left, else ``unverified`` if there was none before, else ``repaired``."""
        if self.left:
            return "unrepaired"
        if not self.triggers and self.lead_before is None and self.moved_before is None:
            return "unverified"
        return "repaired"

    @property
    def severity(self) -> tuple[int, float]:
        """The number of signs that are left, and the largest share of images that a trigger flips."""
        flips = [
            max(one.flips_after, one.reactivated or 0.0, one.perturbed or 0.0, one.grown or 0.0)
            for one in self.triggers
        ]
        return len(self.left), max(flips, default=max(self.lead_after or 0.0, self.moved_after or 0.0))


class Attempt(Record, frozen=True, kw_only=True):
    """One method that a repair tried.

    Attributes:
        method: short name of the method, or several joined by ``+``.
        accuracy_after: clean accuracy after it, on the held-out images.
        left: signs of the backdoor that it leaves, a phrase each.
        rejected: why its result was not considered, in a phrase; empty if it was.
        chosen: whether the repair is its result.
        seconds: wall time of the method and its check.
    """

    method: str
    accuracy_after: Share | None
    left: tuple[str, ...] = ()
    rejected: str = ""
    chosen: bool = False
    seconds: float = 0.0
