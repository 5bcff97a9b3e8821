"""The progress line: silent for short work, plain lines in a log, a bar on a terminal."""

import io
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_short_work_prints_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("train", 10, unit="steps", stream=stream) as bar:
        for _ in range(10):
            clock.now += 0.1
            bar.advance()
    assert stream.getvalue() == ""


def test_a_log_gets_a_line_every_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("train", 100, unit="steps", stream=stream) as bar:
        bar.skip(50)
        for _ in range(25):
            clock.now += 1
            bar.advance(2, note="loss 0.5")
    assert stream.getvalue().splitlines() == [
        "train: 70/100 steps, 2 steps/s, 15 s left, loss 0.5",
        "train: 90/100 steps, 2 steps/s, 5 s left, loss 0.5",
        "train: 100/100 steps, 2 steps/s, loss 0.5",
    ]


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    stream = Terminal()
    with Progress("train", 4, unit="steps", stream=stream) as bar:
        for _ in range(4):
            clock.now += 1
            bar.advance(note="loss 0.5")
    assert "4/4 steps, 1 steps/s" in stream.getvalue()


def test_the_first_estimate_does_not_count_compilation(clock: Clock) -> None:
    """The first step took 100 s, since its program was compiled; the others take 1 s each."""
    stream = io.StringIO()
    with Progress("train", 31, unit="steps", stream=stream) as bar:
        clock.now += 100
        bar.advance()
        for _ in range(10):
            clock.now += 1
            bar.advance()
        assert bar.rate == 1
        assert bar.describe_left() == "20 s left"
    assert stream.getvalue().splitlines()[0] == "train: 1/31 steps"


def test_a_long_note_stays_on_its_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    stream = Terminal()
    with Progress("train", 4_000, unit="steps", stream=stream) as bar:
        for _ in range(4):
            clock.now += 1
            bar.advance(note="loss 0.5, 12,345 tokens/s, waits 12% for data, and much more that is said here")
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).strip().replace("\n", "\r").split("\r")
    assert all(line.startswith("train ") and len(line) <= 80 for line in drawn)
    assert "4/4,000 steps, 1 steps/s 1 h 6 min left" in drawn[-1]
    assert "loss 0.5, ..." in drawn[-1]


def test_seconds_are_readable() -> None:
    assert [format_seconds(s) for s in (3.4, 200, 7500)] == ["3 s", "3 min 20 s", "2 h 5 min"]
