"""The triggers under optimisation, one for each hypothesis: variables, Adam, penalty, and the best trigger so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdprune.loops.inversion.families import Family

_BETAS, _EPSILON = (0.5, 0.9), 1e-8  # Neural Cleanse's Adam
_SPANS = (1e-6, 1e3)  # limits of a penalty


@dataclass(frozen=True)
class PenaltyRule:
    """How the weight of a trigger's size follows its success, separately for each hypothesis.

    Attributes:
        first: weight of the size at the start.
        factor: the weight grows by this factor while the success is reached, and shrinks by its power of 1.5 otherwise
            (Neural Cleanse).
        memory: share of the previous success in the running average.
        patience: number of steps in a row with, or without, the success after which the weight changes.
        from_zero: whether the weight is 0 until the success was first reached in ``patience`` steps in a row.
    """

    first: float = 1e-3
    factor: float = 1.3
    memory: float = 0.8
    patience: int = 1
    from_zero: bool = False


class Candidates:
    """H triggers of one kind; each has its own Adam moments and its own penalty, so any can be dropped.

    All state changes in place, so that a step can be recorded as a CUDA graph.

    Args:
        family: of all triggers.
        count: H.
        shape: (C, h, w) of an image.
        rule: of the penalties.
        generator: draws the first patterns (CPU).
        device: where the state is kept.
    """

    def __init__(
        self,
        family: Family,
        count: int,
        shape: tuple[int, int, int],
        rule: PenaltyRule,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.family, self._shape, self._rule = family, shape, rule
        self._variables = [one.to(device) for one in family.start(count, shape, generator)]
        self._best = [one.clone() for one in self._variables]
        self._means = [torch.zeros_like(one) for one in self._variables]
        self._squares = [torch.zeros_like(one) for one in self._variables]
        self._steps, self._success, self._streak = (torch.zeros(count, device=device) for _ in range(3))
        self.penalty = torch.full((count,), 0.0 if rule.from_zero else rule.first, device=device)
        self.sizes = torch.full((count,), torch.inf, device=device)
        """Size of the smallest successful trigger of each hypothesis ``[H]``; infinite if none was."""

    def __len__(self) -> int:
        return len(self.sizes)

    def leaves(self) -> list[Tensor]:
        """The variables as leaves of a new graph."""
        return [one.detach().requires_grad_() for one in self._variables]

    def update(self, leaves: Sequence[Tensor], success: Tensor, goal: Tensor, lr: float) -> None:
        """Adam along the gradients of ``leaves``, then the penalties.

        Args:
            success: share of this step's images that each trigger flips ``[H]``.
            goal: success that each should reach ``[H]``.
            lr: learning rate.
        """
        self._steps += 1
        self._success.mul_(self._rule.memory).add_(success, alpha=1 - self._rule.memory)
        # The average starts at 0; without the correction no early trigger would count as successful.
        reached = self._success / (1 - self._rule.memory**self._steps) >= goal
        self._keep_best(leaves, reached)
        self._follow(reached)
        for variable, mean, square, leaf in zip(self._variables, self._means, self._squares, leaves, strict=True):
            assert leaf.grad is not None
            mean.mul_(_BETAS[0]).add_(leaf.grad, alpha=1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(leaf.grad, leaf.grad, value=1 - _BETAS[1])
            first, second = (_per_trigger(1 - beta**self._steps, leaf) for beta in _BETAS)
            variable.sub_(lr * (mean / first) / ((square / second).sqrt() + _EPSILON))

    def _follow(self, reached: Tensor) -> None:
        """Changes the penalties of the hypotheses that have ``patience`` steps of the same outcome in a row."""
        rule, ahead = self._rule, torch.where(reached, 1.0, -1.0)
        # A streak is positive for steps with success, negative for steps without.
        self._streak.mul_(self._streak * ahead > 0).add_(ahead)
        due = self._streak.abs() >= rule.patience
        factor = torch.where(reached, rule.factor, rule.factor**-1.5)
        started = torch.where(reached, rule.first, 0.0)
        moved = torch.where(self.penalty > 0, (self.penalty * factor).clamp(*_SPANS), started)
        self.penalty.copy_(torch.where(due, moved, self.penalty))
        self._streak.mul_(~due)

    def _keep_best(self, leaves: Sequence[Tensor], reached: Tensor) -> None:
        sizes = self.family.sizes(*self.tensors_of([leaf.detach() for leaf in leaves]))
        better = reached & (sizes < self.sizes)
        self.sizes.copy_(torch.where(better, sizes, self.sizes))
        for best, leaf in zip(self._best, leaves, strict=True):
            best.copy_(torch.where(_per_trigger(better, leaf), leaf.detach(), best))

    def tensors_of(self, variables: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
        """Masks (None if the family has none) and patterns of the variables."""
        return self.family.tensors(variables, self._shape)

    def best(self) -> tuple[Tensor | None, Tensor]:
        """Masks and patterns of the best triggers; the current ones where none was successful."""
        found = self.sizes.isfinite()
        pairs = zip(self._best, self._variables, strict=True)
        return self.tensors_of([torch.where(_per_trigger(found, best), best, now) for best, now in pairs])

    def select(self, index: Tensor) -> None:
        """Keeps only the hypotheses at ``index`` ([M] int64), in that order."""
        for group in (self._variables, self._best, self._means, self._squares):
            group[:] = [one[index] for one in group]
        self._steps, self._success, self._streak = (one[index] for one in (self._steps, self._success, self._streak))
        self.penalty, self.sizes = self.penalty[index], self.sizes[index]

    def restart_from_best(self, ease: float) -> None:
        """Starts again from the best triggers, with penalties multiplied by ``ease`` and nothing counted as best."""
        found = self.sizes.isfinite()
        for variable, best in zip(self._variables, self._best, strict=True):
            variable.copy_(torch.where(_per_trigger(found, best), best, variable))
        self.penalty.mul_(ease)
        self._success.zero_()
        for state in (self._steps, self._streak, *self._means, *self._squares):
            state.zero_()
        self.sizes.fill_(torch.inf)


def _per_trigger(values: Tensor, like: Tensor) -> Tensor:
    """``[H]`` in a shape that broadcasts over ``[H, C, h, w]``."""
    return values.view(-1, *[1] * (like.dim() - 1))
