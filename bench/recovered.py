"""How a recovered trigger compares with the true one: its flips on test images, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rows import Row
from torch import Tensor, nn

from bdprune.data import RawImages
from bdprune.loops import Trigger
from bdprune.pipeline import load_trigger
from bdprune.record import Result
from bdprune.runtime import predict

_IMAGES = 200  # test images that show which pixels the true trigger changes
_PATCH = 0.25  # share of the image; a trigger that changes more of it is not a patch


def recovered_rows(result: Result, folder: Path, network: nn.Module, test: RawImages, true: nn.Module) -> list[Row]:
    """One row for each recovered trigger of a scan.

    Args:
        result: of the scan, with ``folder`` as the folder for attachments.
        folder: holds the triggers.
        network: images in [0, 1] -> logits.
        test: all test images.
        true: images in [0, 1] -> images with the true trigger, on the CPU.
    """
    patch = patch_of(true, test.images[:_IMAGES].float() / 255)
    named = {one.file: one for found in result.detectors for one in found.triggers if one.file}
    rows = []
    for file, info in named.items():
        trigger = load_trigger(folder / file)
        rows.append(
            {
                "kind": info.kind,
                "target": info.target_label,
                "held_out": info.flip_rate,
                "test": flip_rate(trigger, network, test),
                "overlap": None if patch is None or info.kind != "patch" else overlap(trigger.strength, patch),
            }
        )
    return rows


@torch.no_grad()
def flip_rate(trigger: Trigger, network: nn.Module, test: RawImages) -> float:
    """Share of the test images of the trigger's labels that it flips, in [0, 1]."""
    images, labels = (part[trigger.takes(test.labels)] for part in (test.images, test.labels))
    parts = [predict(network, trigger.apply(one.float() / 255)) for one in images.split(500)]
    return trigger.flips(torch.cat(parts), labels).float().mean().item()


@torch.no_grad()
def patch_of(true: Callable[[Tensor], Tensor], images: Tensor) -> Tensor | None:
    """The pixels that a true trigger changes in most images, bool ``[h, w]``; None if it is not a small patch."""
    changed = (true(images) - images).abs().amax(1) > 0.5 / 255
    covered = changed.float().mean(0) > 0.5
    return covered if 0 < covered.float().mean() <= _PATCH else None


def overlap(strength: Tensor, patch: Tensor) -> float:
    """Intersection over union of a patch and as many pixels of the largest strength, in [0, 1].

    Args:
        strength: ``[h, w]``.
        patch: bool ``[h, w]``.
    """
    count = int(patch.sum())
    strongest = torch.zeros_like(patch).flatten()
    strongest[strength.flatten().topk(count).indices] = True
    both = (strongest.view_as(patch) & patch).sum().item()
    return both / (2 * count - both)


def recovered_table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line for each model and trigger that leads to the right label or to any.

    Shares are in per cent, smallest to largest over the seeds.
    """
    lines = ["| model | trigger | seeds | flips, held out | flips, test | overlap |", "|---|---|---|---|---|---|"]
    for (model, kind, target), mine in _right_triggers(rows).items():
        goal = "any label" if target is None else f"label {target}"
        shares = (_per_cent([one[what] for one in mine]) for what in ("held_out", "test", "overlap"))
        lines.append(f"| {model} | {kind}, {goal} | {len(mine)} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _right_triggers(rows: Sequence[Row]) -> dict[tuple[str, str, int | None], list[Row]]:
    """The recovered triggers of each model, kind and target, unless they lead to a wrong label."""
    found: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        for one in row.get("recovered", ()):
            if row["truth"] is None or one["target"] in (row["truth"], None):
                found.setdefault((row["model"], one["kind"], one["target"]), []).append(one)
    return found


def _per_cent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.1f}", f"{max(known):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
