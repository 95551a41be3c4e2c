"""The losses of inversion and the count of flips."""

from __future__ import annotations

import torch
from torch.nn import functional

from bdprune.loops.inversion.hypotheses import Hypothesis, every_target
from bdprune.loops.inversion.objective import flip_losses, flips, losses_by_target, targets_of

LOGITS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[0, 1, 2, 3, 0], [0, 1, 2, 3, 0]])


def test_the_loss_of_a_target_is_the_cross_entropy() -> None:
    losses = flip_losses(LOGITS, torch.tensor([2, -1]), LABELS)
    assert torch.allclose(losses[0], functional.cross_entropy(LOGITS[0], torch.full((5,), 2), reduction="none"))


def test_the_untargeted_loss_is_the_probability_of_the_true_label() -> None:
    losses = flip_losses(LOGITS, torch.tensor([2, -1]), LABELS)
    kept = LOGITS[1].softmax(1).gather(1, LABELS[1][:, None])
    assert torch.allclose(losses[1], -(1 - kept[:, 0]).log(), atol=1e-6)


def test_losses_to_all_targets_are_the_losses_of_their_hypotheses() -> None:
    table = losses_by_target(LOGITS[0], LABELS[0])
    for target in (-1, 0, 3):
        one = flip_losses(LOGITS[:1], torch.tensor([target]), LABELS[:1])[0]
        assert torch.allclose(table[:, target], one, atol=1e-6)


def test_flips_are_predictions_of_the_target_or_away_from_the_label() -> None:
    found = flips(LOGITS, targets_of([Hypothesis(2), Hypothesis(None)]), LABELS)
    predicted = LOGITS.argmax(2)
    assert torch.equal(found[0], predicted[0] == 2)
    assert torch.equal(found[1], predicted[1] != LABELS[1])


def test_a_hypothesis_takes_the_images_of_its_sources_without_the_target() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    assert Hypothesis(0).takes(labels).tolist() == [False, True, True, False]
    assert Hypothesis(0, sources=(0, 2)).takes(labels).tolist() == [False, False, True, False]
    assert Hypothesis(None).takes(labels).all()


def test_every_target_ends_with_the_untargeted_hypothesis() -> None:
    assert [one.target for one in every_target(3)] == [0, 1, 2, None]
