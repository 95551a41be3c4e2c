from typing import Any

import pytest
import torch

from bdprune.analysis import Case
from bdprune.errors import OptionError
from bdprune.loops.finetune import FineTuneSettings
from bdprune.purifiers.nad import NAD

TUNING = FineTuneSettings(epochs=2, padding=0)
QUICK = NAD(teaching=TUNING, distilling=TUNING)


def test_the_student_learns_from_the_attention_of_the_teacher(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    found = [NAD(betas=betas, teaching=TUNING, distilling=TUNING)(case) for betas in ((0.0,), (5000.0,))]
    assert all(set(one.seconds) == {"teach", "distil", "choose"} for one in found)
    weights = [one.model.network.get_parameter("0.weight") for one in found]
    assert not torch.equal(weights[0], weights[1])


def test_a_network_with_one_resolution_uses_the_last_beta(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    found = [
        NAD(betas=betas, teaching=TUNING, distilling=TUNING)(case).model.network.get_parameter("0.weight")
        for betas in ((500.0,), (1.0, 2.0, 500.0))
    ]
    assert torch.equal(found[0], found[1])


def test_without_betas_it_cannot_be_made() -> None:
    with pytest.raises(OptionError, match="needs a beta"):
        NAD(betas=())
    with pytest.raises(OptionError, match="cannot take the betas"):
        NAD(betas=(500.0, -1.0))


def test_presets_have_the_published_settings() -> None:
    paper = NAD.preset("paper")
    assert paper.betas == (500.0, 1000.0, 1000.0)
    assert (paper.teaching.epochs, paper.distilling.epochs) == (10, 20)
    for tuning in (paper.teaching, paper.distilling):
        assert [tuning.rate(epoch) for epoch in (0, 1, 2, 9)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
        assert (tuning.momentum, tuning.nesterov, tuning.weight_decay, tuning.batch_size) == (0.9, True, 1e-4, 64)
    assert (paper.max_drop, paper.ways) == (1.0, (1.0,)) and NAD.preset("robust") == NAD()
