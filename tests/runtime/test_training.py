"""Two watches for models in training: one knows at once, the other learns one epoch later and never reads too early.
Also the state to which one model returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.runtime import training
from bdprune.runtime.precision import Plan
from bdprune.runtime.training import LateWatch, OneModel, Watch, watch_on


def going(*models: bool) -> Tensor:
    return torch.tensor(models)


def test_a_watch_knows_at_once() -> None:
    assert isinstance(watch_on(torch.device("cpu")), Watch)
    now = Watch()
    assert not now.is_over(going(True, False)) and now.is_over(going(False, False))


class Device:
    """A device that lags: a copy to the host arrives after ``behind`` checks of its mark."""

    def __init__(self, behind: int) -> None:
        self.flags, self.behind, self.asked = torch.zeros(2, dtype=torch.bool), behind, list[int]()

    def mark(self) -> Callable[[], bool]:
        number = len(self.asked)
        flag = self.flags[(number + 1) % 2]  # they take turns
        sent = flag.clone()
        flag.logical_not_()  # a read before its arrival gives the opposite
        self.asked.append(0)

        def query() -> bool:
            self.asked[number] += 1
            if self.asked[number] > self.behind:
                flag.copy_(sent)
            return self.asked[number] > self.behind

        return query


@pytest.mark.parametrize("behind", [0, 3])
def test_a_late_watch_reports_the_state_of_the_last_epoch_after_its_arrival(
    behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    monkeypatch.setattr(training.time, "sleep", naps.append)
    device = Device(behind)
    late = LateWatch(device.flags, device.mark)
    asked = [going(True, True), going(True, False), going(False, False), going(False, False)]
    assert [late.is_over(one, epoch=True) for one in asked] == [False, False, False, True]
    assert device.asked == [behind + 1] * 3 + [0], "the watch never waits for the last epoch"
    assert not late.is_over(going(False)) and len(device.asked) == 4, "the watch never waits for a step"
    assert len(naps) == 3 * behind


def test_a_gpu_is_watched_through_pinned_memory_and_marks_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    empty, gpu = torch.empty, torch.device("cuda", 1)

    def pinned(*shape: int, pin_memory: bool, **options: Any) -> Tensor:
        made.append(pin_memory)
        return empty(*shape, **options)

    def stream(device: torch.device) -> SimpleNamespace:
        assert device == gpu
        return SimpleNamespace(record_event=lambda: SimpleNamespace(query=lambda: True))

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    late = watch_on(gpu)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    assert [late.is_over(one, epoch=True) for one in (going(True), going(False), going(False))] == [False, False, True]
    assert made == [True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_model_goes_back_to_its_last_finite_state(bright: Any, value: float) -> None:
    one = OneModel([bright.model], False)
    one.start(Plan(), [0.1], 0.9, 0.0)
    network = one.model(0).network
    weight, mean = network.get_parameter("3.weight"), network.get_buffer("4.running_mean")
    with torch.no_grad():
        weight[0] = 2.0
        assert one._keep_if_finite()
        weight[1] = 3.0
        mean[5] = value
        assert not one._keep_if_finite()
    assert not one.move(torch.tensor([math.nan]), going(True))
    assert (weight[0] == 2.0).all()
    assert torch.equal(weight[1:], bright.model.network.get_parameter("3.weight")[1:])
    assert torch.equal(mean, bright.model.network.get_buffer("4.running_mean"))
