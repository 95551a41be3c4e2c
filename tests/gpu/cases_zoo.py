"""Zoos on a GPU, or on a stand-in that rejects the same operations: makes and measures every kind of attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdprune.attacks.registry import ATTACKS
from bdprune.zoo.making import make

from ..zoo.conftest import HEAD as OF_A_CPU
from ..zoo.conftest import MODELS as SOURCES

HEAD = OF_A_CPU.replace("bf16 = false", "bf16 = true")

pytestmark = pytest.mark.usefixtures("bfloat16")
Write = Callable[..., Path]

SETTINGS = dict.fromkeys(ATTACKS, "target = 1") | {
    "badnets": 'target = "all-to-all"',
    "trojan-neuron": "target = 1, steps = 2",
    "label-consistent": "target = 1, steps = 2",
    "feature-collision": "target = 1, source_class = 0, steps = 2",
    "dfst": "target = 1, injector_steps = 2",
    "awp": "target = 1, epochs = 1, held_out = 12",
    "adv-t": "target = 1, defence_images = 30, rounds = 1, epochs = 1",
}


def models(kind: str) -> str:
    """A model "one" of that kind, quick to make, and the models that it may start from."""
    source = {None: "", "clean": 'source = "clean"', "backdoored": 'source = "bad"'}[ATTACKS[kind].needs_source]
    attack = f'attack = {{kind = "{kind}", rate = 0.25, {SETTINGS[kind]}}}'
    return f'{SOURCES}[[models]]\nname = "one"\nseed = 3\n{source}\n{attack}\n'


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_interrupted_training_resumes_on_a_gpu_to_the_same_model(
    kind: str,
    gpu: torch.device,
    write: Callable[..., Path],
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bdprune.loops import resume as checkpoint

    monkeypatch.setattr(checkpoint.Checkpoint, "due", lambda self: True)
    manifest = write(models(kind), HEAD)
    (truth,) = make(manifest, tiny_data, only=["one"], device=gpu)
    assert truth.complete and 0 <= truth.clean_accuracy <= 1

    def die(name: str, done: int, *_: object) -> None:
        if done == 4:  # of six, in the second of two cycles
            raise Killed

    out, home = tmp_path / "out", manifest.with_suffix("")
    if ATTACKS[kind].trains:
        with pytest.raises(Killed):
            make(manifest, tiny_data, out, only=["one"], progress=die, device=gpu)
    make(manifest, tiny_data, out, only=["one"], device=gpu)
    for file in ("one.safetensors", "one.trigger"):
        assert (out / file).read_bytes() == (home / file).read_bytes()


def test_network_and_trigger_run_on_the_device(
    gpu: torch.device, write: Write, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in measurements, which would take minutes on the few threads of the host."""
    from bdprune.attacks.generators import Change
    from bdprune.model.architectures.resnet import ResNet

    seen: dict[type, set[tuple[bool, str]]] = {Change: set(), ResNet: set()}
    for module, calls in seen.items():
        forward = module.forward

        def noted(self: nn.Module, images: Tensor, forward: Any = forward, calls: Any = calls) -> Any:
            calls.add((torch.is_grad_enabled(), images.device.type))
            return forward(self, images)

        monkeypatch.setattr(module, "forward", noted)
    make(write(models("lira"), HEAD), tiny_data, only=["one"], device=gpu)
    assert all(calls == {(True, gpu.type), (False, gpu.type)} for calls in seen.values())
