"""What RNP costs on one model: the plain threshold sweep against ours, and unlearning and recovery by precision.

    python bench/rnp.py zoo/demo/badnets.safetensors --data zoo/demo/defence.npz [--threads 1] [--rounds 3]
                        [--clock wall] [--json results.json]

The plain sweep prunes a copy and predicts both sets of clean images at every one of 19 thresholds. "no cache" leaves
out thresholds that prune what the last one did, and the second set where the first is hopeless; "ours" keeps feature
maps on top. All must give the same accuracies, or the run fails; where the plain sweep goes on after a hopeless set,
its first set counts. The rungs take turns within each round, and the least time counts. Precisions are timed over one
epoch each, again in turn; their masks come from a whole run each, and are compared by rank correlation (ties share
their mean rank) and by what a threshold of 0.5 prunes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.data.load import load_clean
from bdprune.model.handle import Model
from bdprune.model.load import load
from bdprune.model.prune import prune
from bdprune.purify.rnp import RNP
from bdprune.training.evaluate import clean_accuracy
from bdprune.training.precision import PRECISIONS, Precision
from bdprune.training.recover import recover
from bdprune.training.sweep import Sweep, below, sweep_thresholds
from bdprune.training.unlearn import unlearn

THRESHOLDS = [index / 20 for index in range(1, 20)]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turn(rungs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Least seconds of each rung."""
    seconds = dict.fromkeys(rungs, float("inf"))
    for _ in range(rounds):
        for name, rung in rungs.items():
            start = clock()
            rung()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def plain_sweep(model: Model, masks: dict[str, Tensor], sets: list[CleanData]) -> list[list[float]]:
    """Clean accuracy on every set at every threshold, nothing left out."""
    accuracies = []
    for threshold in THRESHOLDS:
        module = prune(model, below(masks, threshold)).module
        accuracies.append([clean_accuracy(module, data.images, data.labels) for data in sets])
    return accuracies


def check_sweep(ours: Sweep, plain: list[list[float]], model: Model, sets: list[CleanData], hopeless: float) -> None:
    """Raises unless every point says what the plain sweep says."""
    before = [clean_accuracy(model.module, data.images, data.labels) for data in sets]
    for point, accuracies in zip(ours.points, plain, strict=True):
        drops = [full - left for full, left in zip(before, accuracies, strict=True)]
        known = drops[:1] if drops[0] > hopeless else drops
        if point.clean_accuracy != before[0] - drops[0] or point.drop != max(known):
            raise SystemExit(f"the sweeps differ at {point.threshold}: {point.clean_accuracy} and {accuracies}")


def bench_sweep(model: Model, masks: dict[str, Tensor], sets: list[CleanData], args: argparse.Namespace) -> Any:
    rnp = RNP()
    hopeless = max(rnp.max_drop, rnp.tuned_drop)

    def swept(cache_bytes: int) -> Sweep:
        settings = (THRESHOLDS, rnp.max_drop, rnp.mode, False, hopeless, cache_bytes)
        return sweep_thresholds(model, masks, sets, *settings)

    check_sweep(swept(1 << 30), plain_sweep(model, masks, sets), model, sets, hopeless)
    rungs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_sweep(model, masks, sets),
        "no cache": lambda: swept(0),
        "ours": lambda: swept(1 << 30),
    }
    return in_turn(rungs, args.rounds, CLOCKS[args.clock])


def bench_loops(model: Model, data: CleanData, args: argparse.Namespace) -> Any:
    rnp = RNP()
    ascent = replace(rnp.unlearning, max_epochs=1, stop_share=None, stop_accuracy=0.0, min_steps=0, raises=0)
    descent = replace(rnp.recovery, epochs=1)

    def rung(loop: str, precision: Precision) -> Callable[[], Any]:
        if loop == "unlearn":
            return lambda: unlearn(model, data, ascent, 0, precision)
        return lambda: recover(model, data, descent, 0, precision)

    rungs = {f"{loop} {name}": rung(loop, name) for loop in ("unlearn", "recover") for name in PRECISIONS}
    return in_turn(rungs, args.rounds, CLOCKS[args.clock])


def masks_by_precision(model: Model, data: CleanData) -> dict[str, dict[str, Tensor]]:
    rnp, masks = RNP(), {}
    for name in PRECISIONS[:2]:
        unlearned = unlearn(model, data, rnp.unlearning, 0, name)
        recovered = recover(unlearned.model, data, rnp.recovery, 0, name)
        print(f"{name}: unlearned in {len(unlearned.trajectory)} steps at learning rate {unlearned.lr:g}")
        masks[name] = recovered.masks
    return masks


def ranks(values: Tensor) -> Tensor:
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def agreement(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, float]:
    """Rank correlation of two sets of masks, and the overlap (Jaccard) of what a threshold of 0.5 prunes."""
    a, b = (torch.cat(list(masks.values())) for masks in (one, two))
    correlation = torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()
    cut_a, cut_b = a <= 0.5, b <= 0.5
    overlap = (cut_a & cut_b).sum() / (cut_a | cut_b).sum().clamp(min=1)
    return {"rank_correlation": correlation, "overlap_at_half": overlap.item(), "pruned": int(cut_a.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, data = load(args.model), load_clean(args.data)
    rest, held = data.split(RNP().held_out, torch.Generator().manual_seed(0))
    loops = bench_loops(model, rest, args)
    masks = masks_by_precision(model, rest)
    agreed = agreement(masks["float32"], masks["bfloat16"])
    sweep = bench_sweep(model, masks["float32"], [held, rest], args)
    for name, seconds in (loops | sweep).items():
        print(f"{name:20} {seconds:8.3f} s")
    print(f"plain sweep / ours: {sweep['plain'] / sweep['ours']:.2f}; masks: {agreed}")
    if args.json:
        where = {"machine": platform.processor(), "torch": torch.__version__, "threads": args.threads}
        record = {**where, "model": str(args.model), "loops": loops, "sweep": sweep, "masks": agreed}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
