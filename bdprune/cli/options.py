"""Options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from bdprune.errors import OptionError
from bdprune.record import parse_shape
from bdprune.report import names

Function = TypeVar("Function", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
"""Type of an option or argument that is a path."""


class Names(click.ParamType[str]):
    """A text in which names occur; ``choices`` are looked up only when help asks for them."""

    name = "name"

    def __init__(self, choices: Callable[[], Iterable[str]], after: str = "") -> None:
        self._choices = choices
        self._after = after

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The names there are."""
        return "|".join(self._choices()) + self._after


def _all(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """These options in their order, as one decorator."""
    return lambda function: reduce(lambda inner, option: option(inner), reversed(options), function)


def _shape(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    return None if value is None else parse_shape(value)


def _data(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    if value is None or value == "none":
        return None
    if not os.path.exists(value):
        raise OptionError(
            f"There is no clean data at {value[:200]!r}, or none that may be looked at.",
            "Give a folder or file of clean images, or none.",
        )
    return Path(value)


def _stack(context: click.Context, parameter: click.Parameter, value: str) -> int | str:
    if value != "auto" and not re.fullmatch(r"[1-9]\d{0,5}", value):
        raise OptionError(f"{value[:80]!r} is no size of a stack.", "Give auto, or a number of models.")
    return value if value == "auto" else int(value)


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]i?B|B)?", value)
    if parts is None:
        raise OptionError(f"{value[:80]!r} is no size in memory.", "Give a number and a unit, as in 2GiB or 500MB.")
    unit = parts[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(float(parts[1]) * base ** "BKMGT".index(unit[0]))


model_options = _all(
    click.option("--arch", metavar="NAME|MODULE:CALLABLE", help="Architecture; recognised when left out."),
    click.option("--num-classes", type=click.IntRange(min=2), metavar="N", help="Number of classes; read off."),
    click.option(
        "--input-shape",
        metavar="CxHxW",
        callback=_shape,
        help="Shape of one image, as in 3x32x32.  [default: the size of the images, or the usual one of the "
        "architecture, whichever the model does better on]",
    ),
    click.option(
        "--state-key",
        metavar="KEY",
        help="Which set of weights of a file that holds several, as in state_dict_ema.  [default: all of them]",
    ),
    click.option(
        "--normalize",
        metavar="NAME|M1,M2,M3,S1,S2,S3",
        help="What the model expects before its first layer, for images in [0, 1]: cifar10, cifar10-old, cifar100, "
        "gtsrb, imagenet, mnist, half, bytes, caffe, none, or means then standard deviations.  [default: none]",
    ),
    click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]|auto", help="Where to run."),
    click.option("--seed", default=0, show_default=True, type=int, metavar="N", help="Of everything random."),
)
"""How to load a model."""

data_options = _all(
    click.option(
        "--data",
        metavar="DIR|FILE|none",
        callback=_data,
        help="Labelled clean images: a folder per class, .npz, or parquet.  [default: none]",
    ),
    click.option(
        "--per-class",
        type=click.IntRange(min=1),
        default=50,
        show_default=True,
        metavar="N",
        help="Use at most so many clean images of each class.",
    ),
    click.option(
        "--class-order",
        metavar="number|text|FILE.json",
        help="Which class of the model a label of the data is: the same number; its place in text order (0, 1, 10, "
        "11, ..., as ImageFolder numbers folders); or what a JSON file maps it to.  [default: number]",
    ),
)
"""The clean data: ``data``, ``per_class`` and ``class_order``."""

stack_options = _all(
    click.option(
        "--stack",
        metavar="auto|N",
        default="auto",
        show_default=True,
        callback=_stack,
        help="Scan up to N models of one architecture in the same steps; 1 takes one after another, auto what a "
        "short trial finds faster. With --timeout a stack may take as long as its models one after another.",
    ),
    click.option(
        "--stack-memory",
        metavar="SIZE",
        callback=_bytes,
        help="What stacks may take, as in 2GiB; larger ones are split.  [default: half of what is free]",
    ),
)
"""How many models are scanned at once: ``stack`` and ``stack_memory``."""


def precision_option(trains: str) -> Callable[[Function], Function]:
    """``precision``: of ``trains``, in words."""
    return click.option(
        "--precision",
        type=click.Choice(["winograd", "float32", "bfloat16", "auto"]),
        help=f"How {trains} compute: float32 with Winograd's 3x3 convolutions, faster on a CPU; float32 as PyTorch has "
        "it; bfloat16; or auto, what a short trial finds fastest, whose last digits may differ from run to run.  "
        "[default: winograd]",
    )


progress_options = _all(
    click.option("-q", "--quiet", is_flag=True, help="No progress, and no text when the results go to files."),
    click.option("--no-progress", is_flag=True, help="No progress on standard error."),
)
"""How much is said: ``quiet`` and ``no_progress``."""


def format_option(*kinds: str) -> Callable[[Function], Function]:
    """``formats`` for documents of these kinds: repeatable, each perhaps with its file."""
    return click.option(
        "-f",
        "--format",
        "formats",
        multiple=True,
        type=Names(lambda: names(*kinds), "[=FILE]"),
        help="How to report; repeatable, as in --format text --format html=report.html.  [default: text]",
    )


attachments_option = click.option(
    "--attachments",
    type=FILE,
    metavar="DIR",
    help="Write the tensors and pictures that methods give, such as masks, to this folder; the JSON names them.",
)
"""``attachments``: a folder."""

listing = click.option("-f", "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
"""``form``: of a list that is no result."""
