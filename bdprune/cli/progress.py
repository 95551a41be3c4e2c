"""What is going on, on standard error only: a live line on a terminal, one line a model elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bdprune.report import plain

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress:
    """Shows how far a run is. Use it as a context manager.

    Args:
        total: how many files there are.
        shown: False shows nothing at all.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self._total = total
        self._shown = shown
        self._name = ""
        self._done = 0
        self._last = ""
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            self._live = _rich_progress()
            self._task = self._live.add_task("", total=self._total)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def through(self, files: Iterable[Path]) -> Iterator[Path]:
        """The same files, each announced as it is taken."""
        for file in files:
            self._name = plain(file)
            yield file

    def stage(self, stage: str) -> None:
        """What is being done to the model at hand."""
        if self._live is not None and self._task is not None:
            from rich.markup import escape

            self._live.update(self._task, description=f"{escape(self._name)}: {escape(plain(stage))}")

    def finished(self, verdict: str, name: str, file: str = "") -> None:
        """One more model is done, not always the one that was announced last: stacks read ahead.

        Args:
            verdict: what became of it.
            name: of the model.
            file: that it came from, if others may come from the same one.
        """
        if not file or file != self._last:
            self._done += 1
        self._last = file
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done)
        elif self._shown and self._total > 1:
            print(f"[{self._done}/{self._total}] {verdict}  {plain(name)}", file=sys.stderr, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the live line off the terminal while something else is written to it."""
        if self._live is None:
            yield
            return
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    return RichProgress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
