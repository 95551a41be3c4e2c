from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.loops.recovery import RecoverSettings, recover
from bdprune.loops.unlearning import UnlearnSettings, unlearn
from bdprune.runtime import precision
from bdprune.runtime.precision import PLANS, Plan, computes_bfloat16, plan_for

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
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)
    return tried


def test_float32_is_in_channels_last_and_as_pytorch_computes_it(bright: Any) -> None:
    assert Plan() == Plan(bfloat16=False, channels_last=True, winograd=False)
    assert plan_for("float32", bright.model.module, bright.data.images) == Plan()
    assert unlearn(bright.model, bright.data, UNLEARN, precision="float32").plan == Plan()
    assert recover(bright.model, bright.data, RECOVER, precision="float32").plan == Plan()


def test_auto_takes_the_fastest_and_asks_once(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, 1.0, 1.5, 0.9, 0.4, 1.0)
    module = bright.model.clone().module.train()
    for _ in range(2):
        assert plan_for("auto", module, bright.data.images) == Plan(bfloat16=True, channels_last=False)
    assert len(tried) == 3 * len(PLANS)
    plan_for("auto", module.eval(), bright.data.images)
    assert len(tried) == 6 * len(PLANS)


def test_auto_keeps_float32_where_bfloat16_saves_little(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1.5, 1.0, 0.85, 0.85, 1.2)
    assert plan_for("auto", bright.model.module, bright.data.images) == Plan(channels_last=False)


def test_auto_does_not_try_what_is_emulated(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, 1.5, 1.0, 0.1, 0.1, 1.2)
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    assert plan_for("auto", bright.model.module, bright.data.images) == Plan(channels_last=False)
    assert not any(plan.bfloat16 for plan in tried)


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


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_bfloat16_is_computed_where_the_cpu_has_instructions_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, name: True})
    assert computes_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, name: False})
    assert not computes_bfloat16(torch.device("cpu"))
