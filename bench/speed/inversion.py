"""Trigger inversion: ten target labels and an untargeted hypothesis about one ResNet-18.

All variants but the published loop search with the same hypotheses, first patterns, images, steps, penalties and
stopping rule. Each stage is timed with a thirtieth of its steps and scaled, because all steps of a stage do the same
work. About a thirtieth of 500 images is there, so that the measurements on held-out images have the right share of the
time. The network has random weights, and the images are noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.data import CleanData
from bdprune.loops import Inversion, InvertSettings, Stage, every_target, invert, split_images
from bdprune.model import Model
from bench.speed.benchmark import Benchmark, Kind, Variant, Work, relative_error
from bench.speed.networks import CLASSES, clean_images, conv_flops, resnet18, weight_bytes
from bench.speed.plan import Plan
from bench.speed.stamp import Stamp, broadcast, flat

NAME = "Trigger inversion"
_WIDTHS, _IMAGES, _SHARE = (8, 32), 20, 30
_PUBLISHED_STEPS, _PUBLISHED_BATCH, _TIMED = 1000, 32, 2


def benchmarks(plan: Plan) -> list[Benchmark]:
    """One benchmark for each width."""
    return [inversion_benchmark(plan, width) for width in ((8,) if plan.quick else _WIDTHS)]


def timed_settings() -> InvertSettings:
    """The default search with fewer steps. No image is left out, because the network labels them at random."""
    full = InvertSettings()

    def part(stage: Stage) -> Stage:
        return replace(stage, steps=max(1, stage.steps // _SHARE))

    stages = tuple(part(stage) for stage in full.stages)
    return replace(full, stages=stages, final=part(full.final), flip_rate=0.99, only_right=False)


def inversion_benchmark(plan: Plan, width: int) -> Benchmark:
    """One width. The lower bound has a forward pass and a gradient of the images for every image of every step."""
    model, data, settings = resnet18(width, plan.device), clean_images(_IMAGES, plan.device), timed_settings()

    def plain(style: Style) -> Tensor:
        return PlainSearch(model, data, settings, style).run()

    @cache
    def truth() -> Tensor:
        return plain(TRUTH)

    def ours() -> Tensor:
        found: Inversion = invert([model], data, every_target(CLASSES), settings)[0]
        return torch.tensor([one.size for one in found.triggers])

    note = f"timed over 1/{_SHARE} of the steps of each stage, with {_IMAGES} images"
    published = f"{_PUBLISHED_STEPS} steps of {_PUBLISHED_BATCH} images for each label, without an early stop; "
    published += f"extrapolated from {_TIMED} steps of one label"
    scale = CLASSES * _PUBLISHED_STEPS / _TIMED
    eager: dict[str, Style] = {"all hypotheses in one batch": Style()}
    eager["channels_last"] = Style(channels_last=True)
    eager["channels_last, flat blend"] = Style(channels_last=True, blend=flat)
    calls: list[tuple[str, Kind, Callable[[], Tensor]]] = [
        *((name, "eager", partial(plain, style)) for name, style in eager.items()),
        ("bdprune.loops.invert", "ours", ours),
    ]
    author = partial(published_steps, model, data)
    author()  # the first optimizer of a process imports modules, which is not to be timed
    variants = (
        Variant("one label after another, as published", "author", author, scale, published, exact=False),
        *(Variant(name, kind, call, _SHARE, note) for name, kind, call in calls),
    )
    steps = image_steps(InvertSettings())
    size = 4.0 * data.images[0].numel()
    work = Work(steps * size * 2 + weight_bytes(model.network), 2 * conv_flops(model.network) * steps)
    return Benchmark(
        f"{NAME} width {width}",
        f"{CLASSES} labels and an untargeted hypothesis, {steps} passes of an image",
        variants,
        (work,),
        lambda found: relative_error([found], [truth()]),
        "largest error of the size of a trigger, relative to the largest one",
        seconds=plan.seconds / 4,
        host=True,
    )


def image_steps(settings: InvertSettings) -> int:
    """Passes of an image in a search whose final stage takes all its rounds."""
    stages = (*settings.stages, *[settings.final] * settings.rounds)
    return sum(stage.steps * stage.images * (stage.keep or CLASSES + 1) for stage in stages)


@dataclass(frozen=True)
class Style:
    """The style of a plain search: layout, how triggers are stamped, and dtype (float64 for the exact result)."""

    channels_last: bool = False
    blend: Stamp = broadcast
    dtype: torch.dtype = torch.float32

    def placed(self, value: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in this style."""
        kind = torch.channels_last if self.channels_last else torch.contiguous_format
        return value.to(self.dtype).contiguous(memory_format=kind)

    def frozen(self, model: Model) -> nn.Module:
        """A copy of the model in this style whose weights need no gradients, in eval mode."""
        kind = torch.channels_last if self.channels_last else torch.contiguous_format
        module = copy.deepcopy(model.module).eval().requires_grad_(False)
        return module.to(dtype=self.dtype, memory_format=kind)  # type: ignore[call-overload,no-any-return]


