"""``bdprune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli import exit_codes
from bdprune.cli.options import FILE
from bdprune.cli.outputs import emit, use_colour
from bdprune.cli.progress import Progress
from bdprune.files import check_writable, make_folder, write_text
from bdprune.report import percent, plain, seconds, table

if TYPE_CHECKING:
    from bdprune.fleet import Row
    from bdprune.record import Document, Result

COLUMNS = ("model", "truth", "verdict", "label", "", "clean accuracy", "attack success")
NOTE = (
    "Scans and repairs saw the checkpoints and the clean images only. Accuracy and attack success were measured "
    "afterwards, on test images and with the true triggers."
)


@click.command(short_help="Find and remove the backdoors of the shipped models.")
@click.option(
    "--zoo",
    type=FILE,
    default=Path("zoo/demo"),
    show_default=True,
    metavar="DIR",
    help="Folder with the models of known truth and their images.",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("out/demo"),
    show_default=True,
    metavar="DIR",
    help="Where the repaired models and the report go.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of scans and repairs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def demo(zoo: Path, output: Path, seed: int, quiet: bool) -> int:
    """Scan the shipped models, repair the backdoored ones, and compare both with the truth.

    Scans and repairs see the checkpoints and 500 clean images only. The true triggers are used afterwards, to
    measure. It takes about three minutes on two cores. Exits with 1 if a verdict or a label is wrong.

    \b
    bdprune demo
    bdprune demo --seed 3 -o /tmp/demo
    """
    report = output / "report.html"
    make_folder(output)
    check_writable(report)
    with Progress(1, shown=not quiet) as progress:
        progress.stage("starting")
        from bdprune.fleet import run

        done = run(zoo, output, seed=seed, watcher=_Shown(progress))
    from bdprune.report import Table, html_page

    named = [_with_class_names(document, done.class_names) for document in done.documents]
    closing = f"{sum(row.right for row in done.rows)} of {len(done.rows)} verdicts right, in {seconds(done.seconds)}"
    rows = [_row(row, done.class_names) for row in done.rows]
    write_text(report, html_page(named, "demo", Table(closing, COLUMNS, rows, NOTE)))
    bold = f"\x1b[1m{closing}\x1b[0m" if use_colour() else closing
    emit("\n".join([*table([COLUMNS, *rows], "l" * len(COLUMNS)), "", f"  {bold}. Report: {report}"]) + "\n")
    return exit_codes.OK if all(row.right for row in done.rows) else exit_codes.FOUND


class _Shown:
    """Shows stages and verdicts on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, stage: str, left: float) -> None:
        self._progress.line(f"{name}: {stage}", left)

    def verdict(self, name: str, result: Result) -> None:
        label = "" if result.target_label is None else f", target label {result.target_label}"
        self._progress.note(f"{name}: {result.verdict.upper()}{label}")


def _with_class_names(document: Document, names: tuple[str, ...]) -> Document:
    """The manifest knows the names of the classes, the images do not."""
    import msgspec

    if document.data is None:
        return document
    return msgspec.structs.replace(document, data=msgspec.structs.replace(document.data, class_names=names))


def _row(row: Row, class_names: tuple[str, ...]) -> tuple[str, ...]:
    truth = "clean" if row.true_label is None else f"backdoor to {_label(row.true_label, class_names)}"
    after = row.after
    accuracy = percent(row.before.clean_accuracy) + (f" → {percent(after.clean_accuracy)}" if after else "")
    success = percent(row.before.attack_success_rate) + (f" → {percent(after.attack_success_rate)}" if after else "")
    label = _label(row.result.target_label, class_names)
    return (row.name, truth, row.result.verdict, label, "right" if row.right else "WRONG", accuracy, success)


def _label(label: int | None, class_names: tuple[str, ...]) -> str:
    if label is None:
        return "–"
    return f"{label} ({plain(class_names[label])})" if label < len(class_names) else str(label)
