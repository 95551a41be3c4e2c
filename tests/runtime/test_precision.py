from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.data import RawImages
from bdprune.data.clean import CleanData
from bdprune.errors import OptionError
from bdprune.fleet import scan, scan_many
from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.loops.fitting import Schedule, fit
from bdprune.loops.recovery import RecoverSettings, recover
from bdprune.loops.unlearning import UnlearnSettings, unlearn
from bdprune.model.handle import Model
from bdprune.ops import tuner
from bdprune.pipeline import load, purify
from bdprune.runtime import precision
from bdprune.runtime.batches import crop_and_flip
from bdprune.runtime.precision import PLANS, Plan, computes_bfloat16, laid_out, plain_torch, plan_for, training_layout

UNLEARN = UnlearnSettings(lr=0.05, weight_decay=0, batch_size=60, padding=0, max_epochs=2, stop_accuracy=0.0)
RECOVER = RecoverSettings(batch_size=60, epochs=2, padding=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs its own trials."""
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("BDPRUNE_TUNE", raising=False)


def timed(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[Plan]:
    """Gives each plan of ``PLANS`` a time; returns the list of tried plans."""
    tried: list[Plan] = []

    def one_pass(plan: Plan, module: Any, images: Any) -> float:
        tried.append(plan)
        return seconds[list(PLANS.values()).index(plan)]

    monkeypatch.setattr(precision, "_one_pass", one_pass)
    monkeypatch.setattr(tuner, "seconds_of", lambda run, device: run())
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)
    return tried


def test_float32_uses_channels_last_without_winograd(bright: Any) -> None:
    assert Plan() == Plan(bfloat16=False, channels_last=True, winograd=False)
    assert plan_for("float32", bright.model.module, bright.data.images) == Plan()
    assert unlearn(bright.model, bright.data, UNLEARN, precision="float32").plan == Plan()
    assert recover(bright.model, bright.data, RECOVER, precision="float32").plan == Plan()


def test_auto_uses_the_fastest_plan_and_tries_once(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, 1.0, 1.5, 0.9, 0.4, 1.0)
    module = bright.model.clone().module.train()
    for _ in range(2):
        assert plan_for("auto", module, bright.data.images) == Plan(bfloat16=True, channels_last=False)
    assert len(tried) == 3 * (3 + 3), "three exact plans, then the best of them against two in bfloat16"
    plan_for("auto", module.eval(), bright.data.images)
    assert len(tried) == 2 * 3 * (3 + 3)


def test_auto_keeps_float32_if_bfloat16_saves_little(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1.5, 1.0, 0.85, 0.85, 1.2)
    assert plan_for("auto", bright.model.module, bright.data.images) == Plan(channels_last=False)


def test_auto_follows_the_environment(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, 1.0, 1.0, 1.0, 1.0, 1.0)
    for name, plan in PLANS.items():
        monkeypatch.setenv("BDPRUNE_TUNE", f"precision={name}")
        assert plan_for("auto", bright.model.module, bright.data.images) == plan
    assert not tried


def test_auto_does_not_try_emulated_precisions(bright: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, 1.5, 1.0, 0.1, 0.1, 1.2)
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    assert plan_for("auto", bright.model.module, bright.data.images) == Plan(channels_last=False)
    assert not any(plan.bfloat16 for plan in tried)


def test_a_trial_changes_neither_network_nor_random_state(bright: Any) -> None:
    module = bright.model.clone().module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    assert plan_for("auto", module, bright.data.images) in PLANS.values()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_all_plans_give_nearly_the_same_logits(bright: Any, plan: Plan) -> None:
    module = bright.model.clone().module
    expected = module(bright.data.images[:20])
    plan.arrange(module)
    logits = plan.logits(module, bright.data.images[:20])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_bfloat16_unlearns_and_recovers_like_float32(bright: Any) -> None:
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
def test_bfloat16_runs_only_on_cpus_with_instructions_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, name: True})
    assert computes_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, name: False})
    assert not computes_bfloat16(torch.device("cpu"))


def shortcut(channels: int, colours: int = 3, **settings: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(colours, channels, 3, padding=1), nn.Conv2d(channels, 8, 1, **{"stride": 2, **settings})
    )


@pytest.mark.parametrize(("capability", "floats"), [("AVX2", 8), ("AVX512", 16), ("DEFAULT", 16)])
def test_few_channels_into_a_strided_1x1_conv_stay_contiguous(
    capability: str, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert training_layout(shortcut(floats - 1)) is torch.contiguous_format
    assert training_layout(shortcut(floats)) is torch.channels_last
    assert training_layout(shortcut(floats, groups=2)) is torch.contiguous_format


def test_only_networks_without_trainable_parameters_use_channels_last_with_such_convs() -> None:
    network = nn.Sequential(shortcut(4), nn.Linear(8, 3))
    network[0].requires_grad_(False)
    assert training_layout(network) is torch.contiguous_format
    network.requires_grad_(False)
    assert training_layout(network) is torch.channels_last


@pytest.mark.parametrize("settings", [{"stride": 1}, {"kernel_size": 3}])
def test_other_convs_use_channels_last(settings: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 8, **{"kernel_size": 1, "stride": 2, **settings})
    assert training_layout(conv) is torch.channels_last


def test_cuda_does_not_use_onednn_and_other_devices_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom device, such as that of tests/gpu, may run the CPU's kernels."""
    for name, layout in (("cuda", torch.channels_last), ("privateuseone", torch.contiguous_format)):
        network = shortcut(4)
        monkeypatch.setattr(
            network, "parameters", lambda name=name: [SimpleNamespace(device=torch.device(name), requires_grad=True)]
        )
        assert training_layout(network) is layout


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_keeps_the_layout_of_its_images(layout: torch.memory_format, colours: int) -> None:
    images = crop_and_flip(torch.rand(2, colours, 8, 8), torch.Generator())
    given = laid_out(images, layout)
    assert torch.equal(given, images)
    conv = nn.Conv2d(colours, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]
    assert conv(given).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("colours", [1, 3])
def test_loops_give_such_convs_contiguous_maps(colours: int) -> None:
    """Every conv of such a network gets contiguous maps only, whatever layout the augmentation produced."""
    seen: list[bool] = []
    network = nn.Sequential(shortcut(4, colours), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, inputs, out: seen.append(inputs[0].is_contiguous()))
    images, labels = torch.rand(30, colours, 8, 8), torch.arange(30) % 3
    fit(network, RawImages((images * 255).to(torch.uint8), labels), Schedule(epochs=1, batch_size=10), seed=0)
    model = Model(network, "test", 3, (colours, 8, 8))
    data = CleanData(images, labels)
    fine_tune(model, data, FineTuneSettings(epochs=1))
    recover(unlearn(model, data, UnlearnSettings(max_epochs=1)).model, data, RecoverSettings(epochs=1))
    assert plan_for("float32", network, images) == Plan(channels_last=False)
    assert not plan_for("auto", network, images).channels_last
    assert seen and all(seen)


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("state", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_the_state_is_plain_within_and_restored_afterwards(state: AbstractContextManager[Any]) -> None:
    def now() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    with state:
        before = now()
        with plain_torch():
            assert now() == (True, False, False)
        assert now() == before != (True, False, False)


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_repair_and_a_scan_give_the_same_in_any_state(bright: Any, state: Any) -> None:
    def weights() -> dict[str, torch.Tensor]:
        return purify(bright.model, bright.data, method="fine_tuning", max_acc_drop=1.0).model.network.state_dict()

    def evidence() -> list[float | None]:
        return [one.score for one in scan(bright.model, bright.data, detectors="lipschitz,unlearning").detectors]

    expected, found = weights(), evidence()
    with state():
        repaired, scanned = weights(), evidence()
    assert scanned == found
    assert all(torch.equal(value, expected[name]) for name, value in repaired.items())


def test_a_module_can_be_repaired_without_gradients(bright: Any) -> None:
    with torch.inference_mode():
        done = purify(bright.model.network, bright.data, method="fine_tuning", input_shape=bright.model.input_shape)
    assert done.result.method == "bdprune.fine_tuning"


@pytest.mark.usefixtures("doubles")
def test_another_default_dtype_is_an_error_that_names_it(tiny: Any) -> None:
    for call in (lambda: load(tiny.path), lambda: scan(tiny.path), lambda: purify(tiny.path, tiny.data)):
        with pytest.raises(OptionError, match=r"torch.float64, and bdprune computes in float32") as caught:
            call()
        assert "set_default_dtype" in caught.value.hint


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_an_iterator_that_sets_a_state_changes_no_scan(bright: Any, state: Any) -> None:
    def models() -> Iterator[Any]:
        with state():
            yield bright.model
            yield bright.model

    def evidence(given: Any) -> list[list[float | None]]:
        found = scan_many(given, bright.data, detectors="lipschitz,unlearning", stack=1)
        return [[one.score for one in result.detectors] for result in found]

    assert evidence(models()) == evidence([bright.model, bright.model])
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
