from dataclasses import replace
from typing import Any

import torch

from bdprune.analysis import Case
from bdprune.loops.implicit import ImplicitSettings
from bdprune.purifiers.ibau import IBAU

QUICK = IBAU(unlearning=ImplicitSettings(rounds=1, batch_size=60))


def test_a_repair_keeps_the_limit_and_repeats(bright: Any) -> None:
    found = [QUICK(Case(bright.model, bright.data)) for _ in range(2)]
    assert found[0].accuracy_before - found[0].accuracy_after <= QUICK.max_drop + 1e-6
    states = [one.model.network.state_dict() for one in found]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_few_images_do_not_make_it_a_silent_no_op(bright: Any) -> None:
    few = bright.data.subset(torch.arange(6))
    result = IBAU(unlearning=QUICK.unlearning, max_drop=1.0)(Case(bright.model, few))
    assert result.change == "retrained"


def test_a_training_that_ruins_the_network_is_repeated_more_slowly(bright: Any) -> None:
    """Networks of width 32 stayed as they were."""
    hasty = replace(QUICK, unlearning=replace(QUICK.unlearning, lr=3.0), max_drop=0.01)
    result = replace(hasty, retries=4)(Case(bright.model, bright.data))
    assert result.change == "retrained" and "with a lower rate" in result.selection
    assert result.params == replace(hasty, retries=4).params
    assert replace(hasty, retries=0)(Case(bright.model, bright.data)).change == "nothing"


def test_presets_have_the_published_settings() -> None:
    paper = IBAU.preset("paper")
    one = paper.unlearning
    assert (one.rounds, one.steps, one.search_lr, one.lr, one.penalty, one.step_size) == (5, 5, 10, 1e-3, 1e-3, 0.1)
    assert (one.share, one.batch_size, paper.max_drop, paper.ways, paper.retries) == (0.01, 100, 1.0, (1.0,), 0)
    assert IBAU.preset("robust") == IBAU()
