"""``bdprune zoo``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli.outputs import emit
from bdprune.report.summary import percent, seconds
from bdprune.report.text import plain, table

if TYPE_CHECKING:
    from bdprune.zoo.manifest import Entry
    from bdprune.zoo.store import Truth

MANIFEST = click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    default=Path("zoo/demo/manifest.toml"),
    show_default=True,
    metavar="FILE",
    help="TOML file that says how each model is made.",
)


@click.group(short_help="Make and list models of known truth.")
def zoo() -> None:
    """Models of known truth: make them, list them."""


@zoo.command("make")
@MANIFEST
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with DATASET/train.parquet and DATASET/test.parquet.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where they go.")
@click.option("--only", multiple=True, metavar="NAME", help="Make this model; repeatable.  [default: all]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def make(manifest: Path, data: Path, output: Path, only: tuple[str, ...], quiet: bool) -> int:
    """Train the models of a manifest on real images, with its seeds, and measure them.

    Models that lie in the output folder already are left alone.

    \b
    bdprune zoo make --data data/ -o zoo/demo
    bdprune zoo make --manifest my.toml --data data/ -o my-zoo --only badnets
    """
    from bdprune.zoo.make import make as make_models

    truths = make_models(manifest, data, output, only=only, **({} if quiet else {"progress": _told}))
    emit(_table([(truth.name, "made", truth) for truth in truths]))
    return 0


@zoo.command("list")
@MANIFEST
@click.option("--format", "kind", type=click.Choice(["text", "json"]), default="text", show_default=True)
def list_models(manifest: Path, kind: str) -> int:
    """List the models of a manifest, with what was measured of those that are made.

    \b
    bdprune zoo list
    bdprune zoo list --manifest my.toml --format json
    """
    from bdprune.zoo.manifest import read_manifest
    from bdprune.zoo.store import read_truth

    truths = read_truth(manifest.parent)
    entries = read_manifest(manifest).models
    if kind == "json":
        emit(f"{json.dumps([_entry_json(entry, truths.get(entry.name)) for entry in entries], indent=2)}\n")
        return 0
    made = {path.stem for path in manifest.parent.glob("*.safetensors")}
    emit(_table([(one.name, "made" if one.name in made else "not made", truths.get(one.name)) for one in entries]))
    return 0


def _entry_json(entry: Entry, truth: Truth | None) -> dict[str, object]:
    import msgspec

    return {**msgspec.to_builtins(entry), "truth": msgspec.to_builtins(truth)}


def _table(rows: list[tuple[str, str, Truth | None]]) -> str:
    cells: list[tuple[str, ...]] = [("model", "", "target", "clean accuracy", "attack success", "training")]
    for name, state, truth in rows:
        target = "–" if truth is None or truth.target_label is None else str(truth.target_label)
        shares = (truth.clean_accuracy, truth.attack_success_rate) if truth else (None, None)
        cells.append((plain(name), state, target, *map(percent, shares), seconds(truth.seconds if truth else None)))
    return "\n".join(table(cells, "llrrrr")) + "\n"


def _told(name: str, step: int, steps: int, loss: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{plain(name)}: step {step} of {steps}, loss {loss:.3f}  ", end="", file=sys.stderr, flush=True)
    elif step % max(steps // 10, 1) == 0:
        print(f"{plain(name)}: step {step} of {steps}, loss {loss:.3f}", file=sys.stderr, flush=True)
