"""Measures repairs of small backdoored networks with other norms than batch norm, and without any.

    python bench/norms.py --data DIR [--only NORM ...] [--epochs 12] [--seeds 3] [--models FOLDER]

DIR holds cifar10/train.parquet and cifar10/test.parquet. Each network is a plain CNN of five convs, each with the named
norm behind it. It learns the first 10,000 training images, a tenth of which carry BadNets' 3x3 patch and the label 0.
The defender has 500 other training images. Repairs never see the trigger or the test set; clean accuracy (CA) and
attack success rate (ASR) are measured on all test images, ASR on those of other labels than 0.

Prints a Markdown table. FOLDER keeps the trained weights, which are not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.analysis import Case
from bdprune.attacks import ATTACKS, AttackSetting, shape_of
from bdprune.data import CleanData, RawImages, read_dataset
from bdprune.loops import Schedule, fit
from bdprune.methods import Purifier
from bdprune.model import Model
from bdprune.purifiers import RNP, Auto, SuspiciousnessPruning, TriggerPruning
from bdprune.runtime import seeded
from bdprune.zoo import measure

TRAINED_ON, DEFENCE = 10_000, 500
LAYERS = ((16, 2), (32, 1), (32, 2), (64, 1), (64, 1))  # channels and stride of each conv
SHAPE = (3, 32, 32)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of every pixel of ``[N, C, H, W]``, as in ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class PermutedLayerNorm(nn.Module):
    """The same, with a separate layer norm between two permutations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(4, channels),
    "layer": LayerNorm2d,
    "layer-permuted": PermutedLayerNorm,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "none": lambda channels: nn.Identity(),
}
METHODS: Mapping[str, Callable[[int], Purifier]] = {
    "rnp": lambda seed: RNP(seed=seed),
    "suspiciousness": lambda seed: SuspiciousnessPruning(seed=seed),
    "trigger_pruning": lambda seed: TriggerPruning(seed=seed),
    "auto": lambda seed: Auto(seed=seed),
}


class NormCnn(nn.Module):
    """Five 3x3 convs, each with a norm and a ReLU, then maximum pooling: ``[N, 3, 32, 32] -> [N, 10]``."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = SHAPE[0]
        for width, stride in LAYERS:
            conv = nn.Conv2d(channels, width, 3, stride, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, NORMS[norm](width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x - 0.5).amax((2, 3)))


def trained(norm: str, train: RawImages, epochs: int, models: Path | None) -> tuple[Model, nn.Module, float]:
    """The backdoored network, its trigger, and the seconds of the training (0 if it was kept)."""
    setting = AttackSetting(train.images[:TRAINED_ON], train.labels[:TRAINED_ON], 10, 0)
    attack = ATTACKS["badnets"](target=0)
    trigger = attack.new_trigger(shape_of(setting.images))
    kept, began = models / f"{norm}.pth" if models else None, time.monotonic()
    with seeded(0):
        network = NormCnn(norm)
    if kept and kept.exists():
        network.load_state_dict(torch.load(kept, weights_only=True))
    else:
        poisoned = attack.poison(setting, trigger, torch.Generator().manual_seed(0))
        # Without a norm, the gradients of the first steps need a smaller rate.
        peak = 0.03 if norm == "none" else 0.1
        schedule = Schedule(epochs, 64, peak, padding=0, flip=False)
        fit(network, RawImages(poisoned.images, poisoned.labels), schedule, 0)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), kept)
    return Model(network.eval(), f"norms:{norm}", 10, SHAPE), trigger, time.monotonic() - began


def rows(norm: str, train: RawImages, test: RawImages, given: argparse.Namespace) -> list[str]:
    """The rows of the table for one network."""
    model, trigger, seconds = trained(norm, train, given.epochs, given.models)
    attack, part = ATTACKS["badnets"](target=0), slice(TRAINED_ON, TRAINED_ON + DEFENCE)
    clean = CleanData(train.images[part].float() / 255, train.labels[part])

    def rates(one: Model) -> tuple[float, float]:
        found = measure(one.module, test, 10, attack, trigger)
        assert found.attack_success_rate is not None
        return 100 * found.clean_accuracy, 100 * found.attack_success_rate

    before = rates(model)
    print(f"{norm}: CA {before[0]:.1f}, ASR {before[1]:.1f}, trained in {seconds:.0f} s", flush=True)
    lines = []
    for name, make in METHODS.items():
        after, pruned, took = [], [], []
        for seed in range(given.seeds):
            began = time.monotonic()
            repair = make(seed)(Case(model, clean))
            took.append(time.monotonic() - began)
            pruned.append(sum(map(len, repair.pruned.values())))
            after.append(rates(repair.model))
            print(f"  {name} {seed}: CA {after[-1][0]:.1f}, ASR {after[-1][1]:.1f}, {pruned[-1]} filters", flush=True)
        ca, asr = (statistics.fmean(column) for column in zip(*after, strict=True))
        lines.append(
            f"| {norm} | {name} | {before[0]:.1f} | {before[1]:.1f} | {ca:.1f} | {asr:.1f} "
            f"| {max(one[1] for one in after):.1f} | {statistics.fmean(pruned):.0f} | {statistics.fmean(took):.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(NORMS), default=["group", "layer", "none"])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path)
    given = parser.parse_args()
    train, test = (read_dataset(given.data, "cifar10", part) for part in ("train", "test"))
    lines = [line for norm in given.only for line in rows(norm, train, test, given)]
    head = "| norm | repair | CA before | ASR before | CA after | ASR after | worst ASR | filters pruned | seconds |"
    print("\n".join(["", head, "|---|---|" + "---:|" * 7, *lines]))


if __name__ == "__main__":
    main()
