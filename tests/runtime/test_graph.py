"""Steps that are recorded once and replayed give the numbers of eager steps, without reads from the device.

A tape of the operations of a step simulates CUDA graphs. A replay of the tape runs the operations again on the same
memory, but no Python. So it misses all state that a step keeps outside of tensors, like a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bdprune.errors import OptionError
from bdprune.loops import unlearning
from bdprune.loops.recovery import RecoverSettings, recover, recover_stack
from bdprune.loops.unlearning import UnlearnSettings, unlearn_stack
from bdprune.model.handle import Model
from bdprune.runtime import graph, training
from bdprune.runtime.graph import WARM_UPS, Captured, Tensors, recorder_for

from ..helpers import siblings

aten = torch.ops.aten
READS_BACK = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim}


class Tape(TorchDispatchMode):
    """Records every operation, and restores the memory from before it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in READS_BACK, f"{func} reads back from the device"
        kwargs = kwargs or {}
        for one in tensors(args, kwargs):
            storage = one.untyped_storage()
            if storage.data_ptr() not in self._made | self._before.keys():
                self._before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tensors(out)))
        self._made |= {one.untyped_storage().data_ptr() for one in tensors(out)} - self._before.keys()
        return out

    def restore(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            known = {one.untyped_storage().data_ptr() for one in tensors(args, kwargs)}
            views = all(one.untyped_storage().data_ptr() in known for one in outputs)
            if views and not func._schema.is_mutable:
                continue
            for kept, new in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def tensors(*values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


@dataclass
class Tapes:
    """A recorder that works with tapes; records its calls."""

    warmed_up: int = 0
    replayed: int = 0
    tapes: list[Tape] = field(default_factory=list)

    def warm_up(self, run: Callable[[], Tensors]) -> Tensors:
        self.warmed_up += 1
        return run()

    def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], Any], Tensors]:
        with Tape() as tape:
            outputs = run()
        tape.restore()
        self.tapes.append(tape)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, outputs

    def random_state(self) -> Tensor:
        return torch.get_rng_state()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Records steps on the CPU with tapes, and uses the watch of a GPU."""
    found = Tapes()
    monkeypatch.setattr(training, "captured", lambda step, device: Captured(step, found))
    flags = torch.zeros(2, dtype=torch.bool)
    monkeypatch.setattr(training, "watch_on", lambda device: training.LateWatch(flags, lambda: lambda: True))
    return found


def state(model: Model) -> dict[str, Tensor]:
    return model.network.state_dict()


UNLEARNING = {
    "milestones": UnlearnSettings(lr=0.01, batch_size=50, max_epochs=6, padding=1, milestones=(2, 4)),
    "epochs": UnlearnSettings(lr=0.02, batch_size=50, max_epochs=6, padding=1, stop_on="epoch"),
    "another try": UnlearnSettings(lr=1e-4, batch_size=50, max_epochs=3, padding=1, raises=1),
    "two shapes": UnlearnSettings(lr=0.002, batch_size=37, max_epochs=4, padding=1),
    "breaks down": UnlearnSettings(lr=1e30, batch_size=50, max_epochs=3, padding=1, retries=0),
    "running statistics": UnlearnSettings(lr=0.02, batch_size=50, max_epochs=3, padding=1, small_data=1000),
}


@pytest.mark.parametrize("name", UNLEARNING)
def test_replayed_unlearning_has_the_bits_of_eager_steps(
    bright: Any, name: str, request: pytest.FixtureRequest
) -> None:
    models, settings = siblings(bright.model), UNLEARNING[name]
    written = unlearn_stack(models, bright.data, settings, seed=3)
    tapes: Tapes = request.getfixturevalue("tapes")
    replayed = unlearn_stack(models, bright.data, settings, seed=3)
    assert tapes.replayed > 0
    for ours, theirs in zip(replayed, written, strict=True):
        assert ours.trajectory == theirs.trajectory  # type: ignore[union-attr]
        assert (ours.lr, ours.stopped) == (theirs.lr, theirs.stopped)  # type: ignore[union-attr]
        for form in ("model", "half_way"):
            mine, other = getattr(ours, form), getattr(theirs, form)
            assert (mine is None) == (other is None)
            assert mine is None or all(torch.equal(value, state(mine)[key]) for key, value in state(other).items())


def test_each_batch_shape_is_recorded_once_and_read_from_the_same_memory(bright: Any, tapes: Tapes) -> None:
    settings = UnlearnSettings(lr=1e-4, batch_size=37, max_epochs=5, padding=1)
    unlearn_stack(siblings(bright.model), bright.data, settings)
    # 240 images in batches of 35 and 34, two of the first kind and five of the second an epoch.
    assert len(tapes.tapes) == 2 and tapes.warmed_up == 2 * WARM_UPS
    assert tapes.replayed == 7 * 5 - 2 * WARM_UPS


@pytest.mark.parametrize("stacked", [True, False], ids=["stack", "alone"])
def test_replayed_recovery_has_the_bits_of_eager_steps(
    bright: Any, stacked: bool, request: pytest.FixtureRequest
) -> None:
    settings = RecoverSettings(batch_size=50, epochs=4, padding=1, loss_scale=0.2)
    models = siblings(bright.model)

    def run() -> list[Any]:
        if stacked:
            return list(recover_stack(models, bright.data, settings, seed=5))
        return [recover(models[1], bright.data, settings, seed=5)]

    written = run()
    tapes: Tapes = request.getfixturevalue("tapes")
    replayed = run()
    assert tapes.replayed == 5 * 4 - WARM_UPS
    for ours, theirs in zip(replayed, written, strict=True):
        assert ours.losses == theirs.losses
        assert all(torch.equal(mask, ours.masks[name]) for name, mask in theirs.masks.items())
    assert any((mask < 1).any() for mask in written[0].masks.values())


def test_a_tape_misses_state_outside_of_tensors() -> None:
    total, count = torch.zeros(1), [0]

    def step(one: Tensor) -> Tensors:
        count[0] += 1
        total.add_(one * count[0])
        return (total,)

    written = Captured(step, None)
    sums = [float(written(torch.ones(1))[0]) for _ in range(6)]
    assert sums == [1, 3, 6, 10, 15, 21]
    total.zero_()
    count[0] = 0
    taped = Captured(step, Tapes())
    assert [float(taped(torch.ones(1))[0]) for _ in range(6)] == [1, 3, 6, 10, 14, 18]


def test_the_next_step_does_not_overwrite_the_output_of_a_step() -> None:
    run = Captured(lambda one: (one * 2,), Tapes())
    found = [run(torch.tensor([float(index)]))[0] for index in range(6)]
    assert [float(one) for one in found] == [0, 2, 4, 6, 8, 10]


def test_a_step_that_reads_from_the_device_fails_on_the_tape() -> None:
    run = Captured(lambda one: (one * one.sum().item(),), Tapes())
    for _ in range(WARM_UPS):
        run(torch.ones(2))
    with pytest.raises(AssertionError, match="reads back"):
        run(torch.ones(2))


class NeverOver:
    """A watch that never knows whether models still train."""

    def is_over(self, going: Tensor, epoch: bool = False) -> bool:
        return False


@pytest.mark.parametrize(("phase", "steps"), [("batch", 100), ("epoch", 100), ("recovery", 20), ("recovery alone", 20)])
def test_nothing_is_read_back_before_the_phase_is_over(
    bright: Any, phase: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values: reading one, or copying it to the CPU, raises an error."""
    done: list[Tensors] = []

    def counted(step: Callable[..., Tensors], device: torch.device) -> Callable[..., Tensors]:
        return lambda *inputs: done.append(step(*inputs)) or done[-1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(training, "captured", counted)
    monkeypatch.setattr(training, "watch_on", lambda device: NeverOver())
    models = siblings(bright.model, device="meta")
    monkeypatch.setattr(Model, "groups", bright.model.groups)
    monkeypatch.setattr(torch, "autocast", lambda *settings, **named: nullcontext())  # the device is unknown
    recovery = RecoverSettings(batch_size=50, epochs=4, padding=1)

    def unlearning(stop_on: str) -> object:
        settings = UnlearnSettings(batch_size=50, padding=1, stop_on=stop_on, milestones=(3,))
        return unlearn_stack(models, bright.data, settings)

    runs: dict[str, Callable[[], object]] = {
        "batch": lambda: unlearning("batch"),
        "epoch": lambda: unlearning("epoch"),
        "recovery": lambda: recover_stack(models, bright.data, recovery),
        "recovery alone": lambda: recover(models[0], bright.data, recovery),
    }
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        runs[phase]()
    assert len(done) == steps


def test_a_step_with_random_numbers_is_never_recorded() -> None:
    tapes = Tapes()
    run = Captured(lambda one: (nn.functional.dropout(one),), tapes)
    drawn = {tuple(run(torch.ones(20))[0].tolist()) for _ in range(8)}
    assert len(drawn) == 8 and tapes.warmed_up == 1 and not tapes.tapes


def test_a_step_that_cannot_be_recorded_runs_eagerly() -> None:
    class Refusing(Tapes):
        def record(self, run: Callable[[], Tensors]) -> tuple[Callable[[], Any], Tensors]:
            raise RuntimeError("operation not permitted when stream is capturing")

    total = torch.zeros(1)
    run = Captured(lambda one: (total.add_(one).clone(),), Refusing())
    assert [float(run(torch.ones(1))[0]) for _ in range(6)] == [1, 2, 3, 4, 5, 6]


def test_a_cpu_runs_steps_eagerly_and_checks_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert recorder_for(cpu) is None
    monkeypatch.setattr(graph, "CudaRecorder", lambda device: ("recorder", device))
    monkeypatch.delenv("BDPRUNE_GRAPHS", raising=False)
    assert recorder_for(gpu) == ("recorder", gpu)
    monkeypatch.setenv("BDPRUNE_GRAPHS", "0")
    assert recorder_for(gpu) is None
    monkeypatch.setenv("BDPRUNE_GRAPHS", "yes")
    with pytest.raises(OptionError, match="Set it to 0 or 1"):
        recorder_for(cpu)


class Streams:
    """Replaces the parts of torch.cuda that a recorder calls, and records which stream runs what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.current, self.notes, self.fails = "main", list[str](), fails
        for name in ("Stream", "stream", "graph", "current_stream", "set_stream", "graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def note(self, what: str) -> None:
        self.notes.append(f"{what} on {self.current}")

    def _Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name="side", wait_stream=lambda other: self.notes.append(f"side waits for {other.name}"))

    def _current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name="main", wait_stream=lambda other: self.notes.append(f"main waits for {other.name}"))

    def _set_stream(self, stream: Any) -> None:
        self.current = stream.name

    @contextmanager
    def _stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def _graph(self, graph: Any, pool: str, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        if self.fails:
            raise RuntimeError("the recording is void")
        self.current = before

    def _graph_pool_handle(self) -> str:
        return "pool"

    def _CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.note("replayed"))


@pytest.mark.parametrize("fails", [False, True])
def test_the_cuda_recorder_uses_its_own_stream_and_restores_the_old_one(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    streams = Streams(monkeypatch, fails)
    monkeypatch.setattr(graph.CudaRecorder, "random_state", lambda recorder: torch.zeros(1))
    total = torch.zeros(1)

    def step(one: Tensor) -> Tensors:
        streams.note("ran")
        return (total.add_(one).clone(),)

    run = Captured(step, graph.CudaRecorder(torch.device("cuda")))
    for _ in range(WARM_UPS + 2):
        run(torch.ones(1))
    warmed = ["side waits for main", "ran on side", "main waits for side"] * WARM_UPS
    recorded = ["ran on side", "replayed on main", "replayed on main"]
    refused = ["ran on side", "ran on main", "ran on main"]
    assert streams.notes == warmed + (refused if fails else recorded)


needs_gpu = pytest.mark.needs("cuda")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The result of every recording: a step that cannot be recorded runs eagerly, with the same result."""
    found: list[str] = []
    record = graph.CudaRecorder.record

    def noted(one: graph.CudaRecorder, run: Callable[[], Tensors]) -> Any:
        try:
            replay, outputs = record(one, run)
        except RuntimeError as error:
            found.append(str(error))
            raise
        found.append("")
        return replay, outputs

    monkeypatch.setattr(graph.CudaRecorder, "record", noted)
    return found


@pytest.fixture
def repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums no weight gradient with atomics, and stores trials apart from other tests and the user's cache."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("BDPRUNE_CACHE", str(tmp_path))


@needs_gpu
@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("name", UNLEARNING)
def test_cuda_graphs_unlearn_like_eager_steps(
    bright: Any, name: str, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = siblings(bright.model, device="cuda")
    found = []
    for setting in ("0", "1"):
        monkeypatch.setenv("BDPRUNE_GRAPHS", setting)
        found.append(unlearn_stack(models, bright.data, UNLEARNING[name], seed=3))
    assert recordings and not any(recordings)
    for written, replayed in zip(*found, strict=True):
        assert replayed.trajectory == written.trajectory  # type: ignore[union-attr]
        for key, value in state(written.model).items():  # type: ignore[union-attr]
            torch.testing.assert_close(value, state(replayed.model)[key], rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


@needs_gpu
@pytest.mark.usefixtures("repeatable")
def test_cuda_graphs_recover_like_eager_steps(
    bright: Any, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = siblings(bright.model, device="cuda")
    settings = RecoverSettings(batch_size=50, epochs=4, padding=1, loss_scale=0.2)
    found = []
    for setting in ("0", "1"):
        monkeypatch.setenv("BDPRUNE_GRAPHS", setting)
        found.append([*recover_stack(models, bright.data, settings), recover(models[1], bright.data, settings)])
    assert recordings == ["", ""]
    for written, replayed in zip(*found, strict=True):
        for key, mask in written.masks.items():  # type: ignore[union-attr]
            torch.testing.assert_close(mask, replayed.masks[key], rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@needs_gpu
@pytest.mark.usefixtures("repeatable")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_cuda_unlearning_never_waits_between_its_first_epoch_and_its_end(
    bright: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without graphs, because recording one waits. Trials of convolutions also finish in the first epoch."""
    monkeypatch.setenv("BDPRUNE_GRAPHS", "0")
    asked: list[bool] = []
    is_over, read = training.LateWatch.is_over, unlearning._read

    def strict(one: training.LateWatch, going: Tensor, epoch: bool = False) -> bool:
        if epoch:
            torch.cuda.set_sync_debug_mode("error")
        over = is_over(one, going, epoch)
        asked.extend([over] * epoch)
        return over

    def relaxed(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return read(*args)

    monkeypatch.setattr(training.LateWatch, "is_over", strict)
    monkeypatch.setattr(unlearning, "_read", relaxed)
    try:
        unlearn_stack(siblings(bright.model, device="cuda"), bright.data, UNLEARNING["milestones"], seed=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(asked) > 1
