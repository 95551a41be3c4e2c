"""The demonstration: scan models of known truth, repair the backdoored ones, and compare both with the truth.

Scans and repairs see the checkpoints and the clean images only. The triggers are used afterwards, to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from bdprune.attacks import Attack, shape_of
from bdprune.data import CleanData, load_clean
from bdprune.errors import OptionError
from bdprune.fleet.scans import scan
from bdprune.model import Model, load
from bdprune.pipeline import Repaired, purify
from bdprune.record import Document, Result
from bdprune.runtime import attack_success_rate, clean_accuracy
from bdprune.zoo import Entry, load_trigger, read_manifest

Step: TypeAlias = Literal["scan", "repair", "measure"]

_COST: dict[Step, float] = {"scan": 24.0, "repair": 35.0, "measure": 4.0}
"""Seconds of each step on two cores with AVX-512. Only their ratios matter once a step is done."""


DETECTORS = ("lipschitz", "suspiciousness", "inversion", "unlearning")
"""What the demonstration scans with, at the budget ``fast``. It stays as short as it is when there are more detectors.
"""


class Watcher(Protocol):
    """Follows a demonstration."""

    def stage(self, name: str, stage: str, left: float) -> None:
        """Model ``name`` is at ``stage``; about ``left`` seconds remain."""

    def verdict(self, name: str, result: Result) -> None:
        """The scan of model ``name`` is done."""


class Silent:
    """A watcher that shows nothing."""

    def stage(self, name: str, stage: str, left: float) -> None: ...

    def verdict(self, name: str, result: Result) -> None: ...


@dataclass(frozen=True)
class Measured:
    """Clean accuracy and attack success rate on the test images, in [0, 1]; no rate for a clean model."""

    clean_accuracy: float
    attack_success_rate: float | None


@dataclass(frozen=True)
class Row:
    """One model: the truth, the verdict, and what the repair did (None where nothing was repaired)."""

    name: str
    true_label: int | None
    result: Result
    before: Measured
    after: Measured | None

    @property
    def right(self) -> bool:
        """Whether verdict and label match the truth."""
        if self.true_label is None:
            return self.result.verdict == "clean"
        return self.result.verdict == "backdoored" and self.result.target_label == self.true_label


@dataclass(frozen=True)
class Demo:
    """Every model's row, the documents for a report, the class names, and the seconds it took."""

    rows: tuple[Row, ...]
    documents: tuple[Document, ...]
    class_names: tuple[str, ...]
    seconds: float


class TimeLeft:
    """Estimates how long a demonstration still takes, from its steps that are done.

    Args:
        models: how many models there are. Each counts as one to repair until its verdict is known.
        clock: seconds that only rise.
    """

    def __init__(self, models: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = self._now = clock()
        self._done = 0.0
        self._left: dict[Step, int] = {"scan": models, "repair": models, "measure": models}

    def finish(self, step: Step) -> None:
        """One such step is done."""
        self._left[step] -= 1
        self._done += _COST[step]
        self._now = self._clock()

    def skip(self, step: Step) -> None:
        """One such step is not needed."""
        self._left[step] -= 1

    @property
    def seconds(self) -> float:
        """Estimated seconds until the end, 0 or more."""
        pace = (self._now - self._start) / self._done if self._done else 1.0
        whole = pace * sum(_COST[step] * count for step, count in self._left.items())
        return max(0.0, whole - (self._clock() - self._now))


def run(zoo: Path, out: Path, *, seed: int = 0, watcher: Watcher | None = None) -> Demo:
    """Scans every model of a zoo, in the order of their names, then repairs the backdoored ones.

    Args:
        zoo: folder with ``manifest.toml``, ``defence.npz``, ``test.npz`` and the checkpoints.
        out: folder for the repaired checkpoints, ``<name>-repaired.safetensors``.
        seed: of scans and repairs.
        watcher: follows the stages and verdicts.

    Raises:
        OptionError: ``zoo`` holds no zoo.
        OutputError: ``out`` cannot be written.
    """
    if not (zoo / "manifest.toml").exists():
        raise OptionError(
            f"There is no zoo in {zoo}.", "Run the demo in the root of the repository, or name the folder with --zoo."
        )
    start = time.perf_counter()
    manifest = read_manifest(zoo / "manifest.toml")
    work = _Work(zoo, out, load_clean(zoo / "defence.npz"), seed, watcher or Silent(), TimeLeft(len(manifest.models)))
    entries = sorted(manifest.models, key=lambda entry: entry.name)
    results = [work.scan(entry) for entry in entries]
    repairs = [work.repair(*pair) for pair in zip(entries, results, strict=True)]
    rows = work.measure(entries, results, repairs)
    pairs = zip(results, repairs, strict=True)
    documents = [one for result, repair in pairs for one in ([result, repair.result] if repair else [result])]
    return Demo(tuple(rows), tuple(documents), tuple(manifest.class_names), time.perf_counter() - start)


@dataclass(frozen=True)
class _Work:
    """The steps of one demonstration."""

    zoo: Path
    out: Path
    clean: CleanData
    seed: int
    watcher: Watcher
    left: TimeLeft

    def scan(self, entry: Entry) -> Result:
        stages = self._stages(entry)
        result = scan(
            self._path(entry), self.clean, detectors=DETECTORS, budget="fast", seed=self.seed, progress=stages
        )
        self.left.finish("scan")
        if result.verdict != "backdoored":
            self.left.skip("repair")
        self.watcher.verdict(entry.name, result)
        return result

    def repair(self, entry: Entry, result: Result) -> Repaired | None:
        """The repair of a model that the scan calls backdoored."""
        if result.verdict != "backdoored":
            return None
        target = self.out / f"{entry.name}-repaired.safetensors"
        stages = self._stages(entry)
        repair = purify(self._path(entry), self.clean, method="rnp", output=target, seed=self.seed, progress=stages)
        self.left.finish("repair")
        return repair

    def measure(
        self, entries: Sequence[Entry], results: Sequence[Result], repairs: Sequence[Repaired | None]
    ) -> list[Row]:
        """Measures every model, and its repair, with the test images and the true trigger."""
        test, rows = load_clean(self.zoo / "test.npz"), []
        for entry, result, repair in zip(entries, results, repairs, strict=True):
            self._stages(entry)("measuring with the true trigger")
            attack = entry.make_attack()
            before = against_truth(load(self._path(entry)), entry, attack, self.zoo, test)
            after = against_truth(repair.model, entry, attack, self.zoo, test) if repair else None
            rows.append(Row(entry.name, attack.target if attack else None, result, before, after))
            self.left.finish("measure")
        return rows

    def _path(self, entry: Entry) -> Path:
        return self.zoo / f"{entry.name}.safetensors"

    def _stages(self, entry: Entry) -> Callable[[str], None]:
        return lambda stage: self.watcher.stage(entry.name, stage, self.left.seconds)


def against_truth(model: Model, entry: Entry, attack: Attack | None, zoo: Path, test: CleanData) -> Measured:
    """Clean accuracy on ``test``, and attack success of the trigger in folder ``zoo`` where there is an attack."""
    accuracy = clean_accuracy(model.module, test.images, test.labels)
    if attack is None:
        return Measured(accuracy, None)
    trigger = load_trigger(entry, attack, zoo, shape_of(test.images))
    goal = attack.goal(test.labels, model.num_classes)
    success = attack_success_rate(model.module, test.images, test.labels, trigger, goal)
    return Measured(accuracy, success)
