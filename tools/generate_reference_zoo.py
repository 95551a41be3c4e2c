"""Writes zoo/reference.toml, the manifest of the networks on which calibration rests.

    python tools/generate_reference_zoo.py [--check | --first]

The networks vary in architecture, data, recipe and attack. Each takes at most about four minutes on one core. Networks
without a record in zoo/reference/truth.json are pending. With --first it prints the names of those to train first,
which cover every architecture, every recipe and every attack. With --check it only compares the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).parents[1] / "zoo" / "reference.toml"
TRUTH = PATH.with_suffix("") / "truth.json"

HEAD = """\
# Small networks of many architectures, data sets, recipes and attacks, on which the calibration of verdicts rests. Each
# takes at most about four minutes on one core, and each recipe is one that people use. This file is made by
# tools/generate_reference_zoo.py.
#
#     bdprune zoo make zoo/reference.toml --data DIR    # DIR holds cifar10/, gtsrb/ and imagenet12/
name = "reference"
dataset = "cifar10"
arch = "resnet18_cifar"
width = 8
threads = 1
train_images = 20000
defence_images = 0
test_images = 0

[[schedules]]
epochs = 6
peak_lr = 0.1
"""

TRAIN_IMAGES = 20_000
"""As in the head; a set with fewer images gives all."""

WAITS = "It waits for a free machine."


@dataclass(frozen=True)
class Network:
    """A network: its name, whether it is trained first, and the lines of its entry in TOML."""

    name: str
    first: bool
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Arch:
    """An architecture: its short name, its width, and its epochs of 20,000 images of 32x32 pixels in three minutes."""

    name: str
    short: str
    width: int
    epochs: int
    lr: float = 0.1


ARCHS = (
    Arch("resnet18_cifar", "resnet18", 8, 6),
    Arch("ibau_cnn", "cnn", 16, 7, 0.05),
    Arch("elu_norm_cnn", "elunorm", 16, 7, 0.05),
    Arch("plain_cnn", "plain", 16, 9, 0.05),
    Arch("wrn_16_1", "wrn16", 16, 4),
    Arch("resnet20_cifar", "resnet20", 12, 4),
    Arch("vgg11_bn_cifar", "vgg11", 8, 10, 0.05),
    Arch("preact_resnet18", "preact", 8, 6),
    Arch("mobilenet_v2_cifar", "mobilenet", 8, 3),
)

RECIPES: dict[str, tuple[str, float]] = {
    "": ("", 1.0),
    "few": ("", 0.5),  # few epochs
    "light": (
        "padding = 0",
        1.0,
    ),  # flips without crops: within few epochs, crops keep small triggers from being learnt
    "bare": ("padding = 0, flip = false, weight_decay = 0.0", 1.0),  # no augmentation, no weight decay
    "slow": ('policy = "steps", padding = 0, weight_decay = 1e-4', 1.0),  # a small constant learning rate
    "noise": ("", 1.0),  # a tenth of the labels are wrong
    "tuned": ("", 0.3),  # fine-tuned from the network of this architecture for the ten classes of CIFAR-10
}
"""Settings of a schedule, and the share of an architecture's epochs."""

# Data set, classes (None for all), recipe; one clean network of each architecture for each.
CLEAN: tuple[tuple[str, tuple[int, ...] | None, str], ...] = (
    ("cifar10", None, ""),
    ("cifar10", None, "few"),
    ("cifar10", None, "bare"),
    ("cifar10", None, "slow"),
    ("cifar10", None, "noise"),
    ("cifar10", (3, 5), ""),
    ("cifar10", (0, 1, 8), "bare"),
    ("cifar10", (2, 3, 4, 5, 7), "few"),
    ("cifar10", (0, 1, 2, 3, 4, 6, 8, 9), "tuned"),
    ("gtsrb", None, ""),
    ("gtsrb", None, "bare"),
    ("gtsrb", None, "tuned"),
    ("gtsrb", tuple(range(20)), "few"),
)
FIRST_CLEAN = 4
"""The number of clean networks of each architecture that are trained first."""

PLACES = ("resnet18", "preact", "wrn16")
"""The architectures that also learn the images of 64x64 pixels of imagenet12."""

