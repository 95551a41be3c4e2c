"""Finds plug-ins: modules of bdprune's own packages, and entry points of installed packages.

Each module of ``detectors`` and ``purifiers`` holds one method; plug-ins add others.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from bdprune.errors import OptionError
from bdprune.record import COSTS, LEVELS

if TYPE_CHECKING:
    from bdprune.methods import Detector, Method, Purifier
    from bdprune.record import MethodInfo

Kind = Literal["detector", "purifier"]

log = logging.getLogger(__name__)

_REPAIR = "Repair or remove the package that provides it."


def names(kind: Kind) -> list[str]:
    """Short names of all detectors or purifiers, bdprune's own first. This imports no method."""
    return list(_method_places(kind))


def method_class(kind: Kind, name: str) -> type[Method]:
    """The class of a method.

    Raises:
        OptionError: no method has this name, or the plug-in is not a method.
    """
    known = _method_places(kind)
    if name not in known:
        raise OptionError(f"There is no {kind} {name!r}.", f"The {kind}s are {', '.join(known)}.")
    try:
        found: Any = load(known[name], lambda one: getattr(one, "kind", None) == kind)
    except Exception as error:
        raise OptionError(f"The plug-in {name!r} cannot be imported: {error!r}.", _REPAIR) from error
    if not inspect.isclass(found) or getattr(found, "kind", None) != kind:
        raise OptionError(
            f"The plug-in {name!r} is not a {kind}: {found!r}.",
            f"It must be a subclass of bdprune.{kind.capitalize()}.",
        )
    return cast("type[Method]", found)


def methods(kind: Kind) -> list[MethodInfo]:
    """The descriptions of all methods, in the order in which a scan runs them (:func:`_rank`)."""
    return sorted((method_class(kind, name).info(name) for name in _sound(kind)), key=_rank)


def _rank(method: MethodInfo | Method) -> tuple[int, int]:
    """The place of a method in a scan: those of a small budget come first, and among them the cheap ones.

    Methods of no budget, which run only by name, come last.
    """
    level = getattr(method, "level", None)
    return LEVELS.index(level) if level else len(LEVELS), COSTS.index(method.cost)


def unusable(kind: Kind) -> dict[str, str]:
    """Why each unusable method cannot be made with its default settings, by the method's name."""
    found = {}
    for name in names(kind):
        try:
            method_class(kind, name)().params  # noqa: B018
        except Exception as error:
            found[name] = str(error)
    return found


def _sound(kind: Kind) -> list[str]:
    """The names of the methods that can be made; it skips broken plug-ins with a warning."""
    broken = unusable(kind)
    for name, reason in broken.items():
        log.warning("skipped the plug-in %s: %s", name, reason)
    return [name for name in names(kind) if name not in broken]


def split_names(text: str) -> list[str]:
    """The names in the comma-separated ``text``, each once."""
    return list(dict.fromkeys(map(str.strip, text.split(","))))


def detector(name: str, preset: str | None = None, **settings: Any) -> Detector:
    """The detector of that name, with its default settings, a preset, or single settings.

    Raises:
        OptionError: an unknown name, preset or setting.

    Example:
        >>> detector("lipschitz", threshold=5.0)
        LipschitzDetector(threshold=5.0)
    """
    return _made("detector", name, preset, settings)  # type: ignore[return-value]


def purifier(name: str, preset: str | None = None, **settings: Any) -> Purifier:
    """The purifier of that name, with its default settings, a preset, or single settings.

    Raises:
        OptionError: an unknown name, preset or setting.

    Example:
        >>> purifier("rnp", preset="paper").stop_early
        True
    """
    return _made("purifier", name, preset, settings)  # type: ignore[return-value]


