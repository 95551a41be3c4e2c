from pathlib import Path

import pytest

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.blend import Blend
from bdprune.errors import OptionError
from bdprune.zoo.manifest import read_manifest

TEXT = """
name = "t"
dataset = "d"
arch = "resnet18_cifar"
width = 4
num_classes = 3
[[schedules]]
epochs = 1
[[models]]
name = "clean"
seed = 1
[[models]]
name = "bad"
seed = 2
attack = {kind = "badnets", target = 1, size = 5}
[[models]]
name = "mix"
seed = 3
attack = {kind = "blend", target = 2, alpha = 0.1}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "m.toml"
    path.write_text(text)
    return path


def test_reads_models_schedule_and_attacks(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, TEXT))
    assert (manifest.width, manifest.schedules[0].epochs, manifest.schedules[0].batch_size) == (4, 1, 128)
    assert manifest.entry("clean").make_attack() is None
    assert manifest.entry("bad").make_attack() == BadNets(target=1, size=5)
    assert manifest.entry("mix").make_attack() == Blend(target=2, alpha=0.1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 4", "width = 'four'", "not valid"),
        ("width = 4", "", "not valid.*width"),
        ("epochs = 1", "epoch = 1", "not valid"),
        ("width = 4", "width = 4\nwidht = 5", "not valid.*widht"),
        ('kind = "badnets"', 'kind = "badnet"', "'badnet'"),
        ("size = 5", "sise = 5", "model 'bad'.*sise"),
        ("name", "na\x01me", "not valid"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_manifest(write(tmp_path, TEXT.replace(old, new, 1)))


def test_missing_file_and_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Cannot read the manifest"):
        read_manifest(tmp_path / "none.toml")
    with pytest.raises(OptionError, match=r"no model 'worse'\. Its models are clean, bad, mix"):
        read_manifest(write(tmp_path, TEXT)).entry("worse")
