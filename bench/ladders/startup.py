"""How long ``bdprune --help`` takes from the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
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
            peak=peak_bytes,
        )
    ]


_TYPICAL = "as research code does before it reads its arguments"


# It starts small and reads nothing but its arguments, so the child's peak is not hidden by its own.
_LAUNCHER = """import os, sys
child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)])
print(os.wait4(child, 0)[2].ru_maxrss)"""


def start(*arguments: str) -> tuple[str, ...]:
    """Runs Python with these arguments to its end, and gives them.

    Raises:
        RuntimeError: it did not end well.
    """
    quiet = subprocess.DEVNULL
    done = subprocess.run([sys.executable, *arguments], stdout=quiet, stderr=quiet, env=_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}")
    return arguments


def peak_bytes(arguments: Sequence[str]) -> int:
    """Peak of the resident memory of Python with these arguments, in bytes.

    What a process had mapped before it became another program counts as its own, so a child of this large process would
    look as large. A bare Python stands in between.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *arguments]
    done = subprocess.run(launcher, capture_output=True, env=_environment(), check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
