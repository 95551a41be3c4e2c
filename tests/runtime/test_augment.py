import torch

from bdprune.runtime.augment import crop_and_flip


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


def test_no_padding_only_mirrors() -> None:
    x = torch.rand(8, 1, 4, 4)
    out = crop_and_flip(x, torch.Generator().manual_seed(0), padding=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(out, x, strict=True))


def test_keeps_dtype_and_gives_channels_last() -> None:
    out = crop_and_flip(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.Generator())
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_without_flip_every_crop_is_a_window() -> None:
    x = torch.arange(1, 1 + 32 * 3 * 6 * 6, dtype=torch.float32).view(32, 3, 6, 6)
    out = crop_and_flip(x, torch.Generator().manual_seed(0), padding=1, flip=False)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for image, source in zip(out, padded, strict=True):
        assert any(torch.equal(image, source[:, i : i + 6, j : j + 6]) for i in range(3) for j in range(3))
