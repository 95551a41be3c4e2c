"""Views of a few images."""

from __future__ import annotations

from dataclasses import replace

import torch

from bdprune.methods import mixed_views
from bdprune.runtime import predict
from bdprune.testing.planted import planted


def test_mixed_views_are_images_that_the_network_labels() -> None:
    known = planted()
    few = known.data.sample(1, torch.Generator().manual_seed(0))
    views = mixed_views(known.clean, few, 45, seed=0)
    assert views.images.shape == (50, *few.images.shape[1:]) and views.images.dtype == few.images.dtype
    assert views.images.min() >= 0 and views.images.max() <= 1
    assert torch.equal(views.labels, predict(known.clean.module, views.images))
    assert len(torch.unique(views.images.flatten(1), dim=0)) == 50
    assert torch.equal(views.images, mixed_views(known.clean, few, 45, seed=0).images)
    assert not torch.equal(views.images, mixed_views(known.clean, few, 45, seed=1).images)


def test_each_view_shows_most_of_its_own_image() -> None:
    known = planted()
    few = known.data.sample(1, torch.Generator().manual_seed(0))
    flat = replace(few, images=torch.linspace(0.2, 0.8, 10).view(-1, 1, 1, 1).expand_as(few.images), mirror=False)
    inside = (..., slice(4, -4), slice(4, -4))  # shifted images have black borders
    views = mixed_views(known.clean, flat, 500, seed=0).images[inside]
    own = flat.images.repeat(50, 1, 1, 1)[inside]
    assert (views - own).abs().max() <= 0.4 * 0.6 + 0.2 * 0.8 + 0.1 + 1e-6
    assert views.mean() - own.mean() < 0.05 and (views - own).std() > 0.05
