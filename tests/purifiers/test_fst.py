from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import Case
from bdprune.errors import OptionError
from bdprune.loops.finetune import FineTuneSettings
from bdprune.model.handle import Model
from bdprune.purifiers.fst import FST

QUICK = FST(tuning=FineTuneSettings(lr=0.05, epochs=6, padding=0))


def test_the_new_head_keeps_the_norm_and_turns_away_from_the_old_one(bright: Any) -> None:
    result = FST(alpha=1.0, tuning=QUICK.tuning, max_drop=1.0)(Case(bright.model, bright.data))
    old, new = (one.network.get_parameter("8.weight").flatten() for one in (bright.model, result.model))
    assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-4)
    assert nn.functional.cosine_similarity(old, new, dim=0) < 0.7


def test_a_network_without_a_linear_head_is_an_error(bright: Any) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(OptionError, match="needs a linear layer that outputs the logits"):
        QUICK(Case(Model(network, "no head", 3, (3, 8, 8)), bright.data))


def test_the_same_seed_gives_the_same_repair_and_another_seed_another(bright: Any) -> None:
    heads = [
        FST(tuning=QUICK.tuning, max_drop=1.0, seed=seed)(Case(bright.model, bright.data)).model.network
        for seed in (0, 0, 1)
    ]
    weights = [one.get_parameter("8.weight") for one in heads]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_presets_have_the_published_settings() -> None:
    paper = FST.preset("paper")
    assert (paper.alpha, paper.tuning.lr, paper.tuning.momentum, paper.tuning.epochs) == (0.1, 0.01, 0.9, 10)
    assert paper.tuning.schedule == "cosine" and (paper.max_drop, paper.ways) == (1.0, (1.0,))
    assert FST.preset("robust") == FST()
