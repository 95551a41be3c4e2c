from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from bdprune.data import order as orders
from bdprune.data.load import load_clean
from bdprune.data.order import order_pairs, read_order, text_order
from bdprune.errors import DataError, OptionError

Tree = Callable[..., Path]
Encode = Callable[..., bytes]


def test_text_order_sorts_numbers_as_text() -> None:
    assert text_order(12) == {0: 0, 1: 1, 10: 2, 11: 3, 2: 4, 3: 5, 4: 6, 5: 7, 6: 8, 7: 9, 8: 10, 9: 11}
    assert text_order(10) == {label: label for label in range(10)}


def tree(write_tree: Tree, encode: Encode, pixels: np.ndarray, names: list[str]) -> Path:
    return write_tree({f"{name}/x.png": encode(pixels[index]) for index, name in enumerate(names)})


@pytest.mark.parametrize(("order", "labels"), [(None, [10, 2]), ("number", [10, 2]), ("text", [2, 4])])
def test_numbered_folders(
    write_tree: Tree, encode: Encode, pixels: np.ndarray, order: str | None, labels: list[int]
) -> None:
    data = load_clean(tree(write_tree, encode, pixels, ["10", "2"]), num_classes=12, class_order=order)
    assert data.labels.tolist() == labels
    said = order == "text"
    assert data.notes == (
        ("The labels were renumbered by the text order 0, 1, 10, 11, ... (2→4, 3→5, 4→6, 5→7, ...).",) * said
    )
    assert data.class_order == (text_order(12) if said else {})


def test_leading_zeros_do_not_change_numbers(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = tree(write_tree, encode, pixels, ["02", "10"])
    assert load_clean(root, num_classes=12).labels.tolist() == [2, 10]
    assert load_clean(root, num_classes=12, class_order="text").labels.tolist() == [4, 2]


def test_named_folders_are_in_text_order_already(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = tree(write_tree, encode, pixels, [f"c{label}" for label in (0, 1, 2)])
    data = load_clean(root, num_classes=3, class_order="text")
    assert data.labels.tolist() == [0, 1, 2] and "text order already" in data.notes[0]


def test_files_and_datasets_are_also_renumbered(tmp_path: Path, pixels: np.ndarray) -> None:
    labels = np.array([2, 10, 2, 10, 0, 0, 11, 11])
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    for source in (tmp_path / "data.npz", TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels))):
        assert load_clean(source, num_classes=12, class_order="text").labels.tolist() == [4, 2, 4, 2, 0, 0, 3, 3]


@pytest.mark.parametrize("content", [[7, 5, 6], {"0": 7, "1": 5, "2": 6}, {"0": 7, "1": 5, "2": 6, "99": 0}])
def test_a_file_gives_the_order(tmp_path: Path, content: object, pixels: np.ndarray) -> None:
    (tmp_path / "order.json").write_text(json.dumps(content))
    np.savez(tmp_path / "data.npz", images=pixels[:4], labels=np.array([0, 1, 2, 0]))
    data = load_clean(tmp_path / "data.npz", num_classes=8, class_order=tmp_path / "order.json")
    assert data.labels.tolist() == [7, 5, 6, 7]
    assert data.notes[0].startswith("The labels were renumbered by the given class order (0→7, 1→5, 2→6")
    assert load_clean(tmp_path / "data.npz", class_order=str(tmp_path / "order.json")).labels.tolist() == [7, 5, 6, 7]


def test_names_stay_with_their_classes(write_tree: Tree, encode: Encode, pixels: np.ndarray) -> None:
    root = tree(write_tree, encode, pixels, ["cat", "dog"])
    data = load_clean(root, num_classes=4, class_order=[3, 1])
    assert data.labels.tolist() == [3, 1]
    assert data.class_names[3] == "cat" and data.class_names[1] == "dog"


def test_a_class_order_does_not_change_the_drawn_images() -> None:
    images, labels = torch.rand(40, 3, 2, 2), torch.arange(40) % 4
    swap = torch.tensor([2, 0, 3, 1])
    one = load_clean(TensorDataset(images, labels), per_class=3, class_order=swap.tolist())
    two = load_clean(TensorDataset(images, swap[labels]), per_class=3)
    assert torch.equal(one.images, two.images) and one.labels.tolist() == two.labels.tolist()


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([1], DataError, r"Label 1 of TensorDataset is not in the class order.*--class-order"),
        ([0, 9], DataError, r"gives label 9, but the model has classes 0 to 3.*--class-order"),
        ([2, 2], OptionError, r"gives the data labels 0 and 1 the same label 2"),
        ({0: 1, "0": 2}, OptionError, "names a label of the data twice"),
        ([0, -1], OptionError, "'-1', which is not a label"),
        ([0, 1.5], OptionError, "'1.5', which is not a label"),
        ([True, 0], OptionError, "'True', which is not a label"),
        ({"cat": 1}, OptionError, "'cat', which is not a label"),
        ([0, "9" * 5000], OptionError, "which is not a label"),
        ([], OptionError, "is empty"),
        (3, OptionError, "is of type int"),
        ("texts", OptionError, r"'texts' cannot be read: No such file.*--class-order number, text or"),
        ("a\0b", OptionError, "cannot be read"),
    ],
)
def test_invalid_orders_are_errors(order: Any, error: type[Exception], message: str) -> None:
    data = TensorDataset(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(error, match=message):
        load_clean(data, num_classes=4, class_order=order)


def test_text_order_needs_the_number_of_classes() -> None:
    data = TensorDataset(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(OptionError, match="number of classes"):
        load_clean(data, class_order="text")
    with pytest.raises(DataError, match="label 1, but the model has classes 0 to 0"):
        load_clean(data, num_classes=1, class_order="text")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"text"', b"3", b"[[0]]"])
def test_files_without_an_order_are_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "order.json").write_bytes(content)
    with pytest.raises(OptionError, match=r"order\.json"):
        read_order(tmp_path / "order.json")


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_MAX_FILE", 8)
    (tmp_path / "order.json").write_text("[0, 1, 2]")
    with pytest.raises(OptionError, match="more than 8 bytes"):
        read_order(tmp_path / "order.json")


def test_unchanged_pairs_are_not_shown() -> None:
    assert order_pairs({0: 0, 1: 2, 2: 1}) == "1→2, 2→1"
    assert order_pairs({label: label + 1 for label in range(9)}) == "0→1, 1→2, 2→3, 3→4, ..."
