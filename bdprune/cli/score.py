"""``bdprune score``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import click

from bdprune.cli import options, outputs


@click.command(short_help="List the filters that stand out.")
@click.argument("path", type=options.MODEL)
@click.option(
    "--method",
    type=click.Choice(["lipschitz", "suspiciousness"]),
    default="lipschitz",
    show_default=True,
    help="lipschitz works without data, suspiciousness needs clean images.",
)
@click.option("--top", type=options.AtLeast(0), default=20, show_default=True, metavar="N", help="Filters to list.")
@options.data_options
@options.model_options
@options.format_option("score")
def score(
    path: Path | str,
    method: Literal["lipschitz", "suspiciousness"],
    top: int,
    data: Path | None,
    formats: tuple[str, ...],
    **settings: Any,
) -> int:
    """Score every filter of a checkpoint and list the filters that stand out most in their layers.

    \b
    bdprune score model.pth
    bdprune score model.pth --method suspiciousness --data clean_images/ --top 50
    bdprune score model.pth --format json | jq '.top[0]'
    """
    from bdprune.fleet import check_exists

    check_exists(path)
    wanted = outputs.plan(formats, (), ("score",), quiet=False)
    outputs.check_apart([one.path for one in wanted], [path, data])
    with redirect_stdout(sys.stderr):
        from bdprune.pipeline import score as score_filters

        result = score_filters(path, data, method=method, top=top, **settings)
    for one in wanted:
        one.write([result])
    return 0
