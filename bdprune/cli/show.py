"""``bdprune show``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli import outputs
from bdprune.cli.options import FILE, format_option
from bdprune.errors import OptionError
from bdprune.record import ScreenResult
from bdprune.report import percent, plain, table

if TYPE_CHECKING:
    from bdprune.record import Result
    from bdprune.store import Store


@click.command(short_help="Show the results in a store.")
@click.argument("store", type=FILE, metavar="STORE")
@click.argument("name", required=False)
@format_option("scan", "screen")
@click.option("--all", "every", is_flag=True, help="Also show the earlier scans of NAME, the latest first.")
def show(store: Path, name: str | None, formats: tuple[str, ...], every: bool) -> int:
    """List the models in a store that scans and screens wrote, or show the results of one of them.

    NAME is the path of a model as the scan named it, or the end of it. Of each model, the latest scan counts, and the
    latest screen.

    \b
    bdprune show scans.db
    bdprune show scans.db resnet.pth
    bdprune show scans.db resnet.pth --all --format json
    """
    from bdprune.store import Screens, Store

    if every and name is None:
        raise OptionError("--all needs the NAME of a model.", "Give it after the store.")
    wanted = outputs.plan(formats, (), ("scan", "screen"), quiet=False)
    with Store(store, writes=False) as opened:
        full = None if name is None else _full(name, opened)
        kept = list(opened.scans(full))
        screened = [one for one in Screens(opened).all() if full in (None, one.name)]
    scans = [result for one in (kept if name is None or every else kept[:1]) for result in one.results]
    if name is None and not formats:
        outputs.emit(_listed([*scans, *screened]))
        return 0
    outputs.write_all(wanted, lambda one: [*scans, *screened], as_array=name is None or every)
    return 0


def _full(name: str, store: Store) -> str:
    """The whole name that ``name`` is the end of.

    Raises:
        OptionError: there is none, or there are several.
    """
    from bdprune.store import Screens

    names = list(dict.fromkeys([*store.names(), *Screens(store).names()]))
    if name in names:
        return name
    found = [one for one in names if one.endswith(f"/{name}")]
    if not found:
        raise OptionError(f"There is no model {name!r} in {store.path}.", f"`bdprune show {store.path}` lists them.")
    if len(found) > 1:
        raise OptionError(f"{len(found)} models end with {name!r}: {', '.join(found[:5])}.", "Give more of the path.")
    return found[0]


def _listed(results: Sequence[Result | ScreenResult]) -> str:
    if not results:
        return "The store holds no results.\n"
    rows = [_row(one) for one in results]
    return "\n".join(table([("verdict", "risk", "label", "scanned", "model"), *rows], "lrlll")) + "\n"


def _row(result: Result | ScreenResult) -> tuple[str, str, str, str, str]:
    if isinstance(result, ScreenResult):
        return f"screened: {result.outcome}", "–", "–", result.started[:10], plain(result.name)
    labels = result.targets if result.target_label is None else (result.target_label,)
    risk = "–" if result.risk is None else percent(result.risk)
    return result.verdict, risk, ", ".join(map(str, labels)) or "–", result.started[:10], plain(result.name)
