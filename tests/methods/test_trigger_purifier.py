"""The base of the purifiers that work with recovered triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from bdprune.analysis import Case, Outstanding, SearchFor
from bdprune.methods import Phases, Repair, TriggerPurifier, hold_out, trigger_purifier
from bdprune.record import Needs
from bdprune.testing.planted import planted


@dataclass(frozen=True)
class Watching(TriggerPurifier):
    """Keeps the model, and says how many triggers it got."""

    id = "test.watching"
    needs = Needs(images="labelled", minimum=20)

    def repaired(self, case: Case, known: Sequence[Outstanding], phase: Phases) -> Repair:
        _, held = hold_out(case.images, 0.3, self.seed)
        return self.repair(case, case.model, held, selection=f"{len(known)} triggers", seconds=phase.seconds)


def test_it_searches_first_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def search(case: Case, *settings: Any) -> list[Outstanding]:
        asked.append(settings)
        return []

    monkeypatch.setattr(trigger_purifier, "outstanding_triggers", search)
    known = planted()
    searched = SearchFor()
    repair = Watching(search=searched, least=2.5, seed=7)(Case(known.backdoored, known.data))
    assert asked == [(searched, 2.5, 7)] and repair.selection == "0 triggers" and "search" in repair.seconds
