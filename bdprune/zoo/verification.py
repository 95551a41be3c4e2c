"""Verifies a zoo: measures every model again on the full test set, and writes the table for the documents."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bdprune.attacks import ABlend, Attack, CleanLabel
from bdprune.data import read_dataset
from bdprune.zoo.making import images_of, truth_of
from bdprune.zoo.manifest import Entry, Manifest, read_manifest
from bdprune.zoo.store import Cost, Storage, Truth, other_recipe

TOLERANCE = 0.002
"""Largest difference from the record: 20 of 10,000 images. Another machine rounds differently and flips a few."""

BELOW_CLEAN = 0.015
"""Largest gap of a model's clean accuracy below the mean of the clean models of its kind."""

State = Literal["agrees", "differs", "other recipe", "not measured", "not kept", "not made", "pending"]


@dataclass(frozen=True)
class Check:
    """One model: the record of ``zoo make``, and the new measurement (None if its weights are missing)."""

    entry: Entry
    state: State
    truth: Truth | None = None
    found: Truth | None = None

    @property
    def known(self) -> Truth | None:
        """The new measurement, or else the record of a model whose weights were not kept."""
        return None if self.state == "other recipe" else self.found or self.truth


def verify(
    manifest: Path,
    data: Path,
    models: Path | None = None,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    device: torch.device | None = None,
) -> list[Check]:
    """Measures every existing model again, and compares it with ``truth.json``; it writes nothing.

    Args:
        manifest: TOML file.
        data: folder of the data sets.
        models: folder of the models; the manifest's folder by default.
        only: names of the models; all by default.
        say: called with the name of each model before its measurement.
        device: where to measure; the CPU by default.

    Raises:
        OptionError: the manifest is invalid, or a name in ``only`` is unknown.
        DataError: the images or a trigger cannot be read.
        ArtifactError: a model cannot be read.
    """
    zoo = read_manifest(manifest)
    storage = Storage(zoo, models)
    sets = functools.lru_cache(maxsize=1)(functools.partial(read_dataset, data, part="test"))
    checks = []
    for entry in [zoo.entry(name) for name in only] if only else zoo.models:
        folder, truth = storage.made(entry), storage.truth(entry)
        if folder is None:
            record = storage.record(entry)
            missing: State = "pending" if entry.pending else "not made"
            checks.append(Check(entry, "not kept" if record else missing, record))
            continue
        if other_recipe(entry, truth):
            checks.append(Check(entry, "other recipe", truth))
            continue
        say(entry.name)
        cost = truth.cost if truth else Cost()
        found = truth_of(entry, folder, images_of(entry, sets(entry.dataset)), cost, device)
        state: State = "not measured" if truth is None else "agrees" if agrees(truth, found) else "differs"
        checks.append(Check(entry, state, truth, found))
    return checks


def agrees(truth: Truth, found: Truth) -> bool:
    """Whether target and sources are the same and CA, ASR, RA and cover accuracy differ by at most the tolerance."""
    return not differences(truth, found)


def differences(truth: Truth, found: Truth) -> list[str]:
    """What differs by more than the tolerance, by name: target label, sources and figures."""
    different = [name for name in ("target_label", "sources") if getattr(truth, name) != getattr(found, name)]
    for name in (*_FIGURES, "cover_accuracy"):
        one, two = getattr(truth, name), getattr(found, name)
        if (one is None) != (two is None) or (one is not None and abs(one - two) > TOLERANCE):
            different.append(name)
    return [name.replace("_", " ") for name in different]


_FIGURES = ("clean_accuracy", "attack_success_rate", "robust_accuracy")


def success_bar(attack: Attack) -> float:
    """The attack success rate that a model of this kind should have, in [0, 1]."""
    if isinstance(attack, CleanLabel):
        return 0.85
    if attack.target is None:
        return 0.80
    return 0.70 if isinstance(attack, ABlend) else 0.95


def missed_bars(zoo: Manifest, checks: Sequence[Check]) -> dict[str, list[str]]:
    """The bars that each model misses, in words, by name; models that miss none do not appear.

    A model that was trained under a defence has no bar for its attack success rate.

    Clean accuracy must reach the manifest's bar, and must be near the mean of the clean models of the same data set,
    architecture and width.
    """
    made = [(check.entry, check.known) for check in checks if check.known]
    missed: dict[str, list[str]] = {}
    for entry, found in made:
        same = [truth.clean_accuracy for other, truth in made if other.attack is None and _kind(other) == _kind(entry)]
        words = []
        if zoo.min_clean_accuracy is not None and found.clean_accuracy < zoo.min_clean_accuracy:
            words.append(f"CA {_percent(found.clean_accuracy)} is below {_percent(zoo.min_clean_accuracy)}")
        if same and found.clean_accuracy < statistics.mean(same) - BELOW_CLEAN:
            gap = 100 * (statistics.mean(same) - found.clean_accuracy)
            words.append(f"CA is {gap:.2f} points below the clean models' mean")
        attack, rate = entry.make_attack(), found.attack_success_rate
        if attack and not entry.defence and rate is not None and rate < success_bar(attack):
            words.append(f"ASR {_percent(rate)} is below {_percent(success_bar(attack))}")
        if words:
            missed[entry.name] = words
    return missed


