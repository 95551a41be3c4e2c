"""Scores, unlearns, recovers and sweeps many models of one architecture as one stack."""

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
    """A stack of models that run in one batch if that is faster than one after another.

    Args:
        models: loaded models; one model given G times is one model with G masks.

    Raises:
        OptionError: the list is empty.

    Example:
        >>> models = [load("model.pth"), load("model.pth")]
        >>> scores = stack(models).scores()
        >>> len(scores), len(scores[0])
        (2, 20)
    """
    if not models:
        raise OptionError("A stack needs at least 1 model, not 0.", "Give at least one.")
    return Stack(tuple(models))


@dataclass(frozen=True)
class Stack:
    """Models of one architecture. Every method does the same as the function of that name on each model, with one seed.

    A short trial chooses the variant (:meth:`variant`). One after another, the results equal those of separate runs bit
    for bit. In one stack, sums are taken in another order: a step differs by float32 rounding. After many steps of
    ascent the results may differ as much as those of two seeds if the loss is steep.

    The results of ``unlearn`` and ``recover`` hold an error for each model that fails; the other models continue.
    """

    models: tuple[Model, ...]

    def __len__(self) -> int:
        return len(self.models)

    def variant(self, data: CleanData, batch_size: int = 128) -> Choice:
        """Whether steps on batches of ``data`` run as ``stack`` or ``loop`` (its ``winner``), and why."""
        return stack_or_loop(self.models, data.images[: min(batch_size, len(data))])

    def _parts(self, data: CleanData, batch_size: int) -> list[tuple[Model, ...]]:
        """Groups of models that share their steps."""
        as_stack = self.variant(data, batch_size).winner == "stack"
        return [self.models] if as_stack else [(model,) for model in self.models]

    def scores(self) -> list[dict[str, Tensor]]:
        """``channel_lipschitz`` of every model, with the spectral norms of all filters of all models in one call."""
        return channel_lipschitz_of(self.models)

    def unlearn(
        self, data: CleanData, settings: UnlearnSettings, seed: int = 0, precision: Precision = DEFAULT
    ) -> list[Unlearned | TrainingError]:
        """Unlearns every model on ``data``; each stops and retries at another learning rate independently."""
        parts = self._parts(data, settings.batch_size)
        return [one for part in parts for one in unlearn_stack(part, data, settings, seed, precision)]

    def recover(
        self, data: CleanData, settings: RecoverSettings, seed: int = 0, precision: Precision = DEFAULT
    ) -> list[Recovered | TrainingError]:
        """A mask for every model of this stack, which must be unlearned models."""
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

        On a CPU the models are swept one after another, each with cached feature maps. On a GPU all models are pruned
        at the same threshold in one pass, if a trial finds that faster.

        Raises:
            OptionError: the number of masks is not the number of models.
        """
        if len(masks) != len(self.models):
            raise OptionError(f"There are {len(masks)} masks for {len(self.models)} models.", "Give one per model.")
        return sweep_stack(self.models, masks, sets, settings, precision)
