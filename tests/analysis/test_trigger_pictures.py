"""Pictures of triggers, pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from bdprune.analysis import draw_trigger, shown_images
from bdprune.analysis.trigger_pictures import small_pictures
from bdprune.data import CleanData
from bdprune.loops import Trigger
from bdprune.record import MOST_PICTURE_BYTES

image = pytest.importorskip("PIL.Image")


def pixels(content: bytes) -> np.ndarray:
    with image.open(io.BytesIO(content)) as opened:
        return np.asarray(opened)


def patch(edge: int = 8, channels: int = 3) -> Trigger:
    """Two white opaque pixels at the lower right, and a half opaque one above."""
    mask, pattern = torch.zeros(1, edge, edge), torch.ones(channels, edge, edge)
    mask[0, -1, -2:], mask[0, -2, -1] = 1, 0.5
    return Trigger(mask, pattern, target=1)


def test_mask_and_pattern_of_a_patch() -> None:
    drawn = {name: pixels(one) for name, one in draw_trigger(patch()).items()}
    assert drawn.keys() == {"mask", "pattern"}
    assert drawn["mask"].shape == (8, 8) and drawn["mask"][-1].tolist() == [0] * 6 + [255] * 2
    assert drawn["pattern"].shape == (8, 8, 3) and drawn["pattern"][-2, -1].tolist() == [128] * 3


def test_an_additive_pattern_is_grey_where_it_changes_nothing() -> None:
    change = torch.zeros(1, 4, 4)
    change[0, 0, :3] = torch.tensor([0.1, -0.1, 0.5])
    drawn = {
        name: pixels(one) for name, one in draw_trigger(Trigger(None, change, target=None, kind="additive")).items()
    }
    assert drawn.keys() == {"pattern"}
    assert drawn["pattern"][:2, :3].tolist() == [[255, 0, 255], [128, 128, 128]]


def test_images_with_the_trigger_and_ten_times_its_changes() -> None:
    images = torch.stack([torch.full((3, 8, 8), 0.0), torch.full((3, 8, 8), 0.98)])
    drawn = draw_trigger(patch(), images)
    stamped, difference = pixels(drawn["stamped"]), pixels(drawn["difference"])
    assert stamped.shape == difference.shape == (8, 17, 3)  # one white column between two images
    assert (stamped[:, 8] == 255).all() and (difference[:, 8] == 255).all()
    assert (stamped[0, :8] == 0).all() and (stamped[-1, 6:8] == 255).all() and (stamped[-2, 7] == 128).all()
    assert (difference[-1, 6:8] == 255).all() and (difference[0][:8] == 0).all()
    assert (difference[-1, -1] == round(10 * 0.02 * 255)).all()


@pytest.mark.parametrize(("channels", "shape"), [(1, (8, 8)), (2, (8, 8)), (3, (8, 8, 3)), (4, (8, 8))])
def test_images_of_other_channels_than_three_are_grey(channels: int, shape: tuple[int, ...]) -> None:
    assert pixels(draw_trigger(patch(channels=channels))["pattern"]).shape == shape


@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 30), (30, 224), (32, 32), (1, 600)])
def test_small_pictures_fit_the_record(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 3, height, width, generator=generator)
    one = Trigger(torch.rand(1, height, width, generator=generator), noise[0], target=0)
    found = small_pictures(one, noise)
    assert found.keys() == {"mask", "pattern", "stamped", "difference"}
    assert sum(map(len, found.values())) <= MOST_PICTURE_BYTES
    assert max(pixels(found["mask"]).shape) <= 64
    large = draw_trigger(one, noise)
    assert pixels(large["mask"]).shape == (height, width)
    if height == width == 32:
        assert found == large


def clean(labels: list[int]) -> CleanData:
    """Images whose value is their place, divided by 100."""
    images = torch.arange(len(labels)).reshape(-1, 1, 1, 1) / 100
    return CleanData(images.expand(-1, 1, 2, 2), torch.tensor(labels))


@pytest.mark.parametrize(
    ("target", "sources", "labels", "places"),
    [
        (0, (), [0, 0, 1, 1, 2, 3, 4], [2, 4, 5]),
        (1, (), [0, 0, 1, 1, 2], [0, 4, 1]),
        (None, (), [2, 0, 2, 1], [1, 3, 0]),
        (0, (3,), [0, 3, 3, 1, 3, 3], [1, 2, 4]),
        (3, (3, 1), [3, 1, 3, 1], [1, 3]),
        (0, (3,), [0, 1], []),
        (0, (), [0, 1], [1]),
    ],
)
def test_shown_images_are_of_different_classes_that_the_trigger_flips(
    target: int | None, sources: tuple[int, ...], labels: list[int], places: list[int]
) -> None:
    one = Trigger(None, torch.zeros(1, 2, 2), target, sources, kind="additive")
    found = shown_images(clean(labels), one)
    assert (found[:, 0, 0, 0] * 100).round().int().tolist() == places
    assert ("stamped" in draw_trigger(one, found)) == bool(places)
