"""A detector that misbehaves on some models, in any process, and files of such models."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from bdprune.record import Result

ODD = """
import os, time
from dataclasses import dataclass
from pathlib import Path

import torch

from bdprune.methods import Detector
from bdprune.record import Needs

HERE = Path(__file__).parent
HANGS, EATS, DIES, RESTS = 0.2, 0.3, 0.4, 0.5  # first biases of the last layer


@dataclass(frozen=True)
class Odd(Detector):
    id = "x.odd"
    title = "hangs, eats memory, dies or rests, as the model says, and waits while the file hold names its bias"
    needs = Needs(images="none", minimum=0)

    def __call__(self, case):
        bias = round(float(list(case.model.network.parameters())[-1].detach()[0]), 4)
        self.note("start", bias)
        if bias == HANGS:
            time.sleep(600)
        if bias == EATS:
            eaten = [bytearray(os.urandom(1)) * (50 << 20) for _ in range(40)]
            time.sleep(600)
        if bias == DIES:
            os.kill(os.getpid(), 9)
        if bias == RESTS:
            time.sleep(2)
        while str(bias) in self.held():
            time.sleep(0.05)
        self.note("end", bias)
        return self.evidence(bias, 0.5, attachments=(case.attach("bias", {"x": torch.tensor([bias])}),))

    def held(self):
        try:
            return (HERE / "hold").read_text().split()
        except FileNotFoundError:
            return []

    def note(self, what, bias):
        with (HERE / "notes").open("a") as file:
            print(what, bias, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES") or "-", file=file)
"""


class Odd:
    """The module of the detector, and what it did.

    Args:
        tiny: the model that the files are copies of, with another bias.
    """

    def __init__(self, tiny: Any) -> None:
        self.tiny, self.folder = tiny, tiny.folder
        (self.folder / "oddities.py").write_text(ODD)
        self.module = importlib.import_module("oddities")
        self.options: dict[str, Any] = {"arch": tiny.arch, "input_shape": tiny.input_shape, "stack": 1}
        self.options["detectors"] = [self.module.Odd()]

    def files(self, *biases: float) -> list[Path]:
        """A file for each first bias."""
        found = []
        for index, bias in enumerate(biases):
            found.append(self.folder / f"m{index}.pth")
            state = self.tiny.module.state_dict() | {"head.bias": torch.tensor([bias, 0.0, 0.0])}
            torch.save(state, found[-1])
        return found

    def notes(self) -> list[tuple[str, float, int, str]]:
        """What the detector did: start or end, bias, process, visible GPUs."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(what, float(bias), int(pid), gpus) for what, bias, pid, gpus in map(str.split, lines)]

    def processes(self) -> set[int]:
        """The processes in which it ran."""
        return {pid for _, _, pid, _ in self.notes()}


def without_times(results: Sequence[Result]) -> list[Result]:
    return [
        msgspec.structs.replace(
            one,
            seconds=0.0,
            started="",
            detectors=tuple(msgspec.structs.replace(seen, seconds=0.0) for seen in one.detectors),
        )
        for one in results
    ]


def becomes_true(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it holds within this time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    """Whether the process exists; one that only waits for its parent to notice its end does not count."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
