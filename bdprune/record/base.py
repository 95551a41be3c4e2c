"""The base of all records: immutable, strict, and JSON without NaN or infinities; and checks of recorded settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import msgspec

from bdprune.errors import DataError, OptionError

SCHEMA_VERSION: Literal["2"] = "2"

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]

_NONE: Mapping[str, float] = MappingProxyType({})


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record: immutable, named fields only, unknown fields refused."""

    def to_json(self, *, indent: int | None = 2) -> str:
        """JSON text without NaN or infinities; ``indent=None`` gives one line."""
        compact = msgspec.json.encode(finite(msgspec.to_builtins(self)))
        return (compact if indent is None else msgspec.json.format(compact, indent=indent)).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads the JSON text of ``to_json``.

        Raises:
            DataError: the text is not JSON, or not a result of this kind and version.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"This is not a {cls.__name__} of schema {SCHEMA_VERSION}: {error}.",
                "Compare it with `bdprune schema`.",
            ) from error


def notebook_form(record: Any) -> str:
    """HTML of a result, which a notebook shows.

    The package bdprune knows where it is made: records are below reports, and import none.
    """
    import bdprune

    return bdprune.html_fragment(record)


def finite(value: Any) -> Any:
    """``value`` as strict JSON: numbers that are not finite become None, objects that JSON lacks become text.

    Bytes of a file name that are not UTF-8 (lone surrogates in Python) become question marks.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return number(value)
    if hasattr(value, "tolist"):  # arrays, tensors, and the scalars of both
        return finite(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite(item) for item in value]
    return str(value).encode(errors="replace").decode()


def number(value: float | None) -> float | None:
    """``value`` if it is a finite number, else None."""
    return float(value) if value is not None and math.isfinite(value) else None


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of ``names``, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def check_settings(settings: object, least: Mapping[str, float] = _NONE, above: Mapping[str, float] = _NONE) -> None:
    """Checks the choices and the ranges of a dataclass of settings.

    Args:
        settings: each field whose type has a ``Literal`` must be one of its values.
        least: field -> its smallest value.
        above: field -> a value below all that it may have.

    Raises:
        OptionError: a field has another value, or is not finite.
    """
    kind: type[Any] = type(settings)
    owner = kind.__name__
    for name, choices in _choices(kind).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(settings, name)
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise OptionError(f"The setting {name} of {owner} is {value!r}.", f"Give one of {known}.")
    for name, bound in least.items():
        _refuse(owner, name, getattr(settings, name), f"at least {bound:g}", lambda value, bound=bound: value >= bound)
    for name, bound in above.items():
        _refuse(owner, name, getattr(settings, name), f"above {bound:g}", lambda value, bound=bound: value > bound)


def check_shares(settings: object, names: Iterable[str], least: float = 0) -> None:
    """Checks that fields of a dataclass are shares; None is one that was not given.

    Args:
        settings: the dataclass.
        names: its fields.
        least: the smallest value; -1 for a difference of shares.

    Raises:
        OptionError: a field is neither None nor a number in [least, 1].
    """
    wanted = f"at least {least:g} and at most 1"
    for name in names:
        if (value := getattr(settings, name)) is not None:
            _refuse(type(settings).__name__, name, value, wanted, lambda value: least <= value <= 1)


def _refuse(owner: str, name: str, value: Any, wanted: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise OptionError(f"The setting {name} of {owner} is {value!r}.", f"Give a number that is {wanted}.")


@cache
def _choices(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """The values that each field with a ``Literal`` may have; None stands for itself."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # a plug-in imports types for its checker only
        return {}
    return {one.name: values for one in fields(kind) if (values := _values_of(hints[one.name]))}


def _values_of(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint)
    if not parts or not all(get_origin(one) is Literal or one is type(None) for one in parts):
        return ()
    return tuple(value for one in parts for value in (get_args(one) if get_origin(one) is Literal else (None,)))
