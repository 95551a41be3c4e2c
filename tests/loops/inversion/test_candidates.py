"""The penalty of a candidate follows its success by the rule of the search."""

from __future__ import annotations

import pytest
import torch

from bdprune.loops.inversion.candidates import Candidates, PenaltyRule
from bdprune.loops.inversion.families import FAMILIES

PUBLISHED = PenaltyRule(first=1e-3, factor=2.0, memory=0.0, patience=5, from_zero=True)


def candidates(rule: PenaltyRule, count: int = 1) -> Candidates:
    return Candidates(FAMILIES["patch"], count, (3, 2, 2), rule, torch.Generator().manual_seed(0), torch.device("cpu"))


def penalties(found: Candidates, *success: float) -> list[float]:
    """The penalty of the first candidate after each step with this success; the goal is 0.99."""
    seen = []
    for one in success:
        leaves = found.leaves()
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        found.update(leaves, torch.full((len(found),), one), torch.full((len(found),), 0.99), 0.1)
        seen.append(found.penalty[0].item())
    return seen


def test_by_default_the_penalty_changes_in_every_step() -> None:
    rule = PenaltyRule(memory=0.0)
    assert penalties(candidates(rule), 1.0, 1.0, 0.0) == pytest.approx([1.3e-3, 1.69e-3, 1.69e-3 / 1.3**1.5])


def test_the_published_penalty_starts_at_zero_and_appears_after_five_successes() -> None:
    found = candidates(PUBLISHED)
    assert penalties(found, 0.0, *[1.0] * 4) == [0.0] * 5
    assert penalties(found, 1.0) == pytest.approx([1e-3])


def test_it_doubles_after_five_successes_and_shrinks_after_five_failures() -> None:
    found = candidates(PUBLISHED)
    assert penalties(found, *[1.0] * 10)[-2:] == pytest.approx([1e-3, 2e-3])
    assert penalties(found, *[0.0] * 5)[-2:] == pytest.approx([2e-3, 2e-3 / 2**1.5])


def test_a_failure_in_between_starts_the_count_again() -> None:
    found = candidates(PUBLISHED)
    assert penalties(found, *[1.0] * 4, 0.0, *[1.0] * 4) == [0.0] * 9
    assert penalties(found, 1.0) == pytest.approx([1e-3])


def test_candidates_that_are_kept_keep_their_count() -> None:
    found = candidates(PUBLISHED, 2)
    penalties(found, *[1.0] * 4)
    found.select(torch.tensor([1]))
    assert penalties(found, 1.0) == pytest.approx([1e-3])


def test_a_new_start_forgets_the_count() -> None:
    found = candidates(PUBLISHED)
    penalties(found, *[1.0] * 4)
    found.restart_from_best(1.0)
    assert penalties(found, *[1.0] * 4) == [0.0] * 4
