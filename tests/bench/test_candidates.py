"""The ideas that were tried for backdoors that no trigger search finds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from candidates import above_median, frozen, separated, smallest_changes, transferred

from tests.written import TARGET, known_networks


def test_a_smallest_change_leads_its_image_to_the_label() -> None:
    known = known_networks()
    images = known.data.images[known.data.labels != 2][:6]
    model = frozen(known.clean)
    changes = smallest_changes(model, images, 2)
    flipped = model.module((images + changes).clamp(0, 1)).argmax(1) == 2
    assert flipped.float().mean() >= 0.5
    assert not smallest_changes(model, images, int(model.module(images[:1]).argmax()))[0].any()


def test_changes_of_an_unresponsive_network_stay_finite() -> None:
    known = known_networks()
    model = replace(known.clean, network=known.clean.clone().network)
    with torch.no_grad():
        for value in model.network.parameters():
            value.zero_()
    assert smallest_changes(frozen(model), known.data.images[:2], 3).isfinite().all()
    assert transferred(frozen(model), known.data, 3) == 0.0


def test_a_trigger_separates_a_backdoored_network_from_its_clean_twin() -> None:
    known = known_networks()
    search, held = known.data.split(0.5, torch.Generator().manual_seed(0))
    backdoored, clean = frozen(known.backdoored), frozen(known.clean)
    assert separated(backdoored, clean, search, held, TARGET) > 0.2


def test_the_score_compares_a_label_with_the_median() -> None:
    assert above_median([0.1, 0.2, 0.9]) == 0.9 - 0.2
