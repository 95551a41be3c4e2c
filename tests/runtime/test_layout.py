from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bdprune.data import RawImages
from bdprune.data.clean import CleanData
from bdprune.loops.finetune import FineTuneSettings, fine_tune
from bdprune.loops.fitting import Schedule, fit
from bdprune.loops.recovery import RecoverSettings, recover
from bdprune.loops.unlearning import UnlearnSettings, unlearn
from bdprune.model.handle import Model
from bdprune.runtime.augment import crop_and_flip
from bdprune.runtime.layout import laid_out, training_layout
from bdprune.runtime.precision import Plan, plan_for


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


@pytest.mark.parametrize("settings", [{"stride": 1}, {"kernel_size": 3}])
def test_other_convs_are_sound(settings: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 8, **{"kernel_size": 1, "stride": 2, **settings})
    assert training_layout(conv) is torch.channels_last


def test_cuda_has_no_onednn_and_other_devices_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of somebody's own, such as the one that tests/gpu makes, may run the CPU's kernels."""
    for name, layout in (("cuda", torch.channels_last), ("privateuseone", torch.contiguous_format)):
        network = shortcut(4)
        monkeypatch.setattr(network, "parameters", lambda name=name: iter([SimpleNamespace(device=torch.device(name))]))
        assert training_layout(network) is layout


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_hands_on_the_layout_of_its_images(layout: torch.memory_format, colours: int) -> None:
    images = crop_and_flip(torch.rand(2, colours, 8, 8), torch.Generator())
    given = laid_out(images, layout)
    assert torch.equal(given, images)
    conv = nn.Conv2d(colours, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]
    assert conv(given).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("colours", [1, 3])
def test_loops_keep_to_it(colours: int) -> None:
    """Every conv of such a network sees contiguous maps only, whatever the augmentation made."""
    seen: list[bool] = []
    network = nn.Sequential(shortcut(4, colours), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, inputs, out: seen.append(inputs[0].is_contiguous()))
    images, labels = torch.rand(30, colours, 8, 8), torch.arange(30) % 3
    fit(network, RawImages((images * 255).to(torch.uint8), labels), Schedule(epochs=1, batch_size=10), seed=0)
    model = Model(network, "test", 3, (colours, 8, 8))
    data = CleanData(images, labels)
    fine_tune(model, data, FineTuneSettings(epochs=1), {}, "zero_gamma")
    recover(unlearn(model, data, UnlearnSettings(max_epochs=1)).model, data, RecoverSettings(epochs=1))
    assert plan_for("float32", network, images) == Plan(channels_last=False)
    assert not plan_for("auto", network, images).channels_last
    assert seen and all(seen)
