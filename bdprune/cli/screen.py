"""``bdprune screen``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli import exit_codes, inputs, options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import OptionError, UnsupportedError
from bdprune.record import ScreenResult, some

if TYPE_CHECKING:
    from bdprune.sources import Sources
    from bdprune.store import Screens

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
@click.option(
    "--store",
    type=options.FILE,
    metavar="FILE.db",
    help="Keep the screens in this file, which may also hold scans. A file that it knows is not screened again.",
)
@options.download_option
@options.format_option(*_GIVES)
@options.progress_options
def screen(
    paths: tuple[str, ...],
    fail_on: exit_codes.ScreenFailOn,
    no_digest: bool,
    store: Path | None,
    max_download: int | None,
    formats: tuple[str, ...],
    quiet: bool,
    no_progress: bool,
) -> int:
    """Look for outlying filters and labels in the weights alone: many models a second, and torch need not be installed.

    PATH is a checkpoint (safetensors, or torch in any of its formats), the index of shards, a folder of checkpoints,
    a glob, hf:ORG/NAME[@REVISION][/FILE] for a repository on the Hugging Face Hub (extra `hub`), @FILE for the paths in
    a file, or - for those on standard input. Nothing in a checkpoint is executed. The outcome is "look closer" or
    "nothing found", never "clean": most backdoors do not show in the weights alone. Scan a model with `bdprune scan`
    before you trust it.

    \b
    bdprune screen model.pth
    bdprune screen models/ --store scans.db --format jsonl > screens.jsonl
    bdprune screen 'models/**/*.pth' --no-digest --fail-on never -f html=screens.html
    """
    from bdprune.sources import expand

    if store is not None and no_digest:
        raise OptionError("A store needs the digest of each file.", "Leave out --no-digest or --store.")
    wanted = outputs.plan(formats, (), _GIVES, quiet)
    given = inputs.expanded(paths)
    note = None if quiet or no_progress else inputs.note
    sources = expand(given, (), max_download, note, inputs.has_list(paths))
    models = sources.models
    outputs.check_apart([one.path for one in wanted], [*sources.local, *outputs.files_of_store(store)])
    if not models:
        raise UnsupportedError(
            f"No checkpoint in {some(given)}.", "Give a checkpoint saved with torch.save or as safetensors."
        )
    out: outputs.Stream[ScreenResult] = outputs.Stream(wanted, several=len(models) > 1)
    with Progress(len(models), shown=not (quiet or no_progress)) as progress:
        counts = _screen_all(sources, store, not no_digest, progress, out)
    out.end(sources.record(), sum(counts.values()) != 1 or not inputs.is_one_file(paths))
    return exit_codes.of_screens(counts, fail_on, unknown=sources.may_hold_weights)


def _screen_all(
    sources: Sources, store: Path | None, digest: bool, progress: Progress, out: outputs.Stream[ScreenResult]
) -> Counter[str]:
    """Screens all models, perhaps with a store; the number of screens of each kind."""
    from bdprune.screening import screen_many

    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        kept = None if store is None else _stored(store, stack)
        files = progress.through(sources.models)
        for result in _reported(kept.run(files) if kept else screen_many(files, digest=digest), sources, progress):
            counts[exit_codes.kind_of_screen(result)] += 1
            with progress.paused():
                out.take(result)
        if kept is not None and kept.taken:
            progress.note(f"Screens from {store}: {kept.taken}.")
    return counts


def _stored(path: Path, stack: ExitStack) -> Screens:
    from bdprune.store import Screens, Store

    return Screens(stack.enter_context(Store(path)))


def _reported(stream: Iterator[ScreenResult], sources: Sources, progress: Progress) -> Iterator[ScreenResult]:
    """The results, each announced; it skips files of a folder that hold no weights."""
    for result in stream:
        error = result.error
        if len(sources.models) > 1 and error is not None and error.holds_no_weights:
            sources.skip(Path(result.name), error.reason)
            progress.finished("skipped", result.name, result.name)
            continue
        progress.finished(result.outcome, result.name, result.name)
        yield result
