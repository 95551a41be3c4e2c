from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.blend import Blend
from bdprune.attacks.feature_collision import FeatureCollision
from bdprune.attacks.trojan import TrojanNeuron
from bdprune.data.clean import CleanData
from bdprune.errors import ArtifactError, OptionError
from bdprune.files.safetensors_file import dump_safetensors
from bdprune.zoo.show import attack_of, grid, panels, picture, ready_trigger, some_victims, strength


def test_settings_are_read_from_text() -> None:
    assert attack_of("badnets", {}) == BadNets(target=0)
    assert attack_of("badnets", {"target": "3", "size": "5", "rate": "0.05"}) == BadNets(3, 0.05, size=5)
    assert attack_of("badnets", {"target": "all-to-all"}) == BadNets(target=None)
    assert attack_of("badnets", {"target": "3", "sources": "1,5"}) == BadNets(3, sources=(1, 5))
    assert attack_of("blend", {"pattern": "image", "alpha": "0.1"}) == Blend(0, pattern="image", alpha=0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("nope", {}, "no attack 'nope'"),
        ("badnets", {"sise": "3"}, "no setting 'sise'"),
        ("badnets", {"size": "big"}, "^The setting size of badnets, 'big', is not valid: expected int, got str"),
        ("badnets", {"rate": "1.5"}, "rate is 1.5"),
        (
            "badnets",
            {"sources": "1;5"},
            "^The setting sources of badnets, .*'1;5'.*, is not valid: expected int, got str",
        ),
        ("blend", {"pattern": "cat"}, "^The setting pattern of blend, 'cat', is not valid: invalid enum value 'cat'"),
    ],
)
def test_impossible_requests_are_named(kind: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        attack_of(kind, settings)
    assert caught.value.hint


def test_panels_are_clean_triggered_and_ten_times_the_difference_on_grey() -> None:
    images = torch.full((2, 3, 16, 16), 0.4)
    trigger = Blend(target=0, alpha=0.1).new_trigger((3, 16, 16))
    cells = panels(trigger, images)
    moved = 0.1 * (trigger.get_buffer("pattern") - 0.4)
    assert cells.shape == (2, 3, 3, 16, 16)
    assert torch.equal(cells[:, 0], images)
    assert torch.allclose(cells[:, 1], images + moved)
    assert torch.allclose(cells[:, 2], (0.5 + 10 * moved).clamp(0, 1).expand_as(images), atol=1e-5)
    assert (cells[:, 2] == 0).any() or (cells[:, 2] == 1).any()


@pytest.mark.parametrize(("channels", "size", "scale"), [(1, 32, 4), (3, 64, 2), (3, 200, 1)])
def test_cells_are_enlarged_pixel_by_pixel_below_captions(channels: int, size: int, scale: int) -> None:
    cells = torch.rand(2, 3, channels, size, size)
    sheet = grid(cells)
    edge = scale * size
    assert sheet.shape == (20 + 2 * (edge + 8), 8 + 3 * (edge + 8), 3)
    assert (sheet[:20] == 255).all() and (sheet[:, :8] == 255).all()
    top, left = 20 + edge + 8, 8 + 2 * (edge + 8)  # second row, third column
    expected = (255 * cells[1, 2, :, 5, 7]).round().expand(3).to(torch.uint8)
    block = sheet[top + 5 * scale : top + 6 * scale, left + 7 * scale : left + 8 * scale]
    assert torch.equal(block, expected.expand_as(block))


def test_picture_is_a_png_with_captions() -> None:
    image = pytest.importorskip("PIL.Image")
    cells = torch.rand(2, 3, 3, 32, 32)
    opened = image.open(io.BytesIO(picture(cells)))
    assert opened.format == "PNG"
    pixels, bare = np.asarray(opened), grid(cells).numpy()
    assert (pixels[20:] == bare[20:]).all()
    for column in range(3):  # each has a caption
        left = 8 + column * (128 + 8)
        assert (pixels[:20, left : left + 128] < 128).any()


def test_shown_images_are_counted_images_spread_over_the_classes() -> None:
    labels = torch.arange(40) // 10
    data = CleanData(labels.view(-1, 1, 1, 1) / 10.0 * torch.ones(40, 1, 4, 4), labels)

    def classes(attack: BadNets | FeatureCollision, count: int) -> list[float]:
        return [round(10 * image.mean().item()) for image in some_victims(attack, data, count)]

    assert classes(BadNets(target=1), 3) == [0, 2, 3]
    assert classes(BadNets(target=None), 100) == labels.tolist()
    assert classes(FeatureCollision(target=0, source_class=2), 2) == [2, 2]
    assert classes(BadNets(target=0, sources=(1, 3)), 2) == [1, 3]
    with pytest.raises(OptionError, match="target is 4"):
        some_victims(BadNets(target=4), data, 3)
    with pytest.raises(OptionError, match="cannot succeed on any image of memory"):
        some_victims(BadNets(target=1), data.subset(torch.arange(10, 20)), 3)


def test_learned_triggers_come_from_their_file(tmp_path: Path) -> None:
    attack, shape, file = TrojanNeuron(target=0), (3, 16, 16), tmp_path / "t.safetensors"
    with pytest.raises(OptionError, match="learned with a model") as caught:
        ready_trigger(attack, shape, None)
    assert "--trigger" in caught.value.hint
    learned = attack.new_trigger(shape)
    learned.get_buffer("pattern").copy_(torch.rand(shape))
    file.write_bytes(dump_safetensors(learned.state_dict(), {}))
    images = torch.rand(2, *shape)
    ready = ready_trigger(attack, shape, file)
    assert torch.equal(ready(images), learned(images)) and not ready.training

    with pytest.raises(ArtifactError, match="does not fit the trigger"):
        ready_trigger(attack, (3, 32, 32), file)
    with pytest.raises(ArtifactError, match="No such file"):
        ready_trigger(attack, shape, tmp_path / "missing")
    file.write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        ready_trigger(attack, shape, file)


def test_the_strength_of_a_patch_counts_and_averages_its_changes() -> None:
    images = torch.full((2, 3, 16, 16), 0.4)
    found = strength(BadNets(target=0).new_trigger((3, 16, 16)), images)
    assert found.pixels == pytest.approx(9 / 256)
    assert found.largest == pytest.approx(0.6)
    assert found.mean == pytest.approx((5 * 0.6 + 4 * 0.4) / 256)
