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


@click.command(short_help="Say whether checkpoints are backdoored.", epilog=exit_codes.HELP)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@options.data_options
@options.model_options
@click.option(
    "--detectors",
    type=options.Names(lambda: names("detector")),
    help="Which detectors run, with commas between; `bdprune detectors` says what they do.  [default: all]",
)
@options.precision_option("the detectors that train")
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up on a model after so long.  [default: never]")
@options.stack_options
@click.option(
    "--fail-on",
    type=click.Choice(["suspicious", "backdoored", "never"]),
    default="suspicious",
    show_default=True,
    help="Exit with 1 from this verdict on.",
)
@click.option("--exit-zero", is_flag=True, help="Exit with 0 whatever was found, except for usage errors.")
@click.option(
    "--skip-unknown",
    is_flag=True,
    help="Files and weights that could not be scanned are named, and do not change the exit code.",
)
@options.attachments_option
@options.format_option(*_GIVES)
@click.option("-o", "--output", "files", multiple=True, metavar="FILE", help="Where a --format goes, in order.")
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
    """Say whether checkpoints are backdoored, and which label the backdoor leads to.

    PATH is a checkpoint (safetensors, or torch in any of its formats), the index of shards, a folder of them, or a
    glob. Checkpoints are known by their content, and what is passed over is named. Each set of weights in a file gets a
    result of its own. Nothing in a checkpoint is ever executed. Without clean images only data-free detectors run, and
    no verdict is "clean".

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
        with redirect_stdout(sys.stderr):  # an --arch or a plug-in may print
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

    stack = 1 if stack == "auto" and len(models) == 1 else stack  # one model needs no trial
    more |= {"stack": StackOptions(stack, stack_memory), "detectors": more["detectors"] or None}
    return scan_many(progress.through(models), data, progress=progress.stage, **more)


def _reported(
    stream: Iterator[Result], sources: Sources, progress: Progress, live: list[outputs.Output]
) -> Iterator[Result]:
    """The results, each written to ``live`` outputs as it comes; files of a folder without weights are passed over."""
    while True:
        with redirect_stdout(sys.stderr):  # an --arch of the user's own may print
            result = next(stream, None)
        if result is None:
            return
        file = result.artifact.path if result.artifact else result.name
        if len(sources.models) > 1 and _holds_no_weights(result):
            sources.pass_over(Path(file), _reason(result))
            progress.finished("passed over", file, file)
            continue
        progress.finished(result.verdict, result.name, file)
        for one in live:
            with progress.paused():
                one.write([result])
        yield result


def _holds_no_weights(result: Result) -> bool:
    return result.error is not None and result.error.type == NoWeightsError.__name__


def _reason(result: Result) -> str:
    """Why a file without weights is passed over, without the name of the file."""
    assert result.error is not None
    return result.error.message.rpartition(": ")[2].removeprefix("it ").rstrip(".")


def _nothing_to_scan(paths: tuple[str, ...], sources: Sources) -> UnsupportedError:
    """The error where no file is a checkpoint: what was found instead."""
    found = [f"{len(files)} x {reason}" for (reason, _), files in sources.passed_over.items()]
    seen = f" Found {sources.files} files: {', '.join(found)}." if found else " It holds no files."
    return UnsupportedError(
        f"No checkpoint in {', '.join(paths)}.{seen}", "Give a checkpoint saved with torch.save or as safetensors."
    )
