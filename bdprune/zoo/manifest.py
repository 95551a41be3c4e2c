"""A zoo's manifest: a TOML file that says how each model of known truth is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from bdprune.attacks.badnets import BadNets
from bdprune.attacks.base import Attack
from bdprune.attacks.blend import Blend
from bdprune.errors import OptionError
from bdprune.training.fit import Schedule

ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blend": Blend}


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model.

    Attributes:
        name: of its files.
        seed: of initialisation, poisoning, order and augmentation.
        attack: the attack's ``kind`` with its arguments, None for a clean model.
    """

    name: str
    seed: int
    attack: dict[str, Any] | None = None

    def make_attack(self) -> Attack | None:
        """The attack object, None for a clean model.

        Raises:
            OptionError: an unknown kind or arguments that the attack does not take.
        """
        if self.attack is None:
            return None
        settings = dict(self.attack)
        kind = settings.pop("kind", None)
        if kind not in ATTACKS:
            raise OptionError(f"Model {self.name!r} names the attack {kind!r}.", f"Known are {', '.join(ATTACKS)}.")
        try:
            return ATTACKS[kind](**settings)
        except TypeError as error:
            raise OptionError(f"Attack of model {self.name!r}: {error}.", "Correct the manifest.") from None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the models of a zoo share, and the models; schedules run one after the other, each a cycle of its own."""

    name: str
    dataset: str
    arch: str
    width: int
    num_classes: int
    schedules: list[Schedule]
    models: list[Entry]
    class_names: list[str] = []
    threads: int = 1
    defence_images: int = 500
    test_images: int = 1000

    def entry(self, name: str) -> Entry:
        """The model of that name.

        Raises:
            OptionError: there is none.
        """
        for entry in self.models:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in self.models)
        raise OptionError(f"The zoo {self.name!r} has no model {name!r}.", f"Its models are {names}.")


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        OptionError: it cannot be read, is not TOML, or a field is missing, unknown or of the wrong type.
    """
    try:
        raw = msgspec.toml.decode(path.read_bytes())
        manifest = msgspec.convert(raw, Manifest)
        _check_schedules(raw["schedules"])
    except OSError as error:
        raise OptionError(f"Cannot read the manifest {path}: {error.strerror}.", "Name an existing file.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise OptionError(
            f"The manifest {path} is not valid: {error}.", "Compare it with zoo/demo/manifest.toml."
        ) from None
    for entry in manifest.models:
        entry.make_attack()
    return manifest


def _check_schedules(schedules: list[dict[str, Any]]) -> None:
    """Unknown fields of a dataclass pass msgspec; a misspelt setting must not train with its default."""
    known = {field.name for field in dataclasses.fields(Schedule)}
    unknown = {name for settings in schedules for name in settings} - known
    if unknown:
        raise msgspec.ValidationError(f"a schedule has no setting `{min(unknown)}`")
