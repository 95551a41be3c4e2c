"""Executors number the models of a run, however they are nested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bdprune.errors import OptionError
from bdprune.fleet.executors.inline import LONGEST_TIMEOUT, Executor, InlineExecutor, Limits, Pause, in_order
from bdprune.fleet.executors.process import ProcessExecutor
from bdprune.fleet.executors.stack import StackExecutor, StackOptions
from bdprune.pipeline import CleanSource, Job, Options
from bdprune.registry import chosen_detectors

EXECUTORS: dict[str, Executor] = {
    "inline": InlineExecutor(),
    "stack": StackExecutor(StackOptions(3)),
    "process": ProcessExecutor(InlineExecutor(), Limits(200)),
    "stack in a process": ProcessExecutor(StackExecutor(StackOptions(3)), Limits(200)),
}


@pytest.fixture
def job(tiny: Any) -> Job:
    options = Options(arch=tiny.arch, input_shape=tiny.input_shape)
    return Job(CleanSource(tiny.data, options), chosen_detectors("lipschitz", {}), options)


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_outcome_has_the_number_of_its_model(tiny: Any, job: Job, name: str) -> None:
    """A file with two sets of weights has two outcomes, another file has one, and they keep the order."""
    state, two, bad = tiny.module.state_dict(), tiny.folder / "two.pth", tiny.folder / "bad.pth"
    torch.save({"model": state, "ema": state | {"head.bias": torch.ones(3)}}, two)
    bad.write_bytes(b"nonsense")
    outcomes = list(in_order(EXECUTORS[name].run([tiny.path, two, bad, tiny.path], job, lambda stage: None)))
    assert [number for number, _ in outcomes] == [0, 1, 1, 2, 3]
    assert [Path(one.result.name.partition("#")[0]).name for _, one in outcomes] == [
        "tiny.pth",
        "two.pth",
        "two.pth",
        "bad.pth",
        "tiny.pth",
    ]
    assert [one.result.error is None for _, one in outcomes] == [True, True, True, False, True]
    assert all(
        one.attachments.keys() == {a.sha256 for e in one.result.detectors for a in e.attachments} for _, one in outcomes
    )


@pytest.mark.parametrize("name", EXECUTORS)
def test_pauses_between_models_are_answered_and_change_nothing(tiny: Any, job: Job, name: str) -> None:
    """At FULL the next model comes only when all before it are done, also those that wait for a full stack."""
    done: list[int] = []

    def models() -> Iterator[Path | Pause]:
        yield Pause.LOOKING
        for number in range(3):
            yield tiny.path
            yield Pause.LOOKING
            while len(done) <= number:
                yield Pause.FULL
        yield Pause.LOOKING

    ticks = 0
    for one in EXECUTORS[name].run(models(), job, lambda stage: None):
        if one is None:
            ticks += 1
        else:
            assert one[1].result.error is None
            done.append(one[0])
    assert done == [0, 1, 2] and ticks >= 5


def test_no_models_give_no_outcomes(job: Job) -> None:
    for executor in (EXECUTORS["inline"], EXECUTORS["stack"], EXECUTORS["process"]):
        assert list(executor.run([], job, lambda stage: None)) == []


def test_executors_read_a_bounded_number_of_models_ahead(job: Job) -> None:
    assert [executor.ahead(job) for executor in EXECUTORS.values()] == [1, 3, 1, 3]
    auto = StackExecutor(StackOptions())
    assert auto.ahead(job) == 1, "on a CPU the loop is nearly always faster"


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), LONGEST_TIMEOUT + 1])
def test_an_invalid_time_limit_is_an_error(timeout: float) -> None:
    with pytest.raises(OptionError, match="Invalid timeout"):
        Limits(timeout)
