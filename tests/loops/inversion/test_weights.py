"""Weights of sources: a hand-computed case, the running means, the images that are drawn, and a planted source."""

from __future__ import annotations

import math

import pytest
import torch

from bdprune.loops import Hypothesis, InvertSettings, Recovery, Stage, invert
from bdprune.loops.inversion.weights import TEMPERATURE, SourceWeights, image_weights

from ...helpers import siblings
from ...written import TARGET, blocks_images, blocks_model, known_networks

SOURCE = 5
LABELS = torch.tensor([4, 4, 7, 7, 9, 9])
SETTINGS = InvertSettings(stages=(Stage(60, 16),), final=Stage(20, 16), rounds=0)


def weights(*weighted: bool) -> SourceWeights:
    """Weights of labels 4 and 7, for candidates whose images have losses of 2, and of label 9 for none of them."""
    pools = [torch.tensor([0, 1, 2, 3]) for _ in weighted]
    return SourceWeights(torch.tensor(weighted), pools, LABELS, torch.full((len(weighted), 6), 2.0))


def test_sources_have_the_softmax_of_their_losses_and_images_share_it() -> None:
    losses, sources = torch.tensor([[1.0, 1.0, 3.0]]), torch.tensor([[6, 6, 2]])
    easy = 1 / (1 + math.exp(-2 / 0.5))
    assert image_weights(losses, sources, 0.5).tolist()[0] == pytest.approx([easy / 2, easy / 2, 1 - easy])


def test_equal_losses_give_sources_equal_weights_whatever_their_images() -> None:
    found = image_weights(torch.ones(1, 4), torch.tensor([[0, 0, 0, 1]]))
    assert found.tolist()[0] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_weights_follow_a_running_mean() -> None:
    found = weights(True)
    # Label 4 goes from 2 to 0.7 * 2 + 0.3 * mean(0, 2) = 1.7, label 7 to 0.7 * 2 + 0.3 * 2 = 2.
    once = found.weigh(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([[0, 1, 2]]), slice(0, 1))
    easy = 1 / (1 + math.exp(-0.3 / TEMPERATURE))
    assert once.tolist()[0] == pytest.approx([easy / 2, easy / 2, 1 - easy])
    # Label 7 has no image in this step, so it keeps its mean; label 4 goes to 0.7 * 1.7 + 0.3 * 1.7.
    found.weigh(torch.tensor([[1.7]]), torch.tensor([[1]]), slice(0, 1))
    again = found.weigh(torch.tensor([[1.7, 2.0]]), torch.tensor([[0, 3]]), slice(0, 1))
    assert again.tolist()[0] == pytest.approx([easy, 1 - easy])
    assert found.ranked() == [(4, 7)]


def test_a_candidate_without_weights_counts_all_images_equally() -> None:
    found = weights(False, True)
    both = found.weigh(torch.tensor([[0.0, 5.0], [0.0, 5.0]]), torch.tensor([[0, 2], [0, 2]]), slice(0, 2))
    assert both[0].tolist() == [0.5, 0.5] and both[1, 0] > 0.9
    assert found.ranked() == [(), (4, 7)]


def test_images_come_from_all_sources_and_more_from_the_easy_ones() -> None:
    found = weights(True)
    found.weigh(torch.tensor([[30.0, 2.0]]), torch.tensor([[0, 2]]), slice(0, 1))
    numbers = torch.randint(1 << 31, (1, 8), generator=torch.Generator().manual_seed(0))
    drawn = LABELS[found.draw(numbers)[0]]
    assert int((drawn == 4).sum()) == 2 and int((drawn == 7).sum()) == 6  # a half evenly, and a half by weight


def test_kept_candidates_keep_their_means() -> None:
    found = weights(True, True)
    found.weigh(torch.tensor([[2.0, 2.0], [9.0, 0.0]]), torch.tensor([[0, 2], [0, 2]]), slice(0, 2))
    found.select(torch.tensor([1]))
    assert found.ranked() == [(7, 4)]
    assert found.draw(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3)


def weighted(model_source: int | None, settings: InvertSettings = SETTINGS, classes: int = 14) -> list[Recovery]:
    wanted = [Hypothesis(target, weighted=True) for target in range(classes)]
    return list(invert([blocks_model(model_source, classes)], blocks_images(classes), wanted, settings)[0].recoveries)


def test_a_trigger_of_one_source_is_found_among_many_labels() -> None:
    found = weighted(SOURCE)
    smallest = min(found, key=lambda one: one.size)
    assert smallest.hypothesis.target == TARGET and smallest.sources[0] == SOURCE
    assert smallest.trigger.sources == (SOURCE,) and smallest.trigger.images == 24
    assert all(one.hypothesis.target not in one.sources and len(one.sources) == 4 for one in found)


def test_a_stack_gives_the_sources_that_its_models_give() -> None:
    known = known_networks()
    models, wanted = siblings(known.clean, 2), [Hypothesis(target, weighted=True) for target in (1, 2)]
    together = invert(models, known.data, wanted, SETTINGS)
    for model, stacked in zip(models, together, strict=True):
        alone = invert([model], known.data, wanted, SETTINGS)[0]
        for ours, theirs in zip(stacked.recoveries, alone.recoveries, strict=True):
            assert ours.sources[0] == theirs.sources[0] and ours.size == pytest.approx(theirs.size, rel=0.1)


def test_hypotheses_with_weights_do_not_change_the_others() -> None:
    few = InvertSettings(stages=(Stage(4, 8),), final=Stage(1, 1), rounds=0)
    plain, pair = Hypothesis(1), Hypothesis(2, sources=(0,))
    model, data = blocks_model(SOURCE), blocks_images()
    mixed = invert([model], data, [plain, pair, Hypothesis(TARGET, weighted=True)], few)[0].recoveries
    others = invert([model], data, [plain, pair, Hypothesis(TARGET)], few)[0].recoveries
    for ours, theirs in zip(mixed[:2], others[:2], strict=True):
        assert ours.sources == () and torch.allclose(ours.trigger.pattern, theirs.trigger.pattern, atol=1e-4)
