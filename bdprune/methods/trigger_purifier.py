"""What the purifiers that work with recovered triggers share: they search first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from bdprune.analysis import Case, Outstanding, SearchFor, outstanding_triggers
from bdprune.methods.purifier import Phases, Purifier, Repair


@dataclass(frozen=True)
class TriggerPurifier(Purifier):
    """Base of the purifiers that work with recovered triggers.

    Args:
        search: which triggers are searched; by default those of a scan.
        least: smallest score of a trigger that counts (:class:`bdprune.detectors.inversion.InversionDetector`).
        seed: seed of everything random.
    """

    search: SearchFor = SearchFor()  # noqa: RUF009  (frozen)
    least: float = 1.5
    seed: int = 0

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model.

        Raises:
            ArchitectureError: the network has no convolutions, and the method prunes.
            DataError: there are too few clean images.
            TrainingError: the loss of a fine-tuning is not finite.
        """
        self.check(case)
        phase = Phases()
        with phase("search"):
            known = outstanding_triggers(case, self.search, self.least, self.seed)
        return self.repaired(case, known, phase)

    @abstractmethod
    def repaired(self, case: Case, known: Sequence[Outstanding], phase: Phases) -> Repair:
        """The repair by known triggers.

        Args:
            case: the case; its model may be another form of the network that the triggers come from.
            known: the triggers; without any, nothing changes.
            phase: takes the times.
        """
