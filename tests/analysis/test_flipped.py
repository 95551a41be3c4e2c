"""Targets and sources that are read off the labels of stamped images."""

from __future__ import annotations

import torch
from torch import Tensor

from bdprune.analysis import Flips, read_flips


def table(goals: dict[int, tuple[int, float]], labels: int = 6, images: int = 20) -> Tensor:
    """The share of each label's images that goes to its goal; the others keep their label."""
    found = torch.zeros(labels, labels, dtype=torch.int64)
    for label in range(labels):
        goal, share = goals.get(label, (label, 1.0))
        moved = round(share * images)
        found[label, goal] += moved
        found[label, label] += images - moved
    return found


def test_one_target_of_all_labels() -> None:
    assert read_flips(table({label: (2, 0.9) for label in range(6)}), 2) == Flips((2,), ())


def test_an_all_to_all_backdoor_has_a_target_for_each_label() -> None:
    goals = {label: ((label + 1) % 6, 0.9) for label in range(6)}
    assert read_flips(table(goals), None) == Flips((0, 1, 2, 3, 4, 5), ())


def test_an_untargeted_trigger_to_one_label_names_it() -> None:
    assert read_flips(table({label: (4, 0.9) for label in range(6) if label != 4}), None) == Flips((4,), ())


def test_a_source_specific_backdoor_names_its_sources() -> None:
    assert read_flips(table({1: (0, 0.95)}), 0) == Flips((0,), (1,))


def test_labels_that_are_partly_flipped_are_no_sources() -> None:
    goals = {1: (0, 0.95), 2: (0, 0.4), 3: (0, 0.4), 4: (0, 0.4), 5: (0, 0.4)}
    assert read_flips(table(goals), 0).sources == ()


def test_labels_without_images_do_not_count() -> None:
    found = table({1: (0, 0.95)})
    found[3:] = 0
    assert read_flips(found, 0) == Flips((0,), ())
