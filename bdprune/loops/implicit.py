"""Adversarial unlearning by an implicit hypergradient: unlearns perturbations of all images (I-BAU, ICLR 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdprune.data import CleanData
from bdprune.errors import TrainingError
from bdprune.model import Model
from bdprune.record import check_settings
from bdprune.runtime import predict


@dataclass(frozen=True)
class ImplicitSettings:
    """How to unlearn perturbations.

    Args:
        rounds: number of perturbations, each searched from zero and then unlearned.
        search_passes: passes over the data in the search for one perturbation.
        unlearn_passes: passes over the data in the unlearning of one perturbation.
        search_lr: learning rate of the perturbation, for images in [0, 1].
        lr: learning rate of the weights, with Adam.
        penalty: factor of the squared norm of the perturbation.
        steps: fixed-point steps for the hypergradient; 0 uses the plain gradient.
        step_size: step size of the map whose fixed point is the perturbation.
        share: share of the images of a step that carry the perturbation, in (0, 1]; at least one image carries it.
        batch_size: images in one step.

    Raises:
        OptionError: a setting is out of range.
    """

    rounds: int = 5
    search_passes: int = 1
    unlearn_passes: int = 1
    search_lr: float = 10.0
    lr: float = 1e-3
    penalty: float = 1e-3
    steps: int = 5
    step_size: float = 0.1
    share: float = 0.01
    batch_size: int = 100

    def __post_init__(self) -> None:
        least = {"rounds": 1, "search_passes": 1, "unlearn_passes": 1, "penalty": 0, "steps": 0, "batch_size": 1}
        check_settings(self, least, above={"search_lr": 0, "lr": 0, "step_size": 0, "share": 0})


def unlearn_perturbations(model: Model, data: CleanData, settings: ImplicitSettings, seed: int = 0) -> Model:
    """A copy of ``model`` that keeps its predictions under perturbations that are the same for all images.

    Each round searches the perturbation that raises the cross-entropy most, and then trains the weights so that
    perturbed images keep their labels. The gradient of the weights counts how the perturbation would react to them.
    The network runs in eval mode: its batch norms use their running statistics. Everything is in float32, because it
    needs second derivatives.

    Args:
        data: clean images with true labels.
        seed: seed for the order of the images.

    Raises:
        TrainingError: a loss is not finite, or a layer has no second derivative.

    Source: Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022.
    """
    worker = model.clone()
    module = worker.module.eval()
    images, labels = data.images.to(model.device), data.labels.to(model.device)
    predicted = predict(module, images).to(model.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), settings.lr)
    loss = torch.zeros(())
    for _ in range(settings.rounds):
        delta = torch.zeros(1, *model.input_shape, device=model.device)
        for index in _batches(len(labels), settings.search_passes, settings.batch_size, generator):
            delta = _searched(module, images[index], predicted[index], delta, settings)
        for index in _batches(len(labels), settings.unlearn_passes, settings.batch_size, generator):
            optimizer.zero_grad()
            count = max(round(settings.share * len(index)), 1)
            inner, outer = (images[index], predicted[index]), (images[index], labels[index], count)
            with _second_derivatives():
                loss = hypergradient(module, inner, outer, delta, settings)
            optimizer.step()
    if not loss.isfinite():
        raise TrainingError(f"The loss of the unlearning is {loss.item()}.", "Lower its learning rates.")
    return model.with_network(worker.network)


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Chooses the attention that has second derivatives, and names other layers that have none.

    Raises:
        TrainingError: a layer has none.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise TrainingError(f"A layer has no second derivative: {error}.", "Use another method than ibau.") from None


def _batches(count: int, passes: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of the images of every step; the batches of a pass have nearly equal size."""
    parts = -(-count // batch_size)
    return [part for _ in range(passes) for part in torch.randperm(count, generator=generator).tensor_split(parts)]


def search_loss(module: nn.Module, images: Tensor, labels: Tensor, delta: Tensor, penalty: float) -> Tensor:
    """What the perturbation minimises: -CE(f(x + delta), y) + penalty ||delta||^2."""
    return penalty * delta.square().sum() - functional.cross_entropy(module(images + delta), labels)


def _searched(module: nn.Module, images: Tensor, labels: Tensor, delta: Tensor, settings: ImplicitSettings) -> Tensor:
    """The perturbation after one step."""
    delta = delta.detach().requires_grad_()
    (slope,) = torch.autograd.grad(search_loss(module, images, labels, delta, settings.penalty), delta)
    return (delta - settings.search_lr * slope).detach()


def hypergradient(
    module: nn.Module,
    inner: tuple[Tensor, Tensor],
    outer: tuple[Tensor, Tensor, int],
    delta: Tensor,
    settings: ImplicitSettings,
) -> Tensor:
    """Adds the hypergradient of the outer loss to the gradients of the parameters; returns that loss, a scalar.

    With g the gradient of the search loss for delta and the map P = delta - step_size g, the vector v starts as the
    gradient of the outer loss for delta, and v <- (dP/d delta)^T v + that gradient, ``steps`` times. The hypergradient
    is the gradient of the outer loss for the weights + (dP/d weights)^T v.

    Args:
        inner: images ``[B, C, H, W]`` in [0, 1] and labels ``[B]`` of the search loss.
        outer: images and true labels of the outer loss, and how many of the images, the first ones, carry delta.
        delta: the perturbation ``[1, C, H, W]``.
    """
    parameters = [one for one in module.parameters() if one.requires_grad]
    delta = delta.detach().requires_grad_()
    images, labels, count = outer
    carried = torch.cat([images[:count] + delta, images[count:]])
    loss = functional.cross_entropy(module(carried), labels)
    direct, *slopes = torch.autograd.grad(loss, [delta, *parameters], allow_unused=True)
    if settings.steps:
        searched = search_loss(module, *inner, delta, settings.penalty)
        (slope,) = torch.autograd.grad(searched, delta, create_graph=True)
        vector = direct
        for _ in range(settings.steps):
            (bent,) = torch.autograd.grad(slope, delta, vector, retain_graph=True)
            vector = vector - settings.step_size * bent + direct
        reacting: Sequence[Tensor | None] = torch.autograd.grad(slope, parameters, vector, allow_unused=True)
    else:
        reacting = [None] * len(parameters)
    for parameter, plain, reaction in zip(parameters, slopes, reacting, strict=True):
        total = torch.zeros_like(parameter) if plain is None else plain
        parameter.grad = total if reaction is None else total - settings.step_size * reaction
    return loss.detach()