TRUTH = Style(dtype=torch.float64)


class PlainSearch:
    """What :func:`bdprune.loops.invert` does for patches and one model, in plain PyTorch."""

    def __init__(self, model: Model, data: CleanData, settings: InvertSettings, style: Style) -> None:
        self._network, self._settings, self._style = style.frozen(model), settings, style
        self._generator = torch.Generator().manual_seed(0)
        search, held = (
            CleanData(style.placed(part.images.to(model.device)), part.labels.to(model.device))
            for part in split_images(data, settings, 0)
        )
        self._search, self._held = search, held
        count, shape = CLASSES + 1, data.images.shape[1:]
        self._targets = torch.arange(count, device=model.device)  # the last one is untargeted
        self._members = torch.arange(count)
        opacity = torch.full((count, 1, *shape[1:]), 0.05).logit()
        start = [opacity, torch.randn(count, *shape, generator=self._generator)]
        self._variables = [style.placed(one.to(model.device)).requires_grad_() for one in start]
        self._best = [one.detach().clone() for one in self._variables]
        self._sizes = torch.full((count,), torch.inf, device=model.device, dtype=style.dtype)
        self._success = torch.zeros_like(self._sizes)
        self._penalty = torch.full_like(self._sizes, settings.penalty.first)
        self._adam, self._steps = self._new_adam(), 0

    def run(self) -> Tensor:
        """The size of the trigger of each hypothesis ``[H]``."""
        found = torch.zeros(CLASSES + 1, dtype=self._style.dtype)
        for stage in self._settings.stages:
            self._keep(stage.keep)
            self._run_stage(stage, self._settings.success)
            found[self._members] = self._current_sizes()
        self._keep(self._settings.final.keep)
        best, sizes = self._held_rates(), self._current_sizes()
        for _ in range(self._settings.rounds):
            if min(best) >= self._settings.flip_rate:
                break
            self._restart()
            self._run_stage(self._settings.final, (1 + self._settings.flip_rate) / 2)
            again, grown = self._held_rates(), self._current_sizes()
            for place, (old, new) in enumerate(zip(best, again, strict=True)):
                if old < min(new, self._settings.flip_rate):
                    best[place], sizes[place] = new, grown[place]
        found[self._members] = sizes
        return found

    def _run_stage(self, stage: Stage, goal: float) -> None:
        drawn = torch.randint(1 << 31, (stage.steps, CLASSES + 1, stage.images), generator=self._generator)
        pools = [(self._search.labels != target).nonzero().flatten() for target in self._targets]
        for numbers in drawn[:, self._members].to(self._targets.device):
            picks = [pool[own % len(pool)] for pool, own in zip(pools, numbers, strict=True)]
            self._step(torch.stack(picks), goal)

    def _step(self, picks: Tensor, goal: float) -> None:
        masks, patterns = (one.sigmoid() for one in self._variables)
        stamped = self._style.blend(self._search.images, masks, patterns, picks)
        logits = self._network(self._style.placed(stamped.flatten(0, 1))).unflatten(0, picks.shape)
        labels, sizes = self._search.labels[picks], masks.flatten(1).sum(1)
        loss = (self._losses(logits, labels) + self._penalty * sizes).sum()
        self._adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            self._follow(sizes, self._flips(logits, labels).to(self._success.dtype).mean(1), goal)
        self._adam.step()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with the target, and ``-log(1 - p(label))`` without one, ``[H]``."""
        logs = logits.log_softmax(2)
        wanted = torch.where(self._targets == CLASSES, 0, self._targets)[:, None, None].expand(*labels.shape, 1)
        others = logs.scatter(2, labels.unsqueeze(2), -torch.inf).logsumexp(2)
        aimed = logs.gather(2, wanted).squeeze(2)
        return -torch.where(self._targets[:, None] == CLASSES, others, aimed).mean(1)

    def _flips(self, logits: Tensor, labels: Tensor) -> Tensor:
        predicted, targets = logits.argmax(2), self._targets[:, None]
        return torch.where(targets == CLASSES, predicted != labels, predicted == targets)

    def _follow(self, sizes: Tensor, success: Tensor, goal: float) -> None:
        """Keeps the smallest successful triggers, and moves the penalties."""
        rule = self._settings.penalty
        self._steps += 1
        self._success.mul_(rule.memory).add_(success, alpha=1 - rule.memory)
        reached = self._success / (1 - rule.memory**self._steps) >= goal
        better = reached & (sizes < self._sizes)
        self._sizes = torch.where(better, sizes, self._sizes)
        for best, now in zip(self._best, self._variables, strict=True):
            best.copy_(torch.where(better[:, None, None, None], now, best))
        self._penalty = (self._penalty * torch.where(reached, rule.factor, rule.factor**-1.5)).clamp(1e-6, 1e3)

    def _triggers(self) -> list[Tensor]:
        """The smallest successful masks and patterns; the current ones where none was."""
        found = self._sizes.isfinite()[:, None, None, None]
        pairs = zip(self._best, self._variables, strict=True)
        return [torch.where(found, best, now).detach() for best, now in pairs]

    def _current_sizes(self) -> Tensor:
        return self._triggers()[0].sigmoid().flatten(1).sum(1).cpu()

    @torch.no_grad()
    def _held_rates(self) -> list[float]:
        masks, patterns = (one.sigmoid() for one in self._triggers())
        images, rates = self._held.images, []
        everything = torch.arange(len(images), device=images.device).expand(len(masks), -1)
        stamped = self._style.blend(images, masks, patterns, everything)
        logits = torch.stack([self._network(self._style.placed(own)) for own in stamped])
        flipped = self._flips(logits, self._held.labels.expand(len(masks), -1))
        for own, target in zip(flipped, self._targets, strict=True):
            rates.append(own[self._held.labels != target].float().mean().item())
        return rates

    def _keep(self, keep: int) -> None:
        """Drops all but the smallest triggers."""
        if not keep or keep >= len(self._members):
            return
        index = self._sizes.argsort(stable=True)[:keep].sort().values
        self._members, self._targets = self._members[index.cpu()], self._targets[index]
        self._best = [one[index] for one in self._best]
        self._sizes, self._success, self._penalty = self._sizes[index], self._success[index], self._penalty[index]
        moments = [self._adam.state[one] for one in self._variables]
        self._variables = [one.detach()[index].requires_grad_() for one in self._variables]
        self._adam = self._new_adam()
        for variable, state in zip(self._variables, moments, strict=True):
            kept = {name: value[index] if value.dim() else value for name, value in state.items()}
            self._adam.state[variable] = kept

    def _restart(self) -> None:
        self._variables = [one.clone().requires_grad_() for one in self._triggers()]
        self._penalty = self._penalty * 0.25
        self._success, self._sizes = torch.zeros_like(self._success), torch.full_like(self._sizes, torch.inf)
        self._adam, self._steps = self._new_adam(), 0

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._variables, self._settings.lr, betas=(0.5, 0.9))


def published_steps(model: Model, data: CleanData) -> Sequence[Tensor]:
    """A few steps of Neural Cleanse (Wang et al., S&P 2019) for one label: Adam on one mask and one pattern.

    As in its code, the weights get no gradients.
    """
    network = Style().frozen(model)
    shape = data.images.shape[1:]
    generator = torch.Generator().manual_seed(0)
    images = data.images.to(model.device).repeat(-(-_PUBLISHED_BATCH // len(data)), 1, 1, 1)[:_PUBLISHED_BATCH]
    mask, pattern = (torch.randn(count, *shape[1:], generator=generator).to(model.device) for count in (1, shape[0]))
    variables = [mask.requires_grad_(), pattern.requires_grad_()]
    adam = torch.optim.Adam(variables, 0.1, betas=(0.5, 0.9))
    wanted = torch.zeros(_PUBLISHED_BATCH, dtype=torch.int64, device=model.device)
    for _ in range(_TIMED):
        opacity, colours = (one.tanh() / 2 + 0.5 for one in variables)
        logits = network((1 - opacity) * images + opacity * colours)
        adam.zero_grad()
        (functional.cross_entropy(logits, wanted) + 1e-3 * opacity.sum()).backward()
        adam.step()
    return variables
