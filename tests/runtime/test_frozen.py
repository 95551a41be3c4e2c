"""Frozen networks: folded norms, gradients of images only, and stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bdprune.model import Model
from bdprune.model.architectures import build
from bdprune.runtime import FrozenNetworks, folded_form


def random_model(arch: str = "resnet18_cifar", seed: int = 0, **more: int) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(arch, 10, **more).eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for value, low in ((layer.running_mean, -0.2), (layer.running_var, 0.5), (layer.weight.data, 0.5)):
                    assert value is not None
                    value.uniform_(low, low + 1)
    return Model(network, arch, 10, (3, 32, 32))


IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_norms_are_folded_into_their_convs() -> None:
    model = random_model()
    folded = folded_form(model, IMAGES)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.network.modules())
    assert torch.allclose(folded.module(IMAGES), model.module(IMAGES), rtol=1e-3, atol=1e-4)


def test_a_norm_before_its_conv_stays() -> None:
    model = random_model("preact_resnet18")
    folded = folded_form(model, IMAGES)
    left = sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.network.modules())
    assert 0 < left < sum(isinstance(layer, nn.BatchNorm2d) for layer in model.network.modules())
    assert torch.allclose(folded.module(IMAGES), model.module(IMAGES), rtol=1e-3, atol=1e-4)


def test_a_network_that_reads_its_norm_is_left_alone() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.conv(x)).mean((2, 3)) * self.norm.weight)

    model = Model(Reads().eval(), "reads", 10, (3, 32, 32))
    assert folded_form(model, IMAGES) is model


@pytest.mark.parametrize("precision", ["float32", "winograd"])
def test_gradients_reach_the_images_only(precision: str) -> None:
    model = random_model()
    frozen = FrozenNetworks([model], IMAGES, precision)  # type: ignore[arg-type]
    ours, plain = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    frozen.logits(ours).logsumexp(1).sum().backward()
    model.module(plain).logsumexp(1).sum().backward()
    assert ours.grad is not None and plain.grad is not None
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-2, atol=1e-3 * float(plain.grad.abs().max()))


def test_a_stack_takes_images_of_its_own_for_each_model() -> None:
    models = [random_model(seed=seed) for seed in (0, 1)]
    frozen = FrozenNetworks(models, IMAGES)
    logits = frozen.logits(IMAGES)
    expected = torch.cat([models[0].module(IMAGES[:3]), models[1].module(IMAGES[3:])])
    assert torch.allclose(logits, expected, rtol=1e-2, atol=1e-3)


def test_models_that_cannot_all_be_folded_are_stacked_unfolded() -> None:
    models = [random_model(seed=seed) for seed in (0, 1)]
    models[1].network.bn1.register_forward_hook(lambda module, inputs, output: None)
    frozen = FrozenNetworks(models, IMAGES)
    expected = torch.cat([models[0].module(IMAGES[:3]), models[1].module(IMAGES[3:])])
    assert torch.allclose(frozen.logits(IMAGES), expected, rtol=1e-2, atol=1e-3)
