"""A line that says the progress of a long job: done, rate, time left, and a note such as the loss.

On a terminal where the program shows its log (console.py) it is a bar that is redrawn; elsewhere (a log file, a batch
system, a program with logging of its own) a plain line of the log every ten seconds, at level INFO. Work that ends
within two seconds says nothing.
"""

import logging
import textwrap
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from distillcache.schemas.runtime.console import terminal

BAR_WIDTH = 16  # characters; the words need the rest of an 80-character line
QUIET_S = 2.0  # shorter work needs no bar
LINE_EVERY_S = 10.0  # often enough to see life in a log, rare enough not to fill it

log = logging.getLogger(__name__)


class Progress:
    """`with Progress("train", 2000, unit="steps") as bar: bar.advance(1, note="loss 0.12")`."""

    def __init__(self, title: str, total: int, *, unit: str, quiet: bool = False) -> None:
        """
        Args:
            title: what is going on, a word or two.
            total: how many units there are in all.
            unit: their name in the plural.
            quiet: show nothing: of several processes that do the same, one is enough to watch.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._skipped, self._note, self._logged, self._quiet = 0, "", -1, quiet
        self._bar: RichProgress | None = None
        self._task = None
        self._start = self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first units were done, and how many

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line > self._start and self.done != self._logged:
            self._log_line()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` stays on the line until the next one."""
        self.done += count
        self._note = note or self._note
        now = time.monotonic()
        self._first = self._first or (now, count)
        if self._quiet or now - self._start < QUIET_S or not log.isEnabledFor(logging.INFO):
            return
        if (stream := terminal()) is not None:
            self._draw(stream)
        elif now - self._last_line >= LINE_EVERY_S:
            self._log_line()
            self._last_line = now

    def skip(self, count: int) -> None:
        """`count` more units were done earlier or elsewhere: they do not count in the rate."""
        self.done += count
        self._skipped += count

    @property
    def rate(self) -> float:
        """Units a second of this process; 0 until it is known.

        The first units are left out, with their time: programs are compiled meanwhile, which says nothing of the rest.
        """
        if self._first is None:
            return 0.0
        since, count = self._first
        return max(self.done - self._skipped - count, 0) / max(time.monotonic() - since, 1e-9)

    def _draw(self, stream: TextIO) -> None:
        if self._bar is None:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=BAR_WIDTH),
                _RateColumn(self),
                _LeftColumn(self),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            ]
            self._bar = RichProgress(*columns, console=Console(file=stream))
            self._task = self._bar.add_task(self.title, total=self.total, completed=self._skipped, note="")
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self._fitting_note(self._bar.console.width))

    def _fitting_note(self, width: int) -> str:
        """The note, cut to what is left of a line: a second line would be left behind at every redrawing."""
        used = len(f"{self.title} {self.describe()} {self.describe_left()} ") + BAR_WIDTH + 2
        return textwrap.shorten(self._note, max(width - used, 0), placeholder=" ...") if width > used + 4 else ""

    def _log_line(self) -> None:
        self._logged = self.done
        words = [f"{self.title}: {self.describe()}", self.describe_left(), self._note]
        log.info(", ".join(word for word in words if word))

    def describe(self) -> str:
        """`120/2,000 steps, 3.1 steps/s`; without a rate until it is known."""
        rate = f", {_short(self.rate)} {self.unit}/s" if self.rate else ""
        return f"{self.done:,}/{self.total:,} {self.unit}{rate}"

    def describe_left(self) -> str:
        """`3 min 20 s left`; empty at the end, and until the rate is known."""
        left = (self.total - self.done) / self.rate if self.rate else 0.0
        return f"{format_seconds(left)} left" if left > 0 else ""


class _LeftColumn(ProgressColumn):
    """The words of `Progress.describe_left`: rich's own estimate counts the time of compilation."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.describe_left())


class _RateColumn(ProgressColumn):
    """The words of `Progress.describe`: rich's own rate forgets what a resumed run had done."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
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
