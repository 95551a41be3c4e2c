"""Trains one model or a stack of models on a device: the update of a step, and when the host reads results.

There are two strategies. The host reads one model on a CPU (:class:`OneModel`) after every step: it uses torch's SGD,
and undoes the last step if the state is not finite. It reads nothing from a stack (:class:`ManyModels`) until training
ends: flags on the device say whether a model has stopped or failed, and control its next update. So no step waits, and
a step can be recorded as a CUDA graph (:mod:`bdprune.runtime.graph`), because it changes all state in place.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bdprune.errors import TrainingError
from bdprune.model import Model, StackedNetwork, why_not
from bdprune.runtime.batches import Batches
from bdprune.runtime.graph import Tensors, captured
from bdprune.runtime.precision import Plan

_Done = TypeVar("_Done")


def keep_running_statistics(module: nn.Module) -> None:
    """Sets every batch norm of ``module`` to eval mode, so that it uses its running statistics without updates."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds global randomness, from which dropout draws, for the context, and restores it afterwards."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class OneModel:
    """A copy of one model in training, with torch's SGD; ``[G]`` has one entry for each model.

    Args:
        models: exactly one; it does not change.
        keeps_statistics: whether batch norms use their running statistics and do not update them.

    Attributes:
        module: images -> logits, in train mode.
        reads_back: whether the host reads the result of every step.
    """

    reads_back = True

    def __init__(self, models: Sequence[Model], keeps_statistics: bool) -> None:
        (self._model,) = models
        worker = self._model.clone()
        self._network, self.module = worker.network, _in_train_mode(worker.module, keeps_statistics)

    def start(self, plan: Plan, rates: Sequence[float], momentum: float, weight_decay: float) -> None:
        """Sets the layout of the weights and creates SGD, with a learning rate for each model."""
        self._plan = plan
        plan.arrange(self.module)
        self._optimizer = torch.optim.SGD(self.module.parameters(), rates[0], momentum, weight_decay=weight_decay)
        self._kept: dict[str, Tensor] = {name: value.clone() for name, value in self._network.state_dict().items()}

    def lower_rates(self, times: int) -> None:
        """Divides all learning rates by ten, ``times`` times."""
        self._optimizer.param_groups[0]["lr"] *= 0.1**times

    def logits(self, images: Tensor) -> Tensor:
        """``[G, N, K]``."""
        return self._plan.logits(self.module, images).unsqueeze(0)

    def move(self, losses: Tensor, going: Tensor) -> Tensor:
        """Moves the models that are ``going`` (bool ``[G]``) down their loss; returns which models moved.

        A model whose loss or next state would not be finite keeps its state from before :meth:`logits`.
        """
        moves = bool(losses.isfinite())
        if moves:
            self._optimizer.zero_grad()
            losses.sum().backward()
            self._optimizer.step()
            moves = self._keep_if_finite()
        if not moves:
            self._network.load_state_dict(self._kept)
        return going & moves

    @torch.no_grad()
    def _keep_if_finite(self) -> bool:
        """Saves the current state if all of it is finite, in memory that is allocated once; returns whether it is."""
        state: dict[str, Tensor] = self._network.state_dict()
        floating = [value for value in state.values() if value.is_floating_point() and value.numel()]
        # The extremes propagate NaN; reading all of them at once waits for the device only once.
        if not bool(torch.cat([torch.stack(value.aminmax()) for value in floating]).isfinite().all()):
            return False
        for name, value in state.items():
            self._kept[name].copy_(value)
        return True

    def model(self, index: int) -> Model:
        """The current state of model ``index``; ends the training."""
        return self._model.with_network(self._network)

    def start_saving(self) -> None:
        """Allows :meth:`save`; called after :meth:`start`."""
        self._saved: Model | None = None

    def save(self, now: Tensor) -> None:
        """Saves the current state of the models of ``now`` (bool ``[G]``); the training continues."""
        if bool(now):
            self._saved = self._model.with_network(copy.deepcopy(self._network))

    def saved(self, index: int) -> Model | None:
        """The state of model ``index`` that was saved last; None if none was."""
        return self._saved


