"""The progress line: silent for short work, plain lines in a log, a bar on a terminal."""

import io
import logging
import re

import pytest

from distillcache.schemas.runtime import progress
from distillcache.schemas.runtime.progress import Progress, format_seconds


class Clock:
    """`time.monotonic` that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, console: object) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(progress, "terminal", lambda: stream)
    return stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_short_work_prints_nothing(clock: Clock, console: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 10, unit="steps") as bar:
        for _ in range(10):
            clock.now += 0.1
            bar.advance()
    assert console.readouterr().err == ""


def test_a_log_gets_a_line_every_ten_seconds(clock: Clock, console: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 100, unit="steps") as bar:
        bar.skip(50)
        for _ in range(25):
            clock.now += 1
            bar.advance(2, note="loss 0.5")
    assert console.readouterr().err.splitlines() == [
        "train: 70/100 steps, 2 steps/s, 15 s left, loss 0.5",
        "train: 90/100 steps, 2 steps/s, 5 s left, loss 0.5",
        "train: 100/100 steps, 2 steps/s, loss 0.5",
    ]


def test_a_terminal_gets_a_bar(clock: Clock, terminal: io.StringIO) -> None:
    with Progress("train", 4, unit="steps") as bar:
        for _ in range(4):
            clock.now += 1
            bar.advance(note="loss 0.5")
    assert "4/4 steps, 1 steps/s" in terminal.getvalue()


def test_the_first_estimate_does_not_count_compilation(clock: Clock, console: pytest.CaptureFixture[str]) -> None:
    """The first step took 100 s, since its program was compiled; the others take 1 s each."""
    with Progress("train", 31, unit="steps") as bar:
        clock.now += 100
        bar.advance()
        for _ in range(10):
            clock.now += 1
            bar.advance()
        assert bar.rate == 1
        assert bar.describe_left() == "20 s left"
    assert console.readouterr().err.splitlines()[0] == "train: 1/31 steps"


def test_a_long_note_stays_on_its_line(clock: Clock, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with Progress("train", 4_000, unit="steps") as bar:
        for _ in range(4):
            clock.now += 1
            bar.advance(note="loss 0.5, 12,345 tokens/s, waits 12% for data, and much more that is said here")
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).strip().replace("\n", "\r").split("\r")
    assert all(line.startswith("train ") and len(line) <= 80 for line in drawn)
    assert "4/4,000 steps, 1 steps/s 1 h 6 min left" in drawn[-1]
    assert "loss 0.5, ..." in drawn[-1]


def test_a_quiet_one_shows_nothing(clock: Clock, console: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 100, unit="steps", quiet=True) as bar:
        for _ in range(25):
            clock.now += 1
            bar.advance()
    assert console.readouterr().err == ""


def test_a_library_says_nothing_of_its_progress_unless_it_is_asked(
    clock: Clock, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with Progress("train", 12, unit="steps") as bar:
            for _ in range(12):
                clock.now += 1
                bar.advance()

    work()
    assert caplog.records == []
    with caplog.at_level(logging.INFO, "distillcache"):
        work()
    assert [record.getMessage() for record in caplog.records] == [
        "train: 10/12 steps, 1 steps/s, 2 s left",
        "train: 12/12 steps, 1 steps/s",
    ]
    assert {record.name for record in caplog.records} == {"distillcache.schemas.runtime.progress"}
    assert capfd.readouterr() == ("", "")


def test_seconds_are_readable() -> None:
    assert [format_seconds(s) for s in (3.4, 200, 7500)] == ["3 s", "3 min 20 s", "2 h 5 min"]
