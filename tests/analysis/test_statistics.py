from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bdprune.analysis.statistics import filter_statistics


def post_norm_maps(bright: Any) -> Tensor:
    with torch.no_grad():
        return bright.model.network[:5](bright.data.images).double()  # type: ignore[no-any-return]


def test_activation_is_the_mean_map_norm_over_root_of_positions(bright: Any) -> None:
    maps = post_norm_maps(bright)
    expected = maps.flatten(2).norm(dim=2).mean(0) / 8
    found = filter_statistics(bright.model, bright.data)["3"].activation
    assert torch.allclose(found, expected, rtol=1e-5)
    rectified = filter_statistics(bright.model, bright.data, rectified=True)["3"].activation
    assert torch.allclose(rectified, maps.relu().flatten(2).norm(dim=2).mean(0) / 8, rtol=1e-5)


def test_correlation_is_over_images_and_positions(bright: Any) -> None:
    flat = post_norm_maps(bright).transpose(0, 1).flatten(1)
    matrix = torch.corrcoef(flat).abs()
    alive = flat.var(1) > 0
    expected = (matrix.nan_to_num().sum(1) - matrix.nan_to_num().diagonal()) / 11
    found = filter_statistics(bright.model, bright.data)["3"].correlation
    assert torch.allclose(found[alive], expected[alive], atol=1e-5)
    assert (found[~alive] == 1).all()


def test_saliency_per_image_and_per_batch(bright: Any) -> None:
    few = bright.data.subset(torch.arange(12))
    network = bright.model.clone().network
    weight = network[3].weight
    gradients = torch.stack(
        [
            torch.autograd.grad(functional.cross_entropy(network(image[None]), label[None]), weight)[0]
            for image, label in zip(few.images, few.labels, strict=True)
        ]
    ).double()
    flat = gradients.flatten(2)
    per_image = filter_statistics(bright.model, few)["3"].saliency
    assert torch.allclose(per_image, flat.abs().sum(2).mean(0) / 108, rtol=1e-4)
    euclidean = filter_statistics(bright.model, few, order=2)["3"].saliency
    assert torch.allclose(euclidean, flat.norm(dim=2).mean(0) / 108, rtol=1e-4)
    batch = filter_statistics(bright.model, few, per_image=False)["3"].saliency
    assert torch.allclose(batch, flat.mean(0).abs().sum(1) / 108, rtol=1e-3, atol=1e-9)


def test_the_model_keeps_no_hooks_or_gradients(bright: Any) -> None:
    before = {name: value.clone() for name, value in bright.model.network.state_dict().items()}
    filter_statistics(bright.model, bright.data)
    assert all(torch.equal(value, before[name]) for name, value in bright.model.network.state_dict().items())
    assert all(not module._forward_hooks for module in bright.model.network.modules())
    assert all(parameter.grad is None for parameter in bright.model.network.parameters())
