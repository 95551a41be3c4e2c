"""A zoo's manifest: a TOML file that describes how to train each of its clean and backdoored models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from bdprune.attacks import ATTACKS, Attack
from bdprune.data import PUBLISHED
from bdprune.errors import OptionError
from bdprune.loops import IsolationSettings, Schedule
from bdprune.model import architecture
from bdprune.zoo.defences import defence_from, invalid_setting

ALL_TO_ALL = "all-to-all"
"""The text for the target None in a manifest, because TOML has no null."""


_Count = Annotated[int, msgspec.Meta(ge=1)]
_Images = Annotated[int, msgspec.Meta(ge=0)]
_Schedules = Annotated[list[Schedule], msgspec.Meta(min_length=1)]


class _Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model in the file; None stands for the zoo's value."""

    name: str
    seed: int
    attack: dict[str, Any] | None = None
    defence: dict[str, Any] | None = None
    source: str | None = None
    dataset: str | None = None
    num_classes: _Count | None = None
    arch: str | None = None
    width: _Count | None = None
    train_images: _Count | None = None
    classes: Annotated[list[_Images], msgspec.Meta(min_length=2)] | None = None
    label_noise: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    schedules: _Schedules | None = None
    pending: bool = False
    note: str = ""


class _Zoo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    name: str
    dataset: str
    arch: str
    width: _Count
    schedules: _Schedules
    models: list[_Model] = []
    include: list[str] = []
    num_classes: _Count | None = None
    class_names: list[str] = []
    train_images: _Count | None = None
    threads: _Count = 1
    defence_images: _Images = 500
    test_images: _Images = 1000
    min_clean_accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


@dataclass(frozen=True)
class Entry:
    """One model, with the settings of its zoo.

    Attributes:
        name: the name of its files.
        seed: of initialisation, poisoning, order and augmentation.
        dataset: see ``data.datasets.read_dataset``.
        num_classes: number of labels.
        arch: the architecture's name in the registry.
        width: in the architecture's own unit.
        schedules: training schedules in order, each a separate cycle.
        threads: of the training; the same number gives the same weights.
        home: the default folder of its files.
        attack: the attack's ``kind`` with its settings, None for a clean model.
        defence: the ``kind`` of the defence that the training runs under, with its settings; None for none.
        source: name of the model that the attack starts from; for a clean model, of the clean model that is
            fine-tuned.
        train_images: number of training images, drawn by the seed; None takes all.
        classes: the labels of ``dataset`` that the model learns, renumbered in this order; empty for all.
        label_noise: share of the training images that get a random other label, in [0, 1).
        pending: whether it is trained only if it is requested by name.
        note: why it is pending, or why it misses a bar; or empty.
    """

    name: str
    seed: int
    dataset: str
    num_classes: int
    arch: str
    width: int
    schedules: tuple[Schedule, ...]
    threads: int
    home: Path
    attack: dict[str, Any] | None = None
    source: str | None = None
    train_images: int | None = None
    classes: tuple[int, ...] = ()
    label_noise: float = 0.0
    pending: bool = False
    note: str = ""
    defence: dict[str, Any] | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """All settings that determine the model, without settings at their default value.

        A later version with more settings thus reads the same recipe.
        """
        attack, defence = self.make_attack(), self.make_defence()
        return {
            **{name: getattr(self, name) for name in ("seed", "dataset", "num_classes", "arch", "width")},
            **({"train_images": self.train_images} if self.train_images else {}),
            **({"classes": list(self.classes)} if self.classes else {}),
            **({"label_noise": self.label_noise} if self.label_noise else {}),
            "schedules": [_not_default(schedule) for schedule in self.schedules],
            "attack": attack and {"kind": attack.kind, **_not_default(attack)},
            "source": self.source,
            **({"defence": {"kind": (self.defence or {})["kind"], **_not_default(defence)}} if defence else {}),
        }

    def make_attack(self) -> Attack | None:
        """The attack object, None for a clean model.

        Raises:
            OptionError: an unknown kind, or settings that the attack does not have.
        """
        if self.attack is None:
            return None
        try:
            settings = {name: value for name, value in self.attack.items() if name != "kind"}
            attack = attack_from(self.attack.get("kind"), settings)
            attack.goal(torch.arange(self.num_classes), self.num_classes)
        except OptionError as error:
            raise OptionError(f"Attack of model {self.name!r}: {error.message}", error.hint) from None
        return attack

    def make_defence(self) -> IsolationSettings | None:
        """The settings of the defence, None without one.

        Raises:
            OptionError: an unknown kind, settings that the defence does not have, or an attack that controls the
                training: the defender controls it then.
        """
        if self.defence is None:
            return None
        try:
            defence = defence_from(self.defence)
        except OptionError as error:
            raise OptionError(f"Defence of model {self.name!r}: {error.message}", error.hint) from None
        attack = self.make_attack()
        if attack is not None and not attack.only_poisons:
            raise OptionError(
                f"Model {self.name!r} has a defence, but the attack {attack.kind} controls the training.",
                "Name an attack that only poisons images, such as badnets, or remove `defence`.",
            )
        return defence


