from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bdprune.analysis import size as sizes
from bdprune.analysis.sanity import check_sanity
from bdprune.analysis.size import fit_size
from bdprune.data.clean import CleanData
from bdprune.data.load import resize_clean
from bdprune.model.handle import Model

CLASSES = 4


class ReadsAt(nn.Module):
    """Reads the label from the mean colour. The share of images for which it is right depends on their height."""

    def __init__(self, shares: dict[int, float]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(CLASSES)))
        self.shares = shares
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[2])
        share = self.shares[x.shape[2]]  # a KeyError for a size that the network does not take
        code = (x.mean((1, 2, 3)) * 1000).round().long()
        label, rank = code // 100, code % 100
        wrong = rank >= round(100 * share)
        return nn.functional.one_hot((label + wrong) % CLASSES, CLASSES).float() * self.scale


def images(side: int = 8, count: int = 200) -> CleanData:
    """Flat images whose colour is label/10 + rank/1000; of 200, two have each rank."""
    position = torch.arange(count)
    labels, rank = position % CLASSES, position * 37 % 100
    colour = (labels * 100 + rank) / 1000
    return CleanData(colour.view(-1, 1, 1, 1).expand(-1, 3, side, side).clone(), labels, native_size=(side, side))


def fit(shares: dict[int, float], native: int, own: int, count: int = 200, **options: bool) -> tuple[Model, CleanData]:
    model = Model(ReadsAt(shares).eval(), "reads", CLASSES, (3, own, own))
    source = images(native, count)
    return fit_size(model, resize_clean(source, (own, own)), lambda size: resize_clean(source, size), **options)


@pytest.mark.parametrize(("native", "own"), [(8, 4), (4, 16)])
def test_the_better_size_wins_whichever_is_larger(native: int, own: int) -> None:
    model, data = fit({native: 0.9, own: 0.5}, native, own)
    assert model.input_shape == (3, native, native) == tuple(data.images.shape[1:])
    assert f"The images are {native}x{native} and the network takes them unresized: clean accuracy" in data.notes[-1]
    assert f"when resized to {own}x{own}, the usual size of reads (on 64 images)." in data.notes[-1]
    assert not any("were resized from" in note for note in data.notes)
    model, data = fit({native: 0.5, own: 0.9}, native, own)
    assert model.input_shape == (3, own, own) == tuple(data.images.shape[1:])
    assert data.notes[0] == f"200 images were resized from {native}x{native} to {own}x{own} (bilinear)."
    assert data.notes[1].startswith(f"The images were resized to {own}x{own}: clean accuracy")
    assert data.other_size is None


@pytest.mark.parametrize(("native", "taken"), [(8, 8), (12, 4)])
def test_undecided_keeps_the_images_up_to_four_times_the_pixels(native: int, taken: int) -> None:
    model, data = fit({native: 0.8, 4: 0.8}, native, 4)
    assert model.input_shape == (3, taken, taken) == tuple(data.images.shape[1:])
    assert "on 200 images; the difference is too small to be certain" in data.notes[-1]


def test_a_difference_that_64_images_leave_open_is_settled_by_200() -> None:
    """82 against 77 of 100: 10 of 200 images, all gained; 10 is more than three times the square root of 10."""
    model, data = fit({12: 0.82, 4: 0.77}, 12, 4)
    assert model.input_shape == (3, 12, 12) and "on 200 images)" in data.notes[-1]


def test_a_gain_of_few_images_may_be_chance() -> None:
    """Three of 12 images are a quarter, but may be chance."""
    assert not sizes._is_clear(torch.arange(12) < 9, torch.arange(12) < 6)
    assert sizes._is_clear(torch.arange(12) < 10, torch.arange(12) < 6)


def test_a_network_that_does_not_take_the_size() -> None:
    model, data = fit({4: 0.5}, 8, 4)
    assert model.input_shape == (3, 4, 4)
    assert data.notes == (
        "200 images were resized from 8x8 to 4x4 (bilinear).",
        "The network does not take images of 8x8.",
    )


