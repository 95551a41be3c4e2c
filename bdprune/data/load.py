"""Loads clean data from a folder per class, .npz, parquet, or a torch dataset."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bdprune.data.clean import ClassOrder, CleanData, sample_per_class
from bdprune.data.dataset import DatasetSource, SizedDataset
from bdprune.data.folder import FolderSource
from bdprune.data.npz import NpzSource
from bdprune.data.order import order_pairs, read_order, renumber, start_of_text_order
from bdprune.data.parquet import ParquetSource
from bdprune.data.source import MAX_BYTES, ImageSource, as_labels, as_pixels, reason_of
from bdprune.errors import DataError, OptionError

_KINDS = "Give a folder with one sub-folder per class, an .npz archive, a parquet file or a torch Dataset."


def load_clean(
    source: str | os.PathLike[str] | SizedDataset,
    *,
    per_class: int | None = None,
    seed: int = 0,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    class_order: ClassOrder = None,
) -> CleanData:
    """Reads labelled clean images as float32 in [0, 1].

    It samples classes by their labels, before it decodes any image.

    Args:
        source: a class-per-folder tree, an ``.npz`` or parquet file (recognised by content), or a torch Dataset.
        per_class: maximum number of images of each class, drawn without replacement; None takes all, in order.
        seed: of the sampling.
        input_shape: the model's (C, H, W); images of another size are resized (bilinear, antialiased), with a note in
            the result. None: all images must have one size.
        num_classes: number of labels of the model; a larger label is an error.
        class_order: how labels of the data map to labels of the model. None or ``number``: unchanged. ``text``: the
            place among the numbers of all classes sorted as texts (0, 1, 10, 11, ...), as ImageFolder labels numbered
            folders. Else a mapping or a sequence, or the path of a JSON file with one.

    Returns:
        At least 2 images of at least 2 classes: with fewer, a label vote and batch statistics are meaningless.

    Raises:
        DataError: the data can't be read or doesn't fit the model.
        OptionError: ``per_class`` is less than 1, or ``class_order`` is invalid.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> load_clean(TensorDataset(images, labels), per_class=2).class_counts
        {0: 2, 1: 2}
    """
    check_per_class(per_class)
    order = "number" if class_order is None else read_order(class_order)
    opened = _open(source, input_shape)
    named = isinstance(opened, FolderSource) and bool(opened.class_names)
    ordered = _order_classes(opened.labels, opened.class_names, order, num_classes, opened.name, named_folders=named)
    index = torch.arange(len(ordered.labels))
    if per_class is not None:
        index = sample_per_class(ordered.labels, per_class, torch.Generator().manual_seed(seed)).sort().values
    return _read_images(opened, ordered, index, input_shape)


def check_per_class(per_class: int | None) -> None:
    """Checks a maximum number of images.

    Raises:
        OptionError: ``per_class`` is less than 1.
    """
    if per_class is not None and per_class < 1:
        raise OptionError(f"{per_class} images per class is too few.", "Give --per-class 1 or more (per_class).")


def check_clean(
    data: CleanData, input_shape: tuple[int, int, int], num_classes: int, class_order: ClassOrder = None
) -> CleanData:
    """Checks clean data in memory like ``load_clean``, and moves it to the CPU as float32 and int64.

    It does not resize images to ``input_shape``; :func:`resize_clean` does.

    Raises:
        DataError: the data doesn't fit the model, or is not images in [0, 1] with a label each.
        OptionError: ``class_order`` is invalid.
    """
    if data.images.ndim != 4 or not all(data.images.shape[2:]):
        hint = "Give images [N, C, H, W]."
        raise DataError(f"The images of {data.source} have shape {tuple(data.images.shape)}.", hint)
    if len(data.images) and data.images.shape[1] != input_shape[0]:
        raise wrong_channels(data.source, data.images.shape[1], input_shape[0])
    labels = as_labels(data.labels.detach().cpu().numpy(), data.source)
    if len(data.images) != len(labels):
        hint = "Give one label an image."
        raise DataError(f"{data.source} holds {len(data.images)} images but {len(labels)} labels.", hint)
    order = "number" if class_order is None else read_order(class_order)
    ordered = _order_classes(labels, data.class_names, order, num_classes, data.source)
    images = data.images.detach().cpu()
    pixels = as_pixels((images.float() if images.is_floating_point() else images).numpy(), data.source)
    return replace(
        data,
        images=unit(torch.from_numpy(pixels)),
        labels=ordered.labels,
        class_names=ordered.names,
        notes=(*data.notes, *ordered.notes),
        native_size=(images.shape[2], images.shape[3]),
        class_order=_composed(data.class_order, ordered.applied),
    )


def resize_clean(data: CleanData, size: tuple[int, int]) -> CleanData:
    """The images resized to ``size`` (height, width), bilinear and antialiased, with a note.

    Raises:
        DataError: they would take too much memory.
    """
    found = (data.images.shape[2], data.images.shape[3])
    if found == size:
        return data
    check_bytes(data.source, (len(data), data.images.shape[1], *size))
    images = torch.empty((*data.images.shape[:2], *size))
    for row, image in zip(images, data.images, strict=True):
        row.copy_(resize(image, size))
    return replace(data, images=images, notes=(*data.notes, resize_note(len(data), {found}, size)))


def check_bytes(source: str, shape: Sequence[int]) -> None:
    """Checks the memory of float32 images of ``shape``.

    Raises:
        DataError: they would take more than ``MAX_BYTES``.
    """
    needed = 4 * math.prod(shape)
    if needed > MAX_BYTES:
        hint = "Take fewer of each class, for example --per-class 50 (per_class=50)."
        raise DataError(f"The images of {source} would take {needed / 2**30:.1f} GiB of memory.", hint)


@dataclass(frozen=True)
class _Ordered:
    """Labels and names in the order of the model, the applied renumbering, and notes about it."""

    labels: Tensor
    names: tuple[str, ...]
    applied: Mapping[int, int]
    notes: tuple[str, ...] = ()


def _order_classes(
    labels: Tensor,
    names: tuple[str, ...],
    order: str | dict[int, int],
    num_classes: int | None,
    source: str,
    *,
    named_folders: bool = False,
) -> _Ordered:
    """Renumbers the labels and checks that they fit the model."""
    if order == "number":
        _check_labels(labels, source, names, num_classes)
        return _Ordered(labels, names, {})
    if named_folders and order == "text":
        _check_labels(labels, source, names, num_classes)
        return _Ordered(labels, names, {}, ("The class folders have names; their labels are in text order already.",))
    placed, renamed, applied = renumber(labels, names, order, num_classes, source)
    # A map may select some classes of the data; without a map, the names must be the model's.
    _check_labels(placed, source, names if isinstance(order, str) else (), num_classes)
    if not applied:
        return _Ordered(placed, renamed, {})
    by = f"text order {start_of_text_order(num_classes)}" if order == "text" and num_classes else "given class order"
    pairs = order_pairs(applied)
    note = f"The labels were renumbered by the {by} ({pairs})." if pairs else f"The {by} does not change the labels."
    return _Ordered(placed, renamed, applied, (note,))


def _composed(one: Mapping[int, int], two: Mapping[int, int]) -> Mapping[int, int]:
    """First ``one``, then ``two``; an empty map renumbers nothing."""
    return {label: two[place] for label, place in one.items() if place in two} if one and two else one or two


def _open(source: object, input_shape: tuple[int, int, int] | None) -> ImageSource:
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(source), input_shape)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return DatasetSource(source)
    raise DataError(f"A {type(source).__name__} has no items by number, so it cannot be clean data.", _KINDS)


def _open_path(path: Path, input_shape: tuple[int, int, int] | None) -> ImageSource:
    if path.is_dir():
        return FolderSource(path)
    magic = magic_of(path)
    if magic == b"PAR1":
        return ParquetSource(path)
    if magic == b"PK\x03\x04":
        return NpzSource(path, input_shape)
    raise DataError(f"{path} is not clean data in a known format.", _KINDS)


def magic_of(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        DataError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder.", _KINDS)
    try:
        with path.open("rb") as file:
            return file.read(4)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}.", "Check the path and its permissions.") from error


def _check_labels(labels: Tensor, source: str, names: Sequence[str], num_classes: int | None) -> None:
    if not len(labels):
        raise DataError(f"{source} holds 0 images.", _KINDS)
    if num_classes is not None and names and len(names) != num_classes:
        raise DataError(
            f"{source} has {len(names)} classes, but the model has {num_classes}.",
            "Use data of the model's own classes; in a folder tree, keep an empty folder for each class without "
            "images, name the folders by label number, or give --class-order FILE.json.",
        )
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise _out_of_range(labels, source, num_classes)
    if len(labels) == 1:
        raise DataError(f"{source} holds 1 image.", "Give at least 2 images of different classes.")
    if len(torch.unique(labels)) == 1:
        hint = "Give images of at least 2 classes."
        raise DataError(f"All {len(labels)} images of {source} are of class {int(labels[0])}.", hint)


def _out_of_range(labels: Tensor, source: str, num_classes: int) -> DataError:
    highest = int(labels.max())
    from_one = highest == num_classes and int(labels.min()) >= 1
    return DataError(
        f"{source} has label {highest}, but the model has classes 0 to {num_classes - 1}.",
        "The labels seem to count from 1: subtract 1." if from_one else "Use data of the model's own classes.",
    )


def _read_images(
    source: ImageSource, ordered: _Ordered, index: Tensor, input_shape: tuple[int, int, int] | None
) -> CleanData:
    """The images at ``index`` of the source, notes about changes to them, and their common original size."""
    images = [torch.empty(0)] * len(index)
    size = None if input_shape is None else input_shape[1:]
    sizes: Counter[tuple[int, int]] = Counter()
    for slot, image in source.read(index.tolist()):
        found = (image.shape[1], image.shape[2])
        size = size or found
        check_bytes(source.name, (len(index), image.shape[0], *size))
        if found != size and input_shape is None:
            raise DataError(
                f"{source.describe(int(index[slot]))} is {found[0]}x{found[1]}, but others are {size[0]}x{size[1]}.",
                "Bring all images to one size, or give --input-shape (input_shape).",
            )
        sizes[found] += 1
        images[slot] = image if found == size else resize(image, size)
    others = {found: count for found, count in sizes.items() if found != size}
    notes = [resize_note(sum(others.values()), set(others), size)] if size and others else []
    stack, repeated = _stack(source, images, None if input_shape is None else input_shape[0])
    if repeated:
        notes.append(f"{repeated} grey images among colour images were converted to RGB.")
    if source.converted:
        kinds = ", ".join(source.converted)
        notes.append(f"{source.converted.total()} images were converted to grey or RGB from {kinds}.")
    return CleanData(
        images=stack,
        labels=ordered.labels[index],
        source=source.name,
        class_names=ordered.names,
        notes=(*source.notes, *ordered.notes, *notes),
        passed_over=source.passed_over,
        native_size=next(iter(sizes)) if len(sizes) == 1 else None,
        class_order=ordered.applied,
    )


def resize_note(count: int, found: set[tuple[int, int]], size: tuple[int, int]) -> str:
    """A sentence on ``count`` images of the sizes ``found`` that were resized to ``size``."""
    first = min(found)
    was = f"{first[0]}x{first[1]}" if len(found) == 1 else f"{len(found)} other sizes"
    return f"{count} images were resized from {was} to {size[0]}x{size[1]} (bilinear)."


def unit(image: Tensor) -> Tensor:
    """The pixels of an image as floats in [0, 1]."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image ``[C, H, W]`` in ``size`` (height, width) as floats in [0, 1], bilinear and antialiased."""
    resized = interpolate(unit(image)[None], size, mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp_(0, 1)


def _stack(source: ImageSource, images: list[Tensor], channels: int | None) -> tuple[Tensor, int]:
    """All images as one float32 stack, and the number of grey images that were converted to RGB.

    Colour photo collections hold a few grey files among thousands; a completely grey set is not converted.
    """
    found = {image.shape[0] for image in images}
    wanted = channels or max(found)
    mixed = found == {1, 3} and wanted == 3
    if found != {wanted} and not mixed:
        raise wrong_channels(source.name, max(found - {wanted}), wanted)
    stack = torch.empty((len(images), wanted, *images[0].shape[1:]))
    for row, image in zip(stack, images, strict=True):
        row.copy_(unit(image).expand_as(row))
    return stack, sum(image.shape[0] == 1 for image in images) if mixed else 0


def wrong_channels(source: str, found: int, wanted: int) -> DataError:
    """The error for images with ``found`` channels for a model that takes ``wanted``."""
    kinds = {1: "1 channel (grey)", 3: "3 channels (RGB)"}
    return DataError(
        f"The images of {source} have {kinds.get(found, f'{found} channels')}, "
        f"but the model takes {kinds.get(wanted, f'{wanted} channels')}.",
        "Use images like those the model was trained on, or convert them.",
    )
