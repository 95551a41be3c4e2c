"""bench/published_repairs.py: the true triggers, and figures in per cent."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from published_repairs import measured, trigger_of

from bdprune.data import RawImages
from bdprune.testing.planted import planted


def test_triggers_are_those_that_the_authors_used(tmp_path: Path) -> None:
    images = torch.full((1, 3, 32, 32), 0.5)
    square = trigger_of("ibau-cifar10-badnets-target8.pth", tmp_path)
    assert square is not None
    changed = square(images)[0, 0] == 1
    assert changed.nonzero().amin(0).tolist() == [27, 27] and changed.nonzero().amax(0).tolist() == [30, 30]
    Image.fromarray(np.full((32, 32, 3), 204, np.uint8)).save(tmp_path / "ibau-trojanwm-trigger.png")
    mark = trigger_of("ibau-cifar10-trojanwm-target2.pth", tmp_path)
    assert mark is not None and bool((mark(images) == 1).all()) and torch.allclose(mark(images * 0.2), images * 1.8)
    assert trigger_of("akamaster-resnet20-clean.th", tmp_path) is None


def test_a_backdoor_shows_in_the_figures() -> None:
    known = planted()
    images = (known.data.images * 255).round().to(torch.uint8)
    test = RawImages(images, known.data.labels, ())
    for model, found in ((known.backdoored, True), (known.clean, False)):
        row = measured(model, test, known.target, known.trigger)
        assert 0 <= row["ca"] <= 100 and (row["asr"] > 50) == found
    assert measured(known.clean, test, None, None)["asr"] is None
