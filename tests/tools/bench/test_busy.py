"""The process beside which the feed is measured: busy when asked, idle otherwise, gone with the one that started it."""

import os
import sys
import time
from pathlib import Path

import pytest

from distillcache.tools.bench.busy import BusyProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime (proc(5))


def used_within(pid: int, seconds: float) -> float:
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return cpu_seconds(pid) - before


def test_it_is_busy_inside_and_idle_outside() -> None:
    children = os.times().children_user
    with BusyProcess() as process:
        pid = process._child.pid
        with process.busy():
            assert used_within(pid, 0.5) > 0.05  # of a machine that others keep busy, too
        time.sleep(0.1)
        assert used_within(pid, 0.3) <= 0.02
    assert process._child.returncode is not None
    assert os.times().children_user > children + 0.04  # so a report does not take it for other work


def test_it_ends_when_the_process_that_started_it_does() -> None:
    with BusyProcess() as process:
        assert process._child.stdin is not None
        with process.busy():
            process._child.stdin.close()  # as the system does then
            assert process._child.wait(20) == 0
            process._child.stdin = open(os.devnull, "w")  # noqa: SIM115  closed by communicate
