"""``bdprune demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli.outputs import emit, use_colour
from bdprune.cli.progress import Progress
from bdprune.report.files import check_writable, write_text
from bdprune.report.summary import percent, seconds
from bdprune.report.text import plain, table

if TYPE_CHECKING:
    from bdprune.zoo.demo import Demo, Row


@click.command(short_help="Catch backdoors in the shipped models and cut them out.")
@click.option(
    "--zoo",
    type=click.Path(path_type=Path),
    default=Path("zoo/demo"),
    show_default=True,
    metavar="DIR",
    help="Folder with the models of known truth and their images.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/demo"),
    show_default=True,
    metavar="DIR",
    help="Where the repaired models and the report go.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of scans and repairs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def demo(zoo: Path, output: Path, seed: int, quiet: bool) -> int:
    """Catch real backdoored networks, cut the backdoors out, and hold both against the truth.

    Scanning and repairing see the checkpoints and a few clean images only; the triggers are used afterwards, to
    measure. Exits with 1 if a verdict or a label is wrong.

    \b
    bdprune demo
    bdprune demo --seed 3 -o /tmp/demo
    """
    report = output / "report.html"
    output.mkdir(parents=True, exist_ok=True)
    check_writable(report)
    with Progress(1, shown=not quiet) as progress:
        progress.stage("starting")
        from bdprune.zoo.demo import run

        done = run(zoo, output, seed=seed, progress=lambda name, stage: _say(progress, quiet, name, stage))
    from bdprune.report.html import html_page

    write_text(report, html_page(done.documents, "demo"))
    emit(_text(done, report))
    return 0 if all(row.right for row in done.rows) else 1


def _say(progress: Progress, quiet: bool, name: str, stage: str) -> None:
    if sys.stderr.isatty() or quiet:
        progress.stage(f"{name}: {stage}")
    else:
        print(f"{plain(name)}: {stage}", file=sys.stderr, flush=True)


def _text(done: Demo, report: Path) -> str:
    header = ("model", "truth", "verdict", "label", "", "clean accuracy", "attack success")
    rows = table([header, *(_row(row, done.class_names) for row in done.rows)], "lllllll")
    right = sum(row.right for row in done.rows)
    closing = f"{right} of {len(done.rows)} verdicts right, in {seconds(done.seconds)}. Report: {report}"
    bold = f"\x1b[1m{closing}\x1b[0m" if use_colour() else closing
    return "\n".join([*rows, "", f"  {bold}"]) + "\n"


def _row(row: Row, class_names: tuple[str, ...]) -> tuple[str, ...]:
    truth = "clean" if row.true_label is None else f"backdoor to {_label(row.true_label, class_names)}"
    after = row.after
    accuracy = percent(row.before.clean_accuracy) + (f" -> {percent(after.clean_accuracy)}" if after else "")
    success = percent(row.before.attack_success_rate) + (f" -> {percent(after.attack_success_rate)}" if after else "")
    label = _label(row.result.target_label, class_names)
    return (plain(row.name), truth, row.result.verdict, label, "right" if row.right else "WRONG", accuracy, success)


def _label(label: int | None, class_names: tuple[str, ...]) -> str:
    if label is None:
        return "–"
    return f"{label} ({plain(class_names[label])})" if label < len(class_names) else str(label)
