"""Repairs of models of known truth: the rows of one repair, and the tables of many."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from published import published
from rows import Row
from torch import Tensor, nn
from verdicts import by

from bdprune.analysis import MEMO, Case
from bdprune.data import CleanData, RawImages
from bdprune.loops import FineTuneSettings, fine_tune
from bdprune.methods import Purifier
from bdprune.model import Model
from bdprune.registry import names, purifier

POISONED = 5
"""Triggered images of the retuning, as in Wang et al., NeurIPS 2024 (PAM)."""

_RETUNING = FineTuneSettings(lr=0.01, epochs=5, padding=0)


def parse_method(text: str) -> tuple[str, str | None, int]:
    """Name, preset and number of clean images of a method such as ``rnp``, ``rnp:paper`` or ``auto-100``.

    Raises:
        ValueError: there is no such purifier, or the number is not one.
    """
    whole, _, count = text.rpartition("-") if text.rpartition("-")[2].isdigit() else (text, "", "500")
    name, _, preset = whole.partition(":")
    if name not in names("purifier"):
        raise ValueError(f"There is no purifier {name!r}. The purifiers are {', '.join(names('purifier'))}.")
    return name, preset or None, int(count)


def make_method(text: str, seed: int) -> Purifier:
    """The purifier of :func:`parse_method`."""
    name, preset, _ = parse_method(text)
    return purifier(name, preset, seed=seed) if _takes_seed(name) else purifier(name, preset)


def _takes_seed(name: str) -> bool:
    return hasattr(purifier(name), "seed")


def repair_row(model: Model, clean: CleanData, method: str, seed: int, measure: Callable[[Model], Row]) -> Row:
    """The figures of one repair.

    Args:
        model: the model before the repair.
        clean: the defender's clean images; a part is drawn with the seed if the method takes fewer.
        method: see :func:`parse_method`.
        seed: of the draw and of the method.
        measure: CA, ASR and RA in per cent of a model.
    """
    _, _, count = parse_method(method)
    if count < len(clean):
        clean = clean.sample(max(count // len(clean.class_counts), 1), torch.Generator().manual_seed(seed))
    MEMO.clear()  # the seconds must include everything
    start = time.perf_counter()
    repair = make_method(method, seed)(Case(model, clean))
    seconds = time.perf_counter() - start
    return {
        "images": len(clean),
        "pruned": sum(map(len, repair.pruned.values())),
        "threshold": None if math.isnan(repair.threshold) else repair.threshold,
        "rule": repair.selection,
        "change": repair.change,
        "outcome": repair.check.outcome if repair.check else "unchecked",
        "attempts": [[one.method, list(one.left), one.rejected, one.chosen] for one in repair.attempts],
        "scores": [[one.name, one.score_before, one.score_after] for one in repair.check.triggers]
        if repair.check
        else [],
        "held_out": [_finite(repair.accuracy_before), _finite(repair.accuracy_after)],
        "after": measure(repair.model),
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "model_after": repair.model,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def retuned(model: Model, clean: CleanData, test: RawImages, trigger: nn.Module, target: int, seed: int) -> Model:
    """The model after an attacker's fine-tuning on five triggered images with the target label, and clean images.

    Args:
        clean: the clean images that accompany them.
        test: images of which five get the trigger; only for this measurement.
        trigger: images in [0, 1] -> triggered images.
        target: label of the backdoor.
        seed: of the draws and of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    others = torch.nonzero(test.labels != target).flatten()
    chosen = others[torch.randperm(len(others), generator=generator)[:POISONED]]
    with torch.no_grad():
        poisoned: Tensor = trigger(test.images[chosen].float() / 255).clamp(0, 1)
    images = torch.cat([poisoned, clean.images])
    labels = torch.cat([torch.full((len(chosen),), target), clean.labels])
    return fine_tune(model, CleanData(images, labels), _RETUNING, seed=seed)


def defence_rate(before: Row, after: Row) -> float:
    """DER in per cent: half the fall of ASR less half the fall of CA, from 50 (nothing) to 100."""
    gained, lost = max(0.0, before["asr"] - after["asr"]), max(0.0, before["ca"] - after["ca"])
    return (gained - lost + 100) / 2


