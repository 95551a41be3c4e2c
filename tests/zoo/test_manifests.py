"""The shipped manifests."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.registry import ATTACKS
from bdprune.data.datasets import PUBLISHED
from bdprune.loops.fitting import Schedule
from bdprune.zoo.manifest import Manifest, read_manifest
from bdprune.zoo.store import Storage

ROOT = Path(__file__).parents[2] / "zoo"
MANIFESTS = sorted(path.name for path in ROOT.glob("*.toml"))
TUNING, REFERENCE = "tuning.toml", "reference.toml"
PAPERS = {"epochs": 200, "peak_lr": 0.1, "policy": "steps", "milestones": (60, 120), "batch_size": 128}


ADAPTIVE = "evasive"
"""An attack on the detectors, which no zoo has that detectors are measured or fitted on."""


def test_all_manifests_are_tested() -> None:
    sets = ("cifar10", "gtsrb", "imagenet12")
    regular = ["cifar10-w32.toml", *(f"{name}-w{width}.toml" for name in sets for width in (8, 64))]
    assert sorted([*regular, TUNING, REFERENCE]) == MANIFESTS


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name not in (TUNING, REFERENCE)])
def test_names_contain_data_set_and_width_and_seeds_differ(name: str) -> None:
    zoo = read_manifest(ROOT / name)
    dataset, _, width = name.removesuffix(".toml").partition("-w")
    assert zoo.name == name.removesuffix(".toml")
    for entry in zoo.models:
        assert (entry.dataset, entry.width, entry.arch, entry.threads) == (dataset, int(width), "resnet18_cifar", 1)
        assert entry.num_classes == PUBLISHED[dataset].num_classes
    assert len({entry.seed for entry in zoo.models}) == len(zoo.models)
    assert zoo.home == ROOT / zoo.name


@pytest.mark.parametrize("name", MANIFESTS)
def test_models_that_are_neither_made_nor_included_are_pending(name: str) -> None:
    zoo = read_manifest(ROOT / name)
    storage = Storage(zoo)
    for entry in zoo.models:
        record = storage.record(entry)
        assert (record is None) == entry.pending, entry.name
        assert record is None or record.recipe == entry.recipe, entry.name
        assert storage.made(entry) is None or storage.truth(entry) is not None, entry.name


def test_the_reference_zoo_is_generated_and_covers_everything() -> None:
    script = ROOT.parent / "tools" / "generate_reference_zoo.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
    first = subprocess.run([sys.executable, script, "--first"], check=True, capture_output=True, text=True)
    zoo = read_manifest(ROOT / REFERENCE)
    assert (len(zoo.models), sum(entry.attack is None for entry in zoo.models)) == (200, 120)
    for entries in (zoo.models, [zoo.entry(name) for name in first.stdout.split()]):
        attacked = [entry.attack["kind"] for entry in entries if entry.attack]
        assert set(attacked) == set(ATTACKS) - {ADAPTIVE}
        assert len(attacked) >= 30 and len(entries) - len(attacked) >= 30
        assert len({entry.arch for entry in entries}) == 9
        assert {entry.dataset for entry in entries} == {"cifar10", "gtsrb", "imagenet12"}
        assert {2, 3, 5, 8, 10, 12, 20, 43} <= {entry.num_classes for entry in entries}
    images = {"gtsrb": 26_610, "imagenet12": 11_330}  # of GTSRB those of the first 20 labels
    for entry in zoo.models:
        assert (entry.train_images or 0) <= images.get(entry.dataset, 5_000 * entry.num_classes), entry.name


def test_the_standard_zoo_has_the_specified_models() -> None:
    zoo = read_manifest(ROOT / "cifar10-w32.toml")
    attacks = {entry.name: entry.make_attack() for entry in zoo.models}
    assert sum(attack is None for attack in attacks.values()) == 6
    to_one = [attack for attack in attacks.values() if attack and attack.target is not None]
    assert max(Counter(attack.target for attack in to_one).values()) <= 3
    assert {attack.target for attack in to_one} == set(range(10))
    to_all = [attack.kind for attack in attacks.values() if attack and attack.target is None]
    assert sorted(to_all) == ["badnets", "blend", "trojan"]
    badnets = [attack for attack in to_one if attack.kind == "badnets"]
    assert sorted((attack.rate, attack.size) for attack in badnets) == [  # type: ignore[attr-defined]
        (0.005, 3),
        (0.01, 3),
        (0.05, 3),
        (0.1, 3),
        (0.1, 5),
        (0.1, 10),
    ]
    own = [entry for entry in zoo.models if entry.home == zoo.home]
    longer = {"wanet": 24}
    assert all(entry.schedules == (Schedule(epochs=longer.get(entry.name, 12), peak_lr=0.1),) for entry in own)
    assert zoo.min_clean_accuracy == 0.89


OURS = "drawn-patch"
"""An attack of no paper, for zoos with many different patches."""


def test_the_small_zoo_has_every_attack_of_the_standard_zoo() -> None:
    small, standard = (read_manifest(ROOT / f"cifar10-w{width}.toml") for width in (8, 32))

    # Small networks do not learn all-to-all at the standard rate; other rates and sizes count as the same attack.
    easier = {f"{kind}-all": {"rate": None} for kind in ("badnets", "blend", "trojan")}
    left_out = {f"badnets-{which}" for which in ("5", "1", "05", "5x5", "10x10")}
    # Attacks that no standard model has.
    left_out |= {"badnets-one-pixel", "badnets-source", "blend-source", "pruning-aware"}
    left_out |= {"evasive-badnets", "evasive-blend", "evasive-trojan"}

    def attacks(zoo: Manifest) -> dict[str, object]:
        attacked = [entry for entry in zoo.models if entry.attack and entry.name not in left_out]
        return {one.name: (dict(one.attack or {}) | easier.get(one.name, {}), one.source) for one in attacked}

    assert attacks(small) == attacks(standard)
    assert {entry.make_attack().kind for entry in small.models if entry.attack} == set(ATTACKS) - {OURS}  # type: ignore[union-attr]


def test_the_small_zoo_has_class_specific_attacks_and_a_trigger_of_one_pixel() -> None:
    attacks = {entry.name: entry.make_attack() for entry in read_manifest(ROOT / "cifar10-w8.toml").models}
    specific = {name: attack.sources for name, attack in attacks.items() if attack and attack.sources}
    assert set(specific) == {"fc", "badnets-source", "blend-source"}
    pixel = attacks["badnets-one-pixel"]
    assert isinstance(pixel, BadNets) and pixel.size == 1


def test_the_networks_for_thresholds_differ_in_architecture_recipe_and_seed() -> None:
    models = read_manifest(ROOT / TUNING).models
    assert len({entry.seed for entry in models}) == len(models)
    assert not {entry.seed for entry in models} & {
        entry.seed for name in MANIFESTS if name != TUNING for entry in read_manifest(ROOT / name).models
    }
    clean = [entry for entry in models if entry.attack is None]
    bad = [entry.make_attack() for entry in models if entry.attack]
    assert len(clean) >= 8 and len(bad) >= 6
    assert len({(entry.arch, entry.width) for entry in clean}) >= 7
    assert len({attack.target for attack in bad if attack}) >= 6
    assert {entry.dataset for entry in clean} >= {"cifar10", "gtsrb"}


def test_the_wide_zoo_has_the_same_attacks_and_the_schedule_of_the_paper() -> None:
    narrow, wide = (read_manifest(ROOT / f"cifar10-w{width}.toml") for width in (32, 64))
    assert [(entry.name, entry.attack, entry.source) for entry in narrow.models] == [
        (entry.name, entry.attack, entry.source) for entry in wide.models
    ]
    assert all(entry.schedules == (Schedule(**PAPERS),) for entry in wide.models)  # type: ignore[arg-type]


def test_traffic_signs_are_never_mirrored() -> None:
    signs = [entry for name in MANIFESTS for entry in read_manifest(ROOT / name).models if entry.dataset == "gtsrb"]
    assert len({entry.home for entry in signs}) == 4
    for entry in signs:
        assert not any(schedule.flip for schedule in entry.schedules)
