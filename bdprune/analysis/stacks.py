"""Many models of one architecture, scored, unlearned, recovered and swept as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bdprune.analysis.lipschitz import channel_lipschitz_of
from bdprune.data import CleanData
from bdprune.errors import OptionError, TrainingError
from bdprune.loops import (
    Recovered,
    RecoverSettings,
    Sweep,
    SweepSettings,
    Unlearned,
    UnlearnSettings,
    recover_stack,
    sweep_stack,
    unlearn_stack,
)
from bdprune.model import Model
from bdprune.ops import Choice
from bdprune.runtime import DEFAULT, Precision, stack_or_loop


def stack(models: Sequence[Model]) -> Stack:
    """A stack of models that are run as one, where that is faster than one after another.

    Args:
        models: what ``bdprune.load`` gave; one model given G times is one model with G masks.

    Raises:
        OptionError: no model.

    Example:
        >>> models = [load("model.pth"), load("model.pth")]
        >>> scores = stack(models).scores()
        >>> len(scores), len(scores[0])
        (2, 20)
    """
    if not models:
        raise OptionError("A stack of no models does nothing.", "Give at least one.")
    return Stack(tuple(models))


@dataclass(frozen=True)
class Stack:
    """Models of one architecture; every method does what its namesake does to each of them, with the same seed.

    What runs is chosen by a short trial (:meth:`variant`). One after another the results are those of separate runs to
    the bit. In one stack, sums are taken in another order: a step differs by float32 rounding, and what many steps of
    ascent make of that is as different as two seeds of one model could be where a loss is steep.

    An entry of the results of ``unlearn`` and ``recover`` is the error itself for a model that breaks down; the others
    go on.
    """

    models: tuple[Model, ...]

    def __len__(self) -> int:
        return len(self.models)

    def variant(self, data: CleanData, batch_size: int = 128) -> Choice:
        """How steps on batches of ``data`` run: ``stack`` or ``loop`` (its ``winner``), and why."""
        return stack_or_loop(self.models, data.images[: min(batch_size, len(data))])

    def _parts(self, data: CleanData, batch_size: int) -> list[tuple[Model, ...]]:
        """The models that share their steps."""
        as_stack = self.variant(data, batch_size).winner == "stack"
        return [self.models] if as_stack else [(model,) for model in self.models]

    def scores(self) -> list[dict[str, Tensor]]:
        """``channel_lipschitz`` of every model, the spectral norms of all filters of all models in one call."""
        return channel_lipschitz_of(self.models)

    def unlearn(
        self, data: CleanData, settings: UnlearnSettings, seed: int = 0, precision: Precision = DEFAULT
    ) -> list[Unlearned | TrainingError]:
        """Every model unlearned on ``data``: each stops, and starts over at another learning rate, for itself."""
        parts = self._parts(data, settings.batch_size)
        return [one for part in parts for one in unlearn_stack(part, data, settings, seed, precision)]

    def recover(
        self, data: CleanData, settings: RecoverSettings, seed: int = 0, precision: Precision = DEFAULT
    ) -> list[Recovered | TrainingError]:
        """A mask for every model of this stack, which are taken as unlearned."""
        parts = self._parts(data, settings.batch_size)
        return [one for part in parts for one in recover_stack(part, data, settings, seed, precision)]

    def sweep(
        self,
        masks: Sequence[Mapping[str, Tensor]],
        sets: Sequence[CleanData],
        settings: SweepSettings,
        precision: Precision = DEFAULT,
    ) -> list[Sweep]:
        """The threshold sweep of every model with its own mask.

        On a CPU they are swept one after another, each from the feature maps that it has kept. Elsewhere all models are
        at one threshold in the same pass where a trial finds that faster.

        Raises:
            OptionError: not one mask a model.
        """
        if len(masks) != len(self.models):
            raise OptionError(f"There are {len(masks)} masks for {len(self.models)} models.", "Give one for each.")
        return sweep_stack(self.models, masks, sets, settings, precision)
