from typing import Any

import torch

from bdprune.analysis import Case
from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.methods.held_out import hold_out
from bdprune.purifiers.fine_tuning import FineTuning

QUICK = FineTuning(tuning=FineTuneSettings(epochs=2, padding=0))


def test_the_result_is_the_fine_tuned_copy_on_the_images_that_are_not_held_out(bright: Any) -> None:
    result = QUICK(Case(bright.model, bright.data))
    rest, _ = hold_out(bright.data, QUICK.held_out, QUICK.seed)
    wanted = fine_tune(bright.model, rest, QUICK.tuning, seed=QUICK.seed).network.state_dict()
    assert result.change == "retrained" and result.pruned == {}
    assert all(torch.equal(value, wanted[name]) for name, value in result.model.network.state_dict().items())


def test_a_fine_tuning_that_costs_too_much_is_not_kept(bright: Any) -> None:
    result = FineTuning(tuning=QUICK.tuning, max_drop=-1.0)(Case(bright.model, bright.data))
    assert result.change == "nothing" and result.accuracy_after == result.accuracy_before


def test_presets() -> None:
    paper = FineTuning.preset("paper")
    assert (paper.tuning.lr, paper.tuning.epochs, paper.tuning.batch_size) == (0.01, 100, 256)
    assert paper.tuning.schedule == "cosine" and (paper.max_drop, paper.ways) == (1.0, (1.0,))
    assert FineTuning.preset("robust") == FineTuning()
