from collections.abc import Callable
from pathlib import Path

import pytest

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.blend import Blend
from bdprune.data.datasets import PUBLISHED
from bdprune.errors import OptionError
from bdprune.loops.fitting import Schedule
from bdprune.zoo.manifest import read_manifest
from bdprune.zoo.store import Storage

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
[[models]]
name = "fc"
seed = 4
source = "clean"
attack = {kind = "feature-collision", target = 2}
"""
Write = Callable[..., Path]


@pytest.fixture
def manifest(write: Write) -> Callable[..., Path]:
    def call(text: str = TEXT, name: str = "m.toml") -> Path:
        return write(text, "", name)

    return call


def test_models_schedule_and_attacks_are_read(manifest: Write) -> None:
    zoo = read_manifest(manifest())
    clean, bad, mix, fc = zoo.models
    assert (clean.width, clean.num_classes, clean.schedules, clean.threads) == (4, 3, (Schedule(epochs=1),), 1)
    assert clean.make_attack() is None
    assert bad.make_attack() == BadNets(target=1, size=5)
    assert mix.make_attack() == Blend(target=2, alpha=0.1)
    assert (fc.source, clean.source, clean.pending) == ("clean", None, False)


def test_a_manifest_and_a_model_limit_the_training_images(manifest: Write) -> None:
    limited = TEXT.replace("width = 4", "width = 4\ntrain_images = 20").replace(
        "seed = 2", "seed = 2\ntrain_images = 30"
    )
    clean, bad, *_ = read_manifest(manifest(limited)).models
    assert (clean.train_images, bad.train_images) == (20, 30)
    assert (clean.recipe["train_images"], bad.recipe["train_images"]) == (20, 30)
    (unlimited, *_) = read_manifest(manifest()).models
    assert unlimited.train_images is None
    assert "train_images" not in unlimited.recipe  # as in the records of earlier versions
    with pytest.raises(OptionError, match="not valid"):
        read_manifest(manifest(TEXT.replace("width = 4", "width = 4\ntrain_images = 0")))


def test_sources_of_an_attack_are_read_and_checked(manifest: Write) -> None:
    def with_sources(labels: str) -> str:
        return TEXT.replace("target = 1, size = 5", f"target = 1, sources = {labels}")

    _, bad, *_ = read_manifest(manifest(with_sources("[2, 0]"))).models
    assert bad.make_attack() == BadNets(target=1, sources=(0, 2))
    assert bad.recipe["attack"] == {"kind": "badnets", "target": 1, "sources": [0, 2]}
    for labels in ("[1]", "[3]", '["cat"]'):
        with pytest.raises(OptionError, match=r"model 'bad': .*sources"):
            read_manifest(manifest(with_sources(labels)))


def test_models_override_the_settings_of_the_zoo(manifest: Write) -> None:
    more = """
    [[models]]
    name = "signs"
    seed = 4
    dataset = "gtsrb"
    arch = "vgg16_bn_cifar"
    width = 8
    pending = true
    note = "no time"
    schedules = [{epochs = 200, peak_lr = 0.1, policy = "steps", milestones = [60, 120], flip = false}]
    [[models]]
    name = "more"
    seed = 5
    dataset = "pets"
    num_classes = 37
    """
    zoo = read_manifest(manifest(TEXT + more))
    signs, pets = zoo.entry("signs"), zoo.entry("more")
    assert (signs.dataset, signs.num_classes, signs.arch, signs.width) == ("gtsrb", 43, "vgg16_bn_cifar", 8)
    assert (signs.pending, signs.note) == (True, "no time")
    assert signs.schedules == (Schedule(epochs=200, peak_lr=0.1, policy="steps", flip=False),)
    assert (pets.dataset, pets.num_classes, pets.arch) == ("pets", 37, "resnet18_cifar")


def test_all_to_all_is_written_as_a_word(manifest: Write) -> None:
    zoo = read_manifest(manifest(TEXT.replace('"badnets", target = 1', '"badnets", target = "all-to-all"')))
    assert zoo.entry("bad").make_attack() == BadNets(target=None, size=5)


def test_known_data_sets_define_their_classes(manifest: Write) -> None:
    text = TEXT.replace('dataset = "d"', 'dataset = "cifar10"').replace("num_classes = 3\n", "")
    zoo = read_manifest(manifest(text))
    assert zoo.class_names == PUBLISHED["cifar10"].class_names
    assert zoo.entry("bad").num_classes == 10
    with pytest.raises(OptionError, match="number of classes of 'd' is unknown"):
        read_manifest(manifest(TEXT.replace("num_classes = 3\n", "")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 4", "width = 'four'", "not valid"),
        ("width = 4", "", "not valid.*width"),
        ("width = 4", "width = 0", "not valid.*width"),
        ("width = 4", "width = 4\nthreads = 0", "not valid.*threads"),
        ("width = 4", "width = 4\ndefence_images = -1", "not valid.*defence_images"),
        ("width = 4", "width = 4\ntest_images = -1", "not valid.*test_images"),
        ("width = 4", "width = 4\nmin_clean_accuracy = 89", "not valid.*min_clean_accuracy"),
        ("num_classes = 3", "num_classes = 0", "not valid.*num_classes"),
        ("seed = 1", "seed = 1\nwidth = -4", "not valid.*width"),
        ("seed = 1", "seed = 1\nschedules = []", "not valid.*schedules"),
        ("[[schedules]]\nepochs = 1", "schedules = []", "not valid.*schedules"),
        ("epochs = 1", "epochs = 1\nwarmup = 2.0", "schedule's warmup is out of range: 2"),
        ("epochs = 1", "epoch = 1", "not valid.*epoch"),
        ("width = 4", "width = 4\nwidht = 5", "not valid.*widht"),
        ("seed = 1", "seed = 1\nwidht = 5", "not valid.*widht"),
        ("seed = 1", "seed = 1\nschedules = [{epoch = 5}]", "not valid.*epoch"),
        ("epochs = 1", "epochs = 0", "1 epoch and 1 image a step, not 0"),
        ('arch = "resnet18_cifar"', 'arch = "resnet19"', "Unknown architecture 'resnet19'"),
        ('kind = "badnets"', 'kind = "badnet"', "'badnet'"),
        ('kind = "badnets"', 'kind = ["badnets"]', r"\['badnets'\]"),
        ("size = 5", "sise = 5", "model 'bad'.*sise"),
        ("size = 5", "size = 'big'", "model 'bad'.*int"),
        ("target = 1, ", "", "model 'bad'.*target"),
        ("target = 1", "target = 3", "model 'bad'.* 3"),
        ("name", "na\x01me", "not valid"),
        ('name = "bad"', 'name = "../bad"', r"named '\.\./bad'"),
        ('name = "bad"', 'name = "clean"', "Two models are named 'clean'"),
        ('source = "clean"', "", "'fc' starts from a clean model"),
        ('source = "clean"', 'source = "bad"', "'fc' starts from a clean model, 'bad' is backdoored"),
        ('source = "clean"', 'source = "none"', "no model 'none'"),
        ('source = "clean"', 'source = "clean"\nwidth = 8', "'fc' has width 8, its source 'clean' has 4"),
        ("seed = 3", 'seed = 3\nsource = "clean"', "'mix' has a source, but its attack needs none"),
    ],
)
def test_mistakes_are_named(manifest: Write, old: str, new: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_manifest(manifest(TEXT.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ("target = 1, size = 5", True),
        ("target = 1, size = 5, rate = 0.2, eps = 0.1", True),
        ("target = 2, size = 5", False),
        ("target = 1, size = 3", False),
        ("target = 1, size = 5, margin = 0", False),
    ],
)
def test_an_attack_must_match_the_backdoor_of_its_source(manifest: Write, settings: str, fits: bool) -> None:
    models = f'[[models]]\nname = "more"\nseed = 5\nsource = "bad"\nattack = {{kind = "adv-t", {settings}}}\n'
    if fits:
        assert read_manifest(manifest(TEXT + models)).entry("more").source == "bad"
        models, message = models.replace('"bad"', '"mix"'), "than its source 'mix'"
    else:
        message = "'more' has another trigger or target than its source 'bad'"
    with pytest.raises(OptionError, match=message):
        read_manifest(manifest(TEXT + models))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ("target = 1, settings = {size = 5}", True),
        ("target = 1, settings = {size = 5}, rate = 0.3", True),
        ("target = 2, settings = {size = 5}", False),
        ("target = 1", False),
        ('target = 1, base = "blend"', False),
    ],
)
def test_an_attack_that_hides_a_backdoor_has_the_settings_of_the_attack(
    manifest: Write, settings: str, fits: bool
) -> None:
    models = f'[[models]]\nname = "more"\nseed = 5\nsource = "bad"\nattack = {{kind = "evasive", {settings}}}\n'
    if fits:
        assert read_manifest(manifest(TEXT + models)).entry("more").recipe["attack"]["settings"] == {"size": 5}
        return
    with pytest.raises(OptionError, match="'more' has another trigger or target than its source 'bad'"):
        read_manifest(manifest(TEXT + models))


def test_settings_at_their_default_are_not_part_of_the_recipe(manifest: Write) -> None:
    models = '[[models]]\nname = "more"\nseed = 5\nsource = "mix"\n'
    models += 'attack = {kind = "evasive", target = 2, base = "blend", settings = {alpha = 0.1}}\n'
    recipe = read_manifest(manifest(TEXT + models)).entry("more").recipe
    assert recipe["attack"] == {"kind": "evasive", "target": 2, "base": "blend", "settings": {"alpha": 0.1}}
    plain = (
        read_manifest(
            manifest(
                TEXT.replace(", size = 5", "")
                + models.replace("mix", "bad")
                .replace(', base = "blend", settings = {alpha = 0.1}', "")
                .replace("target = 2", "target = 1")
            )
        )
        .entry("more")
        .recipe
    )
    assert plain["attack"] == {"kind": "evasive", "target": 1}


def test_missing_file_and_unknown_model(manifest: Write, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Cannot read the manifest"):
        read_manifest(tmp_path / "none.toml")
    with pytest.raises(OptionError, match=r"no model 'worse'\. Its models are clean, bad, mix"):
        read_manifest(manifest()).entry("worse")


def test_models_are_in_a_folder_named_after_the_manifest(manifest: Write, tmp_path: Path) -> None:
    assert read_manifest(manifest(name="zoo/w4.toml")).home == tmp_path / "zoo" / "w4"
    zoo = read_manifest(manifest(name="zoo/demo/manifest.toml"))
    assert zoo.home == zoo.entry("bad").home == tmp_path / "zoo" / "demo"


INCLUDING = """
name = "all"
include = ["demo/manifest.toml"]
dataset = "d"
num_classes = 3
arch = "resnet18_cifar"
width = 4
[[schedules]]
epochs = 2
[[models]]
name = "more"
seed = 9
"""


def test_included_models_come_first_and_keep_their_settings_and_folder(manifest: Write, tmp_path: Path) -> None:
    manifest(name="demo/manifest.toml")
    zoo = read_manifest(manifest(INCLUDING, "all.toml"))
    assert [entry.name for entry in zoo.models] == ["clean", "bad", "mix", "fc", "more"]
    assert [entry.schedules[0].epochs for entry in zoo.models] == [1, 1, 1, 1, 2]
    assert zoo.entry("bad").home == tmp_path / "demo" and zoo.entry("more").home == tmp_path / "all"


def test_included_names_are_unique_and_nothing_includes_itself(manifest: Write) -> None:
    manifest(name="demo/manifest.toml")
    with pytest.raises(OptionError, match="Two models are named 'bad'"):
        read_manifest(manifest(INCLUDING.replace("more", "bad"), "all.toml"))
    manifest(INCLUDING.replace("demo/manifest", "all"), "all.toml")
    with pytest.raises(OptionError, match="includes itself"):
        read_manifest(manifest(INCLUDING.replace("demo/manifest", "all"), "all.toml"))


def test_own_models_use_the_given_folder_and_included_models_their_default(manifest: Write, tmp_path: Path) -> None:
    home, own, other = tmp_path / "demo", tmp_path / "all", tmp_path / "out"
    manifest(name="demo/manifest.toml")
    zoo = read_manifest(manifest(INCLUDING, "all.toml"))
    for folder, name in ((home, "bad"), (own, "more")):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.safetensors").touch()
    bad, more, mix = zoo.entry("bad"), zoo.entry("more"), zoo.entry("mix")
    assert [Storage(zoo).made(entry) for entry in (bad, more, mix)] == [home, own, None]
    storage = Storage(zoo, other)
    assert [storage.made(entry) for entry in (bad, more, mix)] == [home, None, None]
    assert [storage.source(entry) for entry in (bad, more, mix)] == [home, own, None]
    assert [storage.place(entry) for entry in (bad, more, mix)] == [other] * 3
