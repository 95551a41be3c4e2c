"""How recovered triggers are compared with true ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
from recovered import flip_rate, overlap, patch_of, recovered_table

from bdprune.data import RawImages
from bdprune.loops import Trigger
from tests.written import TARGET, known_networks


def _corner(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[..., :2, :3] = 1.0
    return images


def test_patch_of_finds_the_pixels_that_a_trigger_changes() -> None:
    patch = patch_of(_corner, torch.rand(20, 3, 8, 8) * 0.9)
    assert patch is not None
    assert patch.sum() == 6
    assert patch[:2, :3].all()


def test_patch_of_is_none_for_a_trigger_that_covers_the_image() -> None:
    assert patch_of(lambda images: images * 0.5, torch.rand(20, 3, 8, 8) + 0.1) is None


@pytest.mark.parametrize(("columns", "expected"), [(3, 1.0), (0, 0.0)])
def test_overlap_compares_the_strongest_pixels(columns: int, expected: float) -> None:
    patch = torch.zeros(8, 8, dtype=torch.bool)
    patch[:2, :3] = True
    strength = torch.zeros(8, 8)
    strength[:2, :columns] = 0.9
    strength[6:, :3] = 0.5
    assert overlap(strength, patch) == pytest.approx(expected)


def test_the_table_shows_triggers_of_the_right_label_and_to_any_label() -> None:
    found = [
        {"kind": "patch", "target": target, "held_out": 1.0, "test": 0.97, "overlap": 0.5} for target in (3, 4, None)
    ]
    again = [found[0] | {"held_out": 0.9, "overlap": None}]
    rows = [{"model": "m", "truth": 3, "recovered": one} for one in (found, again)]
    table = recovered_table(rows)
    assert "| m | patch, label 3 | 2 | 90.0 to 100.0 % | 97.0 % | 50.0 % |" in table
    assert "any label" in table
    assert "label 4" not in table


def test_flip_rate_counts_the_images_of_other_labels() -> None:
    known = known_networks()
    images = (known.test.images * 255).round().to(torch.uint8)
    test = RawImages(images, known.test.labels)
    mask = torch.zeros(1, *images.shape[2:])
    mask[:, -3:, -3:] = 1
    pattern = torch.zeros(images.shape[1:])
    pattern[:, -3:, -3:] = (torch.arange(9) % 2).float().view(3, 3)
    trigger = Trigger(mask, pattern, TARGET)
    assert flip_rate(trigger, known.backdoored.module, test) > 0.95
    assert flip_rate(trigger, known.clean.module, test) < 0.5
