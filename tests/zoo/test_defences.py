"""Models that are trained under a defence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdprune.attacks.registry import ATTACKS
from bdprune.data.parquet import RawImages
from bdprune.errors import OptionError
from bdprune.loops.fitting import Schedule
from bdprune.loops.isolation import IsolationSettings
from bdprune.loops.resume import Checkpoint
from bdprune.zoo.making import make
from bdprune.zoo.manifest import Entry, read_manifest
from bdprune.zoo.train import Trained, train_model
from bdprune.zoo.verification import verify

Write = Callable[..., Path]
ABL = '{kind = "abl", epochs = 1, share = 0.1}'
STEPS = 4 + 3 + 2  # isolation on 64 images, training on 58, unlearning of 6 twice


class Killed(Exception):
    pass


def train(work: Path, die_at: int | None = None, defence: dict[str, object] | None = None) -> Trained:
    work.mkdir(exist_ok=True)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(epochs=1, batch_size=16, bf16=False)
    given = {"kind": "abl", "epochs": 1, "share": 0.1, "unlearn_epochs": 2} if defence is None else defence
    attack = {"kind": "badnets", "target": 1, "rate": 0.25}
    entry = Entry("m", 3, "d", 4, "resnet18_cifar", 4, (schedule,), 1, work, attack, defence=given or None)
    seen: list[int] = []

    def progress(step: int, steps: int, loss: float) -> None:
        seen.append(step)
        assert steps == STEPS or not given
        if step == die_at:
            raise Killed

    trained = train_model(entry, RawImages(images, torch.arange(64) % 4), work, None, None, progress)
    assert seen[-1] == STEPS or not given
    return trained


def test_a_defended_training_killed_in_any_part_gives_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, Tensor] = train(tmp_path / "whole").network.state_dict()
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    for step in (2, 6, 8):
        with pytest.raises(Killed):
            train(tmp_path / "killed", step)
    found = train(tmp_path / "killed").network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    plain = train(tmp_path / "plain", defence={}).network.state_dict()
    assert not torch.equal(plain["conv1.weight"], expected["conv1.weight"])


def test_a_defence_is_part_of_the_recipe(write: Write, tiny_data: Path) -> None:
    bad = '[[models]]\nname = "bad"\nseed = 2\nattack = {kind = "badnets", target = 1, rate = 0.25}\n'
    manifest = write(f"{bad}defence = {ABL}\n")
    (truth,) = make(manifest, tiny_data)
    assert truth.recipe is not None and truth.attack_success_rate is not None
    assert truth.recipe["defence"] == {"kind": "abl", "epochs": 1, "share": 0.1}
    assert [check.state for check in verify(manifest, tiny_data)] == ["agrees"]
    write(bad)
    assert [check.state for check in verify(manifest, tiny_data)] == ["other recipe"]
    assert "defence" not in read_manifest(manifest).models[0].recipe
    with pytest.raises(OptionError, match="another recipe"):
        make(manifest, tiny_data)


def test_a_clean_model_may_have_a_defence(write: Write) -> None:
    (entry,) = read_manifest(write(f'[[models]]\nname = "c"\nseed = 1\ndefence = {ABL}\n')).models
    assert entry.make_defence() == IsolationSettings(epochs=1, share=0.1)


@pytest.mark.parametrize(
    ("defence", "words"),
    [
        ('{kind = "abc"}', "no defence 'abc'"),
        ("{share = 0.1}", "no defence None"),
        ('{kind = "abl", shares = 0.1}', "has no setting 'shares'"),
        ('{kind = "abl", share = "x"}', "setting share of abl"),
        ('{kind = "abl", share = 2.0}', "share is out of range"),
        ('{kind = "abl", loss = "down"}', "setting loss of abl"),
    ],
)
def test_an_impossible_defence_is_refused(write: Write, defence: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_manifest(write(f'[[models]]\nname = "m"\nseed = 1\ndefence = {defence}\n'))


def test_an_attack_that_controls_the_training_has_no_defence(write: Write) -> None:
    attack = 'attack = {kind = "dynamic", target = 1}'
    with pytest.raises(OptionError, match="the attack dynamic controls the training"):
        read_manifest(write(f'[[models]]\nname = "m"\nseed = 1\n{attack}\ndefence = {ABL}\n'))


def test_which_attacks_only_poison() -> None:
    found = {kind for kind, attack in ATTACKS.items() if attack(target=2).only_poisons}
    assert {"badnets", "blend", "sig", "trojan", "wanet", "ablend", "label-consistent"} <= found
    assert not found & {"dynamic", "lira", "awp", "dfst", "evasive", "adapt-d", "adv-t", "pruning-aware"}