def attack_from(kind: object, settings: Mapping[str, Any], strict: bool = True) -> Attack:
    """The attack of that name.

    Args:
        kind: as in a manifest.
        settings: of the attack, such as ``{"target": 3}``; the target may be "all-to-all".
        strict: whether values must have their types; otherwise numbers may be texts.

    Raises:
        OptionError: an unknown attack or setting, or an invalid value.
    """
    if not isinstance(kind, str) or kind not in ATTACKS:
        raise OptionError(f"There is no attack {kind!r}.", f"Known are {', '.join(ATTACKS)}.")
    known = [field.name for field in dataclasses.fields(ATTACKS[kind])]
    for name in settings:
        if name not in known:
            raise OptionError(f"The attack {kind} has no setting {name!r}.", f"Its settings are {', '.join(known)}.")
    values = {**settings, "target": None} if settings.get("target") == ALL_TO_ALL else settings
    try:
        return msgspec.convert(values, ATTACKS[kind], strict=strict)
    except msgspec.ValidationError as error:
        raise invalid_setting(kind, settings, str(error)) from None


@dataclass(frozen=True)
class Manifest:
    """A zoo.

    Attributes:
        name: of the zoo.
        dataset: the default data set of its own models.
        class_names: a name for each label of ``dataset``, empty if unknown.
        home: folder for the files of its own models: the manifest's folder if the manifest is called
            ``manifest.toml``, else a folder of the manifest's name next to it.
        models: the models of included manifests, then its own, in the order of training.
        defence_images: number of clean training images to write next to the models, balanced over the classes and at
            least one of each; 0 writes none.
        test_images: the same for test images.
        min_clean_accuracy: lowest accepted clean accuracy of all its models, in [0, 1]; None sets no bar.
    """

    name: str
    dataset: str
    class_names: tuple[str, ...]
    home: Path
    models: tuple[Entry, ...]
    defence_images: int
    test_images: int
    min_clean_accuracy: float | None

    def entry(self, name: str) -> Entry:
        """The model of that name.

        Raises:
            OptionError: an unknown name.
        """
        for entry in self.models:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in self.models)
        raise OptionError(f"The zoo {self.name!r} has no model {name!r}.", f"Its models are {names}.")


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest and the manifests that it includes.

    Raises:
        OptionError: it cannot be read or is not TOML; a field is missing, unknown or of the wrong type; or the settings
            of a model contradict each other.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> Manifest:
    if path.resolve() in above:
        raise OptionError(f"The manifest {path} includes itself.", "Remove it from `include`.")
    zoo = _parse(path)
    home = path.parent if path.name == "manifest.toml" else path.with_suffix("")
    models: list[Entry] = []
    for name in zoo.include:
        models += _read(path.parent / name, (*above, path.resolve())).models
    models += [_entry(zoo, model, home) for model in zoo.models]
    known = PUBLISHED.get(zoo.dataset)
    class_names = tuple(zoo.class_names) or (known.class_names if known else ())
    images, bar = (zoo.defence_images, zoo.test_images), zoo.min_clean_accuracy
    manifest = Manifest(zoo.name, zoo.dataset, class_names, home, tuple(models), *images, bar)
    _check(manifest)
    return manifest