def chosen_detectors(chosen: Sequence[str | Detector] | str | None, defaults: Mapping[str, Any]) -> list[Detector]:
    """The chosen detectors in the order given; None chooses all, in the order of :func:`methods`.

    Args:
        chosen: names, detectors, or comma-separated names.
        defaults: settings, such as the seed, for detectors that are given by name and have these settings.

    Raises:
        OptionError: an unknown detector.
    """
    wanted = split_names(chosen) if isinstance(chosen, str) else chosen
    if wanted is not None and not isinstance(wanted, Sequence):
        raise OptionError(
            f"The detectors must be a list, not {wanted!r}.", "Give names or instances of bdprune.Detector in a list."
        )
    named = _sound("detector") if wanted is None else wanted
    found = [detector(one, **_accepted("detector", one, defaults)) if isinstance(one, str) else one for one in named]
    invalid = [one for one in found if inspect.isclass(one) or getattr(one, "kind", None) != "detector"]
    if invalid:
        raise OptionError(f"{invalid[0]!r} is not a detector.", "Give a name, or an instance of bdprune.Detector.")
    return sorted(found, key=_rank) if wanted is None else found


def chosen_purifier(
    method: str | Purifier, preset: str | None, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Purifier:
    """The purifier of that name, with ``settings`` and the ``defaults`` that it accepts; an instance is returned
    unchanged.

    Raises:
        OptionError: an unknown name, preset or setting.
    """
    if not isinstance(method, str):
        return method
    return purifier(method, preset, **{**_accepted("purifier", method, defaults), **settings})


def _made(kind: Kind, name: str, preset: str | None, settings: Mapping[str, Any]) -> Method:
    make = method_class(kind, name)
    refused = sorted(settings.keys() - make.settings())
    if refused:
        known = ", ".join(sorted(make.settings()))
        hint = f"Its settings are {known}." if known else "It has no settings."
        raise OptionError(f"The {kind} {name!r} has no setting {', '.join(refused)}.", hint)
    settings = {**settings, **_nested(kind, name, make.preset(preset) if preset else make(), settings)}
    return make.preset(preset, **settings) if preset else make(**settings)


def _nested(kind: Kind, name: str, base: Method, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are groups of settings, given as mappings, as results record them; the others keep their value.

    Raises:
        OptionError: a mapping is not a group of settings, or does not fit it.
    """
    found = {}
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            continue
        own = getattr(base, key)
        if not is_dataclass(own) or isinstance(own, type):
            raise OptionError(f"The setting {key} of the {kind} {name!r} is no group of settings.", "Give a value.")
        unknown = sorted(value.keys() - {one.name for one in fields(own)})
        if unknown:
            known = ", ".join(one.name for one in fields(own))
            raise OptionError(f"The setting {key} of {name!r} has no {', '.join(unknown)}.", f"It has {known}.")
        try:
            found[key] = msgspec.convert({**asdict(own), **value}, type(own))
        except msgspec.ValidationError as error:
            raise OptionError(f"The setting {key} of {name!r} is wrong: {error}.", "Give another value.") from None
    return found


def _accepted(kind: Kind, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``settings`` that the method has and that are not None."""
    known = method_class(kind, name).settings()
    return {key: value for key, value in settings.items() if key in known and value is not None}


@cache
def _method_places(kind: Kind) -> dict[str, EntryPoint | str]:
    """The place of every method, by name. A process searches the installed packages once."""
    return places(f"bdprune.{kind}s", f"bdprune.{kind}s")


def places(package: str, group: str) -> dict[str, EntryPoint | str]:
    """Places of plug-ins by name: the modules of ``package``, then the entry points of ``group``."""
    path = importlib.import_module(package).__path__
    ours: dict[str, EntryPoint | str] = {one.name: f"{package}.{one.name}" for one in pkgutil.iter_modules(path)}
    plugged = {point.name: point for point in entry_points(group=group)}
    for name in plugged.keys() & ours.keys():
        log.warning("skipped the entry point %s of %s: bdprune has its own method of this name", name, group)
    return ours | {name: point for name, point in plugged.items() if name not in ours}


def load(place: EntryPoint | str, fits: Callable[[type], bool]) -> object:
    """The object that an entry point names, or the one class of a bdprune module that ``fits``."""
    if isinstance(place, EntryPoint):
        return place.load()
    defined = vars(importlib.import_module(place)).values()
    (found,) = (one for one in defined if inspect.isclass(one) and one.__module__ == place and fits(one))
    return found
