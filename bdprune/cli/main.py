"""The command ``bdprune``: its subcommands, and what becomes of errors."""

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
from bdprune.cli.demo import demo
from bdprune.cli.doctor import doctor
from bdprune.cli.methods import detectors, purifiers
from bdprune.cli.outputs import ClosedPipeError
from bdprune.cli.purify import purify
from bdprune.cli.scan import scan
from bdprune.cli.schema import schema
from bdprune.cli.score import score
from bdprune.cli.zoo import zoo
from bdprune.errors import BdpruneError, first_line
from bdprune.report import plain

log = logging.getLogger("bdprune")


class Commands(click.Group):
    """A group whose errors are one or two lines on standard error and one of the documented exit codes."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs the command; in standalone mode, as from a shell, it ends the program."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        if sys.stderr is None:  # closed by the caller: what is meant for it must not go to standard output
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
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
        """The commands in the order in which they are added."""
        return list(self.commands)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the command as Ctrl-C does: worker stopped, nothing half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(run: Callable[[], Any]) -> int:
    """The exit code of ``run``, whatever becomes of it."""
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
    except (KeyboardInterrupt, click.Abort):
        _complain("Interrupted; nothing was left half-written.")
        return exit_codes.INTERRUPTED
    except ClosedPipeError:
        return exit_codes.BROKEN_PIPE
    except Exception as error:
        log.debug("", exc_info=True)
        _complain(
            f"Unexpected {type(error).__name__}: {first_line(error)}",
            "Please report it, with what `bdprune --verbose` prints.",
        )
        return exit_codes.FAILED


def _complain(message: str, hint: str = "") -> None:
    lines = [f"bdprune: {message}", *([f"  {hint}"] if hint else [])]
    with contextlib.suppress(OSError):  # nobody may be reading
        print("\n".join(plain(line) for line in lines), file=sys.stderr)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=exit_codes.HELP,
)
@click.version_option(bdprune.__version__, message="%(prog)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Say more on standard error, tracebacks too.")
def main(verbose: bool) -> None:
    """Tell backdoored neural networks from clean ones, and repair them.

    \b
    bdprune scan model.pth --data clean_images/
    bdprune purify model.pth --data clean_images/ -o repaired.pth
    bdprune demo
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal need not know every character
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if not sys.warnoptions and not verbose:
        warnings.simplefilter("ignore")


for command in (scan, purify, score, detectors, purifiers, zoo, demo, doctor, schema):
    main.add_command(command)
