"""Records results of scans, repairs and scores of known models, and checks later versions against them.

    python bench/golden.py --write bench/results/golden       # writes golden-<cpu>.json and .safetensors
    python bench/golden.py --check bench/results/golden       # exits with 1 if something differs
    python bench/golden.py --check bench/results/golden --only demo/clean cifar10-w8/badnets

The models are those of zoo/demo and three of zoo/cifar10-w8. The images are zoo/demo/defence.npz, the seed is 0, and
one thread computes. With ``--precision float32``, labels, statistics, masks and pruned filters must be equal
bit by bit. In the default precision, labels must be equal, and the rank correlation of the masks must be
at least 0.99 (Spearman). Bits depend on the instruction set, so each has its own pair of files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bdprune
from bdprune.analysis import MEMO

Record = dict[str, Any]
Masks = dict[str, Tensor]
ZOO = Path(__file__).parents[1] / "zoo"
MODELS = ("demo/clean", "demo/badnets", "demo/blend", "cifar10-w8/clean", "cifar10-w8/badnets", "cifar10-w8/wanet")
PRECISIONS = ("float32", "winograd")
DETECTORS = ("lipschitz", "suspiciousness", "unlearning")
PURIFIERS = ("rnp", "suspiciousness")
LEAST_RANK_CORRELATION = 0.99
_READINGS = ("final_label", "runs", "leads", "flip_shares", "trajectory", "layers", "near", "lr", "collapsed")


def measure(name: str, precision: str) -> tuple[Record, Masks]:
    """The record of one model in one precision, and the masks of its repairs."""
    path, images = ZOO / f"{name}.safetensors", ZOO / "demo" / "defence.npz"
    MEMO.clear()  # nothing may come from another record
    record: Record = {"scan": _scan(path, images, precision)}
    masks: Masks = {}
    for method in PURIFIERS:
        MEMO.clear()
        repair = bdprune.purify(path, images, method=method, precision=precision)
        record[method], own = _repair(repair)
        masks |= {f"{name} {precision} {method} {group}": mask for group, mask in own.items()}
    if precision == "float32":
        record["scores"] = {method: _score(path, images, method) for method in ("lipschitz", "suspiciousness")}
    return record, masks


def _scan(path: Path, images: Path, precision: str) -> Record:
    result = bdprune.scan(path, images, detectors=DETECTORS, precision=precision)
    detectors = {
        one.detector: {
            "score": one.score,
            "threshold": one.threshold,
            "flagged": one.flagged,
            "target_label": one.target_label,
            **{key: one.details[key] for key in _READINGS if key in one.details},
        }
        for one in result.detectors
    }
    return {"label": result.target_label, "detectors": detectors}


def _repair(repair: Any) -> tuple[Record, Masks]:
    result, masks = repair.result, repair.repair.masks
    record = {
        "threshold": result.threshold,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "target_label": result.target_label,
        "pruned": {name: list(filters) for name, filters in result.pruned.items()},
        "curve": [[one.threshold, one.clean_accuracy, one.filters_pruned] for one in result.curve],
        "weights": _digest(repair.model.network.state_dict()),
    }
    return record, {name: mask.detach().cpu().clone() for name, mask in masks.items()}


def _digest(state: dict[str, Tensor]) -> str:
    """A checksum of all bits of a state dict."""
    total = 0
    for value in state.values():
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).long()
        total = (total * 1_000_003 + int((bits * (torch.arange(len(bits)) % 8191 + 1)).sum())) % (1 << 61)
    return str(total)


def _score(path: Path, images: Path, method: str) -> Record:
    result = bdprune.score(path, images, method=method, top=10_000)
    scores = {f"{one.layer}/{one.filter}": [one.score, one.z] for one in result.top}
    return shortened(scores)


def shortened(scores: Record) -> Record:
    """The 20 largest scores, and the digest of all scores."""
    digest = hashlib.sha256(json.dumps(scores).encode()).hexdigest()
    return {"top": dict(list(scores.items())[:20]), "digest": digest}


def differences(was: Any, now: Any, where: str = "") -> Iterator[str]:
    """All differences between two records, as text."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was.keys() | now.keys():
            yield from differences(was.get(key), now.get(key), f"{where}/{key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, pair in enumerate(zip(was, now, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif was != now:
        yield f"{where}: was {was!r}, is {now!r}"


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation; ties share their mean rank."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return 1.0 if bool((ranks[0] == ranks[1]).all()) else float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    values = values.double()
    _, place, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[place]


def check(name: str, precision: str, was: Record, kept: Masks) -> list[str]:
    """All differences as text; empty if the model passes."""
    now, masks = measure(name, precision)
    now = json.loads(json.dumps(now))
    if precision == "float32":
        wrong = list(differences(was, now, f"{name} {precision}"))
        return wrong + [f"{key}: the mask differs" for key, mask in masks.items() if not torch.equal(mask, kept[key])]
    labels = [one["scan"]["label"] for one in (was, now)]
    wrong = [] if labels[0] == labels[1] else [f"{name} {precision}: the label was {labels[0]}, is {labels[1]}"]
    for method in PURIFIERS:
        keys = [key for key in masks if key.startswith(f"{name} {precision} {method} ")]
        both = (torch.cat([of[key].flatten() for key in keys]) for of in (kept, masks))
        correlation = rank_correlation(*both)
        print(f"{name} {precision} {method}: rank correlation of masks {correlation:.4f}")
        if correlation < LEAST_RANK_CORRELATION:
            wrong.append(f"{name} {precision} {method}: the rank correlation of the masks is only {correlation:.4f}")
    return wrong


def main() -> int:
    """Writes the records or checks against them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--only", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--precision", nargs="*", default=PRECISIONS, choices=PRECISIONS)
    chosen = parser.parse_args()
    if (chosen.write is None) == (chosen.check is None):
        parser.error("give --write or --check")
    torch.set_num_threads(1)
    kind = torch.backends.cpu.get_cpu_capability().lower()
    place = chosen.write or chosen.check
    records_file, masks_file = (place.with_name(f"{place.name}-{kind}{end}") for end in (".json", ".safetensors"))
    tasks = [(name, precision) for name in chosen.only for precision in chosen.precision]
    if chosen.check:
        if not records_file.exists():
            print(f"Found no record for {kind}, {records_file}; make one with --write.", file=sys.stderr)
            return 2
        records, kept = json.loads(records_file.read_text()), load_file(masks_file)
        wrong: list[str] = []
        for name, precision in tasks:
            found = check(name, precision, records[f"{name} {precision}"], kept)
            print(f"{name} {precision}: {f'{len(found)} differences' if found else 'equal'}", flush=True)
            wrong += found
        print("\n".join(wrong[:50]))
        return 1 if wrong else 0
    records, masks = {}, {}
    for name, precision in tasks:
        records[f"{name} {precision}"], own = measure(name, precision)
        masks |= own
        print(f"{name} {precision}: label {records[f'{name} {precision}']['scan']['label']}", flush=True)
    records_file.write_text(json.dumps(records) + "\n")
    save_file(masks, masks_file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
