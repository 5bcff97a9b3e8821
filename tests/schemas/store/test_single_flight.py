"""What is remembered is read once, by one thread, and not for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distillcache.schemas.store.single_flight import Remembered


def test_all_who_ask_at_one_time_wait_for_one_read() -> None:
    remembered: Remembered[int, str] = Remembered(8)
    meet, reads = threading.Barrier(8), []

    def ask(_: int) -> str:
        meet.wait()
        return remembered.get(7, lambda: reads.append(7) or "seven")

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"seven"}
    assert reads == [7]


def test_what_was_used_longest_ago_is_forgotten() -> None:
    remembered: Remembered[int, int] = Remembered(2)
    reads: list[int] = []
    for key in (1, 2, 1, 3, 1, 2):
        assert remembered.get(key, lambda key=key: reads.append(key) or key) == key
    assert reads == [1, 2, 3, 2]


def test_a_failure_is_told_and_tried_again() -> None:
    remembered: Remembered[int, int] = Remembered(2)
    with pytest.raises(ZeroDivisionError):
        remembered.get(1, lambda: 1 // 0)
    assert remembered.get(1, lambda: 5) == 5
    remembered.forget(1)
    assert remembered.get(1, lambda: 6) == 6
