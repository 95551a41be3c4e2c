"""Guesses from names and shapes which batch norm consumes the output of a convolution.

Only a forward pass shows it for certain, and that needs the network. A screen has the file, so it guesses by names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

Shapes = Mapping[str, tuple[int, ...]]

_NORMS = ("bn", "norm", "batchnorm", "batch_norm")


def norms_of_convolutions(shapes: Shapes) -> dict[str, str]:
    """The batch norm that likely follows each convolution: module -> module. A convolution without one is left out.

    A norm must have as many channels as the convolution has filters, and running statistics. The rules, in one parent:

    - numbered modules, as in ``nn.Sequential``: the next module with tensors, if it is a norm;
    - ``conv2`` belongs to ``bn2`` (also ``norm2``, ``batchnorm2``), and ``conv_a`` to ``bn_a``;
    - in a network whose norms precede their convolutions (``bn2`` has the channels that ``conv2`` reads, not those that
      it writes, somewhere in the file), ``conv1`` belongs to ``bn2``, and the last convolution of a block to none.

    Args:
        shapes: name of a tensor -> shape.
    """
    norms = {
        name.removesuffix("running_mean").removesuffix("."): shape[0]
        for name, shape in shapes.items()
        if name.endswith("running_mean") and len(shape) == 1
    }
    convs = {
        name.removesuffix("weight").removesuffix("."): shape
        for name, shape in shapes.items()
        if name.rpartition(".")[2] == "weight" and len(shape) == 4
    }
    following = _following({name.rpartition(".")[0] for name in shapes})
    named = {conv: _named(conv, norms) for conv in convs}
    first = any(
        norm and norms[norm] != convs[conv][0] and norms[norm] == convs[conv][1] for conv, norm in named.items()
    )
    pairs = {}
    for conv, shape in convs.items():
        norm = following.get(conv) or (_named(conv, norms, 1) if first else named[conv])
        if norm is not None and norms.get(norm) == shape[0]:
            pairs[conv] = norm
    return pairs


def _following(modules: set[str]) -> dict[str, str]:
    """Module with a number -> the one with the next larger number in the same parent."""
    numbered: dict[str, list[int]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        if leaf.isdecimal() and leaf.isascii() and len(leaf) < 9:
            numbered.setdefault(parent, []).append(int(leaf))
    found: dict[str, str] = {}
    for parent, numbers in numbered.items():
        start, ordered = f"{parent}." if parent else "", sorted(numbers)
        found |= {f"{start}{one}": f"{start}{after}" for one, after in pairwise(ordered)}
    return found


def _named(conv: str, norms: Mapping[str, int], ahead: int = 0) -> str | None:
    """The norm with the name of a convolution, or with a number that is larger by ``ahead``; None if there is none."""
    parent, dot, leaf = conv.rpartition(".")
    if "conv" not in leaf:
        return None
    for norm in _NORMS:
        name = leaf.replace("conv", norm, 1)
        if ahead:
            number = re.search(r"[0-9]{1,8}$", name)
            if number is None:
                return None
            name = f"{name[: number.start()]}{int(number[0]) + ahead}"
        if f"{parent}{dot}{name}" in norms:
            return f"{parent}{dot}{name}"
    return None
