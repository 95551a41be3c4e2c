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
from bdprune.hub import is_hub_name
from bdprune.record import parse_shape
from bdprune.report import names

Function = TypeVar("Function", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
"""Type of an option or argument that is a path."""


class ModelFile(click.ParamType[Path | str]):
    """A path, or the name of a file on the Hugging Face Hub, which stays a text."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """The path or the name."""
        return value if is_hub_name(value) else Path(value)


MODEL = ModelFile()
"""Type of the argument that is a model."""


class AtLeast(click.ParamType[int]):
    """A whole number of at least ``least``."""

    name = "integer"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        number: int = click.INT.convert(value, param, ctx)
        if number < self._least:
            name = param.opts[-1] if param else "The number"
            raise OptionError(f"{name} must be {self._least} or more, not {number}.")
        return number


class Names(click.ParamType[str]):
    """A text that contains names; the list of ``choices`` is made only for help texts."""

    name = "name"

    def __init__(self, choices: Callable[[], Iterable[str]], after: str = "") -> None:
        self._choices = choices
        self._after = after

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The known names."""
        return "|".join(self._choices()) + self._after


def _all(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """One decorator that adds these options in this order."""
    return lambda function: reduce(lambda inner, option: option(inner), reversed(options), function)


def _shape(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    return None if value is None else parse_shape(value)


def _data(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    if value is None or value == "none":
        return None
    if not os.path.exists(value):
        raise OptionError(
            f"There is no clean data at {value[:200]!r}, or it cannot be accessed.",
            "Give a folder or file of clean images, or none.",
        )
    return Path(value)


def _stack(context: click.Context, parameter: click.Parameter, value: str) -> int | str:
    if value != "auto" and not re.fullmatch(r"[1-9]\d{0,5}", value):
        raise OptionError(f"Invalid stack size {value[:80]!r}.", "Give auto, or a number of models.")
    return value if value == "auto" else int(value)


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]i?B|B)?", value)
    if parts is None:
        raise OptionError(f"Invalid size {value[:80]!r}.", "Give a number and a unit, as in 2GiB or 500MB.")
    unit = parts[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(float(parts[1]) * base ** "BKMGT".index(unit[0]))


download_option = click.option(
    "--max-download",
    metavar="SIZE",
    callback=_bytes,
    help="Download at most this much of one repository on the Hugging Face Hub, as in 20GiB.  [default: 10GiB]",
)
"""``max_download``: bytes."""


def _workers(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not re.fullmatch(r"[1-9]\d{0,3}", value):
        raise OptionError(f"Invalid number of workers {value[:80]!r}.", "Give auto, or a number of models.")
    return int(value)


model_options = _all(
    click.option("--arch", metavar="NAME|MODULE:CALLABLE", help="Architecture.  [default: recognised]"),
    click.option("--num-classes", type=AtLeast(2), metavar="N", help="Number of classes.  [default: recognised]"),
    click.option(
        "--input-shape",
        metavar="CxHxW",
        callback=_shape,
        help="Shape of one image, as in 3x32x32.  [default: the size of the images or the usual size of the "
        "architecture, whichever gives the higher accuracy]",
    ),
    click.option(
        "--state-key",
        metavar="KEY",
        help="Name of one set of weights in a file that holds several, as in state_dict_ema.  [default: all]",
    ),
    click.option(
        "--normalize",
        metavar="NAME|M1,M2,M3,S1,S2,S3",
        help="How the model's images are normalised, from values in [0, 1]: cifar10, cifar10-old, cifar100, gtsrb, "
        "imagenet, mnist, half, bytes, caffe, none, or means followed by standard deviations.  [default: none]",
    ),
    click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]|auto", help="Where to run."),
    click.option("--seed", default=0, show_default=True, type=int, metavar="N", help="Seed of all random numbers."),
    download_option,
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
        type=AtLeast(1),
        default=50,
        show_default=True,
        metavar="N",
        help="Use at most N clean images of each class.",
    ),
    click.option(
        "--class-order",
        metavar="number|text|FILE.json",
        help="How labels of the data map to classes of the model: number keeps them; text uses their place in text "
        "order (0, 1, 10, 11, ..., as ImageFolder numbers folders); a JSON file gives a map.  [default: number]",
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
        help="Scan up to N models of one architecture in one batch; 1 scans one model at a time, auto chooses the "
        "faster by a short trial. With --timeout, a stack may take the sum of the times of its models.",
    ),
    click.option(
        "--stack-memory",
        metavar="SIZE",
        callback=_bytes,
        help="Memory limit of stacks, as in 2GiB; larger stacks are split.  [default: half of the free memory]",
    ),
)
"""How many models are scanned at once: ``stack`` and ``stack_memory``."""


run_options = _all(
    click.option(
        "--executor",
        type=click.Choice(["auto", "inline", "processes", "ray"]),
        default="auto",
        show_default=True,
        help="Where models run. inline: in this process, one after another; processes: in other processes of this "
        "machine; ray: on a Ray cluster (extra cluster); auto: ray with --address, processes with a limit or "
        "--workers, else inline.",
    ),
    click.option(
        "--workers",
        metavar="N|auto",
        callback=_workers,
        help="How many models run at a time; auto: one for each GPU, or on a CPU one for each core.  [default: auto "
        "if --executor is processes or ray, else 1]",
    ),
    click.option(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="Time limit for each model, after which its verdict is error.  [default: none]",
    ),
    click.option(
        "--memory-limit",
        metavar="SIZE",
        callback=_bytes,
        help="Memory limit of each process, as in 4GiB; a model that exceeds it gets the verdict error. Memory of a "
        "GPU does not count.  [default: none]",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT|auto",
        help="Ray cluster, as in 10.0.0.1:6379; auto finds the one that this machine belongs to.  [default: with "
        "--executor ray, Ray starts on this machine and ends with the scan]",
    ),
)
"""Where models run, and within which limits: ``executor``, ``workers``, ``timeout``, ``memory_limit``, ``address``."""


def precision_option(trains: str) -> Callable[[Function], Function]:
    """``precision``; ``trains`` says in words what computes in it."""
    return click.option(
        "--precision",
        type=click.Choice(["winograd", "float32", "bfloat16", "auto"]),
        help=f"How {trains} compute. winograd: float32 with Winograd's 3x3 convolutions, faster on a CPU; float32: "
        "PyTorch's own convolutions; bfloat16; auto: the fastest in a short trial, so the last digits may differ from "
        "run to run.  [default: winograd]",
    )


progress_options = _all(
    click.option("-q", "--quiet", is_flag=True, help="Show no progress, and no text if the results go to files."),
    click.option("--no-progress", is_flag=True, help="Show no progress on standard error."),
)
"""What to print: ``quiet`` and ``no_progress``."""


def format_option(*kinds: str) -> Callable[[Function], Function]:
    """``formats`` for documents of these kinds: repeatable, each with an optional file."""
    return click.option(
        "-f",
        "--format",
        "formats",
        multiple=True,
        type=Names(lambda: names(*kinds), "[=FILE]"),
        help="Format of the report; repeatable, as in --format text --format html=report.html.  [default: text]",
    )


attachments_option = click.option(
    "--attachments",
    type=FILE,
    metavar="DIR",
    help="Write the methods' tensors and pictures, such as masks, to this folder; the JSON lists the files.",
)
"""``attachments``: a folder."""

listing = click.option("-f", "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
"""``form``: the format of a list."""
