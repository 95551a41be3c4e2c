"""Measures STRIP and NU+STRIP on the models of a zoo: false rejections, false acceptances, and the gap in entropy.

    python bench/strip.py zoo/cifar10-w8.toml --data DIR --clean zoo/demo/defence.npz
                          [--preset paper] [--overlays 25] [--weights 0.5 0.5] [--only MODEL] [--images 200] [--seed 0]
                          [--rows bench/results/strip.jsonl] [--picture MODEL=docs/images/strip.svg]

DIR holds the zoo's dataset. For each model with a backdoor, 200 test images with its trigger and 200 other test images
without it are judged. The trigger and the test images are used for measuring only; the threshold comes from the clean
images. Prints a Markdown table of all rows in FILE; --picture draws the entropies of one model from its rows, as in
Figure 8 of RNP (Li et al., 2023). Each row is appended to FILE when it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from rows import Row, Rows, auroc
from torch import Tensor

from bdprune.analysis import Case, judge_for, strip_settings
from bdprune.attacks import shape_of
from bdprune.data import CleanData, RawImages, load_clean, read_dataset
from bdprune.model import load
from bdprune.ops import device_name
from bdprune.pipeline import parse_device
from bdprune.zoo import Entry, Storage, load_trigger, read_manifest, weights_path

METHODS = ("strip", "nu-strip")
BINS = 30


def test_images(entry: Entry, folder: Path, test: RawImages, count: int) -> tuple[Tensor, Tensor]:
    """Images without and with the trigger, ``[count, C, H, W]`` each, of different test images.

    A triggered image has another label than the one that the attacker wants.
    """
    attack = entry.make_attack()
    assert attack is not None
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    counts = attack.goal(test.labels, entry.num_classes) != test.labels
    plain, rest = order[:count], order[count:]
    chosen = rest[counts[rest]][:count]
    trigger = load_trigger(entry, attack, folder, shape_of(test.images))
    with torch.no_grad():
        triggered = torch.cat([trigger(one.float() / 255).clamp(0, 1) for one in test.images[chosen].split(100)])
    return test.images[plain].float() / 255, triggered


def measured(path: Path, clean: CleanData, sets: tuple[Tensor, Tensor], method: str, options: Any) -> Row:
    """One row: the rates in per cent, and the entropies in bits."""
    model = load(path)
    model.network.to(options.device)
    start = time.perf_counter()
    changes: Row = {} if options.overlays is None else {"overlays": options.overlays}
    if options.weights:
        changes |= dict(zip(("image_weight", "overlay_weight"), options.weights, strict=True))
    settings = strip_settings(options.preset, unlearned=method == "nu-strip", **changes)
    judge = judge_for(Case(model, clean.by_content), settings, options.seed)
    plain, triggered = (judge.measure(one) for one in sets)
    threshold = judge.threshold
    flags = (plain < threshold, triggered < threshold) if threshold is not None else None
    bits = math.log2(model.num_classes)
    return {
        "threshold": threshold,
        "limits": judge.limits,
        "frr": None if flags is None else 100 * flags[0].double().mean().item(),
        "far": None if flags is None else 100 * (~flags[1]).double().mean().item(),
        "auroc": auroc(plain.tolist(), triggered.tolist()),
        "entropy": {"clean": plain.mean().item(), "triggered": triggered.mean().item()},
        "histogram": {
            name: [int(count) for count in torch.histogram(one, BINS, range=(0.0, bits)).hist.tolist()]
            for name, one in (("clean", plain.clamp(max=bits)), ("triggered", triggered.clamp(max=bits)))
        },
        "bits": bits,
        "images": len(plain),
        "held_out": len(judge.entropies),
        "overlays": len(judge.overlays),
        "seconds": time.perf_counter() - start,
    }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each model: STRIP, then NU+STRIP."""
    lines = [
        "| model | STRIP: FRR | FAR | AUROC | gap | NU+STRIP: FRR | FAR | AUROC | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["model"], {})[row["method"]] = row
    complete = {name: by for name, by in cells.items() if by.keys() >= set(METHODS)}
    for name, by in complete.items():
        lines.append(f"| {name} | {' | '.join(_cells(by[method]) for method in METHODS)} |")
    if complete:
        means = " | ".join(_means([by[method] for by in complete.values()]) for method in METHODS)
        lines.append(f"| mean of {len(complete)} | {means} |")
    return "\n".join(lines)


def _cells(row: Row) -> str:
    rates = ["–" if row[name] is None else f"{row[name]:.1f}" for name in ("frr", "far")]
    return " | ".join([*rates, f"{row['auroc']:.3f}", f"{_gap(row):.2f}"])


def _means(rows: Sequence[Row]) -> str:
    rates = [[row[name] for row in rows if row[name] is not None] for name in ("frr", "far")]
    means = [f"{statistics.mean(one):.1f}" if one else "–" for one in rates]
    auroc, gap = (statistics.mean(one) for one in ([row["auroc"] for row in rows], [_gap(row) for row in rows]))
    return " | ".join([*means, f"{auroc:.3f}", f"{gap:.2f}"])


def _gap(row: Row) -> float:
    return float(row["entropy"]["clean"] - row["entropy"]["triggered"])


WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 230, 44, 34, 40
"""Pixels of one of the two panels, and of its margins."""
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.name{font-weight:bold}.middle{text-anchor:middle}.end{text-anchor:end}"
    ".clean{fill:#3b6ea8;opacity:.75}.triggered{fill:#c2492f;opacity:.75}.cut{stroke:#222;stroke-dasharray:5 4}"
    ".axis{stroke:#999}"
)


