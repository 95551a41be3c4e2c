"""Normalisations by name: the mean and standard deviation pairs that published training code uses."""

from __future__ import annotations

import math

from bdprune.errors import OptionError
from bdprune.model.handle import Normalization

_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)

NORMALIZATIONS: dict[str, Normalization] = {
    "none": Normalization(),
    "imagenet": Normalization(_IMAGENET_MEAN, (0.229, 0.224, 0.225)),
    "cifar10": Normalization(_CIFAR10_MEAN, (0.2470, 0.2435, 0.2616)),
    "half": Normalization((0.5,), (0.5,)),
    "cifar100": Normalization((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # The standard deviation of the means of images, copied from one training repository to the next.
    "cifar10-old": Normalization(_CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),
    "gtsrb": Normalization((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    # Networks fed with 0 to 255, without and with the mean taken off (Caffe's habit).
    "bytes": Normalization((0.0,), (1 / 255,)),
    "caffe": Normalization(_IMAGENET_MEAN, (1 / 255,) * 3),
}
"""Most common first. One value stands for every channel."""

GRAY_ONLY = frozenset({"mnist"})
"""Names of those that mean nothing for colour images."""


def parse_normalization(text: str) -> Normalization:
    """The normalisation that ``text`` names or spells out.

    Args:
        text: a name in ``NORMALIZATIONS``, or means and then standard deviations with commas between, such as
            ``0.5,0.5,0.5,0.25,0.25,0.25``, in the units of images in [0, 1]. One pair stands for every channel.

    Raises:
        OptionError: no such name, no numbers, an odd count, or a standard deviation that is not above 0.

    Example:
        >>> parse_normalization("0.5,0.25")
        Normalization(mean=(0.5,), std=(0.25,))
    """
    name = text.strip().lower()
    return NORMALIZATIONS[name] if name in NORMALIZATIONS else _spelled_out(text)


def normalization_name(normalization: Normalization) -> str:
    """What to write after ``--normalize`` to get ``normalization``: its name, else its numbers."""
    for name, known in NORMALIZATIONS.items():
        if known == normalization:
            return name
    return ",".join(f"{value:g}" for value in (*normalization.mean, *normalization.std))


def _spelled_out(text: str) -> Normalization:
    hint = f"Give one of {', '.join(NORMALIZATIONS)}, or numbers as in m1,m2,m3,s1,s2,s3."
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"There is no normalisation {text[:80]!r}.", hint) from error
    if len(values) % 2:
        raise OptionError(f"{len(values)} numbers can't be as many means as standard deviations.", hint)
    mean, std = values[: len(values) // 2], values[len(values) // 2 :]
    if not all(map(math.isfinite, values)) or min(std) <= 0:
        raise OptionError(f"{text[:80]!r} has a value that is not finite or a standard deviation not above 0.", hint)
    return Normalization(tuple(mean), tuple(std))
