"""``bdprune schema``."""

from __future__ import annotations

import json

import click

from bdprune.cli.outputs import emit
from bdprune.record import KINDS
from bdprune.record import schema as json_schema


@click.command(short_help="Print the JSON Schema of a result.")
@click.argument("kind", type=click.Choice(list(KINDS)), default="scan")
def schema(kind: str) -> int:
    """Print the JSON Schema of a result: scan, purify, score, invert, inspect, or the coverage of folders.

    \b
    bdprune schema > result.schema.json
    bdprune schema purify
    """
    emit(f"{json.dumps(json_schema(kind), indent=2)}\n")
    return 0
