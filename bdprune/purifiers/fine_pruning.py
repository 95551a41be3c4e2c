"""Fine-Pruning (Liu et al., RAID 2018): prune the channels that sleep on clean images, then fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bdprune.analysis import Case, last_layer
from bdprune.data import CleanData
from bdprune.errors import ArchitectureError, OptionError
from bdprune.loops import FineTuneSettings, KeptPruned, Sweep, SweepPoint, SweepSettings, fine_tune, sweep
from bdprune.methods import CurvePoint, Phases, Purifier, Repair, accuracy_on, hold_out, views_drop
from bdprune.model import FilterGroup, Model, PruneMode, last_group, prune
from bdprune.record import Needs, check_shares
from bdprune.runtime import BATCH, DEFAULT, Precision, within

_TUNING = FineTuneSettings(lr=0.01, epochs=15)


@dataclass(frozen=True)
class FinePruning(Purifier):
    """Prunes the channels of the last conv that are least active on clean images, and fine-tunes the rest.

    Channels are pruned from the least active on, while the clean accuracy on held-out images stays above a limit, which
    lies far below the accuracy of the network: the fine-tuning must regain the difference. If it does not, the channels
    whose pruning costs at most ``max_drop`` are pruned, with the fine-tuning or, if that costs too much, without it.

    Args:
        prune_drop: largest fall of clean accuracy by the pruning, in [0, 1], on the held-out images.
        least_accuracy: accuracy below which the pruning stops, in [0, 1], used instead of ``prune_drop``; None for
            none. RNP's comparison uses 0.8.
        max_drop: largest fall of clean accuracy by the pruning without a fine-tuning, in [0, 1], on the held-out
            images.
        regained_drop: largest fall of clean accuracy after the fine-tuning on views of the held-out images
            (:func:`bdprune.methods.views_drop`), in [0, 1].
        held_out: share of the clean images held out for these decisions.
        layer: path of the conv; by default the last one that is not in a shortcut.
        fine_tuning: settings of the fine-tuning, in which pruned channels stay pruned; None for none.
        mode: how a channel is pruned; by default it outputs zero.
        precision: precision of the fine-tuning (:func:`bdprune.runtime.plan_for`).
        seed: seed for the split, the order and the augmentation.
    """

    prune_drop: float = 0.1
    least_accuracy: float | None = None
    max_drop: float = 0.02
    regained_drop: float = 0.04
    held_out: float = 0.3
    layer: str | None = None
    fine_tuning: FineTuneSettings | None = field(default_factory=lambda: _TUNING)
    mode: PruneMode = "zero_gamma_beta"
    precision: Precision = DEFAULT
    seed: int = 0

    chosen: ClassVar[str] = "least active"

    id = "bdprune.fine_pruning"
    title = "prunes the channels of the last conv that are least active on clean images, then fine-tunes"
    paper = "Liu et al., Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks, RAID 2018"
    needs = Needs(images="labelled", minimum=2)
    cost = "training"
    limits = "It leaves backdoors that use channels which clean images use too, or that are not in the last conv."
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"least_accuracy": 0.8, "regained_drop": 1.0},
        "robust": {},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, ["least_accuracy"])

    def __call__(self, case: Case) -> Repair:
        """Repairs a copy of the model; a share of the images is held out for the decisions.

        Raises:
            ArchitectureError: the network has no conv.
            DataError: there are no clean images, or no class has an image to hold out.
            OptionError: the network has no conv at ``layer``.
            TrainingError: the loss of the fine-tuning is not finite.
        """
        self.check(case)
        rest, held = hold_out(case.images, self.held_out, self.seed)
        group, phase = self._group(case.model), Phases()
        with phase("rank"):
            scores = self._scores(case, case.with_data(rest), group)
        with phase("prune"):
            swept, limit = self._sweep(case.model, {group.name: _ranks(scores)}, held)
        with phase("fine_tune"):
            model, chosen, tuned = self._decide(case.model, swept, limit, rest, held)
        few = chosen is not None and self.max_drop < limit and chosen == swept.highest(self.max_drop)
        return self.repair(
            case,
            model,
            held,
            pruned=chosen.pruned if chosen else {},
            retrained=tuned,
            num_filters=group.num_filters,
            selection=self._selection(chosen, group.name, len(held), tuned, few),
            masks={group.name: scores},
            curve=tuple(CurvePoint(p.threshold, p.clean_accuracy, p.filters_pruned) for p in swept.points),
            seconds=phase.seconds,
            attachments=(case.attach("filter_scores", {group.name: scores}),),
        )

    def _group(self, model: Model) -> FilterGroup:
        """The conv to prune."""
        if not model.groups:
            raise ArchitectureError("The network has no conv to prune.", "Use a method that does not prune convs.")
        if self.layer is None:
            return last_group(model.groups)
        found = [group for group in model.groups if group.name == self.layer]
        if not found:
            known = ", ".join(group.name for group in model.groups[-5:])
            raise OptionError(f"The network has no conv {self.layer!r}.", f"Its last convs are {known}.")
        return found[0]

    def _scores(self, case: Case, rest: Case, group: FilterGroup) -> Tensor:
        """Score of every channel ``[num_filters]``; the lowest are pruned first."""
        return mean_activations(case.model, rest.images.images, group)

    def _sweep(self, model: Model, ranks: Mapping[str, Tensor], held: CleanData) -> tuple[Sweep, float]:
        """Clean accuracy with more and more channels pruned, up to the first that costs too much; and the limit."""
        limit = self.prune_drop
        if self.least_accuracy is not None:
            limit = accuracy_on(model, held) - self.least_accuracy
        (count,) = map(len, ranks.values())
        thresholds = [float(index) for index in range(1, count + 1)]
        settings = SweepSettings(thresholds, limit, self.mode, stop_early=True)
        return sweep(model, ranks, [held], settings, self.precision), limit

    def _decide(
        self, model: Model, swept: Sweep, limit: float, rest: CleanData, held: CleanData
    ) -> tuple[Model, SweepPoint | None, bool]:
        """The repaired model, its pruned channels, and whether it was fine-tuned."""
        many, few = swept.highest(limit), swept.highest(min(limit, self.max_drop))
        for chosen in [many] if few == many else [many, few]:
            if self.fine_tuning is None:
                break
            pruned = chosen.pruned if chosen else {}
            kept, found = KeptPruned(pruned, self.mode), prune(model, pruned, self.mode)
            found = fine_tune(found, rest, self.fine_tuning, kept, self.seed, self.precision)
            if within(views_drop(model, found, held, self.seed), self.regained_drop):
                return found, chosen, True
        return prune(model, few.pruned if few else {}, self.mode), few, False

    def _selection(self, chosen: SweepPoint | None, layer: str, held: int, tuned: bool, few: bool) -> str:
        if chosen is None:
            nothing = f"nothing is pruned: one channel of {layer} costs too much on {held} held-out images"
            return nothing + ("; fine-tuned" if tuned else "")
        limit = f"cost at most {100 * (self.max_drop if few else self.prune_drop):g} points"
        if not few and self.least_accuracy is not None:
            limit = f"leave an accuracy of at least {self.least_accuracy:g}"
        what = f"{chosen.filters_pruned} {self.chosen} channels of {layer}, which {limit} on {held} held-out images"
        return what + (", then fine-tuned" if tuned else "")


@torch.no_grad()
def mean_activations(model: Model, images: Tensor, group: FilterGroup) -> Tensor:
    """Mean of every channel's rectified map, after its norm, over images and positions.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].

    Returns:
        ``[num_filters]``, float64, on the CPU.
    """
    module = model.clone().module.eval()
    start, sums = group.norm.start if group.norm else 0, torch.zeros(group.num_filters, dtype=torch.float64)

    def observe(layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps = output[:, start : start + group.num_filters].relu()
        sums.add_(maps.mean((2, 3)).sum(0).double().cpu())

    last_layer(module.get_submodule("network"), group).register_forward_hook(observe)
    for batch in images.split(BATCH):
        module(batch.to(model.device))
    return sums / len(images)


def _ranks(scores: Tensor) -> Tensor:
    """1 for the lowest score, 2 for the next, ..."""
    order = torch.argsort(scores, stable=True)
    return torch.empty(len(scores)).scatter_(0, order, torch.arange(1.0, len(scores) + 1))