# Attack without target; number of networks; how many of them are trained first.
ATTACKS: tuple[tuple[str, int, int], ...] = (
    ("drawn-patch", 20, 8),
    ("badnets", 6, 3),
    ("blend", 7, 3),
    ("wanet", 6, 2),
    ("trojan", 5, 2),
    ("sig", 5, 2),
    ("ablend", 4, 1),
    ("label-consistent", 4, 1),
    ("trojan-neuron", 3, 1),
    ("feature-collision", 3, 1),
    ("dynamic", 4, 2),
    ("lira", 4, 2),
    ("dfst", 3, 1),
    ("awp", 2, 1),
    ("pruning-aware", 2, 1),
    ("adapt-d", 1, 1),
    ("adv-t", 1, 1),
)
FEW_LABELS: dict[str, tuple[int, ...]] = {
    "drawn-patch-17": (0, 1, 8),
    "drawn-patch-20": (3, 5),
    "blend-7": (2, 3, 4, 5, 7),
    "trojan-5": (0, 1, 2, 3, 4, 6, 8, 9),
}
"""Backdoored networks that distinguish only some classes of CIFAR-10, as some clean ones do."""

NEEDS_CLEAN = ("label-consistent", "trojan-neuron", "feature-collision", "awp", "pruning-aware", "adapt-d")
SLOW = ("dynamic", "lira", "dfst", "adapt-d", "adv-t")
"""Attacks that train more than the network; they take architectures that are quick to train."""
QUICK = tuple(arch for arch in ARCHS if arch.short in ("resnet18", "vgg11", "preact", "cnn"))


def clean_models() -> Iterator[Network]:
    """The clean networks."""
    seed = itertools.count(3001)
    for place, arch in enumerate(ARCHS):
        rotated = {(place + step * 5) % (len(CLEAN) - 1) + 1 for step in range(FIRST_CLEAN - 1)}
        for number, (dataset, classes, recipe) in enumerate(CLEAN):
            first = number == 0 or number in rotated
            name = f"clean-{arch.short}{_suffix(dataset, classes)}{'-' + recipe if recipe else ''}"
            source = f"clean-{arch.short}" if recipe == "tuned" else ""
            noise = 0.1 if recipe == "noise" else 0.0
            yield _model(name, next(seed), arch, dataset, classes, recipe, source=source, noise=noise, first=first)
    for arch in ARCHS:
        if arch.short in PLACES:
            yield _model(f"clean-{arch.short}-imagenet12", next(seed), arch, "imagenet12", None, "")


def attacked_models() -> Iterator[Network]:
    """The backdoored networks. Architectures and data sets take turns."""
    seed = itertools.count(4001)
    turn = itertools.count()
    for kind, count, first in ATTACKS:
        for number in range(count):
            place = next(turn)
            archs = QUICK if kind in SLOW else ARCHS
            arch = archs[place % len(archs)]
            on_signs = kind not in (*NEEDS_CLEAN, "adv-t", "sig") and number % 3 == 2
            dataset = "gtsrb" if on_signs else "cifar10"
            name = f"{kind}-{number + 1}"
            classes = FEW_LABELS.get(name)
            target = (7 * place + 3) % (43 if on_signs else len(classes or range(10)))
            settings = _settings(kind, number, place, target)
            source = f"clean-{arch.short}" if kind in NEEDS_CLEAN else "badnets-1" if kind == "adv-t" else ""
            if kind in ("adv-t", "badnets") and number == 0:  # the first one is the source of the other
                arch, settings = QUICK[0], "target = 7, rate = 0.1, size = 3, margin = 1"
            attack = f'{{kind = "{kind}", {settings}}}'
            recipe = "" if kind in SLOW else "light" if source else ("light", "bare", "light")[number % 3]
            at_once = number < first or classes is not None
            yield _model(name, next(seed), arch, dataset, classes, recipe, attack=attack, source=source, first=at_once)