def repair_table(rows: Sequence[Row], before: dict[str, Row]) -> str:
    """A Markdown table with mean and worst over the seeds of one method, and a line for all models."""
    lines = [
        "| model | ASR before | after, mean (worst) | CA before | after, mean (worst) | RA after | DER | changed "
        "| outcome | after retuning: ASR | s | published ASR / CA |",
        "|" + "---|" * 12,
    ]
    means: list[tuple[float, float, float]] = []
    clean: list[float] = []
    for name, mine in by(rows, "model").items():
        first, accuracy = before[name], [row["after"]["ca"] for row in mine]
        if first["asr"] is None:
            clean.append(first["ca"] - statistics.mean(accuracy))
        else:
            success = [row["after"]["asr"] for row in mine]
            rates = [defence_rate(first, row["after"]) for row in mine]
            drop = first["ca"] - statistics.mean(accuracy)
            means.append((statistics.mean(success), drop, statistics.mean(rates)))
        lines.append(_line(name, mine, first))
    if means:
        success_rates, drops, rates = zip(*means, strict=True)
        lines.append(
            f"\n{len(means)} backdoored models: ASR {statistics.mean(success_rates):.2f} on average and "
            f"{max(success_rates):.2f} at worst; CA falls by {statistics.mean(drops):.2f} points on average and "
            f"{max(drops):.2f} at worst; DER {statistics.mean(rates):.1f}."
        )
    if clean:
        lines.append(f"\n{len(clean)} clean models: CA falls by at most {max(clean):.2f} points.")
    return "\n".join(lines)


def _line(name: str, rows: Sequence[Row], before: Row) -> str:
    after = [row["after"] for row in rows]
    accuracy = [one["ca"] for one in after]
    success, robust = _known(after, "asr"), _known(after, "ra")
    again = [row["retuned"] for row in rows if row.get("retuned") is not None]
    rates = [defence_rate(before, one) for one in after] if before["asr"] is not None else []
    pruned = sorted({row["pruned"] for row in rows})
    span = f"{pruned[0]}" if len(pruned) == 1 else f"{pruned[0]} to {pruned[-1]}"
    changes = "/".join(sorted({row.get("change", "pruned") for row in rows}))
    cells = [
        name,
        "–" if before["asr"] is None else f"{before['asr']:.1f}",
        f"{statistics.mean(success):.1f} ({max(success):.1f})" if success else "–",
        f"{before['ca']:.1f}",
        f"{statistics.mean(accuracy):.1f} ({min(accuracy):.1f})",
        f"{statistics.mean(robust):.1f}" if robust else "–",
        f"{statistics.mean(rates):.1f}" if rates else "–",
        f"{changes}, {span} filters" if pruned[-1] else changes,
        "/".join(sorted({row.get("outcome", "unchecked") for row in rows})),
        f"{statistics.mean(again):.1f}" if again else "–",
        f"{statistics.mean(row['seconds'] for row in rows):.0f}",
        published(rows[0]["method"], rows[0]["kind"], rows[0]["truth"] is None),
    ]
    return f"| {' | '.join(cells)} |"


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def summary_table(rows: Sequence[Row], before: dict[str, Row], methods: Sequence[str], models: int) -> str:
    """A Markdown table with a line for each method: averages and worst over the backdoored models.

    Args:
        models: number of backdoored models that each method should have repaired.
    """
    lines = [
        "| method | models | ASR, mean (worst) | fall of CA, mean (worst) | DER | ASR after retuning | s |",
        "|" + "---|" * 7,
    ]
    for method in methods:
        mine = [row for row in rows if row["method"] == method and before[row["model"]]["asr"] is not None]
        count = len({row["model"] for row in mine})
        if not mine:
            lines.append(f"| {method} | not run | | | | | |")
            continue
        success = [row["after"]["asr"] for row in mine]
        drops = [before[row["model"]]["ca"] - row["after"]["ca"] for row in mine]
        rates = [defence_rate(before[row["model"]], row["after"]) for row in mine]
        again = [row["retuned"] for row in mine if row.get("retuned") is not None]
        missing = "" if count == models else f", {models - count} not run"
        lines.append(
            f"| {method} | {count}{missing} | {statistics.mean(success):.1f} ({max(success):.1f}) "
            f"| {statistics.mean(drops):.1f} ({max(drops):.1f}) | {statistics.mean(rates):.1f} "
            f"| {f'{statistics.mean(again):.1f}' if again else '–'} "
            f"| {statistics.mean(row['seconds'] for row in mine):.0f} |"
        )
    return "\n".join(lines)
