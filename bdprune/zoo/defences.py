"""Defences that act during the training of a zoo's model, by their kind in a manifest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from bdprune.errors import OptionError
from bdprune.loops import IsolationSettings

DEFENCES: dict[str, type[IsolationSettings]] = {"abl": IsolationSettings}
"""The settings of each defence."""


def defence_from(given: Mapping[str, Any]) -> IsolationSettings:
    """The settings of a defence, such as ``{"kind": "abl", "share": 0.01}``.

    Raises:
        OptionError: an unknown kind or setting, or an invalid value.
    """
    kind, settings = given.get("kind"), {name: value for name, value in given.items() if name != "kind"}
    if not isinstance(kind, str) or kind not in DEFENCES:
        raise OptionError(f"There is no defence {kind!r}.", f"Known are {', '.join(DEFENCES)}.")
    known = [field.name for field in dataclasses.fields(DEFENCES[kind])]
    for name in settings:
        if name not in known:
            raise OptionError(f"The defence {kind} has no setting {name!r}.", f"Its settings are {', '.join(known)}.")
    try:
        return msgspec.convert(settings, DEFENCES[kind])
    except msgspec.ValidationError as error:
        raise invalid_setting(kind, settings, str(error)) from None


def invalid_setting(kind: str, settings: Mapping[str, Any], reason: str) -> OptionError:
    """The error for msgspec's ``reason``, such as "Expected `int`, got `str` - at `$.size`"."""
    what, _, place = reason.replace("`", "").partition(" - at $.")
    name = re.split(r"[.\[]", place)[0]
    value = f", {str(settings[name])[:80]!r}," if name in settings else ""
    where = f"setting {name} of {kind}{value}" if name else f"value of a setting of {kind}"
    return OptionError(f"The {where} is not valid: {what[:1].lower()}{what[1:]}.", "Correct this setting.")
