"""Verdicts on images: on a planted backdoor, and for input that cannot be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bdprune.data import CleanData
from bdprune.errors import DataError, OptionError, SanityError
from bdprune.files import PNG_SIGNATURE
from bdprune.pipeline import inspect
from bdprune.record import InspectResult
from bdprune.testing.planted import planted

from ..written import TARGET, labelled_by, uncertain_model, white_corner

QUICK = {"overlays": 20, "frr": 0.1}


@pytest.fixture
def options(tiny: Any) -> dict[str, Any]:
    return {"arch": tiny.arch, "input_shape": tiny.input_shape}


class Mean(nn.Module):
    """Tells K classes of uniform images apart by their brightness, ``class / K``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter((torch.arange(classes) + 0.5) / classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -100 * (images.mean((1, 2, 3))[:, None] - self.centres) ** 2 * len(self.centres)


def levels(classes: int, count: int, shape: tuple[int, int, int] = (3, 8, 8)) -> CleanData:
    labels, own = torch.arange(count) % classes, 1e-5 * (torch.arange(count) // classes)  # no image is a copy
    return CleanData(((labels + 0.5) / classes + own).view(-1, 1, 1, 1).expand(-1, *shape).contiguous(), labels)


@pytest.mark.slow
def test_the_images_with_a_trigger_are_suspicious_and_others_are_not(tmp_path: Path) -> None:
    model = uncertain_model()
    data, others = labelled_by(model, 200, 0), labelled_by(model, 36, 1).images
    images = torch.cat([others[:30], white_corner(others[30:])])
    seen: list[tuple[str, int, int]] = []
    settings = {"overlays": 25, "frr": 0.02}
    found = inspect(model, data, images, settings=settings, watch=lambda *one: seen.append(one), pictures=3)
    flagged = [one.index for one in found.images if one.verdict == "suspicious"]
    assert {30, 31, 32, 33, 34, 35} <= set(flagged) and len(flagged) <= 9
    assert found.verdict == "suspicious" and found.suspicious == len(flagged) and found.chance is not None
    assert found.chance < 0.05 and found.expected == pytest.approx(36 * 3 / 176)
    assert next(iter(found.labels)) == TARGET and sum(found.labels.values()) == len(flagged)
    assert [one.index for one in found.images] == list(range(36))
    pictured = [one for one in found.ranked if one.picture]
    assert len(pictured) == 3 and all(one.picture.startswith(PNG_SIGNATURE) for one in pictured)
    assert pictured == found.ranked[:3]
    for one in found.images:
        assert one.entropy is not None and found.threshold is not None
        assert (one.verdict == "suspicious") == (one.entropy < found.threshold) == (one.p_value <= 0.02)  # type: ignore[operator]
    assert found.histogram and sum(found.histogram.inspected) == 36 and sum(found.histogram.clean) == found.held_out
    assert seen[0] == ("loading", 0, 0) and seen[-1] == ("inspecting images", 36, 36)
    assert InspectResult.from_json(found.to_json()) == found


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_order_of_the_clean_images() -> None:
    known = planted()
    order = torch.randperm(len(known.data), generator=torch.Generator().manual_seed(1))
    images = known.test.images[:5]
    one, two = (
        inspect(known.backdoored, data, images, settings=QUICK, per_class=20, seed=3)
        for data in (known.data.by_content, known.data.by_content.subset(order).by_content)
    )
    assert [image.entropy for image in one.images] == [image.entropy for image in two.images]
    again = inspect(known.backdoored, known.data.by_content, images, settings=QUICK, per_class=20, seed=4)
    assert [image.entropy for image in one.images] != [image.entropy for image in again.images]


def test_nu_strip_unlearns_a_copy(tiny: Any, options: dict[str, Any]) -> None:
    found = inspect(tiny.path, tiny.data, tiny.data, method="nu-strip", settings=QUICK, **options)
    assert found.method == "nu-strip" and found.params["unlearned"] is True
    plain = inspect(tiny.path, tiny.data, tiny.data, settings=QUICK, **options)
    assert plain.method == "strip" and plain.threshold != found.threshold
    assert (
        [one.predicted for one in plain.images]
        == [one.predicted for one in found.images]
        == [0] * 30 + [1] * 30 + [2] * 30
    )


def test_too_few_clean_images_leave_all_images_unknown(tiny: Any, options: dict[str, Any]) -> None:
    found = inspect(tiny.path, tiny.data, tiny.data, **options)
    assert found.verdict == "unknown" and found.unknown == 90 and found.threshold is None and found.chance is None
    assert {one.verdict for one in found.images} == {"unknown"} and found.images[0].entropy is not None
    assert "45 held-out clean images cannot set a threshold" in found.limits[0]
    assert InspectResult.from_json(found.to_json()) == found


def test_one_image_is_judged(tiny: Any, options: dict[str, Any]) -> None:
    found = inspect(tiny.path, tiny.data, torch.full((1, 3, 8, 8), 0.5), settings=QUICK, **options)
    assert len(found.images) == 1 and found.images[0].verdict in ("normal", "suspicious")


def test_images_of_another_size_are_resized_and_grey_ones_converted(tiny: Any, options: dict[str, Any]) -> None:
    found = inspect(tiny.path, tiny.data, torch.rand(2, 1, 20, 30), settings=QUICK, pictures=1, **options)
    assert found.incoming.notes[0].startswith("2 images were resized from 20x30 to 8x8")
    assert found.incoming.notes[1] == "2 grey images were converted to RGB."


@pytest.mark.parametrize(
    ("classes", "count", "shape"),
    [(2, 60, (3, 8, 8)), (1000, 1100, (3, 4, 4)), (3, 60, (1, 8, 8)), (3, 24, (3, 224, 224)), (3, 60, (4, 8, 8))],
)
def test_two_and_a_thousand_classes_grey_and_large_images_are_judged(
    classes: int, count: int, shape: tuple[int, int, int]
) -> None:
    data = levels(classes, count, shape)
    found = inspect(Mean(classes), data, data.images[:3], settings={**QUICK, "held_out": 30}, input_shape=shape)
    assert [one.verdict for one in found.images].count("unknown") == 0
    assert all(0 <= (one.entropy or 0.0) <= np.log2(classes) + 1e-9 for one in found.images)
    assert [one.predicted for one in found.images] == [0, 1, 2 % classes]


def test_a_class_without_clean_images_is_no_obstacle() -> None:
    data = levels(4, 80)
    found = inspect(
        Mean(4),
        data.subset((data.labels != 2).nonzero().flatten()),
        data.images[:8],
        settings=QUICK,
        input_shape=(3, 8, 8),
    )
    assert [one.predicted for one in found.images] == [0, 1, 2, 3] * 2 and found.unknown == 0


def test_a_network_that_ignores_its_input_is_refused(tiny: Any, options: dict[str, Any]) -> None:
    module = tiny.module
    with torch.no_grad():
        module.head.weight.zero_()
    with pytest.raises(SanityError, match=r"Clean accuracy is 33\.3 %"):
        inspect(module, tiny.data, tiny.data, settings=QUICK, input_shape=(3, 8, 8))


def test_an_unreadable_picture_is_unknown_and_the_others_are_judged(tiny: Any, options: dict[str, Any]) -> None:
    from PIL import Image

    folder = tiny.folder / "incoming"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (40 * index, 20, 60)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = inspect(tiny.path, tiny.data, folder, settings=QUICK, **options)
    last = found.images[3]
    assert last.verdict == "unknown" and last.entropy is None and "cannot be decoded" in last.error
    assert found.unknown == 1 and found.incoming.unread == 1 and last.name == str(folder / "broken.png")


def test_invalid_requests_are_errors(tiny: Any, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="needs clean data"):
        inspect(tiny.path, None, tiny.data, **options)
    with pytest.raises(OptionError, match="no method 'magic'"):
        inspect(tiny.path, tiny.data, tiny.data, method="magic", **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no setting unlearned"):
        inspect(tiny.path, tiny.data, tiny.data, settings={"unlearned": True}, **options)
    with pytest.raises(OptionError, match="not -1"):
        inspect(tiny.path, tiny.data, tiny.data, pictures=-1, **options)
    with pytest.raises(OptionError, match=r"not 2\.5"):
        inspect(tiny.path, tiny.data, tiny.data, pictures=2.5, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="must be whole"):
        inspect(tiny.path, tiny.data, tiny.data, settings={"overlays": 10.5}, **options)
    with pytest.raises(OptionError, match="rate of 1 is impossible"):
        inspect(tiny.path, tiny.data, tiny.data, settings={"frr": 1.0}, **options)
    with pytest.raises(DataError, match="holds 0 images"):
        inspect(tiny.path, tiny.data, torch.empty(0, 3, 8, 8), **options)


def test_an_image_may_vanish_once_it_has_been_judged(tmp_path: Path, tiny: Any, options: dict[str, Any]) -> None:
    """A folder of queries is a place where files come and go."""
    for name in "abcd":
        Image.fromarray(np.random.default_rng(ord(name)).integers(0, 255, (8, 8, 3), np.uint8)).save(
            tmp_path / f"{name}.png"
        )

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "inspecting images" and done == total:
            (tmp_path / "b.png").unlink(missing_ok=True)

    found = inspect(tiny.path, tiny.data, tmp_path, settings=QUICK, watch=watch, pictures=4, **options)
    assert sum(bool(one.picture) for one in found.images) == 4
