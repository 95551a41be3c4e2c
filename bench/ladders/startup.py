"""How long ``bdprune --help`` takes from the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench.ladders.ladder import Ladder, Rung
from bench.ladders.plan import Plan

_ROOT = Path(__file__).resolve().parents[2]
_BARE = "python that does nothing"


def ladders(plan: Plan) -> list[Ladder]:
    """A process of its own each time; the CPU's work alone."""
    if plan.device.type != "cpu":
        return []
    rungs = (
        Rung("a program that imports torch at once", "author", partial(start, "-c", "import torch"), note=_TYPICAL),
        Rung("a program that imports click only", "eager", partial(start, "-c", "import click")),
        Rung("bdprune --help", "ours", partial(start, "-m", "bdprune", "--help")),
        Rung(_BARE, "bound", partial(start, "-c", "pass")),
    )
    seconds = 2 * plan.seconds
    case = "files in the page cache"
    return [
        Ladder(
            "Start of the command line",
            case,
            rungs,
            floor_rung=_BARE,
            seconds=seconds,
            host=True,
            peak=lambda size: size,
        )
    ]


_TYPICAL = "as research code does before it reads its arguments"


def start(*arguments: str) -> int:
    """Runs Python with these arguments to its end; gives the peak of its resident memory in bytes.

    Raises:
        RuntimeError: it did not end well.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    quiet = subprocess.DEVNULL
    child = subprocess.Popen([sys.executable, *arguments], stdout=quiet, stderr=quiet, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {child.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
