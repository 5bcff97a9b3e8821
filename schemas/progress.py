"""A line that says how far a long piece of work is: done, rate, time left, and a note such as the loss.

On a terminal it is a bar that is redrawn; elsewhere (a log file, a batch system) a plain line every ten seconds.
Work that ends within two seconds prints nothing. Everything goes to standard error: standard output is for results.
"""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

QUIET_S = 2.0  # shorter work needs no bar
LINE_EVERY_S = 10.0  # often enough to see life in a log, rare enough not to fill it


_quiet = False


def be_quiet() -> None:
    """From now on nothing is printed: of several processes that do the same, one is enough to watch."""
    global _quiet
    _quiet = True


class Progress:
    """`with Progress("train", 2000, unit="steps") as bar: bar.advance(1, note="loss 0.12")`."""

    def __init__(self, title: str, total: int, *, unit: str, stream: TextIO | None = None, quiet: bool = False) -> None:
        """
        Args:
            title: what is going on, a word or two.
            total: how many units there are in all.
            unit: their name in the plural.
            stream: where to print; default: standard error.
            quiet: print nothing.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._skipped, self._note, self._printed, self._quiet = 0, "", -1, quiet
        self._stream = stream if stream is not None else sys.stderr
        self._bar: RichProgress | None = None
        self._task = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line > self._start and self.done != self._printed:
            self._print_line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` stays on the line until the next one."""
        self.done += count
        self._note = note or self._note
        now = time.monotonic()
        if _quiet or self._quiet or now - self._start < QUIET_S:
            return
        if self._stream.isatty():
            self._draw()
        elif now - self._last_line >= LINE_EVERY_S:
            self._print_line()
            self._last_line = now

    def skip(self, count: int) -> None:
        """`count` more units were done earlier or elsewhere: they do not count in the rate."""
        self.done += count
        self._skipped += count

    @property
    def rate(self) -> float:
        """Units a second, of this process; 0 before anything is done."""
        return (self.done - self._skipped) / max(time.monotonic() - self._start, 1e-9)

    def _draw(self) -> None:
        if self._bar is None:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(),
                _RateColumn(self),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            ]
            self._bar = RichProgress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(self.title, total=self.total, completed=self._skipped, note="")
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self._note)

    def _print_line(self) -> None:
        self._printed = self.done
        left = (self.total - self.done) / self.rate if self.rate else 0.0
        words = [f"{self.title}: {self.describe()}", f"{format_seconds(left)} left" if left > 0 else "", self._note]
        print(", ".join(word for word in words if word), file=self._stream, flush=True)

    def describe(self) -> str:
        """`120/2000 steps, 3.1 steps/s`."""
        return f"{self.done:,}/{self.total:,} {self.unit}, {_short(self.rate)} {self.unit}/s"


class _RateColumn(ProgressColumn):
    """The words of `Progress.describe`: rich's own rate forgets what a resumed run had done."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.describe())


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
