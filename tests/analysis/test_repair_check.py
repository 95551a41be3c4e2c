"""Whether clean images show that a repair removed the backdoor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case, CheckLimits, Outstanding, SearchFor, Signs, check_repair, collapse_of, signs_of
from bdprune.analysis.repair_check import _changed, _trigger_check, flips_of, perturbed_flips
from bdprune.data import CleanData
from bdprune.loops import ChangeSettings, GrowthSettings, Trigger
from bdprune.methods import hold_out
from bdprune.model import Model

from ..written import known_networks
from .test_outstanding import PATCH

LIMITS = CheckLimits(draws=2)


def test_a_backdoored_network_keeps_its_signs_and_its_clean_twin_has_none() -> None:
    known = known_networks()
    case = Case(known.backdoored, known.data)
    _, held = hold_out(known.data, 0.3, 0)
    signs = signs_of(case, held, LIMITS, PATCH)
    assert signs.triggers and signs.label == known.target
    same = check_repair(case, known.backdoored, signs, LIMITS, PATCH)
    assert same.outcome == "unrepaired" and same.left
    first = same.triggers[0]
    assert first.flips_before == first.flips_after > 0.5 and first.score_after >= 1.7
    assert first.flips_before == flips_of(known.backdoored, signs.triggers[0].trigger, held)
    twin = check_repair(case, known.clean, signs, LIMITS, PATCH)
    assert twin.outcome == "repaired" and twin.left == ()
    assert twin.triggers[0].flips_after < 0.1 and twin.triggers[0].score_after < 1.7
    assert twin.triggers[0].perturbed is not None and first.perturbed is None, "it is measured if no sign is left"
    assert twin.severity < same.severity


def test_a_wider_patch_that_still_works_is_a_sign_that_is_left() -> None:
    """What is left of a backdoor may respond to the true trigger, and not to the small one that was found."""
    known = known_networks()
    case = Case(known.backdoored, known.data)
    _, held = hold_out(known.data, 0.3, 0)
    wide = replace(LIMITS, growth=GrowthSettings(largest=1.0))
    signs = signs_of(case, held, wide, PATCH)
    first = signs.triggers[0]
    assert first.grown is not None and first.grown.size > first.size
    weak = replace(first, trigger=replace(first.trigger, mask=torch.zeros_like(first.grown.mask)))  # type: ignore[arg-type]
    found = check_repair(case, known.backdoored, replace(signs, triggers=(weak,)), wide, PATCH)
    assert found.triggers[0].flips_after == 0 and found.triggers[0].grown == flips_of(
        known.backdoored, first.grown, held
    )
    assert "a wider patch" in found.left[0] and found.severity[1] == found.triggers[0].grown
    assert signs_of(case, held, LIMITS, PATCH).triggers[0].grown is None, "it would cover too much of a small image"


def test_without_signs_nothing_can_be_verified() -> None:
    known = known_networks()
    case = Case(known.clean, known.data)
    _, held = hold_out(known.data, 0.3, 0)
    signs = signs_of(case, held, replace(LIMITS, lead=1.0, moved=1.0), PATCH)
    assert not signs and signs.label is None
    assert check_repair(case, known.clean, signs, LIMITS, SearchFor()).outcome == "unverified"


def test_a_lead_that_stays_is_a_sign_that_is_left() -> None:
    known = known_networks()
    case = Case(known.backdoored, known.data)
    _, held = hold_out(known.data, 0.3, 0)
    low = replace(LIMITS, lead=-1.0, moved=1.0)
    signs = replace(signs_of(case, held, low, PATCH), triggers=())
    found = check_repair(case, known.backdoored, signs, low, PATCH)
    led = collapse_of(case)
    assert led is not None and found.lead_before == found.lead_after == led.lead
    assert found.left == (f"label {led.label} leads under unlearning, by {led.lead:.2f}",)
    assert found.severity == (1, led.lead)
    moves = replace(LIMITS, lead=1.0, moved=-1.0)
    signs = replace(signs_of(case, held, moves, PATCH), triggers=())
    found = check_repair(case, known.backdoored, signs, moves, PATCH)
    assert found.moved_before == found.moved_after == led.moved and found.lead_before is None
    assert len(found.left) == 1 and "filters that unlearning moves" in found.left[0]


def test_changed_networks_differ_in_their_norms_only_and_the_same_way_each_time() -> None:
    known = known_networks()
    one, two = _changed(known.clean, LIMITS, 0), _changed(known.clean, LIMITS, 0)
    before = known.clean.network.state_dict()
    for form, same in zip(one, two, strict=True):
        changed = {name for name, value in form.network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and all(name.endswith(("weight", "bias")) for name in changed)
        assert all(before[name].dim() == 1 for name in changed)
        ratios = [(form.network.state_dict()[name] / before[name]).nan_to_num(1) for name in changed]
        assert all(ratio.min() >= 0.9 - 1e-6 and ratio.max() <= 1.1 + 1e-6 for ratio in ratios)
        assert all(
            torch.equal(value, same.network.state_dict()[name]) for name, value in form.network.state_dict().items()
        )


def test_a_network_without_batch_norms_is_not_changed(bright: Any) -> None:
    assert _changed(bright.model, LIMITS, 0)
    images, labels = bright.data.images, bright.data.labels
    plain = nn.Sequential(nn.Conv2d(images.shape[1], 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LazyLinear(3))
    plain(images[:1])
    model = Model(plain.eval(), "group norm", 3, (3, 8, 8))
    assert _changed(model, LIMITS, 0) == []
    known = Outstanding(Trigger(torch.ones(1, 8, 8), images[0], 0), 0.5, 4.0, (9.0,))
    found = _trigger_check(model, model, known, known, CleanData(images, labels), LIMITS, 0)
    assert found.reactivated is None


def test_a_hidden_backdoor_comes_back_under_a_small_change_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weak trigger flips few images, until a small change of all images helps it."""
    known = known_networks()
    case = Case(known.backdoored, known.data)
    rest, held = hold_out(known.data, 0.3, 0)
    signs = signs_of(case, held, LIMITS, PATCH)
    trigger = signs.triggers[0].trigger
    assert trigger.mask is not None
    settings = ChangeSettings(bound=0.05)
    weak = replace(trigger, mask=trigger.mask * 0.3)
    back = perturbed_flips(known.backdoored, weak, (rest, held), settings)
    assert back > 1.5 * flips_of(known.backdoored, weak, held) > 0
    assert perturbed_flips(known.clean, weak, (rest, held), settings) < 0.1
    assert back == perturbed_flips(known.backdoored, weak, (rest, held), settings)
    monkeypatch.setattr("bdprune.analysis.repair_check.perturbed_flips", lambda *args: 0.4)
    found = check_repair(case, known.clean, signs, LIMITS, PATCH)
    assert found.outcome == "unrepaired" and found.severity == (1, 0.4)
    assert found.left[0].startswith("with a small change of the images, the ")


