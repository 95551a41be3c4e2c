"""``bdprune inspect``."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import click

from bdprune.cli import exit_codes, options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import OptionError


@click.command(short_help="Find images that carry a trigger.", epilog=exit_codes.IMAGES_HELP)
@click.argument("path", type=options.MODEL)
@click.option(
    "--images",
    required=True,
    type=options.FILE,
    metavar="DIR|FILE",
    help="Images to judge: a folder of pictures at any depth, .npz, or parquet. Labels are not read.",
)
@options.data_options
@click.option(
    "--method",
    type=click.Choice(["strip", "nu-strip"]),
    default="strip",
    show_default=True,
    help="strip needs the network only; nu-strip unlearns a copy of it first, which finds more kinds of triggers.",
)
@click.option(
    "--preset",
    type=click.Choice(["robust", "paper"]),
    default="robust",
    show_default=True,
    help="How images are superposed and how the threshold is set; paper is as published.",
)
@click.option(
    "--frr",
    type=float,
    metavar="SHARE",
    help="False rejection rate: the share of clean images that may be called suspicious.  [default: 0.01]",
)
@click.option(
    "--overlays",
    type=options.AtLeast(1),
    metavar="N",
    help="Superpose each image with N clean images.  [default: 100]",
)
@click.option(
    "--pictures",
    type=options.AtLeast(0),
    default=24,
    show_default=True,
    metavar="N",
    help="Put pictures of the N most suspicious images into the JSON and HTML reports.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["suspicious", "excess", "never"]),
    default="suspicious",
    show_default=True,
    help="Exit with 1 if an image is suspicious; or only if more are than clean images explain (excess, at 1 %).",
)
@options.model_options
@options.format_option("inspect")
@options.progress_options
def inspect(
    path: Path | str,
    images: Path,
    data: Path | None,
    method: Literal["strip", "nu-strip"],
    frr: float | None,
    overlays: int | None,
    fail_on: exit_codes.InspectFailOn,
    formats: tuple[str, ...],
    quiet: bool,
    no_progress: bool,
    **more: Any,
) -> int:
    """Find images that carry the trigger of a backdoored network, among queries or in a training set.

    Each image is superposed with clean images. A trigger keeps its label under them, so the entropy of the predictions
    is low. Held-out clean images set the threshold.

    \b
    bdprune inspect model.pth --data clean_images/ --images incoming/
    bdprune inspect model.pth --data clean.npz --images incoming/ --method nu-strip --frr 0.02 -f html=images.html
    bdprune inspect model.pth --data clean_images/ --images incoming/ --fail-on excess -f json | jq .labels
    """
    if data is None:
        raise OptionError("An inspection needs clean data.", "Give a few labelled clean images with --data.")
    from bdprune.fleet import check_exists

    check_exists(path)
    check_exists(images)
    wanted = outputs.plan(formats, (), ("inspect",), quiet)
    outputs.check_apart([one.path for one in wanted], [path, data, images])
    settings = {name: value for name, value in (("frr", frr), ("overlays", overlays)) if value is not None}
    with Progress(1, shown=not (quiet or no_progress)) as progress, redirect_stdout(sys.stderr):
        from bdprune.pipeline import inspect as inspect_images

        watch = _Watch(progress)
        result = inspect_images(path, data, images, method=method, settings=settings, watch=watch, **more)
    outputs.write_all(wanted, lambda one: [result], as_array=False)
    return exit_codes.of_inspection(result, fail_on)


class _Watch:
    """Shows the stage, and the time that is left for its images."""

    def __init__(self, progress: Progress, every: float = 5.0) -> None:
        self._progress, self._every = progress, every
        self._stage, self._start, self._shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start, self._shown = stage, now, now
            self._progress.stage(stage)
        elif total and (now - self._shown >= self._every or done == total):
            self._shown = now
            left = (now - self._start) / max(done, 1) * (total - done)
            self._progress.line(f"{stage}: {done} of {total}", left)