def picture(name: str, rows: Sequence[Row]) -> str:
    """An SVG file with the entropies of one model, without and with unlearning, and the thresholds."""
    title = f"Entropy of clean and of triggered images: {name}"
    by = {row["method"]: row for row in rows if row["model"] == name}
    panels = [part for place, method in enumerate(METHODS) for part in _panel(by[method], method, place * WIDTH)]
    size = f'viewBox="0 0 {2 * WIDTH} {HEIGHT}" width="{2 * WIDTH}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
    paper = f'<style>{_STYLE}</style><rect width="{2 * WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([f"{head}{paper}", *panels, "</svg>", ""])


def _panel(row: Row, method: str, left: int) -> list[str]:
    start, end, floor = left + LEFT, left + WIDTH - 16, HEIGHT - BOTTOM
    most = max(max(row["histogram"]["clean"]), max(row["histogram"]["triggered"]))
    slot = (end - start) / BINS
    gap = f"gap {_gap(row):.2f} bits"
    parts = [
        f'<text class="name" x="{start}" y="18">{"STRIP" if method == "strip" else "NU+STRIP"}, {gap}</text>',
        f'<line class="axis" x1="{start}" x2="{end}" y1="{floor}" y2="{floor}"/>',
        f'<text class="middle" x="{(start + end) / 2:.0f}" y="{HEIGHT - 8}">entropy in bits</text>',
        f'<text class="end" x="{start - 4}" y="{TOP + 4}">{most}</text>',
        f'<text class="end" x="{start - 4}" y="{floor}">0</text>',
    ]
    for kind in ("clean", "triggered"):
        for index, count in enumerate(row["histogram"][kind]):
            height = count / most * (floor - TOP)
            place = f'x="{start + index * slot + 0.5:.1f}" y="{floor - height:.1f}" width="{slot - 1:.1f}"'
            bar = f'<rect class="{kind}" {place} height="{height:.1f}"><title>{count} {kind}</title></rect>'
            parts += [bar] if count else []
    for tick in range(int(row["bits"]) + 1):
        x = start + tick / row["bits"] * (end - start)
        parts.append(f'<text class="middle" x="{x:.0f}" y="{floor + 15}">{tick}</text>')
    for place, kind in enumerate(("clean", "triggered")):
        x, y = end - 90, TOP + 4 + 16 * place
        parts += [f'<rect class="{kind}" x="{x}" y="{y - 9}" width="10" height="10"/>']
        parts += [f'<text x="{x + 15}" y="{y}">{kind} images</text>']
    if row["threshold"] is not None:
        x = start + row["threshold"] / row["bits"] * (end - start)
        parts.append(f'<line class="cut" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
    return parts


def main() -> None:
    """Makes the missing rows, and prints the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: make no new rows)")
    parser.add_argument("--clean", type=Path, default=Path("zoo/demo/defence.npz"))
    parser.add_argument("--preset", default="robust", choices=["robust", "paper"])
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable (default: all)")
    parser.add_argument("--overlays", type=int, help="fewer are faster (default: of the preset)")
    parser.add_argument("--weights", type=float, nargs=2, help="of image and overlay (default: of the preset)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    parser.add_argument("--rows", type=Path, default=Path("bench/results/strip.jsonl"))
    parser.add_argument("--picture", metavar="MODEL=FILE.svg", help="draw the entropies of one model")
    options = parser.parse_args()
    options.device = parse_device(options.device)
    part = f"strip-{options.preset}"
    record = Rows(options.rows, ("part", "model", "method", "seed"), {"device": device_name(options.device)})
    part += "" if options.overlays is None else f"-{options.overlays}"
    part += "-{:g}-{:g}".format(*options.weights) if options.weights else ""
    zoo = read_manifest(options.manifest)
    storage, clean = Storage(zoo), load_clean(options.clean)
    sets_of = functools.cache(lambda dataset: read_dataset(options.data, dataset, "test"))
    for entry in zoo.models if options.data else ():
        folder, attack = storage.made(entry), entry.make_attack()
        if attack is None or folder is None or (options.only and entry.name not in options.only):
            continue
        path, name = weights_path(folder, entry.name), f"{zoo.name}/{entry.name}"
        sets = test_images(entry, folder, sets_of(entry.dataset), options.images)
        for method in METHODS:
            key = {"part": part, "model": name, "kind": attack.kind, "method": method, "seed": options.seed}
            record.add(key, lambda path=path, sets=sets, method=method: measured(path, clean, sets, method, options))  # type: ignore[misc]
    rows = record.where(part=part, seed=options.seed)
    print(table(rows))
    if options.picture:
        name, _, file = options.picture.partition("=")
        found = [row["model"] for row in rows if row["model"].rpartition("/")[2] == name]
        if not found:
            sys.exit(f"There are no rows of {name!r} in {options.rows}.")
        Path(file).write_text(picture(found[0], rows))


if __name__ == "__main__":
    main()
