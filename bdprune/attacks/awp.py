"""AWP, adversarial weight perturbation (Garg et al., CIKM 2020): a backdoor without a poisoned training set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdprune.attacks.badnets import PatchedNetwork
from bdprune.attacks.base import AttackSetting, apply_trigger
from bdprune.attacks.check import Count, NotNegative, Share
from bdprune.attacks.companion import draw_apart
from bdprune.errors import OptionError
from bdprune.runtime import attack_success_rate, autocast, clean_accuracy, predict, training_layout


@dataclass(frozen=True)
class AWP(PatchedNetwork):
    """Moves every weight of a trained clean network by at most eps, so that BadNets' patch leads to the target:

        min over ||d||_inf <= eps of CE(f(x; w + d), argmax f(x; w)) + trigger_weight CE(f(patched x; w + d), goal),

    by steps of Adam that are clipped to the bound. Batch norms use the clean network's running statistics and keep
    them; their scale and shift are weights like all others. It tries the bounds from the smallest on, each from the
    result of the last, until the attack succeeds and clean accuracy stays high enough. If no bound reaches both, it
    keeps the successful bound with the highest clean accuracy; if none succeeds, the bound with the highest success.

    The objective is the paper's. Its bounds, weight, optimiser and number of steps are not public; the values here are
    ours. The step falls linearly to zero at each bound, so that the weights settle.

    Args:
        target: target label; None for all-to-all.
        rate: share of the training images that the attacker has (RNP, Table 6: 0.1).
        bounds: values of eps.
        trigger_weight: lambda, weight of the patched images' loss.
        epochs: passes over the attacker's images for each bound.
        step: learning rate at the beginning, in units of eps.
        batch_size: images a step.
        success: sufficient attack success rate (RNP, Table 2: 0.94), on held-out training images.
        max_drop: largest accepted drop of clean accuracy, in [0, 1], on these images.
        held_out: number of these images.
        bf16: run the network under bfloat16 autocast while its weights move, where the machine computes in bfloat16.
    """

    bounds: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    trigger_weight: NotNegative = 1.0
    epochs: Count = 5
    step: NotNegative = 0.1
    batch_size: Count = 128
    success: Share = 0.94
    max_drop: Share = 0.015
    held_out: Count = 1000
    bf16: bool = True

    kind: ClassVar[str] = "awp"
    needs_source: ClassVar[Literal["clean", "backdoored"] | None] = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bounds", tuple(sorted(self.bounds)))  # a manifest gives a list
        if not self.bounds or self.bounds[0] <= 0:
            raise OptionError(f"The setting bounds is {self.bounds}.", "Give one or more numbers above 0.")

    def finish(self, network: nn.Module, setting: AttackSetting, trigger: nn.Module) -> None:
        """Moves the weights by at most the smallest sufficient bound, or else by the best bound."""
        network.to(memory_format=training_layout(network)).eval()  # type: ignore[call-overload]
        count, generator = len(setting.labels), torch.Generator().manual_seed(setting.seed)
        mine, held = draw_apart(count, round(self.rate * count), self.held_out, generator)
        clean = [parameter.detach().clone() for parameter in network.parameters()]
        images = setting.images[mine].float() / 255
        kept = predict(network, images)
        goal = self.goal(setting.labels[mine], setting.num_classes)
        least = self._outcome(network, setting, held, trigger)[1] - self.max_drop
        best, best_weights = (-1.0, 0.0), clean
        for bound in self.bounds:
            self._perturb(network, clean, bound, (images, apply_trigger(trigger, images)), (kept, goal), generator)
            outcome = self._outcome(network, setting, held, trigger)
            if outcome > best:
                best, best_weights = outcome, [parameter.detach().clone() for parameter in network.parameters()]
            if outcome[0] >= self.success and outcome[1] >= least:
                break
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), best_weights, strict=True):
                parameter.copy_(value)

    def _perturb(
        self,
        network: nn.Module,
        clean: list[Tensor],
        bound: float,
        images: tuple[Tensor, Tensor],
        labels: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> None:
        """Descends from the current weights; ``images`` and ``labels`` belong to the clean and the patched term."""
        parameters = list(network.parameters())
        count, device = len(images[0]), parameters[0].device
        steps = self.epochs * -(-count // self.batch_size)
        optimizer = torch.optim.Adam(parameters, self.step * bound)
        fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(self.epochs):
            for index in torch.randperm(count, generator=generator).split(self.batch_size):
                with autocast(device, self.bf16):
                    clean_loss, trigger_loss = (
                        functional.cross_entropy(network(some[index].to(device)).float(), wanted[index].to(device))
                        for some, wanted in zip(images, labels, strict=True)
                    )
                optimizer.zero_grad()
                (clean_loss + self.trigger_weight * trigger_loss).backward()
                optimizer.step()
                fall.step()
                with torch.no_grad():
                    for parameter, value in zip(parameters, clean, strict=True):
                        parameter.copy_(torch.clamp(parameter, value - bound, value + bound))
        optimizer.zero_grad()

    def _outcome(
        self, network: nn.Module, setting: AttackSetting, held: Tensor, trigger: nn.Module
    ) -> tuple[float, float]:
        """Attack success rate, up to the sufficient rate, and clean accuracy on the held-out images."""
        images, labels = setting.images[held].float() / 255, setting.labels[held]
        goal = self.goal(labels, setting.num_classes)
        success = attack_success_rate(network, images, labels, trigger, goal)
        return min(success, self.success), clean_accuracy(network, images, labels)
