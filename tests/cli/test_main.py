"""The command as a program: help, streams, signals and pipes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result as Ran

import bdprune
from bdprune.cli.main import main

Run = Callable[..., Ran]
Start = Callable[..., "subprocess.Popen[str]"]

COMMANDS = [
    "scan",
    "screen",
    "purify",
    "score",
    "invert",
    "inspect",
    "show",
    "report",
    "diff",
    "export",
    "detectors",
    "purifiers",
]

SLEEPER = """
import os, time
from pathlib import Path
from torch import nn

def build(num_classes=3):
    (Path(__file__).parent / "started").write_text(str(os.getpid()))
    time.sleep(600)
"""

SLOW_START = """
import sys, time
from pathlib import Path

if "--multiprocessing-fork" in sys.orig_argv:
    (Path(__file__).parent / "started").touch()
    time.sleep(600)
"""


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"bdprune {bdprune.__version__}\n"
    text = run("--help").stdout
    assert list(main.commands) == [*COMMANDS, "zoo", "calibrate", "demo", "doctor", "schema"]
    assert all(f"\n  {name} " in text for name in main.commands)
    assert "Exit codes:" in text


@pytest.mark.parametrize("command", [*COMMANDS, "zoo make", "zoo list", "demo", "doctor", "schema"])
def test_every_command_has_help_with_examples(run: Run, command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.exit_code == 0 and f"  bdprune {command}" in done.stdout.split("Options:")[0].split("\n", 1)[1]


def test_unknown_command_is_exit_4(run: Run) -> None:
    done = run("scna")
    assert done.exit_code == 4 and "No such command 'scna'" in done.stderr and len(done.stderr.splitlines()) <= 2


def test_the_command_without_arguments_shows_help(run: Run) -> None:
    done = run()
    assert "Usage: bdprune" in done.output and done.exit_code == 4


def test_a_bug_is_one_message_and_exits_with_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str) -> None:
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr("bdprune.cli.schema.json_schema", fail)
    done = run("schema")
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "bdprune: Unexpected ZeroDivisionError: division by zero"
    assert "Traceback" not in done.stderr


def test_messages_cannot_rewrite_the_terminal(run: Run) -> None:
    done = run("scan", "\x1b]0;title\x07missing.pth")
    assert done.exit_code == 4 and "\x1b" not in done.output


def test_an_embedding_program_gets_exceptions_instead_of_exits() -> None:
    assert main.main(["schema", "score"], standalone_mode=False) == 0


def _read_terminal(descriptor: int) -> str:
    """All output until the other side is closed. A terminal buffers little: without a reader, the writer stops."""
    shown = b""
    with contextlib.suppress(OSError):  # Linux raises it if the other side is closed
        while chunk := os.read(descriptor, 65536):
            shown += chunk
    return shown.decode()


def test_stdout_is_pure_json_while_progress_is_live_on_a_terminal(
    start: Start, tiny: Any, model_args: list[str]
) -> None:
    ours, theirs = pty.openpty()
    # The bare name: a long path would be cut to the width of the terminal.
    process = start(
        "scan", "tiny.pth", "--data", tiny.data, *model_args, "--detectors", "lipschitz", "-f", "json", stderr=theirs
    )
    os.close(theirs)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(_read_terminal, ours)
        stdout, _ = process.communicate(timeout=300)
        shown = reading.result()
    os.close(ours)
    assert process.returncode == 5  # the detector that decides did not run
    assert json.loads(stdout)["verdict"] == "inconclusive"
    assert "\x1b[" in shown and "tiny.pth" in shown


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("extra", [[], ["--timeout", "500"]], ids=["in process", "with a worker"])
def test_ctrl_c_is_exit_130_and_leaves_nothing(start: Start, tiny: Any, tmp_path: Path, extra: list[str]) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    before = {*os.listdir(tmp_path), "started", "__pycache__"}
    process = start(
        "scan", tiny.path, "--data", tiny.data, "--arch", "sleeper:build", "-f", "html=r.html", *extra,
        start_new_session=True,
    )  # fmt: skip
    _wait_for(tmp_path / "started", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the worker too
    _check_interrupted(process)
    assert set(os.listdir(tmp_path)) <= before


NAPPER = """
import time
from pathlib import Path
from tinynet import TinyNet

