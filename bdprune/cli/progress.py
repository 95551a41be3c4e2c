"""Progress on standard error: a live line on a terminal, one line per model elsewhere, both with the time left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from bdprune.report import plain, seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


_File = TypeVar("_File")


class Progress:
    """Shows how far a run is, and about how long it still takes. Use it as a context manager.

    Args:
        total: how many files there are.
        shown: False shows nothing at all.
    """

    def __init__(self, total: int, shown: bool) -> None:
        self._total = total
        self._shown = shown
        self._name = ""
        self._done = self._worked = 0
        self._last = ""
        self._counts: Counter[str] = Counter()
        self._start = time.monotonic()
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty() and find_spec("rich") is not None:  # a screen works without rich
            self._live = _rich_progress(self._total)
            self._task = self._live.add_task("", total=self._total)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def through(self, files: Iterable[_File]) -> Iterator[_File]:
        """The same files, each announced as it is taken."""
        for file in files:
            self._name = plain(str(file))
            yield file

    def stage(self, stage: str) -> None:
        """Shows what is being done to the current model."""
        if self._live is not None:
            self._update(f"{self._name}: {plain(stage)}")

    def line(self, text: str, left: float) -> None:
        """Shows what is being done, and that about ``left`` seconds remain; a log gets a line of its own."""
        if self._live is not None:
            self._update(plain(text), left)
        elif self._shown:
            self._print(f"{plain(text)}{_about(left)}")

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if self._shown:
            with self.paused():
                self._print(plain(text))

    @property
    def done(self) -> int:
        """Number of files that are done."""
        return self._done

    def finished(self, verdict: str, name: str, file: str = "", *, taken: bool = False) -> None:
        """One more model is done. Stacks read ahead, so it need not be the one that was announced last.

        Args:
            verdict: the outcome.
            name: of the model.
            file: the file it came from, if others may come from the same one.
            taken: whether the result was in the store, which takes no time.
        """
        if not file or file != self._last:
            self._done += 1
            self._worked += not taken
        self._last = file
        self._counts[verdict] += 1
        verdict += " (stored)" if taken else ""
        now = time.monotonic()
        left = (now - self._start) / max(self._worked, 1) * (self._total - self._done)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, end=now + left, counts=self._tally(now))
        elif self._shown and self._total > 1:
            self._print(f"[{self._done}/{self._total}] {verdict}  {plain(name)}{_about(left)}")

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

    def _tally(self, now: float) -> str:
        """The rate, and the number of models with each verdict: ``12 a minute · 3 backdoored, 9 clean``."""
        speed = rate(self._worked, now - self._start)
        return " · ".join([*([speed] if speed else []), ", ".join(f"{n} {name}" for name, n in self._counts.items())])

    def _update(self, text: str, left: float | None = None) -> None:
        from rich.markup import escape

        assert self._live is not None and self._task is not None
        self._live.update(self._task, description=escape(text))
        if left is not None:
            self._live.update(self._task, end=time.monotonic() + left)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def rate(done: int, seconds: float) -> str:
    """How many models are done in a second, a minute or an hour, as a person reads it; empty before the first."""
    if not done or seconds <= 0:
        return ""
    value, unit = done / seconds, "a second"
    if value < 1:
        value, unit = 60 * value, "a minute"
    if value < 1:
        value, unit = 60 * value, "an hour"
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"


def _about(left: float) -> str:
    """The time left in brackets; nothing below a second."""
    return f"  ({time_left(left)})" if left >= 1 else ""


def time_left(left: float) -> str:
    """Seconds that remain, as a person reads them; above a minute they are rounded: ``about 2 min 10 s left``."""
    if left < 1:
        return "almost done"
    return f"about {seconds(round(left, -1)) if left >= 60 else f'{left:.0f} s'} left"


def _rich_progress(total: int) -> RichProgress:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        """Counts down to the field ``end`` of the task, a time of the monotonic clock."""

        def render(self, task: Task) -> Text:
            end = task.fields.get("end")
            return Text("" if end is None else time_left(max(0.0, end - time.monotonic())))

    class Counts(ProgressColumn):
        """The field ``counts`` of the task."""

        def render(self, task: Task) -> Text:
            return Text(task.fields.get("counts", ""))

    columns = (
        SpinnerColumn(),
        *((MofNCompleteColumn(), Counts()) if total > 1 else ()),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    return RichProgress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
