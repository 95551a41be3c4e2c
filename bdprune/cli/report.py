"""``bdprune report``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from bdprune.cli.options import FILE
from bdprune.cli.outputs import check_apart, emit, files_of_store
from bdprune.errors import OptionError, StoreError
from bdprune.files import check_writable, write_text


@click.command(short_help="Write a page about all models in stores.")
@click.argument("stores", nargs=-1, required=True, type=FILE, metavar="STORE...")
@click.option(
    "-o", "--output", type=FILE, required=True, metavar="FILE", help="HTML file to write; - for standard output."
)
def report(stores: tuple[Path, ...], output: Path) -> int:
    """Write a page about the latest scans of all models in stores: totals, what was found, and a table of the models.

    The page is one file that loads nothing. Its script searches, sorts and filters the table.

    \b
    bdprune report scans.db -o report.html
    bdprune report scans.db after.db -o report.html
    """
    from bdprune.report import Overview
    from bdprune.store import Screens, Store, latest

    target = None if str(output) == "-" else output
    check_apart([target], [path for one in stores for path in files_of_store(one)])
    _check_twice(stores)
    if target is not None:
        check_writable(target)
    page = Overview()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Store(one, writes=False)) for one in stores]
        for store, scan in latest(opened):
            for result in scan.results:
                page.add(result, scan.name, str(store.path))
        screened = sum(len(Screens(one).names()) for one in opened)
    if not len(page):
        which = f"The store {stores[0]} holds" if len(stores) == 1 else "The stores hold"
        what = f"no scans, only {_screens(screened)}" if screened else "no results"
        raise StoreError(f"{which} {what}.", "Scan models into one with `bdprune scan --store`.")
    if screened:
        print(f"bdprune: The report leaves out {_screens(screened)}; `bdprune show` lists them.", file=sys.stderr)
    emit(page.page()) if target is None else write_text(target, page.page())
    return 0


def _screens(count: int) -> str:
    return f"{count} screen{'s' if count != 1 else ''}"


def _check_twice(stores: tuple[Path, ...]) -> None:
    places = [os.path.realpath(one) for one in stores]
    twice = next((one for place, one in enumerate(stores) if places[place] in places[:place]), None)
    if twice is not None:
        raise OptionError(f"The store {twice} is given twice.", "Give it once; its models would count twice.")