def markdown(zoo: Manifest, checks: Sequence[Check]) -> str:
    """The zoo as Markdown: a table of existing models, models that miss a bar with reasons, and pending models."""
    missed = missed_bars(zoo, checks)
    lines = [
        "| model | attack | target | rate | CA | ASR | RA | minutes | bars |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(check, check.known, check.entry.name in missed) for check in checks if check.known),
    ]
    clean = [(check.entry, check.known.clean_accuracy) for check in checks if check.known and not check.entry.attack]
    for kind in dict.fromkeys(_kind(entry) for entry, _ in clean):
        shares = [share for entry, share in clean if _kind(entry) == kind]
        dataset, arch, width = kind
        mean = _percent(statistics.mean(shares))
        lines += ["", f"Mean CA of the clean models ({dataset}, {arch}, width {width}; {len(shares)}): {mean} %."]
    specific = [(check.entry.name, check.known.cover_accuracy) for check in checks if check.known]
    covered = ", ".join(f"{name} {_percent(share)} %" for name, share in specific if share is not None)
    if covered:
        lines += ["", f"Cover accuracy: {covered}."]
    if missed:
        notes = {check.entry.name: check.entry.note for check in checks}
        lines += ["", "Models that miss a bar:", ""]
        lines += [f"- **{name}**: {'; '.join(words)}.{_note(notes[name])}" for name, words in missed.items()]
    absent = [check.entry.name for check in checks if check.state == "not kept"]
    if absent:
        lines += ["", f"Measured after training; their weights are not kept here: {', '.join(absent)}."]
    waiting = [check for check in checks if check.known is None]
    if waiting:
        lines += ["", "Not made yet:", ""]
        lines += [f"- **{check.entry.name}** ({_attack(check.entry)}).{_note(check.entry.note)}" for check in waiting]
    return "\n".join(lines) + "\n"


def with_section(text: str, name: str, section: str, command: str = "zoo verify") -> str:
    """``text`` with ``section`` between the marks of a command and a zoo, or at the end if it has no such marks."""
    begin, end = f"<!-- {command} {name}: begin -->", f"<!-- {command} {name}: end -->"
    block = f"{begin}\n{section}{end}"
    if begin in text and end in text.split(begin, 1)[1]:
        before, rest = text.split(begin, 1)
        return before + block + rest.split(end, 1)[1]
    gap = "\n" if text and not text.endswith("\n\n") else ""
    return f"{text}{gap}## {name}\n\n{block}\n"


def target_text(attack: Attack) -> str:
    """The attack's target in a table, such as "3", "all-to-all", or "1 to 3" if the trigger works on label 1 only."""
    target = "all-to-all" if attack.target is None else str(attack.target)
    return f"{', '.join(map(str, attack.sources))} to {target}" if attack.sources else target


def _kind(entry: Entry) -> tuple[str, str, int]:
    return entry.dataset, entry.arch, entry.width


def _row(check: Check, found: Truth, misses_bar: bool) -> str:
    entry = check.entry
    attack = entry.make_attack()
    target = "–" if attack is None else target_text(attack)
    rate = "–" if attack is None else f"{100 * attack.rate:g} %"
    figures = [_percent(getattr(found, name)) for name in _FIGURES]
    minutes = "–" if found.seconds is None else _minutes(found)
    verdict = "missed" if misses_bar else "met"
    return f"| {' | '.join([entry.name, _attack(entry), target, rate, *figures, minutes, verdict])} |"


def _minutes(truth: Truth) -> str:
    assert truth.seconds is not None
    on_cpu = truth.env is None or truth.env.device == "cpu"
    return f"{truth.seconds / 60:.0f}" if on_cpu else f"{truth.seconds / 60:.1f} (GPU)"


def _attack(entry: Entry) -> str:
    return with_defence(str(entry.attack["kind"]) if entry.attack else "clean", entry)


def with_defence(kind: str, entry: Entry) -> str:
    """The kind of an attack, and the defence that the model was trained under, such as "badnets under abl"."""
    return f"{kind} under {entry.defence['kind']}" if entry.defence else kind


def _note(note: str) -> str:
    return f" {note}" if note else ""


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"
