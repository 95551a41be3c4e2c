"""Images without labels: every layout, and the images that cannot be used."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from bdprune.data import CleanData, Incoming
from bdprune.errors import DataError

SHAPE = (3, 6, 4)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def everything(incoming: Incoming, size: int = 3) -> torch.Tensor:
    return torch.cat([images for _, images in incoming.parts(size)])


@pytest.fixture
def layouts(tmp_path: Path, pixels: np.ndarray, unit: torch.Tensor, labels: np.ndarray) -> dict[str, object]:
    """The same images in every layout, the folder with some of them in a folder of a class."""
    folder = tmp_path / "pictures"
    (folder / "z_class").mkdir(parents=True)
    for index, image in enumerate(pixels):
        (folder / ("" if index < 5 else "z_class") / f"{index}.png").write_bytes(png(image))
    np.savez(tmp_path / "images.npz", images=pixels)
    cells = [{"bytes": png(image)} for image in pixels]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "images.parquet")
    return {
        "folder": folder,
        "npz": tmp_path / "images.npz",
        "parquet": tmp_path / "images.parquet",
        "tensor": unit,
        "bytes": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "clean data": CleanData(unit, torch.from_numpy(labels)),
        "pairs": TensorDataset(unit, torch.from_numpy(labels)),
        "items": list(unit),
    }


KINDS = ["folder", "npz", "parquet", "tensor", "bytes", "clean data", "pairs", "items"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_images(layouts: dict[str, object], unit: torch.Tensor, kind: str) -> None:
    incoming = Incoming(layouts[kind], SHAPE)  # type: ignore[arg-type]
    assert len(incoming) == 8
    torch.testing.assert_close(everything(incoming), unit)
    assert incoming.unread == {} and incoming.notes == ()
    one = Incoming(layouts["tensor"], SHAPE)  # type: ignore[arg-type]
    everything(one, 8)
    assert incoming.digest == one.digest


def test_parts_are_in_order_and_small(unit: torch.Tensor) -> None:
    assert [index for index, _ in Incoming(unit, SHAPE).parts(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_images_are_resized_and_grey_ones_become_rgb(write_tree: Callable[..., Path], pixels: np.ndarray) -> None:
    grey = np.full((12, 8), 51, np.uint8)
    incoming = Incoming(write_tree({"a.png": png(grey), "b.png": png(pixels[0])}), SHAPE)
    images = everything(incoming)
    assert images.shape == (2, 3, 6, 4) and torch.allclose(images[0], torch.tensor(0.2))
    assert incoming.notes == (
        "1 images were resized from 12x8 to 6x4 (bilinear).",
        "1 grey images were converted to RGB.",
    )


def test_an_image_that_cannot_be_used_does_not_stop_the_others(
    write_tree: Callable[..., Path], pixels: np.ndarray
) -> None:
    files = {f"{index}.png": png(image) for index, image in enumerate(pixels)}
    incoming = Incoming(write_tree({**files, "2.png": files["2.png"][:60], "note.txt": b"x"}), SHAPE)
    assert [index for index, _ in incoming.parts(4)] == [[0, 1, 3], [4, 5, 6, 7]]
    assert list(incoming.unread) == [2] and "2.png cannot be decoded" in incoming.unread[2]
    assert incoming.passed_over == {".txt": 1}


def test_an_image_has_its_final_size_before_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of large pictures does not fit in memory."""
    incoming, alive = Incoming(torch.rand(4, 3, 60, 40), SHAPE), []

    def read(index: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        for slot in range(len(index)):
            image = torch.rand(3, 60, 40)
            alive.append(weakref.ref(image))
            yield slot, image
            del image
            assert sum(one() is not None for one in alive) <= 1

    monkeypatch.setattr(incoming._source, "read", read)
    assert everything(incoming).shape == (4, *SHAPE)


def test_an_image_is_counted_once_though_another_one_cannot_be_read(
    write_tree: Callable[..., Path], pixels: np.ndarray
) -> None:
    alpha = [np.dstack([pixels[0], np.full(pixels[0].shape[:2], value, np.uint8)]) for value in (255, 100)]
    files = {"a.png": png(alpha[0]), "b.png": png(alpha[1]), "c.png": png(pixels[0]), "d.png": b"x"}
    incoming = Incoming(write_tree(files), SHAPE)
    everything(incoming, 4)
    assert list(incoming.unread) == [1, 3] and "transparent" in incoming.unread[1]
    assert incoming.notes == ("1 images were converted to grey or RGB from opaque alpha.",)


def test_an_rgb_image_for_a_grey_model_cannot_be_used(pixels: np.ndarray, write_tree: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"3 channels \(RGB\), but the model takes 1 channel \(grey\)"):
        everything(Incoming(write_tree({"a.png": png(pixels[0])}), (1, 6, 4)))


def test_the_error_of_the_first_image_is_raised_if_none_can_be_used(write_tree: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a\.png cannot be decoded"):
        everything(Incoming(write_tree({"a.png": b"x", "b.png": b"y"}), SHAPE))


def test_sources_without_images_are_errors(tmp_path: Path, write_tree: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        Incoming(tmp_path / "empty", SHAPE)
    with pytest.raises(DataError, match=r"holds no picture that can be read, only 1 \.txt"):
        Incoming(write_tree({"a.txt": b"x"}), SHAPE)
    with pytest.raises(DataError, match="holds 0 images"):
        Incoming(torch.empty(0, *SHAPE), SHAPE)
    with pytest.raises(DataError, match=r"have shape \(3, 6, 4\)"):
        Incoming(torch.rand(SHAPE), SHAPE)
    with pytest.raises(DataError, match="cannot be inspected"):
        Incoming(7, SHAPE)  # type: ignore[arg-type]
    (tmp_path / "x.bin").write_bytes(b"0123")
    with pytest.raises(DataError, match="no images in a known format"):
        Incoming(tmp_path / "x.bin", SHAPE)


def test_values_outside_the_range_are_errors() -> None:
    with pytest.raises(DataError, match="look normalised already"):
        everything(Incoming(torch.full((1, *SHAPE), -1.0), SHAPE))
