"""The order of the classes: the map from labels of the data to labels of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdprune.data.clean import ClassOrder
from bdprune.data.source import MAX_LABEL, reason_of
from bdprune.errors import DataError, OptionError

_MAX_FILE = 32 << 20
_SHOWN = 4
_FORMS = "Give --class-order number, text or a JSON file that gives the label of the model for each label of the data."


def text_order(num_classes: int) -> dict[int, int]:
    """Number of a class -> its place among ``num_classes`` numbers that are sorted as texts (0, 1, 10, 11, ...).

    ``torchvision.datasets.ImageFolder`` labels numbered folders without leading zeros in this order.

    Example:
        >>> text_order(11)[10]
        2
    """
    return {number: place for place, number in enumerate(sorted(range(num_classes), key=str))}


def read_order(order: ClassOrder) -> str | dict[int, int]:
    """``number``, ``text``, or the map that ``order`` is or that its file holds.

    Raises:
        OptionError: the order is unknown, its file cannot be read, it is not a map from labels to labels, or two
            labels of the data map to the same label of the model.
    """
    if order is None or order in ("number", "text"):
        return str(order or "number")
    if isinstance(order, str | os.PathLike):
        return _checked(_read_json(Path(order)), str(order))
    return _checked(order, "class_order")


def renumber(
    labels: Tensor, names: tuple[str, ...], order: str | Mapping[int, int], num_classes: int | None, where: str
) -> tuple[Tensor, tuple[str, ...], dict[int, int]]:
    """Labels and class names in the order of the model, and the applied map (empty for ``number``).

    Args:
        labels: int64 ``[N]``, not negative.
        names: name of each label of the data, empty if unknown.
        order: a value of :func:`read_order`.
        num_classes: number of labels of the model.
        where: name of the data in errors.

    Raises:
        DataError: the order lacks a label, or maps it to a label that the model does not have.
        OptionError: the order is ``text``, but the number of classes is unknown.
    """
    if order == "number" or not len(labels):
        return labels, names, {}
    if isinstance(order, str):
        if num_classes is None:
            raise OptionError("The text order depends on the number of classes, which is unknown.", "Give num_classes.")
        order = text_order(num_classes)
        if int(labels.max()) >= num_classes:
            return labels, names, {}  # the later check of the labels raises the error
    present = torch.unique(labels).tolist()
    _check_covers(present, order, num_classes, where)
    table = torch.zeros(max(present) + 1, dtype=torch.int64)
    for label in present:
        table[label] = order[label]
    return table[labels], _renamed(names, order), dict(order)


def order_pairs(order: Mapping[int, int]) -> str:
    """The first changes of an order as a text: ``2→12, 3→23, ...``."""
    moved = [f"{label}→{place}" for label, place in sorted(order.items()) if label != place]
    return ", ".join([*moved[:_SHOWN], "..."] if len(moved) > _SHOWN else moved)


def start_of_text_order(num_classes: int) -> str:
    """``0, 1, 10, 11, ...``: the beginning of the text order of ``num_classes`` classes."""
    return f"{', '.join(map(str, sorted(range(num_classes), key=str)[:_SHOWN]))}, ..."


def _read_json(path: Path) -> object:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        where = str(path)[:200]
        raise OptionError(f"The class order {where!r} cannot be read: {reason_of(error)}.", _FORMS) from error
    if len(content) > _MAX_FILE:
        raise OptionError(f"The class order {path} has more than {_MAX_FILE} bytes.", _FORMS)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"The class order {path} is not JSON: {str(error)[:200]}.", _FORMS) from error


def _checked(order: object, where: str) -> dict[int, int]:
    if isinstance(order, Mapping):
        pairs = [(_whole(label, where), _whole(place, where)) for label, place in order.items()]
    elif isinstance(order, Sequence) and not isinstance(order, str | bytes):
        pairs = [(label, _whole(place, where)) for label, place in enumerate(order)]
    else:
        raise OptionError(f"The class order {where} is of type {type(order).__name__}.", _FORMS)
    if not pairs:
        raise OptionError(f"The class order {where} is empty.", _FORMS)
    taken: dict[int, int] = {}
    for label, place in pairs:
        if place in taken:
            raise OptionError(
                f"The class order {where} gives the data labels {taken[place]} and {label} the same label {place}.",
                "Give every label of the data a different label in --class-order.",
            )
        taken[place] = label
    found = dict(pairs)
    if len(found) < len(pairs):
        raise OptionError(f"The class order {where} names a label of the data twice.", _FORMS)
    return found


def _whole(value: Any, where: str) -> int:
    """A label, also from a text, because keys in JSON are texts."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_LABEL)) and int(text) <= MAX_LABEL):
        raise OptionError(f"The class order {where} holds {str(value)[:40]!r}, which is not a label.", _FORMS)
    return int(text)


def _check_covers(present: list[int], order: Mapping[int, int], num_classes: int | None, where: str) -> None:
    missing = [label for label in present if label not in order]
    if missing:
        hint = "Give every label of the data a label of the model in --class-order."
        raise DataError(f"Label {missing[0]} of {where} is not in the class order.", hint)
    highest = max(order[label] for label in present)
    if num_classes is not None and highest >= num_classes:
        hint = "Give labels of the model in --class-order."
        found = f"The class order gives label {highest}, but the model has classes 0 to {num_classes - 1}."
        raise DataError(found, hint)


def _renamed(names: tuple[str, ...], order: Mapping[int, int]) -> tuple[str, ...]:
    """The name of each label of the model; the number if it has no name."""
    if not names:
        return ()
    by_label = {order[label]: name for label, name in enumerate(names) if label in order}
    return tuple(by_label.get(label, str(label)) for label in range(max(by_label, default=-1) + 1))
