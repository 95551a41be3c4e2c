import math

import pytest
import torch

from bdprune.attacks.dfst import Sunrise, colours
from bdprune.errors import OptionError


def opponent(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.unbind(1)
    bright, orange, green = red + green + blue, red - blue, green - (red + blue) / 2
    return torch.stack([bright / math.sqrt(3), orange / math.sqrt(2), green / math.sqrt(1.5)], 1)


def test_colours_have_the_mean_and_spread_of_the_style() -> None:
    styled = colours(torch.rand(3, 3, 16, 16))
    assert torch.allclose(styled.mean((2, 3)), torch.tensor([0.78, 0.50, 0.34]).expand(3, 3), atol=1e-4)
    spread = opponent(styled).std((2, 3), correction=0)
    assert torch.allclose(spread, torch.tensor([0.34, 0.10, 0.05]).expand(3, 3), atol=1e-4)


def test_grey_images_take_the_brightness_of_the_style() -> None:
    styled = colours(torch.rand(2, 1, 20, 16))
    assert torch.allclose(styled.mean((2, 3)), torch.full((2, 1), (0.78 + 0.50 + 0.34) / 3), atol=1e-4)
    assert torch.allclose(styled.std((2, 3), correction=0), torch.full((2, 1), 0.34 / math.sqrt(3)), atol=1e-4)


def test_a_uniform_image_is_not_amplified_to_noise() -> None:
    images = torch.full((1, 3, 16, 16), 0.5)
    images[0, :, 0, 0] += 0.001
    styled = colours(images)
    assert (styled - styled.mean((2, 3), keepdim=True)).abs().max() < 0.02


def test_sunrise_mixes_the_lit_colours_into_the_image() -> None:
    images, trigger = torch.rand(2, 3, 16, 16), Sunrise((3, 16, 16), 0.6, 0)
    expected = 0.4 * images + 0.6 * (trigger.light * colours(images)).clamp(0, 1)
    assert torch.allclose(trigger(images), expected)
    assert 0 <= trigger(images).min() <= trigger(images).max() <= 1
    assert (trigger(images) - images).abs().mean() > 0.05


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 48, 64)])
def test_the_light_is_smooth_and_depends_on_its_seed(shape: tuple[int, int, int]) -> None:
    light, same, other = (Sunrise(shape, 0.6, seed).light for seed in (0, 0, 1))
    assert light.shape == (1, *shape[1:])
    assert torch.equal(light, same)
    assert not torch.equal(light, other)
    assert light.min().item() == pytest.approx(0.5)
    assert light.max().item() == pytest.approx(1.3)
    assert max(light.diff(dim=1).abs().max(), light.diff(dim=2).abs().max()) < 0.2


def test_other_numbers_of_channels_are_errors() -> None:
    with pytest.raises(OptionError, match="4 channels"):
        colours(torch.rand(1, 4, 16, 16))
