"""The demonstration: scan models of known truth, repair the backdoored ones, and hold both against the truth.

Scanning and repairing see the checkpoints and the clean images only. The triggers come out afterwards, to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bdprune.attacks import Attack, shape_of
from bdprune.data import CleanData, load_clean
from bdprune.errors import OptionError
from bdprune.fleet.scans import scan
from bdprune.model import Model, load
from bdprune.pipeline import purify
from bdprune.record import Document, Result
from bdprune.runtime import attack_success_rate, clean_accuracy
from bdprune.zoo import Entry, load_trigger, read_manifest

Progress = Callable[[str, str], None]
"""Told what happens next: (model name, stage)."""


@dataclass(frozen=True)
class Measured:
    """Clean accuracy and attack success rate on the test images, in [0, 1]; no rate for a clean model."""

    clean_accuracy: float
    attack_success_rate: float | None


@dataclass(frozen=True)
class Row:
    """One model: the truth, the verdict, and what the repair did (None where there was nothing to repair)."""

    name: str
    true_label: int | None
    result: Result
    before: Measured
    after: Measured | None

    @property
    def right(self) -> bool:
        """Whether verdict and label are those of the truth."""
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


def run(zoo: Path, out: Path, *, seed: int = 0, progress: Progress = lambda name, stage: None) -> Demo:
    """Scans every model of the zoo in folder ``zoo`` and writes repaired checkpoints of the backdoored ones to ``out``.

    Args:
        zoo: folder with ``manifest.toml``, ``defence.npz``, ``test.npz`` and the checkpoints.
        out: folder for ``<name>-repaired.safetensors``.
        seed: of scans and repairs.
        progress: told what happens next.

    Raises:
        OptionError: there is no zoo in ``zoo``.
        OutputError: ``out`` cannot be written.
    """
    if not (zoo / "manifest.toml").exists():
        raise OptionError(
            f"There is no zoo in {zoo}.", "Run the demo in the root of the repository, or name the folder with --zoo."
        )
    start = time.perf_counter()
    manifest = read_manifest(zoo / "manifest.toml")
    clean, test = load_clean(zoo / "defence.npz"), load_clean(zoo / "test.npz")
    rows: list[Row] = []
    documents: list[Document] = []
    for entry in manifest.models:
        row, records = _examine(entry, zoo, out, clean, test, seed, progress)
        rows.append(row)
        documents.extend(records)
    return Demo(tuple(rows), tuple(documents), tuple(manifest.class_names), time.perf_counter() - start)


def _examine(
    entry: Entry,
    zoo: Path,
    out: Path,
    clean: CleanData,
    test: CleanData,
    seed: int,
    progress: Progress,
) -> tuple[Row, list[Document]]:
    path = zoo / f"{entry.name}.safetensors"
    result = scan(path, clean, seed=seed, progress=lambda stage: progress(entry.name, stage))
    documents: list[Document] = [result]
    after: Measured | None = None
    attack = entry.make_attack()
    if result.verdict == "backdoored":
        target = out / f"{entry.name}-repaired.safetensors"
        repair = purify(
            path, clean, method="rnp", output=target, seed=seed, progress=lambda stage: progress(entry.name, stage)
        )
        documents.append(repair.result)
        after = against_truth(repair.model, entry, attack, zoo, test)
    progress(entry.name, "measuring against the truth")
    before = against_truth(load(path), entry, attack, zoo, test)
    return Row(entry.name, attack.target if attack else None, result, before, after), documents


def against_truth(model: Model, entry: Entry, attack: Attack | None, zoo: Path, test: CleanData) -> Measured:
    """Clean accuracy on ``test``, and attack success of the trigger in folder ``zoo`` where there is an attack."""
    accuracy = clean_accuracy(model.module, test.images, test.labels)
    if attack is None:
        return Measured(accuracy, None)
    trigger = load_trigger(entry, attack, zoo, shape_of(test.images))
    goal = attack.goal(test.labels, model.num_classes)
    success = attack_success_rate(model.module, test.images, test.labels, trigger, goal)
    return Measured(accuracy, success)
