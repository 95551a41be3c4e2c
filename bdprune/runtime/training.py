"""How a model, or a stack of them, trains on a device: what one step does to the weights, and when the host looks.

There are two strategies. One model on a CPU (:class:`OneModel`) is looked at after every step: it takes torch's SGD,
and goes one step back where its state is no longer finite. Of a stack (:class:`ManyModels`) nothing is read back until
training is over: whether a model has stopped or broken down is a number on the device that decides over its next
update. So no step waits, and a step can be recorded as a CUDA graph (:mod:`bdprune.runtime.graph`): all that it changes
it changes in place.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Puts every batch norm of ``module`` in eval mode, so that it uses its running statistics and keeps them."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.eval()


class OneModel:
    """A copy of one model in training, by torch's SGD; ``[G]`` is one entry a model.

    Args:
        models: one; it stays as it is.
        keeps_statistics: whether batch norms use their running statistics and keep them.

    Attributes:
        module: images -> logits, in train mode.
        reads_back: whether the host looks at every step.
    """

    reads_back = True

    def __init__(self, models: Sequence[Model], keeps_statistics: bool) -> None:
        (self._model,) = models
        worker = self._model.clone()
        self._network, self.module = worker.network, _in_train_mode(worker.module, keeps_statistics)

    def start(self, plan: Plan, rates: Sequence[float], momentum: float, weight_decay: float) -> None:
        """Lays out the weights and sets up SGD, each model at its own learning rate."""
        self._plan = plan
        plan.arrange(self.module)
        self._optimizer = torch.optim.SGD(self.module.parameters(), rates[0], momentum, weight_decay=weight_decay)
        self._kept: dict[str, Tensor] = {name: value.clone() for name, value in self._network.state_dict().items()}

    def lower_rates(self, times: int) -> None:
        """Divides all learning rates by ten, so many times."""
        self._optimizer.param_groups[0]["lr"] *= 0.1**times

    def logits(self, images: Tensor) -> Tensor:
        """``[G, N, K]``."""
        return self._plan.logits(self.module, images).unsqueeze(0)

    def move(self, losses: Tensor, going: Tensor) -> Tensor:
        """Moves the models that are ``going`` (bool ``[G]``) down their loss; returns which have moved.

        One whose loss or next state would not be finite stays as it was before :meth:`logits`.
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
        """Keeps the state as it is now, in memory that is taken once, if all of it is finite; returns whether it is."""
        state: dict[str, Tensor] = self._network.state_dict()
        floating = [value for value in state.values() if value.is_floating_point() and value.numel()]
        # The extremes pass on what is not a number; one look at all of them waits for the device once.
        if not bool(torch.cat([torch.stack(value.aminmax()) for value in floating]).isfinite().all()):
            return False
        for name, value in state.items():
            self._kept[name].copy_(value)
        return True

    def model(self, index: int) -> Model:
        """Model ``index`` as it is now; training is over."""
        return self._model.with_network(self._network)

    def copy(self) -> Model:
        """A copy of the model as it is now; training goes on."""
        return self._model.with_network(copy.deepcopy(self._network))


class ManyModels:
    """Copies of models in training as a stack, by SGD with a learning rate for each; else as :class:`OneModel`."""

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


Trained: TypeAlias = OneModel | ManyModels


def trainer_for(models: Sequence[Model]) -> type[Trained]:
    """What trains ``models``, or some of them: several as a stack, and one on a GPU, where reading back waits for it.

    One model that cannot be stacked is always by itself.
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
    """Puts ``new`` into ``values`` for the models that are ``chosen`` ``[G]``."""
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
    """What the steps of every epoch give, each with its labels behind, until no model is ``going`` (bool ``[G]``).

    It is known of a GPU an epoch late that all models have stopped: the steps of that epoch must change nothing.

    Args:
        step: images and labels -> tensors. It may write to ``going``, and so may whoever takes the epochs.
        reads_back: ``step`` waits for the device anyway; then it runs as it is written.
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
    """For a device that is done with its work when the host is, which a CPU is."""

    def is_over(self, going: Tensor, epoch: bool = False) -> bool:
        """Whether no model is ``going`` (bool ``[G]``); asked after every step and, with ``epoch``, every epoch."""
        return not bool(going.any())


class LateWatch(Watch):
    """For a device that works behind the host: answers for an epoch with what is known of the one before.

    Whether some model is still going is copied to the host while both work on. The host is held back only where it is
    more than an epoch ahead: the device then has an epoch to do still, and is not kept waiting.

    Args:
        flags: two bools on the CPU, pinned for a GPU.
        mark: puts a mark behind all work that the device was given so far, and returns what asks whether the device has
            come past it.
    """

    _PAUSE = 1e-4  # seconds

    def __init__(self, flags: Tensor, mark: Callable[[], Callable[[], bool]]) -> None:
        self._now, self._before = flags
        self._mark = mark
        self._last: Callable[[], bool] | None = None

    def is_over(self, going: Tensor, epoch: bool = False) -> bool:
        """Whether no model was ``going`` when this was asked an epoch before; False the first time, and of a step."""
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
    """The outcome of the one model that there is.

    Raises:
        TrainingError: that is its outcome.
    """
    (outcome,) = outcomes
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every model ``[G]``, from logits ``[G, N, K]`` and labels ``[N]``."""
    count = len(logits)
    if count == 1:  # torch's own mean, which sums in another order
        return functional.cross_entropy(logits.squeeze(0), labels).unsqueeze(0)
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.repeat(count), reduction="none")
    return losses.view(count, -1).mean(1)
