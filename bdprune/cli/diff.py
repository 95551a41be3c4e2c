"""``bdprune diff``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli.options import FILE, listing
from bdprune.cli.outputs import emit
from bdprune.report import plain

if TYPE_CHECKING:
    from bdprune.store import Changes


@click.command(short_help="Show what changed between two stores, and why.")
@click.argument("first", type=FILE, metavar="STORE_A")
@click.argument("second", type=FILE, metavar="STORE_B")
@listing
def diff(first: Path, second: Path, form: str) -> int:
    """Compare the latest scans of every model in two stores: what changed, and why.

    Models are matched by the paths that the scans named, and files on the Hugging Face Hub also if their commit is
    another. The causes are what differs between both scans: weights, clean data, settings, detectors, versions.

    \b
    bdprune diff before.db after.db
    bdprune diff before.db after.db --format json
    """
    from bdprune.store import Store, changes

    with Store(first, writes=False) as before, Store(second, writes=False) as after:
        found = changes(before, after)
    emit(f"{found.to_json()}\n" if form == "json" else "\n".join(_text(found)) + "\n")
    return 0


def _text(found: Changes) -> Iterator[str]:
    for one in found.changed:
        yield plain(one.name)
        yield from (f"  {plain(change)}" for change in one.changes)
        yield from (f"  because of {plain(reason)}" for reason in one.reasons)
    yield from (f"{plain(name)}\n  only in the first store" for name in found.gone)
    yield from (f"{plain(name)}\n  only in the second store" for name in found.new)
    only = f", {len(found.gone)} only in the first, {len(found.new)} only in the second"
    yield f"{len(found.changed)} changed, {found.same} the same{only if found.gone or found.new else ''}"
