import torch

from bdprune.attacks.patterns import Stamp, checkerboard, in_corner, noise, picture


def test_the_checkerboard_starts_with_white() -> None:
    assert checkerboard(3).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_a_patch_in_the_corner_keeps_the_margin() -> None:
    placed = in_corner(torch.full((1, 2, 3), 0.5), 1, (3, 5, 6))
    assert placed.shape == (1, 5, 6)
    assert placed.nonzero()[:, 1:].tolist() == [[2, 2], [2, 3], [2, 4], [3, 2], [3, 3], [3, 4]]


def test_the_stamp_replaces_exactly_the_masked_pixels() -> None:
    mask = torch.tensor([[[1.0, 0.0]]])
    images = torch.tensor([0.3, 0.7]).view(1, 1, 1, 2).expand(2, 3, 1, 2)
    out = Stamp(mask, torch.full((3, 1, 2), 0.1))(images)
    assert torch.equal(out, torch.tensor([0.1, 0.7]).view(1, 1, 1, 2).expand(2, 3, 1, 2))


def test_pictures_are_smooth_with_full_range_and_noise_is_not_smooth() -> None:
    for shape in ((1, 16, 16), (3, 32, 32), (3, 64, 48)):
        made = picture(shape, 0)
        assert made.shape == shape
        assert (made.min(), made.max()) == (0, 1)
        assert made.diff(dim=2).abs().mean() < 0.1
        # Neighbours of uniform noise differ by 1/3 on average.
        assert abs(noise(shape, 0).diff(dim=2).abs().mean() - 1 / 3) < 0.04


def test_pictures_are_coloured_and_depend_on_their_seed() -> None:
    made = picture((3, 32, 32), 4)
    assert torch.equal(made, picture((3, 32, 32), 4))
    assert (made - picture((3, 32, 32), 5)).abs().mean() > 0.05
    assert (made[0] - made[1]).abs().mean() > 0.02
