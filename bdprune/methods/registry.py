"""The detectors and purifiers there are: those of this package and those that plug in by entry points."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from bdprune.errors import OptionError
from bdprune.methods.base import Detector, Purifier
from bdprune.runtime import Precision

_BUILT_IN = {
    "bdprune.detectors": {
        "unlearning": "bdprune.detectors.unlearning:UnlearningDetector",
        "lipschitz": "bdprune.detectors.lipschitz:LipschitzDetector",
        "suspiciousness": "bdprune.detectors.suspiciousness:SuspiciousnessDetector",
    },
    "bdprune.purifiers": {
        "rnp": "bdprune.purifiers.rnp:RNP",
        "suspiciousness": "bdprune.purifiers.suspiciousness:SuspiciousnessPruning",
    },
}

log = logging.getLogger(__name__)


def names(group: str) -> list[str]:
    """Short names of everything in ``group`` (``bdprune.detectors`` or ``bdprune.purifiers``), ours first."""
    return list(_homes(group))


def detectors(chosen: Sequence[str | Detector] | None, seed: int, precision: Precision | None = None) -> list[Detector]:
    """The chosen detectors, all of them for None.

    A name is made with its default settings, but for ``seed`` and, unless it is None, ``precision``, if it takes them.

    Raises:
        OptionError: a name that no detector has.
    """
    settings = {"seed": seed} if precision is None else {"seed": seed, "precision": precision}
    wanted = names("bdprune.detectors") if chosen is None else chosen
    return [_detector(one, settings) if isinstance(one, str) else one for one in wanted]


def split_names(text: str) -> list[str]:
    """The names in ``text``, which has commas between them; each once."""
    return list(dict.fromkeys(map(str.strip, text.split(","))))


def purifier(method: str | Purifier, settings: Mapping[str, Any], seed: int) -> Purifier:
    """The purifier of that name, made with ``settings`` and ``seed``; one that is made already comes back as it is.

    ``preset`` among the settings names a set of them, for purifiers that have such sets (a class method ``preset``).

    Raises:
        OptionError: a name that no purifier has, or a setting that it does not take.
    """
    if not isinstance(method, str):
        return method
    make = _load("bdprune.purifiers", method)
    own = dict(settings)
    preset = own.pop("preset", None)
    refused = [name for name in own if name not in inspect.signature(make).parameters]
    refused += ["preset"] if preset and not hasattr(make, "preset") else []
    if refused:
        raise OptionError(f"The purifier {method!r} takes no {', '.join(refused)}.", "Leave it out.")
    own |= _taken(make, {"seed": seed})
    return cast(Purifier, make.preset(preset, **own) if preset else make(**own))


def _detector(name: str, settings: Mapping[str, Any]) -> Detector:
    make = _load("bdprune.detectors", name)
    return cast(Detector, make(**_taken(make, settings)))


def _taken(make: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``settings`` that ``make`` takes."""
    return {name: value for name, value in settings.items() if name in inspect.signature(make).parameters}


def _load(group: str, name: str) -> Any:
    homes = _homes(group)
    if name not in homes:
        kind = group.rpartition(".")[2]
        raise OptionError(f"There is no {kind.removesuffix('s')} {name!r}.", f"The {kind} are {', '.join(homes)}.")
    return homes[name].load()


@cache
def _homes(group: str) -> dict[str, EntryPoint]:
    """Where everything in ``group`` is found. Installed packages are looked through once a process."""
    ours = {name: EntryPoint(name, home, group) for name, home in _BUILT_IN[group].items()}
    plugged = {point.name: point for point in entry_points(group=group)}
    for name in plugged.keys() & ours.keys():
        log.warning("the entry point %s of %s has the name of a built-in one and is left out", name, group)
    return ours | {name: point for name, point in plugged.items() if name not in ours}
