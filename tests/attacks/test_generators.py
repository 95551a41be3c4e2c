import pytest
import torch

from bdprune.attacks.generators import Change, EncoderDecoder


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 17, 20), (3, 33, 32)])
@pytest.mark.parametrize("skips", [False, True])
def test_the_output_has_the_size_of_the_input(channels: int, height: int, width: int, skips: bool) -> None:
    made = EncoderDecoder(channels, 2, (4, 8, 16), skips)(torch.rand(3, channels, height, width))
    assert made.shape == (3, 2, height, width)
    assert made.std() > 0.01


def test_images_do_not_affect_each_other() -> None:
    net, images = EncoderDecoder(3, 3, (4, 8)), torch.rand(4, 3, 16, 16)
    assert torch.allclose(net(images)[2:3], net(images[2:3]), atol=1e-5)


def test_skips_bypass_the_smallest_resolution() -> None:
    """If the smallest resolution outputs zero, only the skips distinguish two images."""
    images = torch.rand(2, 3, 16, 16)
    for skips in (False, True):
        net = EncoderDecoder(3, 3, (4, 8), skips)
        norm = net.down[0][1]
        torch.nn.init.zeros_(norm.weight)
        one, two = net(images)
        assert bool((one - two).abs().max() > 1e-4) is skips


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_the_change_is_bounded_and_pixels_stay_in_range(eps: float) -> None:
    images = torch.rand(4, 3, 16, 16)
    net = Change(3, 4, eps)
    torch.nn.init.normal_(net.change.last.weight, std=10.0)
    changed = net(images)
    far = (changed - images).abs().max()
    assert 0.9 * eps < far <= eps + 1e-6
    assert 0 <= changed.min() <= changed.max() <= 1
