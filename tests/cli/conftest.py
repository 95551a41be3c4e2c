"""Runs the command line in this process or, for signals and pipes, in a separate one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bdprune.cli.main import main


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs ``bdprune ARGS`` in this process; an exception that is not an exit code fails the test."""

    def call(*args: object) -> Result:
        done = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="bdprune")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    return call


def _accept_ctrl_c() -> None:
    """Restores SIGINT, as in a terminal: background jobs of a shell and their children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``python -m bdprune ARGS`` in a fresh folder's environment."""

    def call(*args: object, ascii_only: bool = False, **settings: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bdprune", *map(str, args)]
        root = Path(__file__).resolve().parent.parent.parent
        paths = os.pathsep.join([str(root), str(tmp_path)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONIOENCODING": "ascii:strict"} if ascii_only else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
        return subprocess.Popen(command, text=True, env=environment, cwd=tmp_path, preexec_fn=_accept_ctrl_c, **pipes)

    return call


@pytest.fixture
def model_args(tiny: Any) -> list[str]:
    """Options to load the tiny network."""
    return ["--arch", tiny.arch, "--input-shape", "3x8x8"]
