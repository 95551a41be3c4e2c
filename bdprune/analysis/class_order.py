"""Labels that are right except for the order of the classes: text order, a constant shift, or any other order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from bdprune.analysis.size import Trial, beyond_chance, trial_of
from bdprune.data import CleanData, order_pairs, start_of_text_order, text_order
from bdprune.model import Normalization

_FEW_FOR_GUESS = 16
_PASS_MAP = "Write the map under data.sanity.class_map in the JSON report to a file, and pass --class-order FILE.json."


@dataclass(frozen=True)
class Better:
    """An input that fits better: its trial, its description in a sentence, and the advice to the reader."""

    trial: Trial
    how: str
    hint: str
    normalization: Normalization | None = None
    class_map: Mapping[int, int] = field(default_factory=dict)
    on: str = ""
    """The images of the trial if it used only some of them, as in `` on 200 of them``."""


_Guess: TypeAlias = tuple[Better, Tensor]
"""A class order with its trial, and its hits ([N] bool)."""


def relabel(logits: Tensor, data: CleanData, right: Tensor, needed: float, *, sane: bool) -> Better | None:
    """Labels that are right except for the class order: text order, a constant shift, or any other order."""
    for guess in (_named_order, _shifted, _reordered):
        found = guess(logits, data)
        if found is None:
            continue
        better, hits = found
        if better.trial.accuracy >= needed and (not sane or beyond_chance(hits, right)):
            return better
    return None


def _named_order(logits: Tensor, data: CleanData) -> _Guess | None:
    """Text order, or the original order if the data were renumbered. A single guess needs few images."""
    num_classes = logits.shape[1]
    if not data.class_order:
        how = in_text_order(num_classes)
        return _guess_of(logits, data, text_order(num_classes), "class order text", how, "Pass --class-order text.")
    back = {place: label for label, place in data.class_order.items()}
    if not all(back.get(label, num_classes) < num_classes for label in data.class_counts):
        return None
    how = "the original labels of the data"
    return _guess_of(logits, data, back, "class order number", how, "Omit --class-order.")


def in_text_order(num_classes: int) -> str:
    """Text order in words, with its first classes."""
    return f"the classes in text order ({start_of_text_order(num_classes)})"


def _shifted(logits: Tensor, data: CleanData) -> _Guess | None:
    num_classes, labels = logits.shape[1], data.labels.cpu()
    if len(labels) < _FEW_FOR_GUESS:
        return None
    steps = (logits.argmax(1) - labels) % num_classes
    shift = int(torch.bincount(steps, minlength=num_classes).argmax())
    if not shift:
        return None
    signed = shift if shift <= num_classes // 2 else shift - num_classes
    hint = f"Add {signed} to every label." if signed > 0 else f"Subtract {-signed} from every label."
    order = {label: (label + shift) % num_classes for label in range(num_classes)}
    return _guess_of(logits, data, order, f"labels {signed:+d}", f"labels {signed:+d}", hint)


def _reordered(logits: Tensor, data: CleanData) -> _Guess | None:
    """The order suggested by the predictions.

    Each half of the images is tested with the order suggested by the other half. Otherwise a confused model would seem
    to have another order, because on a few images any confusion matches some order.
    """
    labels, evidence = data.labels.cpu(), logits.softmax(1).double()
    if len(labels) < _FEW_FOR_GUESS:
        return None
    half = _halves(labels)
    hits = torch.zeros(len(labels), dtype=torch.bool)
    for held in (half, ~half):
        order = _assign(evidence[~held], labels[~held])
        wanted = torch.tensor([order.get(label, -1) for label in labels[held].tolist()])
        hits[held] = logits[held].argmax(1) == wanted
    order = _assign(evidence, labels)
    how = f"labels in another order ({order_pairs(order)})"
    better, _ = _guess_of(logits, data, order, "labels in another order", how, _PASS_MAP)
    return replace(better, trial=replace(better.trial, accuracy=hits.double().mean().item())), hits


def _halves(labels: Tensor) -> Tensor:
    """Every other image of every class, as a mask ([N] bool)."""
    half = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        half[(labels == label).nonzero().flatten()[::2]] = True
    return half


def _assign(evidence: Tensor, labels: Tensor) -> dict[int, int]:
    """One label of the model for each label that occurs, all different, the most certain pair first.

    Args:
        evidence: ``[N, K]``, the predicted share of each label of the model.
        labels: ``[N]``.
    """
    present, rows = torch.unique(labels, return_inverse=True)
    table = torch.zeros((len(present), evidence.shape[1]), dtype=evidence.dtype).index_add_(0, rows, evidence)
    order: dict[int, int] = {}
    for _ in range(len(present)):
        row, column = divmod(int(table.argmax()), table.shape[1])
        order[int(present[row])] = column
        table[row], table[:, column] = -1, -1
    return order


def _guess_of(logits: Tensor, data: CleanData, order: Mapping[int, int], name: str, how: str, hint: str) -> _Guess:
    """``order`` as a possible correction; its map is from the labels of the source."""
    placed = torch.tensor([order[label] for label in data.labels.tolist()])
    source = {place: label for label, place in data.class_order.items()}
    class_map = {source.get(label, label): order[label] for label in data.class_counts}
    better = Better(trial_of(name, logits, placed), how, hint, class_map=class_map)
    return better, logits.argmax(1) == placed
