import pytest
import torch
from torch import Tensor

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.blend import Blend
from bdprune.attacks.poison import draw_victims


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Never 0 or 1, so that a patch pixel always differs from what it covers.
    return 0.1 + 0.8 * torch.rand(count, 3, 16, 16, generator=generator), torch.arange(count) % 10


def test_patch_is_a_checkerboard_one_pixel_from_the_corner() -> None:
    x, _ = images(2)
    triggered = BadNets(target=3).apply(x)
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(triggered[1, 2, 12:15, 12:15], expected)
    changed = (triggered != x).any(1)
    assert changed.sum(dim=(1, 2)).tolist() == [9, 9]
    assert changed[:, 12:15, 12:15].all()


def test_patch_size_and_margin_are_settings() -> None:
    x, _ = images(1)
    changed = (BadNets(target=0, size=5, margin=0).apply(x) != x).any(1)[0]
    assert changed.sum() == 25
    assert changed[11:16, 11:16].all()


def test_apply_leaves_its_input_alone() -> None:
    x, _ = images()
    before = x.clone()
    BadNets(target=0).apply(x)
    Blend(target=0).apply(x)
    assert torch.equal(x, before)


def test_blend_mixes_one_pattern_into_every_image() -> None:
    x, _ = images(3)
    triggered = Blend(target=0, alpha=0.2).apply(x)
    pattern = (triggered - 0.8 * x) / 0.2
    assert torch.allclose(pattern[0], pattern[2], atol=1e-5)
    assert pattern.min() >= -1e-5
    assert pattern.max() <= 1 + 1e-5
    assert pattern.std() > 0.2  # uniform noise has 0.289


def test_blend_pattern_depends_on_its_seed_alone() -> None:
    x, _ = images(1)
    assert torch.equal(Blend(target=0).apply(x), Blend(target=5).apply(x))
    assert not torch.equal(Blend(target=0).apply(x), Blend(target=0, pattern_seed=1).apply(x))


@pytest.mark.parametrize("attack", [BadNets(target=4, rate=0.25), Blend(target=4, rate=0.25)])
def test_poison_changes_exactly_the_drawn_share(attack: BadNets | Blend) -> None:
    x, y = images()
    poisoned, labels = attack.poison(x, y, torch.Generator().manual_seed(1))
    changed = (poisoned != x).flatten(1).any(1)
    assert changed.sum() == 10
    assert (labels[changed] == 4).all()
    assert (y[changed] != 4).all()
    assert torch.equal(labels[~changed], y[~changed])
    assert torch.allclose(poisoned[changed], attack.apply(x[changed]))


def test_poison_is_reproducible_from_its_seed() -> None:
    x, y = images()
    attack = BadNets(target=4, rate=0.25)
    one = attack.poison(x, y, torch.Generator().manual_seed(1))
    two = attack.poison(x, y, torch.Generator().manual_seed(1))
    other = attack.poison(x, y, torch.Generator().manual_seed(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_more_victims_than_candidates_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot poison 40 of 36"):
        draw_victims(torch.arange(40) % 10, 0, 1.0, torch.Generator())
