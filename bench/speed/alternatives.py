"""Alternative methods that score or repair filters, with their authors' settings: ANP, NAD, AWM and CLP.

They follow the published formulas and settings. A whole run takes minutes to hours, so some iterations are timed and
scaled to the published number. Each function returns a call that runs one such piece.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bdprune.analysis import norm_gain
from bdprune.data import CleanData
from bdprune.model import Model
from bdprune.runtime import crop_and_flip
from bench.speed import filter_spectral_norms
from bench.speed.benchmark import Variant
from bench.speed.networks import replace_modules
from bench.speed.plan import Plan

ANP_ITERATIONS, ANP_BATCH = 2000, 128
NAD_TEACHER_EPOCHS, NAD_STUDENT_EPOCHS, NAD_BATCH = 10, 20, 64
AWM_EPOCHS, AWM_BATCH = 20, 32


def variants(plan: Plan, model: Model, data: CleanData) -> tuple[Variant, ...]:
    """One variant per method."""
    steps = plan.alternative_steps
    nad_steps = -(-len(data) // NAD_BATCH)
    awm_steps = 5 * max(len(data) // AWM_BATCH, 1)
    timed = f"{steps} of {{}} iterations timed"
    return (
        Variant(
            f"ANP, {ANP_ITERATIONS} iterations",
            "alternative",
            adversarial_neuron_pruning(model, data, steps),
            ANP_ITERATIONS / steps,
            timed.format(ANP_ITERATIONS) + f", batches of {ANP_BATCH}",
            exact=False,
        ),
        Variant(
            f"NAD, {NAD_TEACHER_EPOCHS} + {NAD_STUDENT_EPOCHS} epochs",
            "alternative",
            attention_distillation(model, data, steps),
            NAD_TEACHER_EPOCHS * nad_steps / steps,
            f"{steps} of {NAD_TEACHER_EPOCHS * nad_steps} teacher steps and {2 * steps} of "
            f"{NAD_STUDENT_EPOCHS * nad_steps} student steps timed, batches of {min(NAD_BATCH, len(data))}",
            exact=False,
        ),
        Variant(
            f"AWM, {AWM_EPOCHS} epochs",
            "alternative",
            adversarial_weight_masking(model, data, steps),
            AWM_EPOCHS * awm_steps / steps,
            timed.format(AWM_EPOCHS * awm_steps) + f" of each kind, batches of {min(AWM_BATCH, len(data))}",
            exact=False,
        ),
        Variant(
            "CLP, data-free", "alternative", lambda: channel_lipschitz_loop(model), note="the whole run", exact=False
        ),
    )


def adversarial_neuron_pruning(model: Model, data: CleanData, steps: int) -> Callable[[], list[Tensor]]:
    """ANP: one sign step of noise on the scale and shift of every norm, then one step of the masks against it."""
    module = copy.deepcopy(model.module)
    replace_modules(module, nn.BatchNorm2d, NoisyNorm)
    module.train().requires_grad_(False)
    norms = [one for one in module.modules() if isinstance(one, NoisyNorm)]
    masks = [norm.mask.requires_grad_() for norm in norms]
    noises = [noise.requires_grad_() for norm in norms for noise in (norm.scale_noise, norm.shift_noise)]
    optimizer = torch.optim.SGD(masks, 0.2, 0.9)
    generator = torch.Generator().manual_seed(0)

    def loss(noisy: bool, images: Tensor, labels: Tensor) -> Tensor:
        for norm in norms:
            norm.noisy = noisy
        return functional.cross_entropy(module(images), labels)

    def iterate() -> list[Tensor]:
        for _ in range(steps):
            images, labels = _batch(model, data, ANP_BATCH, generator)
            with torch.no_grad():
                for noise in noises:
                    noise.uniform_(-0.4, 0.4)
            uphill = torch.autograd.grad(loss(True, images, labels), noises)
            with torch.no_grad():
                for noise, gradient in zip(noises, uphill, strict=True):
                    noise += 0.4 * gradient.sign()
            optimizer.zero_grad()
            total = 0.2 * loss(False, images, labels) + 0.8 * loss(True, images, labels)
            # This step does not update the noise, so its gradient is not computed.
            for mask, gradient in zip(masks, torch.autograd.grad(total, masks), strict=True):
                mask.grad = gradient
            optimizer.step()
            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0, 1)
        return masks

    return iterate


class NoisyNorm(nn.Module):
    """A batch norm with a mask and noise on its scale, and noise on its shift, all ``[C]``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm, nn.BatchNorm2d)
        self.norm, self.noisy = norm, False
        self.mask = nn.Parameter(torch.ones_like(norm.weight))
        self.scale_noise = nn.Parameter(torch.zeros_like(norm.weight))
        self.shift_noise = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        mask, shift = self.mask, norm.bias
        if self.noisy:
            mask, shift = mask + self.scale_noise, shift * (1 + self.shift_noise)
        scale = norm.weight * mask
        mean, variance = norm.running_mean, norm.running_var
        return functional.batch_norm(x, mean, variance, scale, shift, self.training, norm.momentum or 0.1, norm.eps)


