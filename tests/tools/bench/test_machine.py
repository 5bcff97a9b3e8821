"""How busy other work keeps the machine: own work does not count."""

from pathlib import Path

import pytest

from distillcache.tools.bench import machine
from distillcache.tools.bench.machine import OtherWork


def test_own_work_is_not_other_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ticks = machine.os.sysconf("SC_CLK_TCK")
    stat, clock, own = tmp_path / "stat", [100.0], [3.0]
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(machine.os, "times", lambda: (own[0], 0.0, 0.0, 0.0, clock[0]))
    # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text(f"cpu  {5 * ticks} 0 0 {70 * ticks} 9 0 0 0 0 0\ncpu0 1 2 3\n")
    other = OtherWork()
    clock[0], own[0] = 110.0, 11.0
    stat.write_text(f"cpu  {15 * ticks} {ticks} {2 * ticks} {77 * ticks} 99 0 0 {2 * ticks} 0 0\ncpu0 1 2 3\n")
    assert other.cores() == pytest.approx((15 - 8) / 10)


def test_systems_that_do_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    assert OtherWork().cores() is None
