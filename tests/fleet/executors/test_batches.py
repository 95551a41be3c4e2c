"""What is given out, how far ahead, and what becomes of a batch that failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bdprune.errors import ArtifactError
from bdprune.fleet.executors import batches as module
from bdprune.fleet.executors.batches import Batches
from bdprune.pipeline import CleanSource, Job, Options

JOB = Job(CleanSource(None), [], Options())


def numbers(batches: Batches, count: int) -> list[list[int]]:
    return [[number for number, _ in one.models] for one in batches.take(count)]


def test_few_models_are_spread_over_all_workers() -> None:
    assert numbers(Batches(map(str, range(10)), 64, 4, JOB), 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    many = Batches(map(str, range(10)), 2, 2, JOB)
    assert [numbers(many, 2), numbers(many, 1), numbers(many, 1), numbers(many, 1), numbers(many, 1)] == [
        [[0, 1], [2, 3]],
        [[4, 5]],
        [[6, 7]],
        [[8, 9]],
        [],
    ]


def test_no_more_models_are_read_than_may_wait_for_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AHEAD", 3)
    read: list[int] = []

    def models() -> Iterator[str]:
        for number in range(100):
            read.append(number)
            yield str(number)

    batches = Batches(models(), 1, 2, JOB)
    oldest, *others = batches.take(2)
    while others:
        batches.done(others.pop())
        others += batches.take(1)
    assert read == [0, 1, 2, 3, 4, 5]
    batches.done(oldest)
    assert len(batches.take(9)) == 6 and len(read) == 12


def test_each_model_of_a_failed_batch_comes_alone_before_the_next_models() -> None:
    batches = Batches(map(str, range(6)), 3, 1, JOB)
    (first,) = batches.take(1)
    assert batches.done(first) == 0
    assert list(batches.failed(first, ArtifactError("It broke."))) == []
    again = batches.take(3)
    assert [([number for number, _ in one.models], one.alone) for one in again] == [
        ([1], True),
        ([2], True),
        ([3, 4, 5], False),
    ]
    ((number, outcome),) = batches.failed(again[0], ArtifactError("It broke.", "Mend it."))
    assert number == 1 and outcome.result.error and outcome.result.error.hint == "Mend it."


def test_a_repeated_batch_knows_its_tries() -> None:
    batches = Batches(["a"], 1, 1, JOB)
    for tries in range(3):
        (one,) = batches.take(1)
        assert one.tries == tries
        batches.repeat(one)


def test_a_batch_that_fails_after_its_last_model_fails_nothing() -> None:
    batches = Batches(["a"], 1, 1, JOB)
    (one,) = batches.take(1)
    batches.done(one)
    assert list(batches.failed(one, ArtifactError("Too late."))) == [] and batches.take(1) == []
