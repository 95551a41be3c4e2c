import torch

from bdprune.attacks.blend import Blend
from bdprune.attacks.patterns import picture


def test_blend_mixes_one_pattern_into_every_image() -> None:
    images = torch.rand(3, 3, 16, 16)
    triggered = Blend(target=0, alpha=0.2).new_trigger((3, 16, 16))(images)
    pattern = (triggered - 0.8 * images) / 0.2
    assert torch.allclose(pattern[0], pattern[2], atol=1e-5)
    assert pattern.min() >= -1e-5
    assert pattern.max() <= 1 + 1e-5
    assert pattern.std() > 0.2  # uniform noise has 0.289


def test_the_blend_pattern_depends_only_on_its_seed() -> None:
    images = torch.rand(1, 1, 16, 16)
    one, same, other = Blend(target=0), Blend(target=5, rate=0.3), Blend(target=0, pattern_seed=1)
    first = one.new_trigger((1, 16, 16))(images)
    assert torch.equal(first, same.new_trigger((1, 16, 16))(images))
    assert not torch.equal(first, other.new_trigger((1, 16, 16))(images))


def test_noise_is_the_pattern_of_the_shipped_models() -> None:
    trigger = Blend(target=0, pattern_seed=7).new_trigger((3, 8, 8))
    assert torch.equal(trigger.get_buffer("pattern"), torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(7)))


def test_blend_of_an_image() -> None:
    images = torch.rand(2, 3, 16, 16)
    triggered = Blend(target=0, alpha=0.3, pattern="image", pattern_seed=2).new_trigger((3, 16, 16))(images)
    assert torch.allclose(triggered, 0.7 * images + 0.3 * picture((3, 16, 16), 2))
