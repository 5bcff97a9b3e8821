"""Which chunks are asked for together: neighbours in an object, and nothing else."""

import numpy as np

from distillcache.schemas.format.manifest import PartPlan
from distillcache.trainer.feed.readers import requests
from distillcache.trainer.feed.readers.requests import Wanted, byte_ranges, order_in_object, runs_of, together
from distillcache.trainer.feed.slots import SlotReads

PART = PartPlan(array="a", part="codes", dtype="uint8", width=4, slots=7, slots_per_object=4)
CHUNK = 8 * 4  # bytes; 8 tokens


def wanted(row: int, slots: list[int]) -> Wanted:
    reads = SlotReads(tuple(enumerate(slots)), {})
    return Wanted(row, reads, np.zeros((len(slots), 8, 4), np.uint8))


def asked(rows: dict[int, list[int]], shard_rows: int = 4) -> list[list[tuple[int, int, int]]]:
    """(row, first slot, slots) of the runs of each request."""
    runs = [
        run
        for number, (row, slots) in enumerate(rows.items())
        for run in runs_of(number, wanted(row, slots), PART, CHUNK)
    ]
    return [
        [(run.row, run.slot, len(run.memories)) for run in some] for some in together(runs, PART, shard_rows, CHUNK)
    ]


def test_a_run_ends_with_its_object(monkeypatch) -> None:
    monkeypatch.setattr(requests, "GAP_BYTES", 0)
    assert asked({1: [0, 1, 2, 3, 4, 5]}) == [[(1, 0, 4)], [(1, 4, 2)]]
    assert asked({1: [0, 2, 3, 6]}) == [[(1, 0, 1)], [(1, 2, 2)], [(1, 6, 1)]]


def test_neighbouring_rows_of_a_shard_are_one_request(monkeypatch) -> None:
    monkeypatch.setattr(requests, "GAP_BYTES", 0)
    whole = list(range(7))
    assert asked({2: whole, 1: whole, 4: whole}) == [
        [(1, 0, 4), (2, 0, 4)],
        [(1, 4, 3), (2, 4, 3)],  # the last object of a shard holds three slots: its rows lie closer together
        [(4, 0, 4)],
        [(4, 4, 3)],
    ]
    monkeypatch.setattr(requests, "REQUEST_BYTES", 7 * CHUNK)
    assert asked({1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}) == [[(1, 0, 4)], [(2, 0, 4)]]
    monkeypatch.setattr(requests, "REQUEST_BYTES", 1)  # a chunk is asked for whole, however large
    assert asked({1: [0, 1]}) == [[(1, 0, 1)], [(1, 1, 1)]]


def test_a_small_gap_is_read_along(monkeypatch) -> None:
    monkeypatch.setattr(requests, "GAP_BYTES", 2 * CHUNK)
    assert asked({1: [0, 3]}) == [[(1, 0, 1), (1, 3, 1)]]
    assert asked({1: [0], 2: [0]}) == [[(1, 0, 1)], [(2, 0, 1)]]
    spans = [(0, CHUNK), (3 * CHUNK, CHUNK), (9 * CHUNK, CHUNK)]
    assert byte_ranges(spans[::-1]) == [(0, 4 * CHUNK), (9 * CHUNK, 10 * CHUNK)]


def test_a_row_that_occurs_twice_is_read_twice() -> None:
    once, again = (run for number in (0, 1) for run in runs_of(number, wanted(1, [0, 1]), PART, CHUNK))
    assert together([once, again], PART, 4, CHUNK) == [[once], [again]]


def test_each_place_of_a_run_is_its_own_memory() -> None:
    each = wanted(0, [2, 3])
    (run,) = runs_of(0, each, PART, CHUNK)
    for slot, memory in run.chunks:
        np.frombuffer(memory, np.uint8)[:] = slot
    assert each.stack[:, 0, 0].tolist() == [2, 3]


def test_the_order_in_an_object_is_by_rows() -> None:
    assert [order_in_object(0, slot, PART) for slot in range(7)] == [0, 1, 2, 3, 0, 1, 2]
    assert order_in_object(2, 3, PART) == 11
    assert order_in_object(2, 6, PART) == 8