class Napper(TinyNet):
    def forward(self, images):
        if self.training and len(images) > 50:
            Path(__file__).with_name("started").touch()
            time.sleep(600)
        return super().forward(images)
"""


def test_ctrl_c_while_a_stack_runs_prints_one_message(start: Start, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "napper.py").write_text(NAPPER)
    (tmp_path / "other.pth").write_bytes(tiny.path.read_bytes())
    clean = dict(np.load(tiny.data))
    images, labels = [clean["images"], clean["images"] // 2], [clean["labels"], clean["labels"]]
    np.savez(tmp_path / "more.npz", images=np.concatenate(images), labels=np.concatenate(labels))
    data = ["--data", tmp_path / "more.npz", "--arch", "napper:Napper", "--input-shape", "3x8x8", "--no-progress"]
    process = start("scan", tiny.path, tmp_path / "other.pth", *data, "--stack", "2", start_new_session=True)
    _wait_for(tmp_path / "started", process)
    os.killpg(process.pid, signal.SIGINT)
    _check_interrupted(process)


def _check_interrupted(process: subprocess.Popen[str]) -> None:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stdout == "" and stderr.split("\n")[-2] == "bdprune: Interrupted; nothing was left half-written."
    assert len(stderr.split()) == 6, stderr  # the worker prints nothing


def test_ctrl_c_while_the_worker_starts_prints_one_message(start: Start, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    process = start("scan", tiny.path, "--timeout", "500", start_new_session=True)
    _wait_for(tmp_path / "started", process)
    os.killpg(process.pid, signal.SIGINT)
    _check_interrupted(process)


@pytest.mark.parametrize("extra", [[], ["--timeout", "500"]], ids=["in process", "with a worker"])
def test_sigterm_ends_the_program_and_its_worker_like_ctrl_c(
    start: Start, tiny: Any, tmp_path: Path, extra: list[str]
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    process = start("scan", tiny.path, "--arch", "sleeper:build", *extra)
    _wait_for(tmp_path / "started", process)
    process.terminate()
    _check_interrupted(process)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


def test_ctrl_c_during_imports_prints_one_message() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
import bdprune.__main__
bdprune.__main__.start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "bdprune: Interrupted; nothing was left half-written.\n"


def test_a_broken_pipe_is_silent_and_gives_no_verdict(start: Start) -> None:
    reader, writer = os.pipe()
    process = start("schema", stdout=writer)
    os.close(reader)
    os.close(writer)
    _, stderr = process.communicate(timeout=300)
    assert stderr == "" and process.returncode == 141


def test_standard_error_without_a_reader_gives_no_verdict_either(
    start: Start, tiny: Any, model_args: list[str]
) -> None:
    for args in (["scan", tiny.path, tiny.path.parent, *model_args, "-f", "jsonl"], ["scan", "missing.pth"]):
        reader, writer = os.pipe()
        process = start(*args, stderr=writer)
        os.close(reader)
        os.close(writer)
        process.communicate(timeout=300)
        assert process.returncode not in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_behind_standard_output_is_exit_4(start: Start) -> None:
    with open("/dev/full", "w") as full:
        process = start("schema", stdout=full)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 4
    assert stderr.splitlines()[0] == "bdprune: Standard output cannot be written: No space left on device."


def test_closed_streams_do_not_crash_the_program(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m bdprune"
    closed = subprocess.run(f"{command} schema >&-", shell=True, capture_output=True, text=True)
    assert closed.returncode == 4 and closed.stderr.splitlines()[0] == "bdprune: Standard output is closed."
    closed = subprocess.run(f"{command} scan missing.pth 2>&-", shell=True, capture_output=True, text=True)
    assert closed.returncode == 4 and closed.stdout == ""


def test_an_ascii_only_terminal_still_gets_a_report(start: Start, tiny: Any, model_args: list[str]) -> None:
    process = start("scan", tiny.path, *model_args, ascii_only=True)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 5 and stderr == ""
    assert stdout.startswith("INCONCLUSIVE") and re.search(r"  risk +\?\n", stdout)


def test_the_console_script_runs_this_command() -> None:
    script = Path(sys.executable).parent / "bdprune"
    if not script.exists():
        pytest.skip("the package is not installed with its console script")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"bdprune {bdprune.__version__}\n"
