"""``bdprune purify``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from bdprune.cli import exit_codes, options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import OptionError
from bdprune.registry import names


@click.command(short_help="Remove the backdoor from a checkpoint.")
@click.argument("path", type=options.MODEL)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    type=options.Names(lambda: names("purifier")),
    help="Which purifier to use; `bdprune purifiers` describes them.",
)
@click.option("-o", "--output", required=True, type=options.FILE, metavar="OUT", help="The new checkpoint.")
@options.data_options
@click.option("--preset", metavar="NAME", help="A named set of the method's settings; `bdprune purifiers` lists them.")
@click.option(
    "--from",
    "start_from",
    type=options.FILE,
    metavar="RESULT",
    help="JSON of an earlier scan of the same weights on the same images, which the repair checks. The repair reuses "
    "the unlearned model of the scan if it finds it in the folder --attachments or next to RESULT.",
)
@click.option(
    "--mode",
    type=click.Choice(["zero_gamma", "zero_gamma_beta", "weights", "compact"]),
    help="How to prune a filter. `compact` removes it where that changes no logit (needs torch-pruning), and describes "
    "the smaller network in OUT.arch.json.  [default: the method's]",
)
@click.option(
    "--max-acc-drop",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Largest allowed drop of clean accuracy, as in 0.02. Fewer than 150 images show it less well: there, `auto` "
    "allows three times as much, and five times with fewer than 50.  [default: the method's]",
)
@click.option(
    "--check",
    is_flag=True,
    help="Look for signs of the backdoor before and after the repair. The method `auto` always does.",
)
@click.option(
    "--allow-missing-labels",
    is_flag=True,
    help="Repair although some labels have no clean image. The network may forget these labels.",
)
@options.precision_option("the repair's steps")
@options.model_options
@options.attachments_option
@options.format_option("purify")
@options.progress_options
def purify(
    path: Path | str,
    output: Path,
    data: Path | None,
    start_from: Path | None,
    formats: tuple[str, ...],
    quiet: bool,
    no_progress: bool,
    **settings: Any,
) -> int:
    """Remove the backdoor from a checkpoint and write a drop-in replacement.

    The method `auto` tries several methods, the cheapest first, until clean images show no sign of the backdoor.
    Clean images alone decide; most methods hold some out for this, and `suspiciousness` and `clp` use all. The
    repaired file keeps the format, names and extra entries of the file at PATH, which does not change. All sets of
    weights in it are repaired.

    The exit code is 1 if a sign of the backdoor is left (outcome `unrepaired`). It is 5 if nothing could be measured
    (`unverified`), or if a set of weights could not be repaired. The file is written in each of these cases.

    \b
    bdprune purify model.pth --data clean_images/ --normalize cifar10 -o repaired.pth
    bdprune purify model.pth --data clean.npz -o repaired.pth --method rnp --preset paper
    bdprune purify model.safetensors --data clean.npz -o repaired.safetensors -f html=repair.html
    """
    if data is None:
        raise OptionError("A repair needs clean data.", "Give a few labelled clean images with --data.")
    from bdprune.files import description_path
    from bdprune.fleet import check_exists

    check_exists(path)
    wanted = outputs.plan(formats, (), ("purify",), quiet)
    described = [description_path(output)] if settings["mode"] == "compact" else []
    outputs.check_apart([output, *described, *(one.path for one in wanted)], [path, data, start_from])
    with Progress(1, shown=not (quiet or no_progress)) as progress, redirect_stdout(sys.stderr):
        progress.stage("starting")
        from bdprune.pipeline import purify as repair

        source = next(progress.through([path]))
        done = repair(source, data, output=output, start_from=start_from, progress=progress.stage, **settings)
    results = [done.result, *(other.result for other in done.others)]
    outputs.write_all(wanted, lambda one: results, as_array=False)
    return exit_codes.of_repair(results)
