"""Compares RNP's fast variant with the published loop on a model of known truth.

    python -m bench.precision zoo/demo/manifest.toml badnets [--seeds 3] [--precision auto] [--epochs 20]
                              [--threads 1] [--json results.json]

The published loop is the one of ``bench.speed``: float32, NCHW, all gradients. It unlearns and recovers on its own,
with the learning rate and the stop accuracy of the fast variant. Each seed of split, order and augmentation compares:

* the rank correlation of the masks (ties share their mean rank);
* the filters that RNP's threshold prunes, except masks within 0.02 of it;
* clean accuracy (CA) and attack success rate (ASR) in per cent on the zoo's test images, after each variant prunes at
  its own threshold and before any fine-tuning.

The masks of the first seed also time the sweep over 19 thresholds (processor time): the plain one of ``bench.speed``,
and ours. The script stops with an error if their accuracies differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.data import CleanData, load_clean
from bdprune.fleet import against_truth
from bdprune.loops import SweepPoint, SweepSettings, recover, sweep, unlearn
from bdprune.model import Model, load, prune
from bdprune.purifiers import RNP
from bdprune.runtime import PRECISIONS, Precision, clean_accuracy
from bdprune.zoo import Entry, read_manifest, weights_path
from bench.speed.machine import describe
from bench.speed.rnp import AUTHOR, THRESHOLDS, plain_recover, plain_sweep, plain_unlearn
from bench.speed.targets import NEAR

_ROUNDING = 1e-6  # ours computes accuracies in float32


def ranks(values: Tensor) -> Tensor:
    """Rank of each value; equal values share their mean rank. The smallest rank is 1."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; NaN if all values of one side are equal."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def same_pruned(a: Tensor, b: Tensor, threshold: float) -> bool:
    """Whether a threshold prunes the same filters of both, except masks within ``NEAR`` of it."""
    near = ((a - threshold).abs() <= NEAR) | ((b - threshold).abs() <= NEAR)
    return bool((((a <= threshold) == (b <= threshold)) | near).all())


Masks = dict[str, Tensor]


class Case:
    """A model of a zoo with the defender's images, the test images and the truth about it.

    Args:
        zoo: folder with the checkpoint, ``defence.npz``, ``test.npz`` and the trigger.
        entry: the model's entry in the manifest.
    """

    def __init__(self, zoo: Path, entry: Entry) -> None:
        self.model = load(weights_path(zoo, entry.name))
        self.data = load_clean(zoo / "defence.npz")
        self._zoo, self._entry, self._test = zoo, entry, load_clean(zoo / "test.npz")

    def left(self, rnp: RNP, point: SweepPoint | None) -> dict[str, float | None]:
        """CA and ASR in per cent after pruning the filters of ``point``."""
        repaired = prune(self.model, point.pruned if point else {}, rnp.mode)
        found = against_truth(repaired, self._entry, self._entry.make_attack(), self._zoo, self._test)
        success = found.attack_success_rate
        return {"ca": 100 * found.clean_accuracy, "asr": None if success is None else 100 * success}


def compare(case: Case, precision: Precision, epochs: int, seed: int) -> tuple[dict[str, Any], Masks]:
    """The comparison of both variants with one seed, and the masks of the fast one."""
    rnp, model = RNP(), case.model
    rest, held = case.data.split(rnp.held_out, torch.Generator().manual_seed(seed))
    fast = unlearn(model, rest, rnp.unlearning, seed, precision)
    recovered = recover(fast.model, rest, replace(rnp.recovery, epochs=epochs), seed, precision)
    stop = (rnp.unlearning.stop_share or 0.0) * clean_accuracy(model.module, rest.images, rest.labels)
    network = plain_unlearn(model, rest, AUTHOR, fast.lr, rnp.unlearning.max_epochs, stop, seed)
    plain = plain_recover(model.with_network(network.eval()), rest, AUTHOR, epochs, seed)
    masks = recovered.masks, dict(zip(recovered.masks, plain, strict=True))
    ours, theirs = (torch.cat(list(one.values())) for one in masks)
    chosen = [_chosen(rnp, model, one, (held, rest)) for one in masks]
    threshold = chosen[0].threshold if chosen[0] else None
    return {
        "seed": seed,
        "plans": [str(fast.plan), str(recovered.plan)],
        "rank_correlation": rank_correlation(ours, theirs),
        "largest_difference": (ours - theirs).abs().max().item(),
        "threshold": threshold,
        "same_pruned": None if threshold is None else same_pruned(ours, theirs, threshold),
        "pruned": None if threshold is None else [int((one <= threshold).sum()) for one in (ours, theirs)],
        "left": [case.left(rnp, one) for one in chosen],
    }, recovered.masks


def _chosen(rnp: RNP, model: Model, masks: Masks, sets: Sequence[CleanData]) -> SweepPoint | None:
    """The threshold at which RNP prunes."""
    thresholds = [index * rnp.step for index in range(round(0.95 / rnp.step) + 1)]
    settings = SweepSettings(thresholds, rnp.max_drop, rnp.mode, False, rnp.tuned_drop)
    swept = sweep(model, masks, sets, settings)
    return swept.highest(rnp.max_drop) or swept.highest(rnp.tuned_drop)


def timed_sweeps(model: Model, masks: Masks, data: CleanData) -> dict[str, float]:
    """Processor seconds of the plain sweep and of ours; both measure every threshold."""
    start = time.process_time()
    plain = plain_sweep(model, masks, data, 128, AUTHOR, copies=True)
    middle = time.process_time()
    ours = sweep(model, masks, [data], SweepSettings(THRESHOLDS, 1.0, stop_early=False))
    end = time.process_time()
    found = [point.clean_accuracy for point in ours.points]
    if max(abs(a - b) for a, b in zip(found, plain, strict=True)) > _ROUNDING:
        raise SystemExit(f"The sweeps differ: plain accuracies {plain}, ours {found}.")
    return {"plain": middle - start, "ours": end - middle}


def _case(manifest: Path, name: str) -> Case:
    entries = {entry.name: entry for entry in read_manifest(manifest).models}
    if name not in entries:
        sys.exit(f"{manifest} has no model {name!r}; choose one of {', '.join(entries)}.")
    return Case(manifest.parent, entries[name])


def main() -> None:
    """Prints the comparison of each seed; ``--json`` also writes a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="manifest of a zoo; the models are in its folder")
    parser.add_argument("model", help="name of a model in the manifest")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the recovery")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = _case(args.manifest, args.model)
    record: dict[str, Any] = {"model": args.model, "precision": args.precision, "seeds": []}
    record |= {"machine": describe(torch.device("cpu")), "threads": args.threads, "sweep_seconds": None}
    for seed in range(args.seeds):
        found, masks = compare(case, args.precision, args.epochs, seed)
        record["seeds"].append(found)
        if seed == 0:
            held = case.data.split(RNP().held_out, torch.Generator().manual_seed(0))[1]
            record["sweep_seconds"] = timed_sweeps(case.model, masks, held)
        print(json.dumps(found), flush=True)
    print(json.dumps({"sweep_seconds": record["sweep_seconds"]}))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
