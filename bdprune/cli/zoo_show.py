"""``bdprune zoo show``."""

from __future__ import annotations

from pathlib import Path

import click

from bdprune.cli.options import FILE
from bdprune.cli.outputs import emit
from bdprune.errors import OptionError
from bdprune.files import check_writable
from bdprune.report import percent, plain

DEFAULT_DATA = Path("zoo/demo/test.npz")


@click.command("show", short_help="Write a picture of an attack: clean, triggered, difference.")
@click.argument("attack")
@click.option(
    "--data",
    type=FILE,
    metavar="DIR|FILE",
    help=f"Labelled clean images: a folder per class, .npz, or parquet.  [default: {DEFAULT_DATA}]",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the attack; repeatable.")
@click.option(
    "--trigger",
    type=FILE,
    metavar="FILE.trigger",
    help="File of a learned trigger, which `zoo make` writes next to the model.",
)
@click.option("--count", type=click.IntRange(1, 100), default=5, show_default=True, metavar="N", help="Rows.")
@click.option("-o", "--output", type=FILE, metavar="FILE.png", help="File of the picture.  [default: ATTACK.png]")
def show(
    attack: str, data: Path | None, settings: tuple[str, ...], trigger: Path | None, count: int, output: Path | None
) -> int:
    """Draw the effect of an attack on images: clean, triggered, and ten times the difference, on grey.

    \b
    bdprune zoo show blend
    bdprune zoo show badnets --set target=all-to-all -o all.png
    bdprune zoo show badnets --set size=5 --set margin=0 --data photos/ -o patch.png
    bdprune zoo show badnets --set target=7 --set sources=1,5 -o specific.png
    bdprune zoo show lira --trigger zoo/cifar10-w32/lira.trigger -o lira.png
    """
    from bdprune.attacks import shape_of
    from bdprune.data import load_clean
    from bdprune.files import write_atomically
    from bdprune.zoo import attack_of, panels, picture, ready_trigger, some_victims, strength

    made = attack_of(attack, dict(map(_split, settings)))
    output = output or Path(f"{made.kind}.png")
    check_writable(output)
    clean = load_clean(_source(data), per_class=count)
    images = some_victims(made, clean, count)
    ready = ready_trigger(made, shape_of(images), trigger)
    write_atomically(output, picture(panels(ready, images)))
    seen = strength(ready, images)
    emit(
        f"{plain(str(output))}: {made.kind}, {made.trigger_type} trigger on {len(images)} images; "
        f"values change by {255 * seen.mean:.1f}/255 on average and {255 * seen.largest:.1f}/255 at most, "
        f"in {percent(seen.pixels)} of the pixels\n"
    )
    return 0


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"Invalid setting {text!r}.", "Give KEY=VALUE, as in --set size=5.")
    return name, value


def _source(data: Path | None) -> Path:
    if data is None and not DEFAULT_DATA.exists():
        raise OptionError(f"No images were given, and {DEFAULT_DATA} is missing.", "Give some with --data.")
    if data is not None and not data.exists():
        raise OptionError(f"There are no images at {data}.", "Give a folder or file of clean images.")
    return data or DEFAULT_DATA