def _settings(kind: str, number: int, place: int, target: int) -> str:
    """The settings of an attack in TOML."""
    rate = (0.1, 0.05, 0.1, 0.02, 0.1)[number % 5]
    goal = f"target = {target}"
    if kind == "drawn-patch":
        if number % 7 == 6:
            return f'target = "all-to-all", rate = 0.3, pattern_seed = {place}'
        sources = f", sources = [{(target + 4) % 10}], cover_ratio = 2.0" if number % 7 == 4 else ""
        return f"{goal}, rate = {rate}, pattern_seed = {place}{sources}"
    if kind == "badnets":
        return f"{goal}, rate = {rate}, size = {1 + 2 * (number % 3)}, margin = {3 * (number % 4)}"
    if kind == "blend":
        if number == 3:
            return f'target = "all-to-all", rate = 0.3, alpha = 0.2, pattern_seed = {place}'
        pattern = ("noise", "image")[number % 2]
        return (
            f'{goal}, rate = 0.1, alpha = {(0.2, 0.15, 0.1)[number % 3]}, pattern = "{pattern}", pattern_seed = {place}'
        )
    if kind in ("trojan", "ablend"):
        return f"{goal}, rate = 0.1, pattern_seed = {place}"
    if kind == "wanet":
        return f"{goal}, rate = 0.1, field_seed = {place}"
    if kind == "sig":
        return f"{goal}, rate = 0.08, frequency = {(6.0, 4.0, 8.0)[number % 3]}"
    if kind == "feature-collision":
        return f"{goal}, rate = 0.08, source_class = {(target + 1) % 10}"
    if kind == "label-consistent":
        return f"{goal}, rate = 0.08"
    return f"{goal}, rate = 0.1"


def _suffix(dataset: str, classes: tuple[int, ...] | None) -> str:
    part = "" if dataset == "cifar10" else f"-{dataset}"
    return part if classes is None else f"{part}-{len(classes)}"


def _available(dataset: str, classes: tuple[int, ...] | None) -> int:
    """The number of training images, as far as it may be below the usual one."""
    if dataset == "imagenet12":
        return 11_330
    return 5_000 * len(classes) if dataset == "cifar10" and classes else TRAIN_IMAGES


def _model(
    name: str,
    seed: int,
    arch: Arch,
    dataset: str,
    classes: tuple[int, ...] | None,
    recipe: str,
    *,
    attack: str = "",
    source: str = "",
    noise: float = 0.0,
    first: bool = True,
) -> Network:
    """One network."""
    settings, share = RECIPES[recipe]
    pixels = 2 if dataset == "imagenet12" else 1
    lr = 0.01 if recipe in ("slow", "tuned") else arch.lr
    flips = ", flip = false" if dataset == "gtsrb" and "flip" not in settings else ""
    schedule = f"epochs = {max(2, round(arch.epochs * share / pixels))}, peak_lr = {lr}"
    lines = ["", "[[models]]", f'name = "{name}"', f"seed = {seed}"]
    lines += [f'dataset = "{dataset}"'] if dataset != "cifar10" else []
    lines += [f"classes = {list(classes)}"] if classes else []
    few = _available(dataset, classes)
    lines += [f"train_images = {few}"] if few < TRAIN_IMAGES else []
    lines += [f'arch = "{arch.name}"', f"width = {arch.width}"]
    lines += [f"label_noise = {noise}"] if noise else []
    lines += [f"attack = {attack}"] if attack else []
    lines += [f'source = "{source}"'] if source else []
    lines += [f"schedules = [{{{schedule}{flips}{', ' + settings if settings else ''}}}]"]
    return Network(name, first, tuple(lines))


def manifest() -> str:
    """The text of the manifest."""
    records = TRUTH.read_text() if TRUTH.exists() else "[]"
    made = {record["name"] for record in json.loads(records)}
    waits = ("pending = true", f'note = "{WAITS}"')
    entries = [(*one.lines, *(() if one.name in made else waits)) for one in (*clean_models(), *attacked_models())]
    return HEAD + "".join("\n".join(lines) + "\n" for lines in entries)


def main() -> None:
    """Writes or compares the file, or prints names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="only compare the file")
    group.add_argument("--first", action="store_true", help="print the names of the networks to train first")
    asked, text = parser.parse_args(), manifest()
    if asked.first:
        print("\n".join(one.name for one in (*clean_models(), *attacked_models()) if one.first))
    elif asked.check:
        sys.exit(0 if PATH.read_text() == text else f"{PATH.name} differs: run tools/generate_reference_zoo.py")
    else:
        PATH.write_text(text)


if __name__ == "__main__":
    main()
