"""``bdprune calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdprune.cli import options, outputs
from bdprune.cli.progress import Progress
from bdprune.errors import OptionError, first_line
from bdprune.files import check_writable, write_text

if TYPE_CHECKING:
    from bdprune.fleet import ReferenceScan, ReferenceZoo
    from bdprune.record import Level
    from bdprune.zoo import Entry


@click.command(short_help="Fit the probabilities of scans to a zoo of known networks.")
@click.argument("manifest", type=options.FILE)
@click.option(
    "--data",
    required=True,
    type=options.FILE,
    metavar="DIR",
    help="Folder of the data sets: cifar10/train.parquet and so on.",
)
@click.option(
    "--models", type=options.FILE, metavar="DIR", help="Folder of the models.  [default: the manifest's folder]"
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Scan only this model, and fit nothing; repeatable, with --rows.  [default: all]",
)
@click.option(
    "--budget",
    type=click.Choice(["fast", "default", "full"]),
    default="default",
    show_default=True,
    help="Budget of the scans that the table is for.",
)
@click.option(
    "--rows",
    type=options.FILE,
    metavar="FILE.jsonl",
    help="File of the scans. Scans that it holds are not repeated; new ones are appended.",
)
@click.option("--seed", default=0, show_default=True, type=int, metavar="N", help="Seed of the scans.")
@click.option("-o", "--output", type=options.FILE, metavar="TABLE.json", help="File for the table.")
@click.option(
    "--report",
    type=options.FILE,
    metavar="FILE.md",
    help="Document for the evaluation, whose other text stays.  [default: printed]",
)
@options.progress_options
def calibrate(
    manifest: Path,
    data: Path,
    models: Path | None,
    only: tuple[str, ...],
    budget: Level,
    rows: Path | None,
    seed: int,
    output: Path | None,
    report: Path | None,
    quiet: bool,
    no_progress: bool,
) -> int:
    """Fit a table that turns the evidence of a scan into a probability, and say what it is worth.

    The networks are those of a zoo (`bdprune zoo make`) that exist. Each is scanned with every detector of the budget;
    this takes about a minute for each small network. The evaluation holds out attack families, then architectures.
    To use two cores, first scan some of them in a second process with --only and the same --rows.

    \b
    bdprune calibrate zoo/reference.toml --data data/ --rows scans.jsonl --only badnets-1
    bdprune calibrate zoo/reference.toml --data data/ --rows scans.jsonl -o table.json
    bdprune scan model.pth --data clean/ --calibration table.json
    """
    from bdprune.fleet import ReferenceZoo, calibrate, calibration_page
    from bdprune.zoo import read_manifest, with_section

    for path in (output, report):
        if path is not None:
            check_writable(path)
    outputs.check_apart([output, report, rows], [manifest])
    if only and (rows is None or output or report):
        raise OptionError("--only scans without a fit, so it needs --rows and neither -o nor --report.")
    old = _text(report)
    zoo = ReferenceZoo(read_manifest(manifest), data, models)
    scans = _scanned(zoo, only, rows, budget, seed, shown=not (quiet or no_progress))
    if only:
        return 0
    found = calibrate(zoo, scans, budget)
    page = calibration_page(found)
    if output is not None:
        write_text(output, found.table.to_json() + "\n")
    if report is None:
        outputs.emit(page)
    else:
        write_text(report, with_section(old, f"{zoo.manifest.name} {budget}", page, "calibrate"))
    return 0


def _text(report: Path | None) -> str:
    """The text of the document that the evaluation goes to."""
    if report is None or not report.exists():
        return ""
    try:
        return report.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"Cannot read {report} as text: {first_line(error)}.", "Give a Markdown file.") from None


def _scanned(
    zoo: ReferenceZoo, only: tuple[str, ...], rows: Path | None, budget: Level, seed: int, *, shown: bool
) -> list[ReferenceScan]:
    from bdprune.fleet import scan_references

    wanted = {zoo.manifest.entry(name).name for name in only}
    made = zoo.made()
    missing = wanted - {entry.name for entry in made}
    if missing:
        raise OptionError(f"The network {min(missing)} is not trained.", "Train it with `bdprune zoo make`.")
    entries = [entry for entry in made if not wanted or entry.name in wanted]
    found: list[ReferenceScan] = []
    with Progress(len(entries), shown) as progress:

        def stage(entry: Entry, text: str) -> None:
            progress.stage(f"{entry.name}: {text}")

        for scan in scan_references(zoo, entries, rows, budget=budget, seed=seed, progress=stage):
            progress.finished(scan.verdict, scan.network)
            found.append(scan)
    return found