def test_a_trigger_for_no_image_comes_back_on_none() -> None:
    known = known_networks()
    _, held = hold_out(known.data, 0.3, 0)
    trigger = signs_of(Case(known.backdoored, known.data), held, LIMITS, PATCH).triggers[0].trigger
    goal = held.subset((held.labels == known.target).nonzero().flatten())
    assert len(goal) and perturbed_flips(known.backdoored, trigger, (goal, goal), ChangeSettings()) == 0.0


def test_few_images_show_nothing_under_unlearning() -> None:
    known = known_networks()
    assert collapse_of(Case(known.backdoored, known.data.spread(90))) is None


def test_a_sign_that_cannot_be_measured_again_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_networks()
    case = Case(known.backdoored, known.data)
    _, held = hold_out(known.data, 0.3, 0)
    signs = Signs((), 0.4, None, known.target, held)
    monkeypatch.setattr("bdprune.analysis.repair_check.collapse_of", lambda *args: None)
    found = check_repair(case, known.clean, signs, LIMITS, PATCH)
    assert found.outcome == "unrepaired" and found.left[0].startswith("the repaired network cannot be unlearned")


def test_a_network_without_convolutions_has_no_moved_filters() -> None:
    known = known_networks()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    found = collapse_of(Case(Model(network, "flat", 10, (3, 16, 16)), known.data))
    assert found is None or (found.moved_label, found.moved) == (None, 0.0)
