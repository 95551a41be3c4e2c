from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.data.clean import CleanData
from bdprune.errors import OptionError
from bdprune.model.handle import Model
from bdprune.training import precision
from bdprune.training.finetune import FineTuneSettings, fine_tune
from bdprune.training.precision import PLANS, Plan, plan_for
from bdprune.training.recover import RecoverSettings, recover
from bdprune.training.unlearn import UnlearnSettings, unlearn

UNLEARN = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=60, padding=0, max_epochs=2, stop_accuracy=0.0)
RECOVER = RecoverSettings(batch_size=60, epochs=2, padding=0)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test measures for itself."""
    monkeypatch.setattr(precision, "_measured", {})
    yield


def timed(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[Plan]:
    """Gives each plan of ``PLANS`` a time; returns the list of those that are tried."""
    tried: list[Plan] = []

    def fake(plan: Plan, module: Any, images: Any) -> float:
        tried.append(plan)
        return seconds[PLANS.index(plan)]

    monkeypatch.setattr(precision, "_seconds", fake)
    monkeypatch.setattr(precision, "_bfloat16_is_fast", lambda: True)
    return tried


def test_float32_in_channels_last_is_the_default(bright: Any) -> None:
    assert Plan() == Plan(bfloat16=False, channels_last=True)
    assert plan_for("float32", bright.model.module, bright.data.images) == Plan()
    assert unlearn(bright.model, bright.data, UNLEARN).plan == Plan()
    assert recover(bright.model, bright.data, RECOVER).plan == Plan()


def test_auto_takes_the_fastest_and_asks_once(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, 1.0, 1.5, 0.9, 0.4)
    module = bright.model.clone().module.train()
    for _ in range(2):
        assert plan_for("auto", module, bright.data.images) == Plan(bfloat16=True, channels_last=False)
    assert len(tried) == 3 * len(PLANS)
    plan_for("auto", module.eval(), bright.data.images)
    assert len(tried) == 6 * len(PLANS)


def test_auto_keeps_float32_where_bfloat16_saves_little(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1.5, 1.0, 0.85, 0.85)
    assert plan_for("auto", bright.model.module, bright.data.images) == Plan(channels_last=False)


@pytest.mark.parametrize("fast", [False, True])
def test_a_cpu_without_bfloat16_is_not_tried_on_the_network(
    fast: bool, bright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = timed(monkeypatch, 1.0, 1.5, 0.9, 0.4)
    monkeypatch.setattr(precision, "_bfloat16_is_fast", lambda: fast)
    assert plan_for("auto", bright.model.module, bright.data.images).bfloat16 == fast
    assert any(plan.bfloat16 for plan in tried) == fast


@pytest.mark.parametrize(("rounded", "fast"), [(0.9, True), (1.1, False)])
def test_small_convs_say_whether_bfloat16_is_fast(rounded: float, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda plan, *_: rounded if plan.bfloat16 else 1.0)
    assert precision._bfloat16_is_fast() == fast


def test_a_trial_leaves_network_and_randomness_alone(bright: Any) -> None:
    module = bright.model.clone().module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    assert plan_for("auto", module, bright.data.images) in PLANS
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("plan", PLANS)
def test_all_plans_say_nearly_the_same(bright: Any, plan: Plan) -> None:
    module = bright.model.clone().module
    expected = module(bright.data.images[:20])
    plan.arrange(module)
    logits = plan.logits(module, bright.data.images[:20])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_bfloat16_unlearns_and_recovers_alike(bright: Any) -> None:
    exact, rounded = (unlearn(bright.model, bright.data, UNLEARN, precision=name) for name in ("float32", "bfloat16"))
    assert rounded.plan == Plan(bfloat16=True)
    losses = [[step.loss for step in result.trajectory] for result in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)
    one, two = (recover(exact.model, bright.data, RECOVER, precision=name) for name in ("float32", "bfloat16"))
    for name, mask in one.masks.items():
        torch.testing.assert_close(two.masks[name], mask, rtol=0, atol=0.05)


def test_unknown_precision_is_an_error(bright: Any) -> None:
    with pytest.raises(OptionError, match="float16"):
        unlearn(bright.model, bright.data, UNLEARN, precision="float16")  # type: ignore[arg-type]


class Narrow(nn.Module):
    """A strided 1x1 conv with ``inputs`` inputs; notes whether what it got was in channels_last alone."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, inputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, 8, 1, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        SEEN.append(not x.is_contiguous())
        return self.head(self.shortcut(x).mean((2, 3)))  # type: ignore[no-any-return]


SEEN: list[bool] = []


@pytest.mark.parametrize(("inputs", "channels_last"), [(6, False), (8, True)])
def test_a_network_that_crashes_torch_in_channels_last_runs_without(inputs: int, channels_last: bool) -> None:
    model = Model(Narrow(inputs).eval(), "narrow", 10, (3, 8, 8))
    data = CleanData(torch.rand(20, 3, 8, 8), torch.arange(20) % 10)
    assert model.groups
    runs: list[Callable[[], object]] = [
        lambda: unlearn(model, data, UnlearnSettings(max_epochs=1, stop_accuracy=-1.0)),
        lambda: recover(model, data, RecoverSettings(epochs=1)),
        lambda: fine_tune(model, data, FineTuneSettings(epochs=1), {}, "zero_gamma"),
    ]
    for run in runs:
        SEEN.clear()
        run()
        assert SEEN == [channels_last] * len(SEEN) != []
    assert plan_for("auto", model.module, data.images).channels_last in (False, channels_last)
