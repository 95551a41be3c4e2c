"""Repairs of models of known truth: the rows of one repair, and the tables of many."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from memory import peak_mb, start_peak
from published import published
from rows import Row, Rows
from torch import Tensor, nn
from verdicts import by

from bdprune.analysis import MEMO, Case, check_sanity
from bdprune.attacks import Attack
from bdprune.data import CleanData, RawImages
from bdprune.errors import DataError, SanityError
from bdprune.loops import FineTuneSettings, fine_tune
from bdprune.methods import Purifier, Repair
from bdprune.model import Model
from bdprune.pipeline.repair_data import mirror_rule
from bdprune.registry import names, purifier

MOST_IMAGES = 500
"""Clean images of a repair whose method names no number."""

POISONED = 5
"""Triggered images of the retuning, as in Wang et al., NeurIPS 2024 (PAM)."""

_RETUNING = FineTuneSettings(lr=0.01, epochs=5, padding=0)


@dataclass(frozen=True)
class Method:
    """What a name such as ``rnp``, ``rnp:paper``, ``auto-100`` or ``rnp+nad`` stands for.

    Attributes:
        steps: purifiers and their presets, applied one after another.
        images: largest number of clean images.
    """

    steps: tuple[tuple[str, str | None], ...]
    images: int = MOST_IMAGES

    def purifiers(self, seed: int) -> list[Purifier]:
        """The purifiers of the steps, with the seed where they take one."""
        made = []
        for name, preset in self.steps:
            more = {"seed": seed} if "seed" in purifier(name).settings() else {}
            made.append(purifier(name, preset, **more))
        return made


def parse_method(text: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is no such purifier, or the number is not one.
    """
    whole, _, count = text.rpartition("-") if text.rpartition("-")[2].isdigit() else (text, "", str(MOST_IMAGES))
    steps = []
    for one in whole.split("+"):
        name, _, preset = one.partition(":")
        if name not in names("purifier"):
            raise ValueError(f"There is no purifier {name!r}. The purifiers are {', '.join(names('purifier'))}.")
        steps.append((name, preset or None))
    return Method(tuple(steps), int(count))


