"""Planning of requests: the chunks of one array that a batch needs, grouped into ranges.

A *run* is some consecutive slots of one row inside one object: they lie one after the other there, so one request
brings them. A *request* is one range of bytes of one object: a run, or the runs of neighbouring rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from distillcache.schemas.format.manifest import PartPlan
from distillcache.trainer.feed.slots import SlotReads

# Of one answer. More would be fewer requests, but one stream brings some 100 MB/s and many at a time bring more, and
# each answer lies in memory until it is taken apart.
REQUEST_BYTES = 16 << 20
GAP_BYTES = 64 << 10  # read and thrown away rather than asked for around: less than a request's delay brings


@dataclass(frozen=True)
class Wanted:
    """Some slots of a row, and where they go: `stack` is the row's place in a batch, `[S, T, W]`."""

    row: int
    reads: SlotReads
    stack: np.ndarray


@dataclass(frozen=True)
class Run:
    """Consecutive stored slots, from `slot` on, of one row: of `wanted[number]`. memories: the place of each."""

    number: int
    row: int
    slot: int
    memories: tuple[memoryview, ...]

    @property
    def chunks(self) -> list[tuple[int, memoryview]]:
        """(stored slot, its place)."""
        return list(enumerate(self.memories, self.slot))


def split(pairs: Sequence[tuple[int, int]], part: PartPlan, chunk_bytes: int) -> list[list[tuple[int, int]]]:
    """These (place, stored slot), ascending, by runs: no longer than a request, but one chunk is one in any case."""
    most, found = max(1, REQUEST_BYTES // chunk_bytes), []
    for _, group in groupby(enumerate(pairs), lambda each: (each[1][1] - each[0], each[1][1] // part.slots_per_object)):
        run = [pair for _, pair in group]
        found += [run[first : first + most] for first in range(0, len(run), most)]
    return found


def runs_of(number: int, wanted: Wanted, part: PartPlan, chunk_bytes: int) -> list[Run]:
    """The runs of a row."""
    return [
        Run(number, wanted.row, run[0][1], tuple(wanted.stack[place].data for place, _ in run))
        for run in split(wanted.reads.of_part(part), part, chunk_bytes)
    ]


def together(runs: Sequence[Run], part: PartPlan, shard_rows: int, chunk_bytes: int) -> list[list[Run]]:
    """The runs of each request.

    Runs are joined where chunks in the order of rows, then slots, which is how objects are written, would leave
    gaps of at most `GAP_BYTES` between them.
    """
    joined: list[list[Run]] = []
    end, begin, held = 0, 0, (-1, -1)
    for run in sorted(runs, key=lambda run: (*_object(run, part, shard_rows), run.row, run.slot)):
        place, count = _object(run, part, shard_rows), len(run.memories)
        start = order_in_object(run.row % shard_rows, run.slot, part)
        near = place == held and 0 <= (start - end) * chunk_bytes <= GAP_BYTES
        if near and (start + count - begin) * chunk_bytes <= REQUEST_BYTES:
            joined[-1].append(run)
        else:
            joined.append([run])
            held, begin = place, start
        end = start + count
    return joined


def order_in_object(inside: int, slot: int, part: PartPlan) -> int:
    """Count the chunks before this one, if an object's chunks lie row by row.

    Args:
        inside: the row's number within its shard.
        slot: as stored, through all objects.
    """
    first = slot - slot % part.slots_per_object
    return inside * min(part.slots_per_object, part.slots - first) + slot - first


def _object(run: Run, part: PartPlan, shard_rows: int) -> tuple[int, int]:
    """(shard, group of slots)."""
    return run.row // shard_rows, run.slot // part.slots_per_object


def byte_ranges(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges `[start, stop)` to request for these `(offset, length)`, in ascending order."""
    ranges: list[tuple[int, int]] = []
    for offset, length in sorted(spans):
        if ranges and offset - ranges[-1][1] <= GAP_BYTES and offset + length - ranges[-1][0] <= REQUEST_BYTES:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], offset + length)
        else:
            ranges.append((offset, offset + length))
    return ranges
