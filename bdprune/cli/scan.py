"""``bdprune scan``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdprune.cli import exit_codes, options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import NoWeightsError, UnsupportedError
from bdprune.record import Result
from bdprune.registry import names

if TYPE_CHECKING:
    from bdprune.fleet import Sources

_GIVES = ("scan", "coverage")  # kinds of documents


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
@click.option("--timeout", type=float, metavar="SECONDS", help="Time limit for each model.  [default: none]")
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
    or a glob. The content of a file, not its name, decides whether it is a checkpoint; the report lists skipped files,
    with reasons. Each set of weights in a file gets its own result. A scan never executes anything in a checkpoint.
    Without clean images, only data-free detectors run, and the verdict is never "clean".

    \b
    bdprune scan model.pth --data clean_images/ --normalize cifar10
    bdprune scan models/ --data clean.npz --format jsonl > results.jsonl
    bdprune scan 'models/**/*.pth' --data clean.parquet --timeout 600 -f html=report.html
    """
    from bdprune.fleet import expand

    wanted = outputs.plan(formats, files, _GIVES, quiet)
    sources = expand(paths, [data] if data is not None else [])
    models = sources.models
    outputs.check_apart([one.path for one in wanted], [*models, data])
    if not models and not exit_zero:
        raise _nothing_to_scan(paths, sources)
    live = [one for one in wanted if one.is_live]
    with Progress(len(models), shown=not (quiet or no_progress)) as progress:
        with redirect_stdout(sys.stderr):  # an --arch callable or a plug-in may print
            stream = _scan_many(models, data, progress, **settings)
        results = list(_reported(stream, sources, progress, live))
    coverage = [found] if (found := sources.record()) is not None else []
    as_array = len(results) != 1 or len(paths) > 1 or not Path(paths[0]).is_file()
    outputs.write_all(wanted, lambda one: coverage if one in live else [*results, *coverage], as_array)
    skip_unknown = bool(settings["skip_unknown"])
    unknown = sources.may_hold_weights and not skip_unknown
    return exit_codes.of_scan(results, fail_on, exit_zero, unknown=unknown, skip_unknown=skip_unknown)


def _scan_many(
    models: list[Path], data: Path | None, progress: Progress, stack: int | str, stack_memory: int | None, **more: Any
) -> Iterator[Result]:
    progress.stage("starting")
    from bdprune.fleet import StackOptions, scan_many

    stack = 1 if stack == "auto" and len(models) == 1 else stack  # a trial would be useless for one model
    more |= {"stack": StackOptions(stack, stack_memory), "detectors": more["detectors"] or None}
    return scan_many(progress.through(models), data, progress=progress.stage, **more)


def _reported(
    stream: Iterator[Result], sources: Sources, progress: Progress, live: list[outputs.Output]
) -> Iterator[Result]:
    """The results, each written to ``live`` outputs as it comes; it skips files of a folder that hold no weights."""
    while True:
        with redirect_stdout(sys.stderr):  # an --arch callable may print
            result = next(stream, None)
        if result is None:
            return
        file = result.artifact.path if result.artifact else result.name
        if len(sources.models) > 1 and _holds_no_weights(result):
            sources.skip(Path(file), _reason(result))
            progress.finished("skipped", file, file)
            continue
        progress.finished(result.verdict, result.name, file)
        for one in live:
            with progress.paused():
                one.write([result])
        yield result


def _holds_no_weights(result: Result) -> bool:
    return result.error is not None and result.error.type == NoWeightsError.__name__


def _reason(result: Result) -> str:
    """Why the scan skipped a file without weights; the file's name is left out."""
    assert result.error is not None
    return result.error.message.rpartition(": ")[2].removeprefix("it ").rstrip(".")


def _nothing_to_scan(paths: tuple[str, ...], sources: Sources) -> UnsupportedError:
    """The error for paths without a checkpoint, with the kinds of files that they hold."""
    found = [f"{reason} ({len(files)})" for (reason, _), files in sources.skipped.items()]
    count = "1 file" if sources.files == 1 else f"{sources.files or 'no'} files"
    seen = f"{count}: {', '.join(found)}" if found else count
    return UnsupportedError(
        f"No checkpoint in {', '.join(paths)}. Found {seen}.",
        "Give a checkpoint saved with torch.save or as safetensors.",
    )
