"""``bdprune invert``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import click

from bdprune.cli import options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import OptionError
from bdprune.record import TRIGGER_KINDS, TriggerKind

_LABEL = options.AtLeast(0)


def _targets(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> list[int | Literal["any"]] | None:
    """The labels as numbers; None without any."""
    return ["any" if one == "any" else _LABEL.convert(one, parameter, context) for one in values] or None


@click.command(short_help="Recover the trigger of a backdoor.")
@click.argument("path", type=options.MODEL)
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=_targets,
    metavar="N|any",
    help="Label that the trigger leads to; repeatable. any stands for a trigger that leads away from the true label, "
    "which finds backdoors with many targets.  [default: all labels, and any]",
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    type=_LABEL,
    metavar="N",
    help="Label whose images the trigger flips; repeatable.  [default: all labels but the target]",
)
@click.option(
    "--kind",
    type=click.Choice([*TRIGGER_KINDS, "all"]),
    default="patch",
    show_default=True,
    help="patch covers pixels, additive changes all colours by fixed amounts, warp moves pixels.",
)
@click.option(
    "-o",
    "--output",
    type=options.FILE,
    metavar="DIR",
    help="Folder for each trigger: a safetensors file with mask and pattern, and PNG pictures of it.",
)
@options.data_options
@click.option("--budget", metavar="TIME", help="Time limit of the search, as in 300, 90s or 5m.  [default: none]")
@options.precision_option("the steps of the search")
@options.model_options
@options.format_option("invert")
@options.progress_options
def invert(
    path: Path | str,
    labels: list[int | Literal["any"]] | None,
    sources: tuple[int, ...],
    kind: TriggerKind | Literal["all"],
    output: Path | None,
    data: Path | None,
    formats: tuple[str, ...],
    quiet: bool,
    no_progress: bool,
    **settings: Any,
) -> int:
    """Recover the triggers that make a checkpoint label images as it should not.

    For each label, the smallest patch or change of colours is searched that flips clean images to it. Held-out clean
    images say how well it works. This gives no verdict: `bdprune scan` does.

    \b
    bdprune invert model.pth --data clean_images/ --label 1 -o triggers/
    bdprune invert model.pth --data clean.npz --label 2 --source 0 --kind all -f html=triggers.html
    """
    if data is None:
        raise OptionError(
            "The recovery of a trigger needs clean data.", "Give a few labelled clean images with --data."
        )
    from bdprune.fleet import check_exists

    check_exists(path)
    wanted = outputs.plan(formats, (), ("invert",), quiet)
    outputs.check_apart([output, *(one.path for one in wanted)], [path, data])
    with Progress(1, shown=not (quiet or no_progress)) as progress, redirect_stdout(sys.stderr):
        progress.stage("starting")
        from bdprune.pipeline import Wanted, recover_triggers

        source = next(progress.through([path]))
        done = recover_triggers(
            source, data, Wanted(labels, sources, kind), output=output, progress=progress.stage, **settings
        )
    outputs.write_all(wanted, lambda one: [done.result], as_array=False)
    return 0
