"""Time of ``bdprune --help`` from the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.speed.benchmark import Benchmark, Variant
from bench.speed.plan import Plan

_ROOT = Path(__file__).resolve().parents[2]
_BARE = "python that does nothing"


def benchmarks(plan: Plan) -> list[Benchmark]:
    """Every call starts a process. CPU only."""
    if plan.device.type != "cpu":
        return []
    variants = (
        Variant("a program that imports torch at once", "author", partial(start, "-c", "import torch"), note=_TYPICAL),
        Variant("a program that imports click only", "eager", partial(start, "-c", "import click")),
        Variant("bdprune --help", "ours", partial(start, "-m", "bdprune", "--help")),
        Variant(_BARE, "required", partial(start, "-c", "pass")),
    )
    seconds = 2 * plan.seconds
    case = "files in the page cache"
    return [
        Benchmark(
            "Start of the command line",
            case,
            variants,
            lower_bound_variant=_BARE,
            seconds=seconds,
            host=True,
            peak=peak_bytes,
        )
    ]


_TYPICAL = "as research code does before it reads its arguments"


# The launcher is small and only reads its arguments, so its own peak does not hide the child's.
_LAUNCHER = """import os, sys
child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)])
print(os.wait4(child, 0)[2].ru_maxrss)"""


def start(*arguments: str) -> tuple[str, ...]:
    """Runs Python with these arguments until it ends, and returns the arguments.

    Raises:
        RuntimeError: Python exited with an error.
    """
    quiet = subprocess.DEVNULL
    done = subprocess.run([sys.executable, *arguments], stdout=quiet, stderr=quiet, env=_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {done.returncode}")
    return arguments


def peak_bytes(arguments: Sequence[str]) -> int:
    """Peak of the resident memory of Python with these arguments, in bytes.

    Linux counts the memory that a process had before it started another program. A child of this large process would
    look as large, so a bare Python starts it.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *arguments]
    done = subprocess.run(launcher, capture_output=True, env=_environment(), check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