def repair_row(model: Model, clean: CleanData, method: str, seed: int, measure: Callable[[Model], Row]) -> Row:
    """The figures of one repair. As in ``bdprune purify``, images are mirrored only if the network allows it.

    Args:
        model: the model before the repair.
        clean: the defender's clean images; a part is drawn with the seed if the method takes fewer, as many of each
            label.
        method: see :func:`parse_method`.
        seed: of the draw and of the method.
        measure: CA, ASR and RA in per cent of a model.

    Raises:
        DataError: the method asks for more images than there are.
        SanityError: the model does not recognise the images.
    """
    parsed = parse_method(method)
    if parsed.images > max(len(clean), MOST_IMAGES):
        raise DataError(f"{method} takes {parsed.images} images, and there are {len(clean)}.", "Give more images.")
    sanity = check_sanity(model, clean)
    if not sanity.ok:
        raise SanityError(sanity.message, sanity.suggestion)
    if parsed.images < len(clean):
        clean = clean.sample(max(parsed.images // len(clean.class_counts), 1), torch.Generator().manual_seed(seed))
    clean, no_mirror = mirror_rule(model, clean)
    MEMO.clear()  # the seconds must include everything
    start_peak(model.device)
    start = time.perf_counter()
    repairs: list[Repair] = []
    for one in parsed.purifiers(seed):
        repairs.append(one(Case(repairs[-1].model if repairs else model, clean)))
    seconds, peak = time.perf_counter() - start, peak_mb(model.device)
    pruned = {(name, index) for one in repairs for name, some in one.pruned.items() for index in some}
    changes = {part for one in repairs for part in one.change.split(" and ")} - {"nothing"}
    last = repairs[-1]
    return {
        "images": len(clean),
        "no_mirror": no_mirror,
        "pruned": len(pruned),
        "threshold": None if math.isnan(last.threshold) else last.threshold,
        "rule": "; ".join(one.selection for one in repairs),
        "change": " and ".join(sorted(changes)) or "nothing",
        "outcome": last.check.outcome if last.check else "unchecked",
        "attempts": [[one.method, list(one.left), one.rejected, one.chosen] for one in last.attempts],
        "scores": [[one.name, one.score_before, one.score_after] for one in last.check.triggers] if last.check else [],
        "held_out": [_finite(repairs[0].accuracy_before), _finite(last.accuracy_after)],
        "after": measure(last.model),
        "seconds": seconds,
        "peak_mb": peak,
        "model_after": last.model,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def retuned(model: Model, clean: CleanData, test: RawImages, trigger: nn.Module, attack: Attack, seed: int) -> Model:
    """The model after an attacker's fine-tuning on five triggered images with the attacker's labels, and clean images.

    Args:
        clean: the clean images that accompany them.
        test: images of which five get the trigger; only for this measurement.
        trigger: images in [0, 1] -> triggered images.
        attack: gives the attacker's label of each image.
        seed: of the draws and of the order.
    """
    clean, _ = mirror_rule(model, clean)
    generator = torch.Generator().manual_seed(seed)
    goal = attack.goal(test.labels, model.num_classes)
    others = torch.nonzero(test.labels != goal).flatten()
    chosen = others[torch.randperm(len(others), generator=generator)[:POISONED]]
    with torch.no_grad():
        poisoned: Tensor = trigger(test.images[chosen].float() / 255).clamp(0, 1)
    images, labels = torch.cat([poisoned, clean.images]), torch.cat([goal[chosen], clean.labels])
    return fine_tune(model, CleanData(images, labels, mirror=clean.mirror), _RETUNING, seed=seed)


def defence_rate(before: Row, after: Row) -> float:
    """DER in per cent: half the fall of ASR less half the fall of CA, from 50 (nothing) to 100."""
    gained, lost = max(0.0, before["asr"] - after["asr"]), max(0.0, before["ca"] - after["ca"])
    return (gained - lost + 100) / 2


def repair_table(rows: Sequence[Row], before: dict[str, Row], as_published: Collection[str] = ()) -> str:
    """A Markdown table with mean and worst over the seeds of one method, and a line for all models.

    An average over models is that of their means.

    Args:
        rows: repairs by one method.
        before: the figures of each model before.
        as_published: models whose attack has the settings of the RNP paper, so that its figures are beside them.
    """
    lines = [
        "| model | ASR before | after, mean (worst) | CA before | after, mean (worst) | RA after | DER | changed "
        "| outcome | after retuning: ASR | s | MB | published ASR / CA |",
        "|" + "---|" * 13,
    ]
    means: list[tuple[float, float, float]] = []
    worst: list[tuple[float, float]] = []
    clean: list[float] = []
    for name, mine in by(rows, "model").items():
        first, accuracy = before[name], [row["after"]["ca"] for row in mine]
        if first["asr"] is None:
            clean.append(first["ca"] - min(accuracy))
        else:
            success = [row["after"]["asr"] for row in mine]
            rates = [defence_rate(first, row["after"]) for row in mine]
            drop = first["ca"] - statistics.mean(accuracy)
            means.append((statistics.mean(success), drop, statistics.mean(rates)))
            worst.append((max(success), first["ca"] - min(accuracy)))
        lines.append(_line(name, mine, first, name in as_published))
    if means:
        success_rates, drops, rates = (statistics.mean(one) for one in zip(*means, strict=True))
        most_success, most_lost = map(max, zip(*worst, strict=True))
        lines.append(
            f"\n{len(means)} backdoored models: ASR {success_rates:.2f} on average and {most_success:.2f} in the worst "
            f"run; CA falls by {drops:.2f} points on average and {most_lost:.2f} in the worst run; DER {rates:.1f}."
        )
    if clean:
        lines.append(f"\n{len(clean)} clean models: CA falls by at most {max(clean):.2f} points.")
    return "\n".join(lines)


def _line(name: str, rows: Sequence[Row], before: Row, as_published: bool) -> str:
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
        _memory(rows),
        published(rows[0]["method"], rows[0]["kind"], rows[0]["truth"] is None) if as_published else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _memory(rows: Sequence[Row]) -> str:
    peaks = _known(rows, "peak_mb")
    return f"{max(peaks):.0f}" if peaks else "–"


def summary_table(rows: Sequence[Row], before: dict[str, Row], methods: Sequence[str], models: Collection[str]) -> str:
    """A Markdown table with a line for each method: averages and worst over the backdoored models.

    Args:
        rows: repairs by any method.
        before: the figures of each model before.
        methods: those that get a line.
        models: the backdoored models that each method should have repaired.
    """
    lines = [
        "| method | models | ASR, mean (worst) | fall of CA, mean (worst) | DER | ASR after retuning | s | MB |",
        "|" + "---|" * 8,
    ]
    for method in methods:
        mine = [row for row in rows if row["method"] == method and row["model"] in models]
        count = len({row["model"] for row in mine})
        if not mine:
            lines.append(f"| {method} | not run | | | | | | |")
            continue
        success = [row["after"]["asr"] for row in mine]
        drops = [before[row["model"]]["ca"] - row["after"]["ca"] for row in mine]
        rates = [defence_rate(before[row["model"]], row["after"]) for row in mine]
        again = [row["retuned"] for row in mine if row.get("retuned") is not None]
        missing = "" if count == len(models) else f", {len(models) - count} not run"
        lines.append(
            f"| {method} | {count}{missing} | {statistics.mean(success):.1f} ({max(success):.1f}) "
            f"| {statistics.mean(drops):.1f} ({max(drops):.1f}) | {statistics.mean(rates):.1f} "
            f"| {_retuned(again, len(mine))} "
            f"| {statistics.mean(row['seconds'] for row in mine):.0f} | {_memory(mine)} |"
        )
    return "\n".join(lines)


def success_table(rows: Sequence[Row], before: dict[str, Row], methods: Sequence[str]) -> str:
    """A Markdown table with a line for each backdoored model and a column for each method.

    Each cell has the ASR after the repair and, in brackets, the fall of CA, both means over the seeds.
    """
    lines = [f"| model | before | {' | '.join(methods)} |", "|" + "---|" * (len(methods) + 2)]
    for name, mine in by(rows, "model").items():
        if before[name]["asr"] is None:
            continue
        cells = [name, f"{before[name]['asr']:.0f}"]
        for method in methods:
            after = [row["after"] for row in mine if row["method"] == method]
            cells.append(
                f"{statistics.mean(one['asr'] for one in after):.0f} "
                f"({before[name]['ca'] - statistics.mean(one['ca'] for one in after):.1f})"
                if after
                else "–"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _retuned(again: Sequence[float], rows: int) -> str:
    """The mean ASR after the retuning, and of how many rows, if some have none."""
    part = "" if len(again) == rows else f" ({len(again)} of {rows})"
    return f"{statistics.mean(again):.1f}{part}" if again else "–"


def comparison_table(rows: Sequence[Row], before: Row) -> str:
    """A Markdown table of all methods on one backdoored model, means over the seeds."""
    lines = [
        "| method | ASR | CA | RA | ASR after retuning | changed | s | MB |",
        "|" + "---|" * 8,
        f"| before | {before['asr']:.1f} | {before['ca']:.1f} | | | | | |",
    ]
    for method, mine in by(rows, "method").items():
        after, again = [row["after"] for row in mine], _known(mine, "retuned")
        cells = [
            f"`{method}`",
            *(f"{statistics.mean(one[name] for one in after):.1f}" for name in ("asr", "ca", "ra")),
            f"{statistics.mean(again):.1f}" if again else "–",
            "/".join(sorted({row["change"] for row in mine})),
            f"{statistics.mean(row['seconds'] for row in mine):.0f}",
            _memory(mine),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def missing_rows(record: Rows, models: Sequence[str], methods: Sequence[str], seeds: int) -> str:
    """The repairs that have no row, and why those failed that were tried, in sentences; empty if there are none."""
    lines = []
    for method in methods:
        found = {(row["model"], row["seed"]) for row in record.where(part="repair", method=method)}
        missing = {name: [one for one in range(seeds) if (name, one) not in found] for name in models}
        names = [f"{name} (seeds {', '.join(map(str, one))})" for name, one in missing.items() if one]
        if names:
            lines.append(f"Not run by {method}: {', '.join(names)}.")
    lines += [f"Failed: {key['model']} by {key['method']}, seed {key['seed']}: {why}" for key, why in record.failed]
    return "\n".join(lines)
