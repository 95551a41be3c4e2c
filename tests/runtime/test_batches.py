from typing import Any

import pytest
import torch
from torch import Tensor

from bdprune.data.clean import CleanData
from bdprune.runtime.batches import crop_and_flip, passes

CPU = torch.device("cpu")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def data() -> CleanData:
    return CleanData(torch.rand(101, 3, 4, 4, generator=generator()), torch.arange(101))


def test_every_pass_has_every_image_once_in_a_new_order(data: CleanData) -> None:
    seen = [torch.cat([labels for _, labels in batches]) for batches in passes(data, 3, 16, 0, generator(), CPU)]
    assert len(seen) == 3 and all(torch.equal(labels.sort()[0], data.labels) for labels in seen)
    assert not torch.equal(seen[0], seen[1])


def test_batches_have_nearly_equal_sizes(data: CleanData) -> None:
    def sizes(count: int) -> list[int]:
        (batches,) = passes(data.subset(torch.arange(count)), 1, 50, 0, generator(), CPU)
        return [len(labels) for _, labels in batches]

    assert sizes(100) == [50, 50] and sizes(101) == [34, 34, 33] and sizes(7) == [7]


def test_images_that_a_mirror_would_change_are_not_mirrored() -> None:
    ramp = torch.linspace(0, 1, 4).expand(60, 3, 4, 4)  # brighter to the right
    both, one = CleanData(ramp, torch.zeros(60).long()), CleanData(ramp, torch.zeros(60).long(), mirror=False)
    for data, mirrored in ((both, True), (one, False)):
        (batches,) = passes(data, 1, 20, 0, generator(), CPU)
        images = torch.cat([images for images, _ in batches])
        assert bool((images[..., 0] > images[..., -1]).any()) is mirrored


def test_a_pass_draws_an_order_and_then_the_crops_of_each_batch(data: CleanData) -> None:
    drawn = generator()
    for batches in passes(data, 2, 50, 1, generator(), CPU):
        order = torch.randperm(101, generator=drawn)
        for index, (images, labels) in zip(order.tensor_split(3), batches, strict=True):
            assert torch.equal(labels, data.labels[index])
            assert torch.equal(images, crop_and_flip(data.images[index], drawn, 1))
    assert not list(passes(data, 0, 50, 1, generator(), CPU))


def test_a_gpu_gets_three_pinned_copies_before_the_first_pass_and_none_after(
    data: CleanData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for a copy of a tensor that is not pinned, and for a copy sent after the first steps."""
    notes: list[str] = []

    def pin(one: Tensor) -> Tensor:
        notes.append("pinned")
        return one

    def send(one: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        notes.append(f"sent to {device}, {'on the side' if non_blocking else 'waiting'}")
        return one

    expected = [list(batches) for batches in passes(data, 4, 50, 1, generator(), CPU)]
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", send)
    shuffled = passes(data, 4, 50, 1, generator(), torch.device("cuda"))
    first = list(next(shuffled))
    assert notes == ["pinned", "sent to cuda, on the side"] * 3
    for ours, theirs in zip([first, *(list(batches) for batches in shuffled)], expected, strict=True):
        assert all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    assert len(notes) == 6


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror() -> None:
    x = torch.arange(1, 1 + 64 * 3 * 6 * 6, dtype=torch.float32).view(64, 3, 6, 6)
    out = crop_and_flip(x, torch.Generator().manual_seed(0), padding=2)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    mirrored = 0
    for image, source in zip(out, padded, strict=True):
        windows = [source[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
        straight = any(torch.equal(image, window) for window in windows)
        flipped = any(torch.equal(image, window.flip(2)) for window in windows)
        assert straight or flipped
        mirrored += flipped
    assert 16 < mirrored < 48


def test_without_padding_images_are_only_mirrored() -> None:
    x = torch.rand(8, 1, 4, 4)
    out = crop_and_flip(x, torch.Generator().manual_seed(0), padding=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(out, x, strict=True))


def test_augmentation_keeps_the_dtype_and_gives_channels_last() -> None:
    out = crop_and_flip(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.Generator())
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_without_flip_every_crop_is_a_window() -> None:
    x = torch.arange(1, 1 + 32 * 3 * 6 * 6, dtype=torch.float32).view(32, 3, 6, 6)
    out = crop_and_flip(x, torch.Generator().manual_seed(0), padding=1, flip=False)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for image, source in zip(out, padded, strict=True):
        assert any(torch.equal(image, source[:, i : i + 6, j : j + 6]) for i in range(3) for j in range(3))
