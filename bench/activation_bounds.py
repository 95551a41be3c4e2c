"""Measures MM-BM, which bounds the activations of a network, as a bar for the purifiers.

    python bench/activation_bounds.py zoo/cifar10-w8.toml --data DIR --clean zoo/demo/defence.npz --only badnets
                                       [--only MODEL] [--seeds 1] [--lr 0.001] [--rows FILE]

Each channel of each batch norm gets an upper bound of its output. The bounds start at the largest output of the layer,
and are trained to be small while the logits on clean images stay the same (Wang et al., MM-BD, S&P 2024; settings as in
the reimplementation by Dunnett et al., arXiv 2411.11200). The network needs an operation for each bound, which its
checkpoint cannot hold, so this is a measurement and not a purifier of the package. Triggers and test images are used
for measuring only. Each row is appended to FILE (JSON lines) when it is done. Rows in FILE are not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from efficacy import Subject
from memory import peak_mb, start_peak
from repairs import comparison_table
from rows import Row, Rows
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from verdicts import by

from bdprune.data import CleanData, load_clean, read_dataset
from bdprune.methods import hold_out
from bdprune.model import Model
from bdprune.runtime import clean_accuracy
from bdprune.zoo import Storage, images_of, read_manifest

_EPOCHS, _BATCH, _WEIGHT = 50, 32, 0.5
_PERIOD, _FACTOR, _LARGEST_FALL = 10, 1.2, 0.05  # how the weight of the bounds follows the clean accuracy


class Bounds:
    """Upper bounds of the outputs of all batch norms of a network, applied by hooks.

    Attributes:
        values: one tensor ``[C]`` for each batch norm.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        norms = [one for one in network.modules() if isinstance(one, _BatchNorm)]
        largest = _largest_outputs(network, norms, images)
        self.values = [
            torch.full((norm.num_features,), peak).requires_grad_() for norm, peak in zip(norms, largest, strict=True)
        ]
        for norm, value in zip(norms, self.values, strict=True):
            norm.register_forward_hook(partial(_bounded, value))


def _bounded(bound: Tensor, norm: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return torch.minimum(output, bound[:, None, None])


@torch.no_grad()
def _largest_outputs(network: nn.Module, norms: list[_BatchNorm], images: Tensor) -> list[float]:
    found: list[float] = []
    hooks = [norm.register_forward_hook(lambda _, __, output: found.append(output.max().item())) for norm in norms]
    network(images)
    for one in hooks:
        one.remove()
    if len(found) != len(norms):
        sys.exit("A batch norm of the network runs more than once, or not at all.")
    return found


def bounded(model: Model, data: CleanData, lr: float, seed: int) -> Model:
    """A copy of the model with bounded activations.

    Args:
        data: clean images.
        lr: learning rate of the bounds.
        seed: of the split and the order.
    """
    rest, held = hold_out(data, 0.3, seed)
    repaired, generator = model.clone(), torch.Generator().manual_seed(seed)
    repaired.network.requires_grad_(False)
    accuracy = clean_accuracy(model.module, held.images, held.labels)
    with torch.no_grad():
        goal = model.module(rest.images)
    bounds = Bounds(repaired.module, rest.images)
    optimizer, weight = torch.optim.Adam(bounds.values, lr), _WEIGHT
    for epoch in range(1, _EPOCHS + 1):
        for index in torch.randperm(len(rest), generator=generator).split(_BATCH):
            far = nn.functional.mse_loss(repaired.module(rest.images[index]), goal[index])
            loss = far + weight * torch.stack([one.norm() for one in bounds.values]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not epoch % _PERIOD:
            fall = accuracy - clean_accuracy(repaired.module, held.images, held.labels)
            weight = weight * _FACTOR if fall < _LARGEST_FALL else weight / _FACTOR
    return repaired


def row_of(subject: Subject, lr: float, seed: int) -> Row:
    """The figures of one network with bounds."""
    start_peak(subject.device)
    model, start = subject.load(), time.perf_counter()
    after = bounded(model, subject.clean, lr, seed)
    seconds, peak = time.perf_counter() - start, peak_mb(subject.device)
    return {
        "change": "bounded",
        "after": subject.measure(after),
        "seconds": seconds,
        "peak_mb": peak,
        "retuned": None,
    }


def main() -> None:
    """Makes the missing rows, and prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="a model; repeatable (default: all)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate of the bounds (0.001)")
    parser.add_argument("--rows", type=Path, help="JSON lines file for the rows")
    options = parser.parse_args()
    record = Rows(options.rows, ("part", "model", "method", "seed"))
    zoo, clean = read_manifest(options.manifest), load_clean(options.clean)
    storage = Storage(zoo)
    for entry in zoo.models:
        folder = storage.made(entry)
        if folder is None or entry.attack is None or (options.only and entry.name not in options.only):
            continue
        test = images_of(entry, read_dataset(options.data, entry.dataset, "test"))
        subject = Subject(entry, folder, clean, test, torch.device("cpu"))
        base: Row = {"model": entry.name, "kind": entry.attack["kind"], "truth": subject.truth}
        key = base | {"part": "before", "method": None, "seed": None}
        record.add(key, lambda subject=subject: subject.measure(subject.load()))
        for seed in range(options.seeds):
            key = base | {"part": "repair", "method": f"mm_bm, lr {options.lr:g}", "seed": seed}
            record.add(key, partial(row_of, subject, options.lr, seed))
    before = {row["model"]: row for row in record.where(part="before")}
    for name, mine in by(record.where(part="repair"), "model").items():
        print(f"\n{name}\n\n{comparison_table(mine, before[name])}")
    sys.exit(1 if record.failed else 0)


if __name__ == "__main__":
    main()
