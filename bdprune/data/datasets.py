"""Complete training and test sets for zoos: published sets, checked byte by byte, and any others."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bdprune.data.folder import FolderSource
from bdprune.data.parquet import RawImages, read_parquet, read_source
from bdprune.errors import DataError

Part = Literal["train", "test"]

_BOX = ["width", "height", "roi_x1", "roi_y1", "roi_x2", "roi_y2"]
"""Size of the photograph, and the first and last pixel of the sign in it."""


@dataclass(frozen=True)
class _Facts:
    """One part of a published set.

    Attributes:
        count: number of images.
        images: SHA-256 of the uint8 array ``[N, H, W, C]``; for JPEGs, which decoders read differently, of the encoded
            images, each after its length in 8 bytes, little endian.
        labels: SHA-256 of the labels, 8 bytes each, little endian.
        boxes: SHA-256 of the columns ``_BOX``, row by row; empty if the set has no such columns.
    """

    count: int
    images: str
    labels: str
    boxes: str = ""


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        folder: folder of ``train.parquet`` and ``test.parquet``.
        shape: (channels, height, width) of one image.
        num_classes: number of labels.
        class_names: a name for each label, empty if the set has none.
        jpeg: whether its images are JPEGs.
        signs: whether to crop every image to its traffic sign.
    """

    folder: str
    shape: tuple[int, int, int]
    num_classes: int
    parts: dict[Part, _Facts]
    class_names: tuple[str, ...] = ()
    jpeg: bool = False
    signs: bool = False


def _published() -> dict[str, Published]:
    found = tomllib.loads(Path(__file__).with_name("published.toml").read_text())
    for settings in found.values():
        settings["parts"] = {part: _Facts(**facts) for part, facts in settings["parts"].items()}
        settings |= {name: tuple(settings[name]) for name in ("shape", "class_names") if name in settings}
    sets = {name: Published(**settings) for name, settings in found.items()}
    sets["gtsrb-signs"] = replace(sets["gtsrb"], signs=True)
    return dict(sorted(sets.items()))


PUBLISHED = _published()
"""The sets with a known name. ``gtsrb`` has the whole photographs, ``gtsrb-signs`` the cropped signs."""


def read_dataset(root: Path, name: str, part: Part) -> RawImages:
    """One part of a data set, in the order of its files.

    Args:
        root: folder of the data sets.
        name: one of ``PUBLISHED``, whose files, counts, sizes and bytes are checked; or the name of a folder with
            ``train.parquet`` and ``test.parquet``, or with ``train/`` and ``test/``. These hold one folder per class,
            the same in both; a label is the place of a class among the sorted names.
        part: "train" or "test".

    Raises:
        DataError: the set does not exist, cannot be read, or differs from the published set.
    """
    published = PUBLISHED.get(name)
    folder = root / (published.folder if published else name)
    path = folder / f"{part}.parquet"
    if published is None and not path.exists():
        return _read_folders(folder, name, part)
    raw = read_parquet(path)
    if published is None:
        return raw
    _check(path, raw, published, published.parts[part])
    images = _cut_signs(path, raw.images) if published.signs else raw.images
    return RawImages(images, raw.labels, published.class_names)


def _read_folders(folder: Path, name: str, part: Part) -> RawImages:
    if not (folder / part).is_dir():
        hint = f"Known are {', '.join(PUBLISHED)}; or put {part}.parquet, or {part}/ with a folder per class, there."
        raise DataError(f"There is no data set {name!r} in {folder.parent}.", hint)
    source, other = FolderSource(folder / part), folder / ("test" if part == "train" else "train")
    if other.is_dir():
        _check_classes(source, FolderSource(other))
    return read_source(source)


def _check_classes(one: FolderSource, two: FolderSource) -> None:
    names = set(one.class_names) ^ set(two.class_names)
    if names:
        raise DataError(
            f"{one.name} and {two.name} have different class folders: only one has {min(names)[:80]!r}.",
            "Give both the same folders; use an empty folder for a class without images.",
        )


def _check(path: Path, raw: RawImages, published: Published, facts: _Facts) -> None:
    found = (len(raw.labels), tuple(raw.images.shape[1:]))
    wanted = (facts.count, published.shape)
    if found != wanted:
        raise _differs(path, f"it holds {_images(*found)}, not {_images(*wanted)}")
    if _labels_digest(raw.labels) != facts.labels:
        raise _differs(path, "its labels differ")
    digest = _encoded_digest(path) if published.jpeg else _pixel_digest(raw.images)
    if digest != facts.images:
        raise _differs(path, "its images differ")
    if published.signs and hashlib.sha256(_boxes(path).data).hexdigest() != facts.boxes:
        raise _differs(path, "the boxes of its signs differ")


def _images(count: int, shape: tuple[int, ...]) -> str:
    return f"{count:,} images of {'x'.join(map(str, shape))}"


def _differs(path: Path, difference: str) -> DataError:
    hint = "Download it again, or rename its folder to read it without these checks."
    return DataError(f"{path} is not the published set: {difference}.", hint)


def _labels_digest(labels: Tensor) -> str:
    return hashlib.sha256(labels.numpy().astype("<i8").data).hexdigest()


def _pixel_digest(images: Tensor) -> str:
    return hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy().data).hexdigest()


def _encoded_digest(path: Path) -> str:
    state = hashlib.sha256()
    for cell in _columns(path, ["image"])["image"]:
        state.update(len(cell).to_bytes(8, "little"))
        state.update(cell)
    return state.hexdigest()


def _cut_signs(path: Path, images: Tensor) -> Tensor:
    """Every image cropped to its sign and resized to its old size, bilinear; boxes refer to the original photo."""
    from PIL import Image

    height, width = images.shape[-2:]
    cut = np.empty((len(images), height, width, 3), dtype=np.uint8)
    rows = images.permute(0, 2, 3, 1).contiguous().numpy()
    for index, (across, down, x1, y1, x2, y2) in enumerate(_boxes(path).tolist()):
        box = (x1 * width / across, y1 * height / down, (x2 + 1) * width / across, (y2 + 1) * height / down)
        image = Image.fromarray(rows[index])
        cut[index] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return torch.from_numpy(cut).permute(0, 3, 1, 2).contiguous()


def _boxes(path: Path) -> np.ndarray[Any, Any]:
    """Columns ``_BOX``, ``[N, 6]``."""
    return np.ascontiguousarray(np.array(list(_columns(path, _BOX).values()), dtype="<i8").T)


def _columns(path: Path, names: list[str]) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=names)
        return {name: table.column(name).to_pylist() for name in names}
    except Exception as error:  # pyarrow fails in many ways; the file was read before, so a column is missing
        hint = "Download it again."
        raise DataError(f"{path} lacks a column of {', '.join(names)}: {str(error)[:200]}.", hint) from error
