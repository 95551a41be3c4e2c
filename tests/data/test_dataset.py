from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from bdprune.data.load import load_clean
from bdprune.errors import DataError


class Items(Dataset[Any]):
    """A dataset that counts how often each image was asked for."""

    def __init__(self, images: Any, labels: Any, /, **attributes: Any) -> None:
        self.images, self.marks, self.asked = images, labels, []
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.asked.append(index)
        return self.images[index], self.marks[index]


FORMS = {
    "float tensor": lambda x: torch.from_numpy(x).permute(2, 0, 1).float() / 255,
    "byte tensor": lambda x: torch.from_numpy(x).permute(2, 0, 1),
    "byte array": lambda x: x,
    "float array": lambda x: x / 255,
    "pillow": Image.fromarray,
}
LABELS = {
    "int": int,
    "numpy": np.int32,
    "tensor": torch.tensor,
    "tensor of one": lambda y: torch.tensor([y]),
    "array": np.asarray,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LABELS)
def test_items_of_every_kind_are_read(
    pixels: np.ndarray, labels: np.ndarray, unit: torch.Tensor, form: str, kind: str
) -> None:
    items = Items([FORMS[form](image) for image in pixels], [LABELS[kind](int(label)) for label in labels])
    data = load_clean(items)
    assert (data.images - unit).abs().max() <= 1e-7
    assert data.labels.tolist() == labels.tolist()
    assert data.source == "Items"


@pytest.mark.parametrize("form", [torch.from_numpy, lambda x: x, Image.fromarray])
def test_grey_items_without_a_channel_axis(pixels: np.ndarray, unit: torch.Tensor, form: Any) -> None:
    items = Items([form(image[..., 0].copy()) for image in pixels], [0, 1] * 4)
    assert torch.equal(load_clean(items, input_shape=(1, 6, 4)).images, unit[:, :1])


def test_bfloat16_items(unit: torch.Tensor) -> None:
    data = load_clean(TensorDataset(unit.bfloat16(), torch.tensor([0, 1] * 4)))
    assert torch.equal(data.images, unit.bfloat16().float())


def test_a_plain_list_is_a_dataset(unit: torch.Tensor) -> None:
    assert torch.equal(load_clean([(image, i % 2) for i, image in enumerate(unit)]).images, unit)


@pytest.mark.parametrize("announced", [list, tuple, np.asarray, torch.tensor])
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_labels_in_an_attribute_save_decoding(
    unit: torch.Tensor, labels: np.ndarray, announced: Any, name: str
) -> None:
    items = Items(unit, labels.tolist(), **{name: announced(labels.tolist()), "classes": ["a", "b", "c"]})
    data = load_clean(items, per_class=1, seed=3)
    assert len(items.asked) == 3
    assert torch.equal(data.images, unit[items.asked])
    assert data.class_names == ("a", "b", "c")


@pytest.mark.parametrize("attributes", [{}, {"targets": "abcdefgh"}, {"targets": [0.5] * 8}, {"labels": [0, 1]}])
def test_labels_come_from_the_items_without_such_an_attribute(
    unit: torch.Tensor, labels: np.ndarray, attributes: dict[str, Any]
) -> None:
    items = Items(unit, labels.tolist(), **attributes)
    assert load_clean(items, per_class=1).labels.tolist() == [0, 1, 2]
    assert items.asked[:8] == list(range(8))


def test_a_target_transform_disables_labels_in_an_attribute(unit: torch.Tensor) -> None:
    items = Items(unit, [3, 4] * 4, targets=[0, 1] * 4, target_transform=lambda y: y + 3)
    assert load_clean(items).class_counts == {3: 4, 4: 4}


def test_wrong_labels_in_an_attribute_are_an_error(unit: torch.Tensor) -> None:
    items = Items(unit, [1, 0] * 4, targets=[0, 1] * 4)
    with pytest.raises(DataError, match="item 0 of Items has label 1, but the dataset's targets say 0"):
        load_clean(items)


def test_subset_of_subset(unit: torch.Tensor, labels: np.ndarray) -> None:
    items = Items(unit, labels.tolist(), targets=labels.tolist())
    data = load_clean(Subset(Subset(items, [7, 6, 5, 0]), [0, 3]))
    assert data.labels.tolist() == [2, 0]
    assert items.asked == [7, 0]


def test_tensor_dataset(unit: torch.Tensor, labels: np.ndarray) -> None:
    data = load_clean(TensorDataset(unit, torch.from_numpy(labels)), per_class=2)
    assert data.class_counts == {0: 2, 1: 2, 2: 1}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield torch.zeros(3, 2, 2), 0


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 2, 2), 0

    def __len__(self) -> int:
        raise TypeError("no length")


class Vast(Items):
    def __len__(self) -> int:
        return 10**9


class Failing(Items):
    def __getitem__(self, index: int) -> Any:
        raise OSError("disk is gone")


IMAGE = torch.zeros(3, 2, 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Endless(), "Endless"),
        (Unsized(), "Unsized has no length.*map-style"),
        (Vast(IMAGE, []), "1000000000 items"),
        (Failing([0, 1], [0, 1]), "item 0 of Failing cannot be read: OSError: disk is gone"),
        ([IMAGE, IMAGE], "item 0 of list is a Tensor, not a pair"),
        ([(IMAGE, 0, 1)], "not a pair"),
        ({"images": 1}, "item 0 of dict cannot be read"),
        ([(IMAGE, 0.5), (IMAGE, 1.0)], "label 0.5 of type float"),
        ([(IMAGE, True), (IMAGE, False)], "label True of type bool"),
        ([(IMAGE, torch.tensor([0, 1]))], r"label tensor\(\[0, 1\]\)"),
        ([(IMAGE, 2**70), (IMAGE, 1)], "label 1180591620717411303424"),
        ([(IMAGE, -1), (IMAGE, 1)], "hold -1"),
        ([(IMAGE - 1, 0), (IMAGE, 1)], "item 0 of list .*normalised already"),
        ([(IMAGE, 0), (IMAGE + 255, 1)], "item 1 of list .*0 to 255"),
        ([(IMAGE * torch.nan, 0), (IMAGE, 1)], "NaN"),
        ([(torch.zeros(4), 0), (IMAGE, 1)], "image of 1 axes"),
        ([("cat.png", 0), (IMAGE, 1)], "image of type str.*Pillow"),
        (TensorDataset(torch.zeros(2, 3, 2, 2), torch.tensor([0.0, 1.0])), "float32, not integers"),
        (7, "A int has no items by number"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_unusable_sources_are_errors(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_clean(source)
