"""What plugs in: a module of a package of ours, or an entry point of an installed package. The methods are found
like this: one for each module of ``detectors`` and ``purifiers``, and those that plug in.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, cast

from bdprune.errors import OptionError
from bdprune.record import COSTS

if TYPE_CHECKING:
    from bdprune.methods import Detector, Method, Purifier
    from bdprune.record import MethodInfo

Kind = Literal["detector", "purifier"]

log = logging.getLogger(__name__)

_REPAIR = "Repair or remove the package that brings it."


def names(kind: Kind) -> list[str]:
    """Short names of all detectors or purifiers, ours first. No method is imported for that."""
    return list(_homes(kind))


def method_class(kind: Kind, name: str) -> type[Method]:
    """The class of a method.

    Raises:
        OptionError: a name that no method has, or a plug-in that is no method.
    """
    homes = _homes(kind)
    if name not in homes:
        raise OptionError(f"There is no {kind} {name!r}.", f"The {kind}s are {', '.join(homes)}.")
    try:
        found: Any = load(homes[name], lambda one: getattr(one, "kind", None) == kind)
    except Exception as error:
        raise OptionError(f"The plug-in {name!r} cannot be imported: {error!r}.", _REPAIR) from error
    if not inspect.isclass(found) or getattr(found, "kind", None) != kind:
        raise OptionError(
            f"The plug-in {name!r} is no {kind}: {found!r}.", f"It must be a subclass of bdprune.{kind.capitalize()}."
        )
    return cast("type[Method]", found)


def methods(kind: Kind) -> list[MethodInfo]:
    """The descriptions of all methods, in the order in which a scan runs them: the cheapest first."""
    found = [method_class(kind, name).info(name) for name in _sound(kind)]
    return sorted(found, key=lambda one: COSTS.index(one.cost))


def unusable(kind: Kind) -> dict[str, str]:
    """Why a method cannot be made with its default settings, by the name of each that cannot."""
    found = {}
    for name in names(kind):
        try:
            method_class(kind, name)().params  # noqa: B018
        except Exception as error:
            found[name] = str(error)
    return found


def _sound(kind: Kind) -> list[str]:
    """The names of the methods that can be made; plug-ins that cannot are left out with a warning."""
    broken = unusable(kind)
    for name, reason in broken.items():
        log.warning("the plug-in %s is left out: %s", name, reason)
    return [name for name in names(kind) if name not in broken]


def split_names(text: str) -> list[str]:
    """The names in ``text``, which has commas between them; each once."""
    return list(dict.fromkeys(map(str.strip, text.split(","))))


def detector(name: str, preset: str | None = None, **settings: Any) -> Detector:
    """The detector of that name, with its default settings, those of a preset, or others.

    Raises:
        OptionError: a name, preset or setting that there is not.

    Example:
        >>> detector("lipschitz", threshold=5.0)
        LipschitzDetector(threshold=5.0)
    """
    return _made("detector", name, preset, settings)  # type: ignore[return-value]


def purifier(name: str, preset: str | None = None, **settings: Any) -> Purifier:
    """The purifier of that name, with its default settings, those of a preset, or others.

    Raises:
        OptionError: a name, preset or setting that there is not.

    Example:
        >>> purifier("rnp", preset="paper").stop_early
        True
    """
    return _made("purifier", name, preset, settings)  # type: ignore[return-value]


def chosen_detectors(chosen: Sequence[str | Detector] | str | None, defaults: Mapping[str, Any]) -> list[Detector]:
    """The chosen detectors in the order given; all of them for None, the cheapest first.

    Args:
        chosen: names, or detectors, or names with commas between.
        defaults: settings, such as the seed, for those that are named and take them.

    Raises:
        OptionError: a name that no detector has.
    """
    wanted = split_names(chosen) if isinstance(chosen, str) else chosen
    if wanted is not None and not isinstance(wanted, Sequence):
        raise OptionError(f"{wanted!r} is no list of detectors.", "Give names or detectors in a list.")
    named = _sound("detector") if wanted is None else wanted
    found = [detector(one, **_taken("detector", one, defaults)) if isinstance(one, str) else one for one in named]
    strangers = [one for one in found if inspect.isclass(one) or getattr(one, "kind", None) != "detector"]
    if strangers:
        raise OptionError(f"{strangers[0]!r} is no detector.", "Give a name, or an instance of bdprune.Detector.")
    return sorted(found, key=lambda one: COSTS.index(one.cost)) if wanted is None else found


def chosen_purifier(
    method: str | Purifier, preset: str | None, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Purifier:
    """The purifier of that name, with ``settings``, and those of ``defaults`` that it takes; one that is made already
    comes back as it is.

    Raises:
        OptionError: a name, preset or setting that there is not.
    """
    if not isinstance(method, str):
        return method
    return purifier(method, preset, **{**_taken("purifier", method, defaults), **settings})


def _made(kind: Kind, name: str, preset: str | None, settings: Mapping[str, Any]) -> Method:
    make = method_class(kind, name)
    refused = sorted(settings.keys() - make.settings())
    if refused:
        hint = f"It takes {', '.join(sorted(make.settings()))}." if make.settings() else "It takes none."
        raise OptionError(f"The {kind} {name!r} takes no {', '.join(refused)}.", hint)
    return make.preset(preset, **settings) if preset else make(**settings)


def _taken(kind: Kind, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``settings`` that the method takes."""
    takes = method_class(kind, name).settings()
    return {key: value for key, value in settings.items() if key in takes and value is not None}


@cache
def _homes(kind: Kind) -> dict[str, EntryPoint | str]:
    """Where every method is found. Installed packages are looked through once a process."""
    return places(f"bdprune.{kind}s", f"bdprune.{kind}s")


def places(package: str, group: str) -> dict[str, EntryPoint | str]:
    """Where what plugs in is found, by name: the modules of ``package``, then the entry points of ``group``."""
    path = importlib.import_module(package).__path__
    ours: dict[str, EntryPoint | str] = {one.name: f"{package}.{one.name}" for one in pkgutil.iter_modules(path)}
    plugged = {point.name: point for point in entry_points(group=group)}
    for name in plugged.keys() & ours.keys():
        log.warning("the entry point %s of %s has the name of one of ours and is left out", name, group)
    return ours | {name: point for name, point in plugged.items() if name not in ours}


def load(place: EntryPoint | str, fits: Callable[[type], bool]) -> object:
    """What an entry point names, or the one class of a module of ours that ``fits``."""
    if isinstance(place, EntryPoint):
        return place.load()
    defined = vars(importlib.import_module(place)).values()
    (found,) = (one for one in defined if inspect.isclass(one) and one.__module__ == place and fits(one))
    return found