def test_large_images_are_not_tried_in_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "MAX_NATIVE_PIXELS", 63)
    model, data = fit({8: 1.0, 4: 0.5}, 8, 4)
    assert model.input_shape == (3, 4, 4) and 8 not in model.network.seen  # type: ignore[operator]
    assert data.notes == ("200 images were resized from 8x8 to 4x4 (bilinear).",) and data.other_size is None


def mixed(shares: dict[int, float]) -> tuple[Model, CleanData]:
    """Images of several sizes, resized to 32x32."""
    model, source = Model(ReadsAt(shares).eval(), "reads", CLASSES, (3, 32, 32)), images(32)
    return fit_size(model, replace(source, native_size=None), lambda size: resize_clean(source, size))


def test_usual_sizes_are_tried_on_images_of_several_sizes() -> None:
    model, data = mixed({32: 0.5, 28: 0.4, 64: 0.9, 96: 0.7})
    assert model.input_shape == (3, 32, 32) and data.images.shape[2] == 32
    assert data.other_size is not None and data.other_size.size == (64, 64)
    assert "with the images resized to 32x32 and" in data.notes[-1] and "with 64x64 (on 200 images)" in data.notes[-1]
    found = check_sanity(model, data)
    assert (found.ok, found.suggestion) == (False, "Pass --input-shape 3x64x64.")


def test_usual_sizes_are_not_tried_if_the_model_does_well() -> None:
    model, data = mixed({32: 0.9, 64: 1.0})
    assert data.other_size is None and set(model.network.seen) == {32}  # type: ignore[arg-type]
    assert mixed({32: 0.5, 28: 0.5})[1].other_size is None


def test_a_size_that_takes_too_much_memory_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "MAX_BYTES", 4 * 200 * 3 * 64 - 1)
    model, data = fit({8: 1.0, 4: 0.5}, 8, 4)
    assert model.input_shape == (3, 4, 4) and "too much memory" in data.notes[-1]


def test_a_requested_size_is_kept_and_a_better_one_named() -> None:
    model, data = fit({8: 0.9, 4: 0.5}, 8, 4, fixed=True)
    assert model.input_shape == (3, 4, 4)
    assert data.notes[-1].startswith("The size of 4x4 was requested: clean accuracy")
    assert data.other_size is not None and data.other_size.size == (8, 8) and data.other_size.accuracy > 0.8


def test_a_requested_size_that_does_well_needs_no_trial() -> None:
    model, data = fit({8: 0.9, 4: 0.95}, 8, 4, fixed=True)
    assert data.other_size is None and data.notes == ("200 images were resized from 8x8 to 4x4 (bilinear).",)
    assert set(model.network.seen) == {4}  # type: ignore[arg-type]


def test_images_of_the_right_size_need_no_trial() -> None:
    def never(size: tuple[int, int]) -> CleanData:
        raise AssertionError(size)

    load: Callable[[tuple[int, int]], CleanData] = never
    model = Model(ReadsAt({}).eval(), "reads", CLASSES, (3, 4, 4))
    data = images(4)
    assert fit_size(model, data, load) == (model, data)


def test_the_given_model_is_unchanged() -> None:
    network = ReadsAt({8: 0.9, 4: 0.5})
    model = Model(network.train(), "reads", CLASSES, (3, 4, 4))
    source = images(8)
    fit_size(model, resize_clean(source, (4, 4)), lambda size: resize_clean(source, size))
    assert model.input_shape == (3, 4, 4) and network.training


def test_large_images_are_tried_on_fewer() -> None:
    model, data = fit({256: 0.9, 4: 0.4}, 256, 4, count=40)
    assert model.input_shape == (3, 256, 256) and "(on 16 images)" in data.notes[-1]
