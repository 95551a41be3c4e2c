"""``bdprune scan``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdprune.cli import exit_codes, inputs, options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import OptionError, UnsupportedError
from bdprune.record import Result, some
from bdprune.registry import names

if TYPE_CHECKING:
    from bdprune.fleet import Scanner, Source, Sources

_GIVES = ("scan", "coverage")  # kinds of documents
_GIVEN_UP = ("not scanned: --max-failures was reached", True)


@click.command(short_help="Check whether checkpoints are backdoored.", epilog=exit_codes.HELP)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@options.data_options
@options.model_options
@click.option(
    "--detectors",
    type=options.Names(lambda: names("detector")),
    help="Detectors to run, separated by commas; `bdprune detectors` describes them.  [default: those of the budget]",
)
@click.option(
    "--budget",
    metavar="fast|default|full|SECONDS",
    default="default",
    show_default=True,
    help="How far to go: which detectors run and how thorough they are; or a time for each model, as in 300, 90s or "
    "5m. A scan ends earlier if its verdict is sure. The findings name what was left out.",
)
@click.option(
    "--calibration",
    metavar="TABLE.json|none",
    help="Table that turns the evidence into a probability, as `bdprune calibrate` writes it; none reports only the "
    "strength of the evidence as the risk.  [default: the table of this package]",
)
@options.precision_option("the detectors that train")
@options.run_options
@options.stack_options
@click.option(
    "--fail-on",
    type=click.Choice(["suspicious", "backdoored", "never"]),
    default="suspicious",
    show_default=True,
    help="Exit with 1 if a model gets this verdict or a worse one.",
)
@click.option("--exit-zero", is_flag=True, help="Exit with 0 instead of 1, 2, 3 and 5.")
@click.option(
    "--skip-unknown",
    is_flag=True,
    help="Report files and weights that could not be scanned, but ignore them in the exit code.",
)
@inputs.store_options
@options.attachments_option
@options.format_option(*_GIVES)
@click.option(
    "-o",
    "--output",
    "files",
    multiple=True,
    metavar="FILE",
    help="File for a --format, in the same order; the suffix of an extra FILE gives its format. Text is still printed "
    "unless --quiet is set.",
)
@options.progress_options
def scan(
    paths: tuple[str, ...],
    data: Path | None,
    fail_on: exit_codes.FailOn,
    exit_zero: bool,
    formats: tuple[str, ...],
    files: tuple[str, ...],
    quiet: bool,
    no_progress: bool,
    **settings: Any,
) -> int:
    """Check whether checkpoints are backdoored, and find the target label of the backdoor.

    PATH is a checkpoint (safetensors, or torch in any of its formats), the index of shards, a folder of checkpoints,
    a glob, hf:ORG/NAME[@REVISION][/FILE] for a repository on the Hugging Face Hub (extra `hub`), @FILE for the paths
    in a file, or - for those on standard input. The content of a file, not its name,
    decides whether it is a checkpoint; the report lists skipped files, with reasons. Each set of weights in a file
    gets its own result. A scan never executes anything in a checkpoint. Without clean images, only data-free detectors
    run, and the verdict is never "clean".

    \b
    bdprune scan model.pth --data clean_images/ --normalize cifar10
    bdprune scan models/ --data clean.npz --format jsonl > results.jsonl
    bdprune scan models/ --data clean.npz --store scans.db
    bdprune scan @list.txt --data clean.npz --store scans.db --shard 1/2
    bdprune scan hf:acme/resnet@main --data clean.npz
    bdprune scan models/ --data clean.npz --workers auto --memory-limit 4GiB
    bdprune scan 'models/**/*.pth' --data clean.parquet --timeout 600 -f html=report.html
    """
    from bdprune.fleet import expand

    wanted = outputs.plan(formats, files, _GIVES, quiet)
    given = inputs.expanded(paths)
    noted = None if quiet or no_progress else inputs.note
    own = [data] if data is not None else []
    sources = expand(given, own, settings["max_download"], noted, inputs.has_list(paths))
    if not sources.models and not exit_zero:
        raise _nothing_to_scan(given, sources)
    part: tuple[int, int] | None = settings.pop("shard")
    if part is not None:
        sources.keep_shard(*part)
    _check_store(settings["store"], settings.pop("resume"))
    outputs.check_apart(
        [one.path for one in wanted], [*sources.local, data, *outputs.files_of_store(settings["store"])]
    )
    out: outputs.Stream[Result] = outputs.Stream(wanted, several=len(sources.models) > 1)
    with Progress(len(sources.models), shown=not (quiet or no_progress)) as progress:
        _scan_all(sources, data, progress, out, **settings)
    out.end(sources.record(), len(out.results) != 1 or not inputs.is_one_file(paths))
    return exit_codes.OK if exit_zero else _code(out.results, sources, fail_on, bool(settings["skip_unknown"]), part)


def _code(
    results: Sequence[Result],
    sources: Sources,
    fail_on: exit_codes.FailOn,
    skip_unknown: bool,
    part: tuple[int, int] | None,
) -> int:
    """The exit code of a scan, perhaps of one shard, that may have stopped early."""
    unknown = sources.may_hold_weights and not skip_unknown
    if part is not None and not results and not unknown:
        return exit_codes.OK  # the models are in other shards
    code = exit_codes.of_scan(results, fail_on, unknown=unknown, skip_unknown=skip_unknown)
    return exit_codes.FAILED if _GIVEN_UP in sources.skipped and code != exit_codes.FOUND else code


def _check_store(store: Path | None, resume: bool) -> None:
    if resume and store is None:
        raise OptionError("--resume needs a store.", "Give the --store of the earlier run.")
    if resume and store is not None and not store.exists():
        raise OptionError(f"There is no store {store} to go on with.", "Check its name, or leave out --resume.")


def _scan_all(
    sources: Sources,
    data: Path | None,
    progress: Progress,
    out: outputs.Stream[Result],
    max_failures: int | None,
    **settings: Any,
) -> None:
    """Scans all models, or those before too many failures."""
    store: Path | None = settings["store"]
    models = _Until(sources.models, max_failures)
    try:
        with redirect_stdout(sys.stderr):  # an --arch callable or a plug-in may print
            scanner = _scanner(sources.models, data, progress, **settings)
            stream = scanner.scan_many(progress.through(models), progress.stage)
        with scanner, closing(stream):
            for result in _reported(stream, scanner, sources, progress):
                with progress.paused():
                    out.take(result)
                models.note(result)
            models.give_up(sources)
            if scanner.taken:
                progress.note(f"Results from {store}: {scanner.taken}.")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(store, progress.done, len(sources.models))) from None


def _scanner(
    models: list[Source], data: Path | None, progress: Progress, stack: int | str, stack_memory: int | None, **more: Any
) -> Scanner:
    progress.stage("starting")
    from bdprune.fleet import Scanner, StackOptions

    stack = 1 if stack == "auto" and len(models) == 1 else stack  # a trial would be useless for one model
    more |= {"stack": StackOptions(stack, stack_memory), "detectors": more["detectors"] or None}
    return Scanner(data, **more)


def _reported(stream: Iterator[Result], scanner: Scanner, sources: Sources, progress: Progress) -> Iterator[Result]:
    """The results, each announced; it skips files of a folder that hold no weights."""
    while True:
        before = scanner.taken
        with redirect_stdout(sys.stderr):  # an --arch callable may print
            result = next(stream, None)
        if result is None:
            return
        file = result.artifact.path if result.artifact else result.name
        if len(sources.models) > 1 and result.error is not None and result.error.holds_no_weights:
            sources.skip(Path(file), result.error.reason)
            progress.finished("skipped", file, file)
            continue
        progress.finished(result.verdict, result.name, file, taken=scanner.taken > before)
        yield result


class _Until:
    """The models, until too many files have failed; what has begun by then is finished.

    Args:
        models: all of them.
        most: number of files that may fail before no other is taken; None for any number.
    """

    def __init__(self, models: Sequence[Source], most: int | None) -> None:
        self._models, self._most = models, most
        self._taken = 0
        self._failed: set[str] = set()

    def __iter__(self) -> Iterator[Source]:
        for model in self._models:
            if self._is_reached():
                return
            self._taken += 1
            yield model

    def note(self, result: Result) -> None:
        """Counts the file of a result that failed; a file with several sets of weights counts once."""
        if result.verdict == "error":
            self._failed.add(result.artifact.path if result.artifact else result.name)

    def give_up(self, sources: Sources) -> None:
        """Records the models that were not taken."""
        left = self._models[self._taken :]
        if not left or not self._is_reached():
            return
        for path in left:
            sources.skip(path, *_GIVEN_UP)
        files = "1 file" if len(self._failed) == 1 else f"{len(self._failed)} files"
        what = f"Stopped after {files} failed; {_count(len(left))} not scanned."
        print(f"bdprune: {what} A larger --max-failures goes further.", file=sys.stderr)

    def _is_reached(self) -> bool:
        return self._most is not None and len(self._failed) >= self._most


def _count(files: int) -> str:
    return "1 file was" if files == 1 else f"{files} files were"


def _how_to_go_on(store: Path | None, done: int, count: int) -> str:
    if store is None:
        return ""
    return f"The results of {done} of {count} files are in {store}. Run the same command again to go on."


def _nothing_to_scan(paths: list[str], sources: Sources) -> UnsupportedError:
    """The error for paths without a checkpoint, with the kinds of files that they hold."""
    found = [f"{reason} ({len(files)})" for (reason, _), files in sources.skipped.items()]
    count = "1 file" if sources.files == 1 else f"{sources.files or 'no'} files"
    seen = f"{count}: {', '.join(found)}" if found else count
    return UnsupportedError(
        f"No checkpoint in {some(paths)}. Found {seen}.",
        "Give a checkpoint saved with torch.save or as safetensors.",
    )
