"""``bdprune screen``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli import exit_codes, inputs, options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import NoWeightsError, UnsupportedError
from bdprune.record import ScreenResult

if TYPE_CHECKING:
    from bdprune.sources import Sources

_GIVES = ("screen", "coverage")  # kinds of documents


@click.command(short_help="Score weights without images and without torch.", epilog=exit_codes.SCREEN_HELP)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--fail-on",
    type=click.Choice(["look-closer", "never"]),
    default="look-closer",
    show_default=True,
    help="Exit with 1 if a model gets this outcome.",
)
@click.option(
    "--no-digest", is_flag=True, help="Leave out the SHA-256 of each file, which takes longer than the scores."
)
@options.download_option
@options.format_option(*_GIVES)
@options.progress_options
def screen(
    paths: tuple[str, ...],
    fail_on: exit_codes.ScreenFailOn,
    no_digest: bool,
    max_download: int | None,
    formats: tuple[str, ...],
    quiet: bool,
    no_progress: bool,
) -> int:
    """Look for outlying filters and labels in the weights alone: many models a second, and torch need not be installed.

    PATH is a checkpoint (safetensors, or torch in any of its formats), the index of shards, a folder of checkpoints,
    a glob, or hf:ORG/NAME[@REVISION][/FILE] for a repository on the Hugging Face Hub (extra `hub`). Nothing in a
    checkpoint is executed. The outcome is "look closer" or "nothing found", never "clean": most backdoors do not show
    in the weights alone. Scan a model with `bdprune scan` before you trust it.

    \b
    bdprune screen model.pth
    bdprune screen models/ --format jsonl > screens.jsonl
    bdprune screen 'models/**/*.pth' --no-digest --fail-on never -f html=screens.html
    """
    from bdprune.screening import screen_many
    from bdprune.sources import expand

    wanted = outputs.plan(formats, (), _GIVES, quiet)
    sources = expand(paths, (), max_download, None if quiet or no_progress else inputs.note)
    models = sources.models
    outputs.check_apart([one.path for one in wanted], sources.local)
    if not models:
        raise UnsupportedError(
            f"No checkpoint in {', '.join(paths)}.", "Give a checkpoint saved with torch.save or as safetensors."
        )
    live = [one for one in wanted if one.is_live]
    counts: Counter[str] = Counter()
    kept: list[ScreenResult] = []
    with Progress(len(models), shown=not (quiet or no_progress)) as progress:
        stream = screen_many(progress.through(models), digest=not no_digest)
        for result in _reported(stream, sources, progress):
            counts[exit_codes.kind_of_screen(result)] += 1
            for one in live:
                with progress.paused():
                    one.write([result])
            if len(live) < len(wanted):  # a stream of many results stays out of memory
                kept.append(result)
    record = sources.record()
    coverage = [record] if record is not None else []
    as_array = sum(counts.values()) != 1 or not inputs.is_one_file(paths)
    outputs.write_all(wanted, lambda one: coverage if one in live else [*kept, *coverage], as_array)
    return exit_codes.of_screens(counts, fail_on)


def _reported(stream: Iterator[ScreenResult], sources: Sources, progress: Progress) -> Iterator[ScreenResult]:
    """The results, each announced; it skips files of a folder that hold no weights."""
    for result in stream:
        error = result.error
        if len(sources.models) > 1 and error is not None and error.type == NoWeightsError.__name__:
            sources.skip(Path(result.name), error.message.rpartition(": ")[2].removeprefix("it ").rstrip("."))
            progress.finished("skipped", result.name, result.name)
            continue
        progress.finished(result.outcome, result.name, result.name)
        yield result
