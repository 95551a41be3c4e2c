"""The command ``bdprune``: its subcommands, and how it reports errors."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click

import bdprune
from bdprune.cli import exit_codes
from bdprune.cli.calibrate import calibrate
from bdprune.cli.demo import demo
from bdprune.cli.diff import diff
from bdprune.cli.doctor import doctor
from bdprune.cli.export import export
from bdprune.cli.inspect import inspect
from bdprune.cli.invert import invert
from bdprune.cli.methods import detectors, purifiers
from bdprune.cli.outputs import ClosedPipeError
from bdprune.cli.purify import purify
from bdprune.cli.report import report
from bdprune.cli.scan import scan
from bdprune.cli.schema import schema
from bdprune.cli.score import score
from bdprune.cli.screen import screen
from bdprune.cli.show import show
from bdprune.cli.zoo import zoo
from bdprune.errors import BdpruneError, first_line
from bdprune.process import keep_freed_memory
from bdprune.report import plain

log = logging.getLogger("bdprune")


class Commands(click.Group):
    """A group that reports an error in one or two lines on standard error and a documented exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs the command; in standalone mode, as from a shell, it ends the program."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        if sys.stderr is None:  # the caller closed it; its text must not go to standard output
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        keep_freed_memory()
        with _terminable():
            code = _guarded(lambda: run(*args, standalone_mode=False, **extra))
        sys.exit(code)

    def invoke(self, context: click.Context) -> Any:
        """Runs the subcommand; a closed standard error ends it like a closed standard output."""
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise ClosedPipeError from None

    def list_commands(self, context: click.Context) -> list[str]:
        """The commands in the order of their registration."""
        return list(self.commands)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM end the command like Ctrl-C: it stops the worker and leaves no partial files."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(run: Callable[[], Any]) -> int:
    """The exit code of ``run``, also if it raises."""
    try:
        code = run()
        return code if isinstance(code, int) else exit_codes.OK
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _complain(error.format_message(), f"See `{context.command_path} --help`." if context else "")
        return exit_codes.USAGE
    except BdpruneError as error:
        log.debug("", exc_info=True)
        _complain(error.message, error.hint)
        return exit_codes.of_error(error)
    except (KeyboardInterrupt, click.Abort) as error:
        how = error.__cause__ or error  # click makes an Abort of the interruption, whose text says how to go on
        _complain("Interrupted; nothing was left half-written.", str(how))
        return exit_codes.INTERRUPTED
    except ClosedPipeError:
        return exit_codes.BROKEN_PIPE
    except ModuleNotFoundError as error:
        if error.name != "torch":
            return _unexpected(error)
        _complain("This needs torch, which is not installed.", "Install torch. `bdprune screen` works without it.")
        return exit_codes.FAILED
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    log.debug("", exc_info=error)
    _complain(
        f"Unexpected {type(error).__name__}: {first_line(error)}",
        "Please report it with the output of `bdprune --verbose`.",
    )
    return exit_codes.FAILED


def _complain(message: str, hint: str = "") -> None:
    lines = [f"bdprune: {message}", *([f"  {hint}"] if hint else [])]
    with contextlib.suppress(OSError):  # standard error may be closed
        print("\n".join(plain(line) for line in lines), file=sys.stderr)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=exit_codes.HELP,
)
@click.version_option(bdprune.__version__, message="%(prog)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Print debug messages and tracebacks on standard error.")
def main(verbose: bool) -> None:
    """Find backdoored neural networks, and repair them.

    \b
    bdprune scan model.pth --data clean_images/
    bdprune purify model.pth --data clean_images/ -o repaired.pth
    bdprune demo
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack some characters
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if not sys.warnoptions and not verbose:
        warnings.simplefilter("ignore")


_COMMANDS: tuple[click.Command, ...] = (
    *(scan, screen, purify, score, invert, inspect, show, report, diff, export),
    *(detectors, purifiers, zoo, calibrate, demo, doctor, schema),
)
for command in _COMMANDS:
    main.add_command(command)
