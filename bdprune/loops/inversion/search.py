"""Trigger inversion: searches the smallest trigger of every hypothesis about a model, all in the same steps.

Source: Wang et al., Neural Cleanse, S&P 2019 (mask, pattern and penalty); Shen et al., K-Arm, ICML 2021 (scheduling).
Here losers drop out by successive halving, and success counts on images that the search never sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bdprune.data import CleanData
from bdprune.loops.inversion.candidates import Candidates
from bdprune.loops.inversion.families import FAMILIES
from bdprune.loops.inversion.hypotheses import Hypothesis
from bdprune.loops.inversion.objective import (
    clean_logits,
    flip_losses,
    flips,
    labelled_right,
    losses_by_target,
    targets_of,
)
from bdprune.loops.inversion.scoring import least_rate, risen, size_scores
from bdprune.loops.inversion.settings import Inversion, InvertSettings, Recovery, Stage, joined
from bdprune.loops.inversion.timing import PASSES_IN_A_STEP, images_in_time, step_seconds
from bdprune.loops.inversion.trigger import Trigger
from bdprune.loops.inversion.weights import SourceWeights
from bdprune.model import Model
from bdprune.runtime import BATCH, FrozenNetworks, captured

_PIXELS = 1 << 24  # values of all stamped images of one pass; more are computed in parts
_EASE = 0.25  # factor of the penalty at the start of the final stage


def invert(
    models: Sequence[Model],
    data: CleanData,
    hypotheses: Sequence[Hypothesis],
    settings: InvertSettings | None = None,
    seed: int = 0,
    seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> list[Inversion]:
    """Searches a small trigger for every hypothesis about every model.

    Args:
        models: one, or several of one architecture on one device; they do not change.
        data: labelled clean images; a share of them is held out from the search.
        hypotheses: what to search. If time is short, the last ones are skipped.
        settings: of the search; the defaults if None.
        seed: draws the split of the images, the first patterns and the images of each step.
        seconds: time limit. The search takes as many hypotheses as fit, and ends early if it must.
        progress: called after every step with (steps done, steps of all stages). The final stage may need fewer.

    Returns:
        One result for each model.

    Raises:
        DataError: no hypothesis has an image in the search.
    """
    start, settings = time.perf_counter(), settings or InvertSettings()
    generator = torch.Generator().manual_seed(seed)
    split = split_images(data, settings, seed)
    found: list[list[Inversion]] = [[] for _ in models]
    kinds = [kind for kind in FAMILIES if any(one.kind == kind for one in hypotheses)]
    networks = FrozenNetworks(models, data.images, settings.precision)
    for place, kind in enumerate(kinds):
        mine = [one for one in hypotheses if one.kind == kind]
        left = None if seconds is None else (start + seconds - time.perf_counter()) / (len(kinds) - place)
        until = None if left is None else time.perf_counter() + left
        some = split if left is None else images_in_time(split, networks, settings, left)
        search = Search(networks, some, mine, settings, generator)
        search.report = partial(_report, progress, place, len(kinds))
        parts = search.run(None if until is None else until - time.perf_counter())
        for own, part in zip(found, parts, strict=True):
            own.append(part)
    return [joined(own, hypotheses) for own in found]


def _report(progress: Callable[[int, int], None], place: int, kinds: int, step: int, steps: int) -> None:
    progress(place * steps + step, kinds * steps)


def split_images(data: CleanData, settings: InvertSettings, seed: int) -> tuple[CleanData, CleanData]:
    """The images that :func:`invert` searches with, and those that it holds out."""
    return data.split(settings.held_out, torch.Generator().manual_seed(seed))


class Search:
    """The search for one kind of trigger.

    The candidates of all models are one list: first those of the first model. Every model has the same number of them
    at any time.

    Args:
        networks: the models.
        split: images of the search, and held-out images.
        hypotheses: of one kind.
        settings: of the search.
        generator: source of randomness (CPU).
    """

    def __init__(
        self,
        networks: FrozenNetworks,
        split: tuple[CleanData, CleanData],
        hypotheses: Sequence[Hypothesis],
        settings: InvertSettings,
        generator: torch.Generator,
    ) -> None:
        self._networks, self._settings, self._generator = networks, settings, generator
        self._images, self._labels = self._placed(split[0])
        self._held_images, self._held_labels = self._placed(split[1])
        all_count = not settings.only_right
        self._right = labelled_right(networks, self._images, self._labels, all_count)
        self._held_right = labelled_right(networks, self._held_images, self._held_labels, all_count)
        models = range(networks.count)
        self._all = [one for one in hypotheses if all(len(self._pool(one, model)) for model in models)]
        self._image_steps, self._complete, self._done = 0, True, 0
        self.report: Callable[[int, int], None] = lambda step, steps: None

    def run(self, seconds: float | None) -> list[Inversion]:
        """The result of each model; takes about ``seconds`` at most."""
        start = time.perf_counter()
        self._until = None if seconds is None else start + seconds
        self._hypotheses = self._all if seconds is None else self._all[: self._affordable(seconds)]
        if not self._hypotheses:
            return [Inversion(()) for _ in range(self._networks.count)]
        count = self._networks.count
        self._start_candidates()
        sizes, stages = self._run_stages()
        triggers = self._strengthened(sizes)
        spent = (time.perf_counter() - start) / count
        results = []
        for g in range(count):
            rows = zip(
                self._hypotheses, sizes[g].tolist(), stages[g].tolist(), triggers[g], self._sources[g], strict=True
            )
            own = [Recovery(*row) for row in rows]
            results.append(Inversion(tuple(own), (), self._image_steps // count, spent, self._complete))
        return results

    # --------------------------------------------------------------------------------------------- images

    def _placed(self, data: CleanData) -> tuple[Tensor, Tensor]:
        images = data.images.to(self._networks.device).contiguous(memory_format=self._networks.layout)
        return images, data.labels.to(self._networks.device)

    def _pool(self, hypothesis: Hypothesis, model: int) -> Tensor:
        """Positions of the images of the search that a hypothesis about a model is about ``[P]``.

        They are images that the model labels correctly: a wrong label would count as a success.
        """
        return (hypothesis.takes(self._labels) & self._right[model]).nonzero().flatten()

    def _affordable(self, seconds: float) -> int:
        """The number of hypotheses that can be searched in this time, at least one."""
        passes = seconds / (step_seconds(self._networks, self._images) * self._networks.count)
        return next((count for count in range(len(self._all), 1, -1) if self._cost(count) <= passes), 1)

    def _cost(self, count: int) -> float:
        """Steps of single images that a search of ``count`` hypotheses takes, with one repetition of the last stage."""
        stages = (*self._settings.stages, self._settings.final)
        steps = sum(stage.steps * stage.images * min(stage.keep or count, count) for stage in stages)
        return steps + min(self._settings.final.keep or count, count) * len(self._held_labels) / PASSES_IN_A_STEP

    # --------------------------------------------------------------------------------------------- the search

    def _start_candidates(self) -> None:
        """Every model starts from the same patterns."""
        count, device = self._networks.count, self._networks.device
        family, shape = FAMILIES[self._hypotheses[0].kind], tuple(self._images.shape[1:])
        few = len(self._hypotheses)
        self._candidates = Candidates(family, few, shape, self._settings.penalty, self._generator, device)  # type: ignore[arg-type]
        self._candidates.select(torch.arange(few, device=device).repeat(count))
        self._members = torch.arange(few).repeat(count)  # the hypothesis of each candidate [F]
        self._weights = self._source_weights()

    def _source_weights(self) -> SourceWeights | None:
        """The weights of the sources of all candidates; None if no hypothesis has weights."""
        few, hypotheses = len(self._hypotheses), self._current()
        if not any(one.weighted for one in hypotheses):
            return None
        weighted = torch.tensor([one.weighted for one in hypotheses], device=self._networks.device)
        pools = [self._pool(one, place // few).cpu() for place, one in enumerate(hypotheses)]
        targets, parts = targets_of(hypotheses).view(-1, few).to(self._networks.device), []
        for logits, labels in clean_logits(self._networks, self._images, self._labels):
            pairs = zip(logits, targets, strict=True)
            parts.append(torch.cat([losses_by_target(own, labels)[:, goals].T for own, goals in pairs]))
        return SourceWeights(weighted, pools, self._labels, torch.cat(parts, 1))

    def _current(self) -> list[Hypothesis]:
        """The hypothesis of each candidate."""
        return [self._hypotheses[member] for member in self._members.tolist()]

    def _meant(self) -> list[tuple[Hypothesis, tuple[int, ...]]]:
        """The hypothesis of each candidate, of a weighted one about its easiest source, and the easiest sources."""
        ranked = [()] * len(self._members) if self._weights is None else self._weights.ranked()
        pairs = zip(self._current(), ranked, strict=True)
        return [(replace(one, sources=easiest[:1]) if easiest else one, easiest) for one, easiest in pairs]

    def _run_stages(self) -> tuple[Tensor, Tensor]:
        """Runs the search; returns the smallest size and the number of stages of each hypothesis ``[G, H]``."""
        count, few = self._networks.count, len(self._hypotheses)
        sizes, stages = torch.full((count, few), torch.inf), torch.zeros(count, few, dtype=torch.int64)
        self._found: list[list[Trigger | None]] = [[None] * few for _ in range(count)]
        self._sources: list[list[tuple[int, ...]]] = [[()] * few for _ in range(count)]
        for number, stage in enumerate(self._settings.stages):
            if number and not self._is_late():
                self._keep(sizes, stage.keep)
            elif number:
                break
            self._steps(stage, self._settings.success)
            self._note(sizes, stages)
        return sizes, stages

    def _is_late(self) -> bool:
        late = self._until is not None and time.perf_counter() >= self._until
        self._complete = self._complete and not late
        return late

    def _keep(self, sizes: Tensor, keep: int) -> None:
        """Drops all but the ``keep`` smallest candidates of each model."""
        own = self._members.view(self._networks.count, -1)
        if not keep or keep >= own.shape[1]:
            return
        places = sizes.gather(1, own).argsort(dim=1, stable=True)[:, :keep].sort(1).values
        index = (places + own.shape[1] * torch.arange(len(own))[:, None]).flatten()
        self._members = self._members[index]
        self._candidates.select(index.to(self._networks.device))
        if self._weights is not None:
            self._weights.select(index.to(self._networks.device))

    def _note(self, sizes: Tensor, stages: Tensor) -> None:
        """Records the sizes and the triggers of the current candidates."""
        own = self._members.view(self._networks.count, -1)
        found = self._candidates.sizes.cpu().view(own.shape)
        sizes.scatter_(1, own, torch.minimum(sizes.gather(1, own), found))
        stages.scatter_add_(1, own, torch.ones_like(own))
        self._note_triggers()

    def _note_triggers(
        self,
        rates: Sequence[float | None] | None = None,
        images: Sequence[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        """Records the triggers of the candidates at these places, of all by default."""
        masks, patterns = self._candidates.best()
        few, meant = len(self._members) // self._networks.count, self._meant()
        for place, member in enumerate(self._members.tolist()):
            if places is not None and place not in places:
                continue
            hypothesis, sources = meant[place]
            trigger = Trigger(
                None if masks is None else masks[place].cpu(),
                patterns[place].cpu(),
                hypothesis.target,
                hypothesis.sources,
                None if rates is None else rates[place],
                0 if images is None else images[place],
                hypothesis.kind,
            )
            self._found[place // few][member] = trigger
            self._sources[place // few][member] = sources

    def _steps(self, stage: Stage, goal: float) -> None:
        """The steps of one stage for the current candidates."""
        targets = targets_of(self._current()).to(self._networks.device)
        goals = torch.full((len(targets),), goal, device=self._networks.device)
        lr = self._settings.lr_of(self._candidates.family.kind)

        def step(picks: Tensor) -> tuple[Tensor, ...]:
            leaves = self._candidates.leaves()
            success = self._backward(leaves, targets, picks)
            self._candidates.update(leaves, success, goals, lr)
            return ()

        run = captured(step, self._networks.device)
        for picks in self._picks(stage):
            if self._is_late():
                return
            run(picks)
            self._image_steps += picks.numel()
            self._done += 1
            self.report(self._done, self._settings.steps)

    def _picks(self, stage: Stage) -> Iterator[Tensor]:
        """The images of every candidate in each step ``[F, N]``.

        They are drawn for each hypothesis, so they depend neither on the candidates that have dropped out nor on the
        other models of a stack.
        """
        drawn = torch.randint(1 << 31, (stage.steps, len(self._hypotheses), stage.images), generator=self._generator)
        few = len(self._members) // self._networks.count
        members = self._members.tolist()
        pools = [self._pool(one, place // few).cpu() for place, one in enumerate(self._current())]
        weighted = torch.tensor([one.weighted for one in self._current()])
        for numbers in drawn:
            picks = torch.stack([pool[numbers[one] % len(pool)] for pool, one in zip(pools, members, strict=True)])
            if self._weights is not None:
                picks = torch.where(weighted[:, None], self._weights.draw(numbers[self._members]), picks)
            yield picks.to(self._networks.device, non_blocking=True)

    def _backward(self, leaves: Sequence[Tensor], targets: Tensor, picks: Tensor) -> Tensor:
        """Computes the gradients of the leaves; returns the share of images that each candidate flips ``[F]``."""
        shares = []
        for part in self._parts(len(picks), picks.shape[1]):
            masks, patterns = self._candidates.tensors_of([leaf[part] for leaf in leaves])
            stamped = self._candidates.family.apply(self._images, masks, patterns, picks[part])
            logits = self._networks.logits(stamped.flatten(0, 1)).unflatten(0, stamped.shape[:2])
            labels = self._labels[picks[part]]
            size = self._candidates.family.sizes(masks, patterns)
            losses = flip_losses(logits, targets[part], labels)
            flipped = flips(logits.detach(), targets[part], labels).float()
            if self._weights is None:
                loss, share = losses.mean(1), flipped.mean(1)
            else:
                weights = self._weights.weigh(losses, picks[part], part)
                loss, share = (weights * losses).sum(1), (weights * flipped).sum(1)
            (loss + self._candidates.penalty[part] * size).sum().backward()
            shares.append(share)
        return torch.cat(shares)

    def _parts(self, candidates: int, images: int) -> list[slice]:
        """The candidates in parts that fit in memory; a stack of models is always one part."""
        pixels = images * self._images[0].numel()
        at_once = candidates if self._networks.count > 1 else max(1, _PIXELS // pixels)
        return [slice(first, first + at_once) for first in range(0, candidates, at_once)]

    # --------------------------------------------------------------------------------------------- the end

    def _strengthened(self, sizes: Tensor) -> list[list[Trigger]]:
        """The triggers of all hypotheses; those of the smallest ones hold on the held-out images, if possible."""
        goal = self._settings.flip_rate
        unfinished = [model for model in range(self._networks.count) if self._has_outstanding(sizes, model)]
        self._keep(sizes, self._settings.final.keep)
        best, images = self._held_out_rates()
        self._note_triggers(best, images)
        few = len(self._members) // self._networks.count
        for _ in range(self._settings.rounds):
            unfinished = [
                model for model in unfinished if least_rate(best[model * few : (model + 1) * few], goal) < goal
            ]
            if not unfinished or self._is_late():
                break
            self._candidates.restart_from_best(_EASE)
            self._steps(self._settings.final, (1 + goal) / 2)
            rates, images = self._held_out_rates()
            better = [one for one in risen(best, rates, goal) if one // few in unfinished]
            self._note_triggers(rates, images, better)
            best = [rates[place] if place in better else old for place, old in enumerate(best)]
        return [[trigger for trigger in own if trigger is not None] for own in self._found]

    def _has_outstanding(self, sizes: Tensor, model: int) -> bool:
        """Whether the score of a trigger of the last stage reaches the settings' limit."""
        if not self._settings.outstanding:
            return True
        members = self._members.view(self._networks.count, -1)[model].tolist()
        shape = tuple(self._images.shape[1:])
        most = FAMILIES[self._hypotheses[0].kind].largest(shape) * math.prod(shape[1:])
        targeted = [self._hypotheses[one].target is not None for one in members]
        scores = size_scores([float(sizes[model][one]) for one in members], targeted, most)
        return any(score >= self._settings.outstanding for score in scores)

    @torch.no_grad()
    def _held_out_rates(self) -> tuple[list[float | None], list[int]]:
        """Share of held-out images that each candidate flips (None if there are none), and their number.

        As in the search, only images that the model labels correctly count, unless the settings take all of them.
        """
        masks, patterns = self._candidates.best()
        few = len(self._members) // self._networks.count
        rates: list[float | None] = []
        counts: list[int] = []
        for place, (hypothesis, _) in enumerate(self._meant()):
            take = hypothesis.takes(self._held_labels) & self._held_right[place // few]
            mask = None if masks is None else masks[place : place + 1]
            logits = self._logits_of(place // few, self._held_images[take], mask, patterns[place : place + 1])
            labels, targets = self._held_labels[take], targets_of([hypothesis]).to(self._networks.device)
            found = flips(logits.unsqueeze(0), targets, labels.unsqueeze(0))
            rates.append(found.float().mean().item() if len(labels) else None)
            counts.append(len(labels))
        return rates, counts

    def _logits_of(self, model: int, images: Tensor, mask: Tensor | None, pattern: Tensor) -> Tensor:
        """Logits ``[N, K]`` of one model for stamped images."""
        count, parts = self._networks.count, []
        for part in images.split(BATCH):
            stamped = self._candidates.family.apply(part, mask, pattern)[0].repeat(count, 1, 1, 1)
            logits = self._networks.logits(stamped.contiguous(memory_format=self._networks.layout))
            parts.append(logits.unflatten(0, (count, -1))[model])
        return torch.cat(parts) if parts else torch.empty(0, 1, device=images.device)
