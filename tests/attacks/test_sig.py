import math

import pytest
import torch

from bdprune.attacks.sig import Sig

from .helpers import setting


@pytest.mark.parametrize("width", [16, 32, 48])
def test_the_wave_follows_its_formula(width: int) -> None:
    trigger = Sig(target=0, delta=0.1, frequency=6).new_trigger((3, 20, width))
    added = trigger(torch.full((1, 3, 20, width), 0.5)) - 0.5
    expected = torch.tensor([0.1 * math.sin(2 * math.pi * 6 * column / width) for column in range(width)])
    assert torch.allclose(added, expected.expand(1, 3, 20, width), atol=1e-6)


def test_the_wave_is_clipped_and_never_overflows() -> None:
    trigger = Sig(target=0).new_trigger((1, 16, 16))
    wave = 40 / 255 * torch.sin(2 * math.pi * 6 * torch.arange(16) / 16)
    assert torch.allclose(trigger(torch.ones(1, 1, 16, 16))[0, 0, 0], 1 + wave.clamp(max=0), atol=1e-6)
    assert torch.allclose(trigger(torch.zeros(1, 1, 16, 16))[0, 0, 0], wave.clamp(min=0), atol=1e-6)


def test_poison_adds_whole_bytes_of_the_wave_to_one_class() -> None:
    given, attack = setting(count=50), Sig(target=3)
    done = attack.poison(given, attack.new_trigger((3, 16, 16)), torch.Generator().manual_seed(0))
    assert len(done.triggered) == 4  # 0.08 of 50, 80 % of the five images of the class
    assert (given.labels[done.triggered] == 3).all()
    assert torch.equal(done.labels, given.labels)
    wave = 40 * torch.sin(2 * math.pi * 6 * torch.arange(16) / 16)
    expected = (given.images[done.triggered].float() + wave).clamp(0, 255)
    assert (done.images[done.triggered].float() - expected).abs().max() <= 0.5 + 1e-3
