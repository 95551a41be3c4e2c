"""Attacks that train something along with the network end with the same weights and trigger after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdprune.attacks.base import Attack
from bdprune.attacks.registry import ATTACKS
from bdprune.data.parquet import RawImages
from bdprune.loops.fitting import Schedule
from bdprune.loops.resume import Checkpoint
from bdprune.model.architectures import build
from bdprune.zoo.manifest import Entry
from bdprune.zoo.train import Trained, train_model

KINDS = [kind for kind, attack in ATTACKS.items() if attack.trains and attack.objective is not Attack.objective]
STEPS = 8
CHEAP: dict[str, dict[str, int]] = {"dfst": {"injector_steps": 2, "images": 16}}
"""Settings that only cost time."""


class Killed(Exception):
    pass


def train(kind: str, work: Path, die_at: int | None) -> Trained:
    """Eight steps in two epochs on 64 images of noise."""
    work.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    schedule = Schedule(epochs=2, batch_size=16, bf16=False)
    # A quarter: for LIRA's batches of 16 and 3 images with 4 channels, oneDNN's convolution (torch 2.13, AVX-512)
    # writes out of bounds.
    attack = {"kind": kind, "target": 1, "rate": 0.25, **CHEAP.get(kind, {})}
    entry = Entry("m", 3, "d", 4, "resnet18_cifar", 4, (schedule,), 1, work, attack)
    source = None
    if ATTACKS[kind].needs_source:
        torch.manual_seed(1)
        source = build("resnet18_cifar", 4, width=4).eval()

    def progress(step: int, steps: int, loss: float) -> None:
        assert steps == STEPS
        if step == die_at:
            raise Killed

    return train_model(entry, RawImages(images, torch.arange(64) % 4), work, source, None, progress)


def state(trained: Trained) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {"network": trained.network}
    if trained.trigger is not None:
        parts["trigger"] = trained.trigger
    return {f"{part}.{name}": value for part, one in parts.items() for name, value in one.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_killed_in_the_middle_gives_the_same_result(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state(train(kind, tmp_path / "whole", None))
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    work = tmp_path / "killed"
    for step in (3, 6):
        with pytest.raises(Killed):
            train(kind, work, step)
    found = state(train(kind, work, None))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    again = state(train(kind, work, None))  # killed after the last step: only `finish` remains
    assert all(torch.equal(again[name], value) for name, value in expected.items())