class ManyModels:
    """A stack of copies of models in training, by SGD with a learning rate for each; like :class:`OneModel`."""

    reads_back = False

    def __init__(self, models: Sequence[Model], keeps_statistics: bool) -> None:
        self._stacked = StackedNetwork(models)
        self.module = _in_train_mode(self._stacked, keeps_statistics)

    def start(self, plan: Plan, rates: Sequence[float], momentum: float, weight_decay: float) -> None:
        self._plan, self._momentum, self._weight_decay = plan, momentum, weight_decay
        plan.arrange(self.module)
        network = self._stacked.network
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._buffers = list(network.buffers())
        self._momenta = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._first_rates = torch.tensor(rates, dtype=torch.float32, device=self._parameters[0].device)
        self._rates, self._lowered = self._first_rates.clone(), 0

    def lower_rates(self, times: int) -> None:
        self._lowered += times
        self._rates.copy_(self._first_rates * 0.1**self._lowered)

    def logits(self, images: Tensor) -> Tensor:
        self._before = [buffer.clone() for buffer in self._buffers]
        return self._plan.logits(self.module, images)

    def move(self, losses: Tensor, going: Tensor) -> Tensor:
        gradients = torch.autograd.grad(losses.sum(), self._parameters)
        with torch.no_grad():
            after, momenta = self._moved(gradients)
            moves = going & losses.isfinite() & _finite([*after, *self._buffers])
            _keep([*self._parameters, *self._momenta], moves, [*after, *momenta])
            _keep(self._buffers, ~moves, self._before)
        return moves

    def _moved(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and momenta after a step of SGD with weight decay."""
        after, momenta = [], []
        for parameter, momentum, gradient in zip(self._parameters, self._momenta, gradients, strict=True):
            decayed = gradient.add(parameter, alpha=self._weight_decay)
            momenta.append(momentum * self._momentum + decayed)
            after.append(parameter - _per_model(self._rates, parameter) * momenta[-1])
        return after, momenta

    def model(self, index: int) -> Model:
        return self._stacked.model(index)

    def start_saving(self) -> None:
        self._state = {name: value.clone() for name, value in self._stacked.network.state_dict().items()}
        self._was_saved = torch.zeros(len(self._first_rates), dtype=torch.bool, device=self._first_rates.device)

    def save(self, now: Tensor) -> None:
        state = self._stacked.network.state_dict()
        _keep(list(self._state.values()), now, [state[name] for name in self._state])
        self._was_saved |= now

    def saved(self, index: int) -> Model | None:
        return self._stacked.model(index, self._state) if bool(self._was_saved[index]) else None


Trained: TypeAlias = OneModel | ManyModels


def trainer_for(models: Sequence[Model]) -> type[Trained]:
    """The trainer class for ``models`` or a part of them: a stack for several, and for one on a GPU, where reads wait.

    A single model that cannot be stacked always uses :class:`OneModel`.
    """
    one = len(models) == 1 and (models[0].device.type != "cuda" or why_not(models))
    return OneModel if one else ManyModels


def _in_train_mode(module: nn.Module, keeps_statistics: bool) -> nn.Module:
    module.train()
    if keeps_statistics:
        keep_running_statistics(module)
    return module


def _per_model(values: Tensor, like: Tensor) -> Tensor:
    """``[G]`` in a shape that broadcasts over ``[G, *]``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _keep(values: Sequence[Tensor], chosen: Tensor, new: Sequence[Tensor]) -> None:
    """Writes ``new`` into ``values`` for the ``chosen`` models ``[G]``."""
    for value, other in zip(values, new, strict=True):
        value.copy_(torch.where(_per_model(chosen, value), other, value))


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Which models ``[G]`` have only finite numbers in ``tensors``, each ``[G, *]``."""
    parts = [value.flatten(1).isfinite().all(1) for value in tensors if value.is_floating_point() and value.numel()]
    return torch.stack(parts).all(0)


# ------------------------------------------------------------------------------------------------- epochs


def epochs(
    step: Callable[[Tensor, Tensor], Tensors], shuffled: Iterable[Batches], going: Tensor, reads_back: bool = False
) -> Iterator[list[Tensors]]:
    """The results of the steps of every epoch, each with its labels, until no model is ``going`` (bool ``[G]``).

    On a GPU, the host learns one epoch late that all models have stopped: the steps of that epoch must change nothing.

    Args:
        step: images and labels -> tensors. It may write to ``going``, and so may the caller between epochs.
        reads_back: ``step`` waits for the device anyway, so it runs eagerly.
    """
    run, watch = (step, Watch()) if reads_back else (captured(step, going.device), watch_on(going.device))
    for batches in shuffled:
        done: list[Tensors] = []
        for images, labels in batches:
            done.append((*run(images, labels), labels))
            if watch.is_over(going):
                break
        yield done
        if watch.is_over(going, epoch=True):
            return


class Watch:
    """The watch for a CPU, where all work is finished when a call returns."""

    def is_over(self, going: Tensor, epoch: bool = False) -> bool:
        """Whether no model is ``going`` (bool ``[G]``); called after every step and, with ``epoch``, every epoch."""
        return not bool(going.any())


class LateWatch(Watch):
    """Tells one epoch late whether all models have stopped, so that the host never waits for the GPU.

    The flag whether any model is still going is copied to the host while both continue. The host waits only if it is
    more than one epoch ahead: the device then still has an epoch of work, so it never idles.

    Args:
        flags: two bools on the CPU, pinned for a GPU.
        mark: records a mark after all work submitted to the device so far, and returns a function that says whether the
            device has passed it.
    """

    _PAUSE = 1e-4  # seconds

    def __init__(self, flags: Tensor, mark: Callable[[], Callable[[], bool]]) -> None:
        self._now, self._before = flags
        self._mark = mark
        self._last: Callable[[], bool] | None = None

    def is_over(self, going: Tensor, epoch: bool = False) -> bool:
        """Whether all models had stopped one epoch earlier. False at the first call and for a single step."""
        if not epoch:
            return False
        self._now, self._before = self._before, self._now
        self._now.copy_(going.any(), non_blocking=True)
        last, self._last = self._last, self._mark()
        if last is None:
            return False
        while not last():
            time.sleep(self._PAUSE)
        return not bool(self._before)


def watch_on(device: torch.device) -> Watch:
    """The watch for models on ``device``."""
    if device.type != "cuda":
        return Watch()
    flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
    return LateWatch(flags, lambda: torch.cuda.current_stream(device).record_event().query)


def only(outcomes: Sequence[_Done | TrainingError]) -> _Done:
    """The only outcome.

    Raises:
        TrainingError: the outcome is this error.
    """
    (outcome,) = outcomes
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every model ``[G]``, from logits ``[G, N, K]`` and labels ``[N]``."""
    count = len(logits)
    if count == 1:  # torch's own mean sums in another order
        return functional.cross_entropy(logits.squeeze(0), labels).unsqueeze(0)
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(count), reduction="none")
    return losses.view(count, -1).mean(1)
