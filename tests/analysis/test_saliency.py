from typing import Any

import pytest
import torch
from torch import nn

from bdprune.analysis import statistics
from bdprune.analysis.saliency import saliency, separable
from bdprune.analysis.statistics import filter_statistics
from bdprune.data.clean import CleanData
from bdprune.model.handle import Model


class Net(nn.Module):
    """Strided, grouped, biased, without a norm, in-place ReLU; ``twice`` runs the middle conv two times."""

    def __init__(self, twice: bool = False, padding: Any = 2, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=padding, dilation=2, groups=4, padding_mode=padding_mode)
        self.last = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu_()
        for _ in range(2 if self.twice else 1):
            x = self.middle(x).relu_()
        return self.head(self.last(x).mean((2, 3)))  # type: ignore[no-any-return]


def problem(**settings: Any) -> tuple[Model, CleanData]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(Net(**settings).eval(), "net", 5, (3, 9, 9))
        return model, CleanData(torch.rand(7, 3, 9, 9), torch.arange(7) % 5)


@pytest.mark.parametrize("order", [1, 2])
def test_one_pass_gives_the_saliency_of_separate_passes(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = problem()
    assert separable(model, data, order)
    monkeypatch.setattr(statistics, "_BATCH", 3)
    found = filter_statistics(model, data, order=order)
    for name, expected in saliency(model, data, True, order).items():
        assert (expected > 0).sum() > len(expected) / 2
        assert torch.allclose(found[name].saliency, expected, rtol=1e-4)


def test_all_images_take_one_forward_pass_after_a_trial_on_one_image() -> None:
    model, data = problem()
    assert len(model.groups) == 3
    sizes: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: sizes.append(len(output)) if isinstance(module, Net) else None
    )
    try:
        filter_statistics(model, data)
    finally:
        hook.remove()
    assert sorted(sizes) == [1, 1, 7]


@pytest.mark.parametrize("settings", [{"twice": True}, {"padding_mode": "reflect"}, {"padding": "same"}])
def test_networks_that_one_pass_gets_wrong_run_image_by_image(settings: Any) -> None:
    model, data = problem(**settings)
    assert not separable(model, data, 1)
    found = filter_statistics(model, data)
    for name, expected in saliency(model, data, True, 1).items():
        assert torch.equal(found[name].saliency, expected)


def test_the_saliency_can_be_left_out() -> None:
    model, data = problem()
    found, full = filter_statistics(model, data, salient=False), filter_statistics(model, data)
    for name, one in found.items():
        assert one.saliency.isnan().all()
        assert torch.equal(one.activation, full[name].activation)