def _parse(path: Path) -> _Zoo:
    try:
        raw = msgspec.toml.decode(path.read_bytes())
        zoo = msgspec.convert(raw, _Zoo)
        for owner in (raw, *raw.get("models", ())):
            _check_schedules(owner.get("schedules", ()))
    except OSError as error:
        raise OptionError(f"Cannot read the manifest {path}: {error.strerror}.", "Name an existing file.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        hint = "Compare it with zoo/demo/manifest.toml."
        raise OptionError(f"The manifest {path} is not valid: {error}.", hint) from None
    return zoo


def _check_schedules(schedules: list[dict[str, Any]]) -> None:
    """Refuses unknown settings, which msgspec ignores: a misspelt setting must not train with its default."""
    known = {field.name for field in dataclasses.fields(Schedule)}
    unknown = {name for settings in schedules for name in settings} - known
    if unknown:
        raise msgspec.ValidationError(f"a schedule has no setting `{min(unknown)}`")


def _entry(zoo: _Zoo, model: _Model, home: Path) -> Entry:
    dataset = model.dataset or zoo.dataset
    known = PUBLISHED.get(dataset)
    given = model.num_classes or (zoo.num_classes if dataset == zoo.dataset else None)
    num_classes = len(model.classes or ()) or given or (known.num_classes if known else None)
    if num_classes is None:
        raise OptionError(f"The number of classes of {dataset!r} is unknown.", "Give num_classes in the manifest.")
    return Entry(
        name=model.name,
        seed=model.seed,
        dataset=dataset,
        num_classes=num_classes,
        arch=model.arch or zoo.arch,
        width=model.width or zoo.width,
        schedules=tuple(model.schedules or zoo.schedules),
        threads=zoo.threads,
        home=home,
        attack=model.attack,
        defence=model.defence,
        source=model.source,
        train_images=model.train_images or zoo.train_images,
        classes=tuple(model.classes or ()),
        label_noise=model.label_noise,
        pending=model.pending,
        note=model.note,
    )


def _check(manifest: Manifest) -> None:
    names = [entry.name for entry in manifest.models]
    for entry in manifest.models:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", entry.name):
            raise OptionError(
                f"A model is named {entry.name!r}.", "Use letters, digits, _ and -, because it names files."
            )
        if names.count(entry.name) > 1:
            raise OptionError(f"Two models are named {entry.name!r}.", "Give them different names.")
        architecture(entry.arch)
        if len(set(entry.classes)) < len(entry.classes):
            raise OptionError(f"Model {entry.name!r} lists a class twice.", "List each class once.")
        attack = entry.make_attack()
        entry.make_defence()
        needed = attack.needs_source if attack else ("clean" if entry.source else None)
        if needed is None and entry.source is not None:
            raise OptionError(f"Model {entry.name!r} has a source, but its attack needs none.", "Remove `source`.")
        if needed is not None:
            _check_source(manifest, entry, needed)


def _check_source(manifest: Manifest, entry: Entry, needed: str) -> None:
    if entry.source is None:
        hint = "Name it with source = NAME."
        raise OptionError(f"The attack of model {entry.name!r} starts from a {needed} model.", hint)
    source = manifest.entry(entry.source)
    if (source.attack is None) != (needed == "clean"):
        kind = "clean" if source.attack is None else "backdoored"
        raise OptionError(
            f"The attack of model {entry.name!r} starts from a {needed} model, {source.name!r} is {kind}.",
            "Name another source.",
        )
    if needed == "backdoored":
        _check_same_backdoor(entry, source)
    same = ("dataset", "num_classes", "classes", "arch", "width") if entry.attack else ("arch", "width")
    for field in same:
        ours, theirs = getattr(entry, field), getattr(source, field)
        if ours != theirs:
            raise OptionError(
                f"Model {entry.name!r} has {field} {ours}, its source {source.name!r} has {theirs}.",
                "Name a source with the same value.",
            )
    seen = {entry.name}
    while source.source is not None:
        if source.name in seen:
            raise OptionError(
                f"Model {entry.name!r} is its own source, directly or indirectly.", "Name another source."
            )
        seen.add(source.name)
        source = manifest.entry(source.source)


def _not_default(settings: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their default, as JSON values."""
    values = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    kept = {field.name: value for field, value in values if value != _default(field)}
    return dict(msgspec.json.decode(msgspec.json.encode(kept)))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_same_backdoor(entry: Entry, source: Entry) -> None:
    """Checks that an attack on a backdoored model has the model's own trigger, since it measures with it."""
    attacks = entry.make_attack(), source.make_attack()
    assert attacks[0] is not None and attacks[1] is not None
    ours, theirs = attacks[0].backdoor, attacks[1].backdoor
    shared = [field.name for field in dataclasses.fields(theirs) if field.name != "rate"]
    if not isinstance(ours, type(theirs)) or any(getattr(ours, name) != getattr(theirs, name) for name in shared):
        raise OptionError(
            f"Model {entry.name!r} has another trigger or target than its source {source.name!r}.",
            f"Name a source with the same {', '.join(shared)}.",
        )
