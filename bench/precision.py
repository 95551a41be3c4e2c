"""Whether RNP's fast path finds what the plain one finds on a model of known truth.

    python -m bench.precision zoo/demo/badnets.safetensors --data zoo/demo/defence.npz [--precision auto]
                              [--epochs 20] [--threads 1] [--json results.json]

The reference is the published loop as the ladders time it: float32, NCHW, every gradient. It unlearns and recovers by
itself, with the learning rate and the stop accuracy of the fast path. Compared are the masks: rank correlation (ties
share their mean rank), and what the threshold that RNP chooses would prune, up to masks within 0.02 of it. The sweep
over 19 thresholds is timed on these masks too (processor time): the plain one of the ladders, and ours with the same
points. It fails where their accuracies differ.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.data.load import load_clean
from bdprune.model.handle import Model
from bdprune.model.load import load
from bdprune.purify.rnp import RNP
from bdprune.training.evaluate import clean_accuracy
from bdprune.training.precision import PRECISIONS
from bdprune.training.recover import recover
from bdprune.training.sweep import sweep_thresholds
from bdprune.training.unlearn import unlearn
from bench.ladders.machine import describe
from bench.ladders.rnp import AUTHOR, THRESHOLDS, plain_recover, plain_sweep, plain_unlearn
from bench.ladders.targets import NEAR

_ROUNDING = 1e-6  # ours counts in float32


def ranks(values: Tensor) -> Tensor:
    """Rank of each value, from 0.5 on; equal values share their mean rank."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; NaN where all values of one side are equal."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def same_pruned(a: Tensor, b: Tensor, threshold: float) -> bool:
    """Whether a threshold prunes the same filters of both, but for masks within ``NEAR`` of it on either side."""
    near = ((a - threshold).abs() <= NEAR) | ((b - threshold).abs() <= NEAR)
    return bool((((a <= threshold) == (b <= threshold)) | near).all())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both paths on one model."""
    model, data = load(args.model), load_clean(args.data)
    rnp = RNP()
    rest, held = data.split(rnp.held_out, torch.Generator().manual_seed(0))
    fast = unlearn(model, rest, rnp.unlearning, 0, args.precision)
    recovered = recover(fast.model, rest, replace(rnp.recovery, epochs=args.epochs), 0, args.precision)
    stop = (rnp.unlearning.stop_share or 0.0) * clean_accuracy(model.module, rest.images, rest.labels)
    network = plain_unlearn(model, rest, AUTHOR, fast.lr, rnp.unlearning.max_epochs, stop)
    plain = torch.cat(plain_recover(model.with_network(network.eval()), rest, AUTHOR, args.epochs))
    ours = torch.cat(list(recovered.masks.values()))
    thresholds = [index * rnp.step for index in range(round(0.95 / rnp.step) + 1)]
    sweep = sweep_thresholds(model, recovered.masks, (held, rest), thresholds, rnp.max_drop, rnp.mode, False)
    chosen = sweep.highest(rnp.max_drop)
    sweeps = timed_sweeps(model, recovered.masks, held)
    return {
        "model": args.model.name,
        "precision": args.precision,
        "plans": [str(fast.plan), str(recovered.plan)],
        "rank_correlation": rank_correlation(ours, plain),
        "threshold": chosen.threshold if chosen else None,
        "same_pruned": same_pruned(ours, plain, chosen.threshold) if chosen else None,
        "pruned": [int((one <= chosen.threshold).sum()) for one in (ours, plain)] if chosen else None,
        "largest_difference": (ours - plain).abs().max().item(),
        "sweep_seconds": sweeps,
    }


def timed_sweeps(model: Model, masks: dict[str, Tensor], data: CleanData) -> dict[str, float]:
    """Processor seconds of the plain sweep and of ours, every threshold measured."""
    start = time.process_time()
    plain = plain_sweep(model, masks, data, 128, AUTHOR, copies=True)
    middle = time.process_time()
    ours = sweep_thresholds(model, masks, [data], THRESHOLDS, 1.0, "zero_gamma", stop_early=False)
    end = time.process_time()
    found = [point.clean_accuracy for point in ours.points]
    if max(abs(a - b) for a, b in zip(found, plain, strict=True)) > _ROUNDING:
        raise SystemExit(f"The sweeps differ: {plain} and {found}.")
    return {"plain": middle - start, "ours": end - middle}


def main() -> None:
    """Prints what was found, and keeps it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--epochs", type=int, default=20, help="of the recovery")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = compare(args)
    for name, value in found.items():
        print(f"{name:20} {value}")
    if args.json:
        record = {"machine": describe(torch.device("cpu")), "threads": args.threads, **found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
