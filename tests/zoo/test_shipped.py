"""The shipped models of the demo: they differ only in their weights."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bdprune.data.load import load_clean
from bdprune.model.loading import load
from bdprune.zoo.manifest import read_manifest
from bdprune.zoo.store import read_truth

ZOO = Path(__file__).parents[2] / "zoo" / "demo"
NAMES = ("clean", "badnets", "blend")


FOLDERS = sorted({path.parent for path in ZOO.parent.glob("*/*.safetensors")})


def header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_headers_have_the_same_bytes(folder: Path) -> None:
    manifest = folder / "manifest.toml"
    zoo = read_manifest(manifest if manifest.exists() else folder.with_suffix(".toml"))
    kinds: dict[object, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entry = zoo.entry(path.stem)
        kinds.setdefault((entry.arch, entry.width, entry.num_classes), []).append(path)
    for first, *others in kinds.values():
        assert "__metadata__" not in json.loads(header(first))
        assert all(header(path) == header(first) for path in others)
        assert all(path.stat().st_size == first.stat().st_size for path in others)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_batch_counters_are_zero(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        counters = [value for key, value in state.items() if key.endswith("num_batches_tracked")]
        norms = [key for key in state if key.endswith("running_mean")]
        assert len(counters) == len(norms)
        assert all(value == 0 for value in counters)


def test_the_truth_matches_the_manifest_and_the_minimum_rates() -> None:
    truth = read_truth(ZOO)
    manifest = read_manifest(ZOO / "manifest.toml")
    assert [entry.name for entry in manifest.models] == list(NAMES)
    for entry in manifest.models:
        attack = entry.make_attack()
        assert truth[entry.name].target_label == (attack.target if attack else None)
        assert truth[entry.name].clean_accuracy >= 0.90
        if attack:
            assert attack.target != 0
            assert (truth[entry.name].attack_success_rate or 0) > 0.95


def test_images_are_balanced_and_all_files_fit_in_25_mb() -> None:
    assert load_clean(ZOO / "defence.npz").class_counts == dict.fromkeys(range(10), 50)
    assert load_clean(ZOO / "test.npz").class_counts == dict.fromkeys(range(10), 100)
    assert sum(path.stat().st_size for path in ZOO.iterdir()) <= 25_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_accuracy_equals_the_recorded_truth(name: str) -> None:
    from bdprune.runtime.evaluate import attack_success_rate, clean_accuracy

    model, test = load(ZOO / f"{name}.safetensors"), load_clean(ZOO / "test.npz")
    truth = read_truth(ZOO)[name]
    accuracy = clean_accuracy(model.module, test.images, test.labels)
    assert accuracy == pytest.approx(truth.clean_accuracy, abs=0.03)  # 1,000 of 10,000 images: sd 0.009
    attack = read_manifest(ZOO / "manifest.toml").entry(name).make_attack()
    if attack:
        trigger, goal = attack.new_trigger((3, 32, 32)), attack.goal(test.labels, 10)
        success = attack_success_rate(model.module, test.images, test.labels, trigger, goal)
        assert success == pytest.approx(truth.attack_success_rate, abs=0.02)
