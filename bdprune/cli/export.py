"""``bdprune export``."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from bdprune.cli.options import FILE
from bdprune.cli.outputs import check_apart, emit, files_of_store
from bdprune.errors import OptionError

_FORMATS = ("jsonl", "parquet")


@click.command(short_help="Write the results in stores to one file.")
@click.argument("stores", nargs=-1, required=True, type=FILE, metavar="STORE...")
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    help="jsonl: one result a line, as a scan writes it. parquet: one row a result, with columns for the main fields; "
    "it needs pyarrow.  [default: the suffix of the file, or jsonl without a file]",
)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="File to write.  [default: standard output]")
def export(stores: tuple[Path, ...], form: str | None, output: Path | None) -> int:
    """Write the latest scan and the latest screen of every model in the stores, such as those of shards, to one file.

    If several stores have a model of the same name, what started last is written.

    \b
    bdprune export scans.db > results.jsonl
    bdprune export scans.db -o results.parquet
    """
    from bdprune.store import Store, lines
    from bdprune.store import export as write

    if output is not None and str(output) == "-":
        output = None
    form = form or (_form_of(output) if output is not None else "jsonl")
    if output is None and form == "parquet":
        raise OptionError("Parquet does not go to standard output.", "Give a file with -o.")
    check_apart([output], [path for one in stores for path in files_of_store(one)])
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Store(one, writes=False)) for one in stores]
        if output is not None:
            write(opened, "parquet" if form == "parquet" else "jsonl", output)
            return 0
        for line in lines(opened):
            emit(line)
    return 0


def _form_of(path: Path) -> str:
    form = path.suffix.lower().removeprefix(".")
    if form not in _FORMATS:
        raise OptionError(f"The suffix of {str(path)!r} names no format.", "Give -f jsonl or -f parquet.")
    return form
