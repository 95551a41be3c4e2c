import pytest
import torch

from bdprune.attacks.badnets import BadNets


def test_patch_is_a_checkerboard_one_pixel_from_the_corner() -> None:
    images = 0.1 + 0.8 * torch.rand(2, 3, 16, 16)
    triggered = BadNets(target=3).new_trigger((3, 16, 16))(images)
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(triggered[1, 2, 12:15, 12:15], expected)
    changed = (triggered != images).any(1)
    assert changed.sum(dim=(1, 2)).tolist() == [9, 9]
    assert changed[:, 12:15, 12:15].all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_of_size_one_is_a_white_pixel(channels: int) -> None:
    images = 0.1 + 0.8 * torch.rand(2, channels, 16, 16)
    triggered = BadNets(target=3, size=1, margin=2).new_trigger((channels, 16, 16))(images)
    assert (triggered[:, :, 13, 13] == 1).all()
    assert (triggered != images).any(1).sum((1, 2)).tolist() == [1, 1]


def test_patch_size_and_margin_are_settings() -> None:
    images = 0.1 + 0.8 * torch.rand(1, 1, 20, 16)
    triggered = BadNets(target=0, size=5, margin=0).new_trigger((1, 20, 16))(images)
    changed = (triggered != images).any(1)[0]
    assert changed.sum() == 25
    assert changed[15:20, 11:16].all()
