"""``bdprune zoo``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdprune.cli import exit_codes
from bdprune.cli.options import FILE, listing
from bdprune.cli.outputs import emit
from bdprune.cli.zoo_show import show
from bdprune.errors import OptionError
from bdprune.files import check_writable, write_text
from bdprune.report import percent, plain, seconds, table

if TYPE_CHECKING:
    from bdprune.zoo import Check, Entry, Truth

MANIFEST = click.argument("manifest", type=FILE, default=Path("zoo/demo/manifest.toml"))
DATA = click.option(
    "--data",
    required=True,
    type=FILE,
    metavar="DIR",
    help="Folder of the data sets: cifar10/train.parquet and so on.",
)
MODELS = click.option(
    "--models", type=FILE, metavar="DIR", help="Folder of the models.  [default: the manifest's folder]"
)
DEVICE = click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]|auto", help="Where to run.")
ONLY = click.option("--only", multiple=True, metavar="NAME", help="Name of a model; repeatable.  [default: all]")

_WRONG = ("differs", "other recipe", "not measured")  # states that fail a verification


@click.group(short_help="Train, list and verify clean and backdoored models.")
def zoo() -> None:
    """Train, list and verify models that are known to be clean or backdoored.

    A zoo is a TOML file, the manifest, that describes how to train each of its models. The models of a manifest.toml
    are in its folder, those of zoo/x.toml in zoo/x/. The default is the manifest of the demo.
    """


zoo.add_command(show)


@zoo.command("make", short_help="Train the models of a manifest.")
@MANIFEST
@DATA
@click.option(
    "-o", "--output", type=FILE, metavar="DIR", help="Folder for the models.  [default: the manifest's folder]"
)
@ONLY
@DEVICE
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def make(manifest: Path, data: Path, output: Path | None, only: tuple[str, ...], device: str, quiet: bool) -> int:
    """Train the models of a manifest on real images, with its seeds, and measure them.

    Existing models stay as they are; pending models are trained only if --only names them. A killed run resumes from
    its last checkpoint. Run the command twice to use two cores: each process trains different models.

    \b
    bdprune zoo make zoo/cifar10-w32.toml --data data/
    bdprune zoo make my.toml --data data/ -o my-zoo --only badnets
    """
    from bdprune.pipeline import parse_device
    from bdprune.zoo import make as make_models
    from bdprune.zoo import read_manifest

    callbacks: dict[str, Any] = {} if quiet else {"progress": Ticker(), "say": _print_message}
    truths = make_models(manifest, data, output, only, device=parse_device(device), **callbacks)
    zoo = read_manifest(manifest)
    emit(_table([(zoo.entry(truth.name), "made", truth) for truth in truths]))
    return 0


@zoo.command("list")
@MANIFEST
@MODELS
@listing
def list_models(manifest: Path, models: Path | None, form: str) -> int:
    """List the models of a manifest, with their measured figures.

    \b
    bdprune zoo list
    bdprune zoo list my.toml --format json
    """
    from bdprune.zoo import Storage, read_manifest

    zoo = read_manifest(manifest)
    storage = Storage(zoo, models)
    rows = [(entry, storage.state(entry), storage.record(entry)) for entry in zoo.models]
    if form == "json":
        emit(f"{json.dumps([_entry_json(*row) for row in rows], indent=2)}\n")
    else:
        emit(_table(rows))
    return 0


@zoo.command("verify", short_help="Measure the models of a manifest again.")
@MANIFEST
@DATA
@MODELS
@ONLY
@DEVICE
@click.option(
    "--write",
    "document",
    type=FILE,
    metavar="FILE.md",
    help="Write the table of the zoo into this document, if all models agree.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(
    manifest: Path,
    data: Path,
    models: Path | None,
    only: tuple[str, ...],
    device: str,
    document: Path | None,
    quiet: bool,
) -> int:
    """Measure the models of a manifest again on the full test set, and compare with the record of `zoo make`.

    Clean accuracy, attack success rate and robust accuracy may differ by 0.2 points, which is 20 of 10,000 images.
    Exits with 1 if a figure differs more, if a model was never measured, or if its recipe in the manifest has changed.

    \b
    bdprune zoo verify zoo/cifar10-w32.toml --data data/
    bdprune zoo verify zoo/cifar10-w32.toml --data data/ --write docs/evaluation/zoo.md
    """
    from bdprune.pipeline import parse_device
    from bdprune.zoo import markdown, missed_bars, read_manifest
    from bdprune.zoo import verify as verify_models

    if document is not None:
        check_writable(document)
    if document is not None and only:
        raise OptionError("--write needs all models, but --only selects some.", "Drop --only or --write.")
    callbacks: dict[str, Any] = {} if quiet else {"say": lambda name: _print_message(f"measuring {name}")}
    checks = verify_models(manifest, data, models, only, device=parse_device(device), **callbacks)
    zoo = read_manifest(manifest)
    emit(_check_table(checks, missed_bars(zoo, checks)))
    if any(check.state in _WRONG for check in checks):
        return exit_codes.FOUND
    if document is not None:
        _write_section(document, zoo.name, markdown(zoo, checks))
    return exit_codes.OK


def _write_section(document: Path, name: str, section: str) -> None:
    from bdprune.zoo import with_section

    text = document.read_text(encoding="utf-8") if document.exists() else ""
    write_text(document, with_section(text, name, section))


def _check_table(checks: list[Check], missed: dict[str, list[str]]) -> str:
    from bdprune.zoo import differences

    cells: list[tuple[str, ...]] = [("model", "", "CA", "truth", "ASR", "truth", "RA", "truth", "bars")]
    for check in checks:
        figures = []
        for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy"):
            figures += [percent(getattr(one, name) if one else None, 2) for one in (check.found, check.truth)]
        bars = "; ".join(missed.get(check.entry.name, [])) or ("met" if check.known else "")
        state = check.state.upper() if check.state in _WRONG else check.state
        if check.state == "differs" and check.truth and check.found:
            state += f": {', '.join(differences(check.truth, check.found))}"
        cells.append((check.entry.name, state, *figures, bars))
    return "\n".join(table(cells, "llrrrrrrl")) + "\n"


def _entry_json(entry: Entry, state: str, truth: Truth | None) -> dict[str, object]:
    import msgspec

    fields = msgspec.to_builtins(entry, enc_hook=str)
    return {**fields, "state": state, "truth": msgspec.to_builtins(truth)}


def _table(rows: list[tuple[Entry, str, Truth | None]]) -> str:
    cells: list[tuple[str, ...]] = [
        ("model", "", "attack", "target", "rate", "clean accuracy", "attack success", "training")
    ]
    for entry, state, truth in rows:
        shares = (truth.clean_accuracy, truth.attack_success_rate) if truth else (None, None)
        took = seconds(truth.seconds if truth else None)
        cells.append((entry.name, state, *_attack(entry), *map(percent, shares), took))
    return "\n".join(table(cells, "lllrrrrr")) + "\n"


def _attack(entry: Entry) -> tuple[str, str, str]:
    from bdprune.zoo import target_text, with_defence

    attack = entry.make_attack()
    figures = ("–", "–") if attack is None else (target_text(attack), percent(attack.rate))
    return (with_defence("none" if attack is None else attack.kind, entry), *figures)


def _print_message(text: str) -> None:
    print(plain(text), file=sys.stderr, flush=True)


class Ticker:
    """Shows the progress of a training and the remaining time: live on a terminal, else in ten lines a model."""

    def __init__(self) -> None:
        self._name = ""
        self._shown = 0.0
        self._first = (0, 0.0)

    def __call__(self, name: str, step: int, steps: int, loss: float) -> None:
        """One more step is done."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._first = name, (step, now)
        live = sys.stderr.isatty()
        if (now - self._shown < 0.2 and step < steps) if live else step % max(steps // 10, 1):
            return
        self._shown = now
        done, began = self._first
        left = f", {seconds((now - began) / (step - done) * (steps - step))} left" if done < step < steps else ""
        text = f"{plain(name)}: step {step} of {steps}, loss {loss:.3f}{left}"
        end = "\n" if not live or step == steps else ""
        print(f"\r\x1b[2K{text}" if live else text, end=end, file=sys.stderr, flush=True)
