"""Adversarial neuron pruning: the choice of the threshold, its guard, and the published settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load as read_tensors

from bdprune.analysis import Case
from bdprune.errors import DataError, OptionError
from bdprune.loops.adversarial_mask import AdversarialMaskSettings, learn_masks
from bdprune.methods.held_out import hold_out
from bdprune.model.edit.pruning import prune
from bdprune.purifiers.anp import ANP
from bdprune.runtime.evaluate import clean_accuracy

QUICK = ANP(AdversarialMaskSettings(iterations=12, batch_size=40, padding=0))


def test_the_highest_threshold_within_the_limit_is_taken(bright: Any) -> None:
    result = QUICK(Case(bright.model, bright.data))
    rest, held = hold_out(bright.data, 0.3, 0)
    masks = learn_masks(bright.model, rest, QUICK.masking).masks
    assert all(torch.equal(masks[name], result.masks[name]) for name in masks)
    fits = {}
    for threshold in (index * 0.05 for index in range(20)):
        pruned = {name: (mask <= threshold).nonzero().flatten().tolist() for name, mask in masks.items()}
        module = prune(bright.model, pruned).module
        drops = [
            clean_accuracy(bright.model.module, data.images, data.labels)
            - clean_accuracy(module, data.images, data.labels)
            for data in (held, rest)
        ]
        if max(drops) <= 0.02:
            fits[threshold] = {name: index for name, index in pruned.items() if index}
    assert result.threshold == max(fits) and result.pruned == fits[result.threshold]
    assert result.accuracy_before - result.accuracy_after <= 0.02
    assert result.change == ("pruned" if result.pruned else "nothing")
    assert len(result.curve) == 20


def test_only_the_scales_of_pruned_filters_change(bright: Any) -> None:
    result = replace(QUICK, max_drop=1.0)(Case(bright.model, bright.data))
    assert result.pruned and result.change == "pruned"
    state = bright.model.network.state_dict()
    changed = {name for name, value in result.model.network.state_dict().items() if not torch.equal(value, state[name])}
    assert changed <= {"1.weight", "4.weight"}


def test_nothing_is_pruned_if_every_threshold_costs_too_much(bright: Any) -> None:
    result = replace(QUICK, max_drop=-1.0)(Case(bright.model, bright.data))
    assert result.change == "nothing" and math.isnan(result.threshold)
    assert result.selection.startswith("nothing is pruned: every threshold costs more than -100 points")


def test_masks_above_every_threshold_are_reported(bright: Any) -> None:
    still = replace(QUICK, threshold=0.0, masking=replace(QUICK.masking, lr=1e-6))
    result = still(Case(bright.model, bright.data))
    assert result.change == "nothing" and result.selection == "nothing is pruned: no mask is at or below 0"
    with pytest.raises(OptionError, match="threshold of ANP is 2"):
        replace(QUICK, threshold=2.0)


def test_a_given_threshold_is_used_whatever_it_costs(bright: Any) -> None:
    result = replace(QUICK, threshold=1.0, max_drop=0.0)(Case(bright.model, bright.data))
    assert sum(map(len, result.pruned.values())) == 24 and result.threshold == 1.0
    assert result.selection == "given threshold" and result.accuracy_after < 0.5


def test_the_same_seed_gives_the_same_repair(bright: Any) -> None:
    one, two = (QUICK(Case(bright.model, bright.data)) for _ in range(2))
    assert one.pruned == two.pruned and one.curve == two.curve


def test_ten_images_suffice_and_one_of_each_class_does_not(bright: Any) -> None:
    result = QUICK(Case(bright.model, bright.data.subset(torch.arange(10))))
    assert set(result.masks) == {"0", "3"}
    with pytest.raises(DataError, match="leave none to hold out"):
        QUICK(Case(bright.model, bright.data.subset(torch.arange(3))))
    with pytest.raises(DataError, match="needs clean images"):
        QUICK(Case(bright.model))


def test_the_masks_are_attached(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    result = QUICK(case)
    (attached,) = result.attachments
    masks = read_tensors(case.attachments[attached.sha256])
    assert all(torch.equal(masks[name], result.masks[name]) for name in result.masks)


def test_presets_have_the_published_settings() -> None:
    paper: Any = ANP.preset("paper")
    masking = paper.masking
    assert (masking.eps, masking.attack_steps, masking.alpha, masking.project) == (0.4, 1, 0.2, False)
    assert (masking.lr, masking.momentum, masking.iterations, masking.batch_size) == (0.2, 0.9, 2000, 128)
    assert (paper.threshold, paper.mode, masking.small_data) == (0.2, "zero_gamma", 0)
    assert ANP.preset("robust") == ANP()
