from typing import Any

import torch

from bdprune.analysis import Case
from bdprune.loops.finetune import FineTuneSettings
from bdprune.purifiers.ft_sam import FTSAM

QUICK = FTSAM(rho=1.0, tuning=FineTuneSettings(epochs=2, padding=0))


def test_the_radius_and_the_smoothing_reach_the_training(bright: Any) -> None:
    case = Case(bright.model, bright.data)
    found = [
        FTSAM(rho=rho, smoothing=smooth, tuning=QUICK.tuning)(case) for rho, smooth in ((1, 0.1), (2, 0.1), (1, 0))
    ]
    heads = [one.model.network.get_parameter("8.weight") for one in found]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert all(one.accuracy_before - one.accuracy_after <= one.params["max_drop"] + 1e-6 for one in found)


def test_ten_images_work(bright: Any) -> None:
    few = bright.data.subset(torch.arange(10))
    assert QUICK(Case(bright.model, few)).change in ("retrained", "nothing")


def test_presets_have_the_published_settings() -> None:
    paper = FTSAM.preset("paper")
    assert (paper.rho, paper.smoothing) == (2.0, 0.1)
    assert (paper.tuning.lr, paper.tuning.epochs, paper.tuning.batch_size) == (0.01, 100, 256)
    assert paper.tuning.schedule == "cosine" and (paper.max_drop, paper.ways) == (1.0, (1.0,))
    assert FTSAM.preset("robust") == FTSAM()