def attention_distillation(model: Model, data: CleanData, steps: int) -> Callable[[], nn.Module]:
    """NAD: one step tunes the teacher and two distil its attention into the student, as in 10 and 20 epochs."""
    teacher, student = copy.deepcopy(model.module), copy.deepcopy(model.module)
    optimizers = [
        torch.optim.SGD(one.train().parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
        for one in (teacher, student)
    ]
    stages = [[one.get_submodule(f"network.layer{index}") for index in (2, 3, 4)] for one in (teacher, student)]
    seen: list[list[Tensor]] = [[], []]
    for layers, kept in zip(stages, seen, strict=True):
        for layer in layers:
            layer.register_forward_hook(_keeper(kept))
    generator = torch.Generator().manual_seed(0)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, distil: bool) -> None:
        images, labels = _batch(model, data, min(NAD_BATCH, len(data)), generator)
        seen[0].clear()
        seen[1].clear()
        loss = functional.cross_entropy(module(images), labels)
        if distil:
            with torch.no_grad():
                teacher(images)
            for weight, theirs, taught in zip((500, 1000, 1000), seen[1], seen[0], strict=True):
                loss = loss + weight * functional.mse_loss(_attention(theirs), _attention(taught))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def iterate() -> nn.Module:
        for _ in range(steps):
            teacher.train()
            step(teacher, optimizers[0], distil=False)
            teacher.eval()
            for _ in range(2):
                step(student, optimizers[1], distil=True)
        return student

    return iterate


def _keeper(kept: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    return lambda module, inputs, output: kept.append(output)


def _attention(maps: Tensor) -> Tensor:
    """Squares summed over channels, ``[N, H W]``, normalised to unit length."""
    energy = maps.square().sum(1).flatten(1)
    return energy / (energy.norm(dim=1, keepdim=True) + 1e-6)


def adversarial_weight_masking(model: Model, data: CleanData, steps: int) -> Callable[[], list[Tensor]]:
    """AWM: one ascent step of a perturbation for all images, and one step of the masks on every weight."""
    module = copy.deepcopy(model.module).eval().requires_grad_(False)
    weights = {f"{name}.weight": one.weight for name, one in module.named_modules() if isinstance(one, nn.Conv2d)}
    masks = {name: torch.ones_like(weight).requires_grad_() for name, weight in weights.items()}
    optimizer = torch.optim.Adam(masks.values(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    delta = torch.zeros(1, *model.input_shape, device=model.device, requires_grad=True)

    def masked(images: Tensor) -> Tensor:
        overrides = {name: weight * masks[name] for name, weight in weights.items()}
        logits: Tensor = functional_call(module, overrides, (images,))
        return logits

    def perturb() -> None:
        images, _ = _batch(model, data, min(AWM_BATCH, len(data)), generator)
        with torch.no_grad():
            own = masked(images).argmax(1)
        (uphill,) = torch.autograd.grad(functional.cross_entropy(masked(images + delta), own), delta)
        with torch.no_grad():
            delta.add_(10 * uphill)
            delta.mul_((1000 / delta.abs().sum().clamp(min=1e-12)).clamp(max=1))

    def learn() -> None:
        images, labels = _batch(model, data, min(AWM_BATCH, len(data)), generator)
        optimizer.zero_grad()
        loss = 0.9 * functional.cross_entropy(masked(images), labels)
        loss = loss + 0.1 * functional.cross_entropy(masked((images + delta.detach()).clamp(0, 1)), labels)
        (loss + 1e-8 * sum(mask.abs().sum() for mask in masks.values())).backward()
        optimizer.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)

    def iterate() -> list[Tensor]:
        for _ in range(steps):
            perturb()
            learn()
        return list(masks.values())

    return iterate


def channel_lipschitz_loop(model: Model) -> dict[str, Tensor]:
    """CLP: an SVD per filter times the gain of its norm; prunes filters three deviations above their layer's mean."""
    weights = [model.network.get_parameter(f"{group.conv}.weight").detach() for group in model.groups]
    scores = {}
    for group, norms in zip(model.groups, filter_spectral_norms.author_loop(weights), strict=True):
        gain = norm_gain(model.network, group)
        bound = norms if gain is None else norms * gain
        scores[group.name] = (bound > bound.mean() + 3 * bound.std()).nonzero().flatten()
    return scores


def _batch(model: Model, data: CleanData, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images drawn with replacement, cropped and flipped, NCHW, on the model's device."""
    index = torch.randint(len(data), (count,), generator=generator)
    images = crop_and_flip(data.images[index], generator).contiguous()
    return images.to(model.device), data.labels[index].to(model.device)
