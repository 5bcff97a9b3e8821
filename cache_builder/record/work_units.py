"""Work units of a segment: leased one by one and handed to the writer; shared by building and copying.

A *work unit* is the consecutive shards of whole batches. Any number of processes may work on one segment.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distillcache.cache_builder.record.finish import lists_segment, tidy
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.writer import ShardBuffer, commit_shard
from distillcache.models.recorder import Recording, raise_if_too_large
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.segment import check_plan_is_ours, committed_shards, read_manifest
from distillcache.schemas.cache.waiting import Waiting
from distillcache.schemas.config import ShardWorkers
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import Interrupted, NonFiniteError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import TOPK_LOGITS, Manifest, NumericsPlan, Plan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store

log = logging.getLogger(__name__)

POLL_S = 1.0  # how often to look, at first, whether other processes have finished their work units

Batches = Iterator[tuple[int, list[Row]]]  # (first row, rows)


class RowSource(Protocol):
    """A source of rows: prepared ones, or those of a cache."""

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1` of the segment."""
        ...


@dataclass(kw_only=True)
class WorkUnits:
    """A segment's rows, in work units of whole batches and whole shards."""

    store: Store
    plan: Plan
    rows: RowSource
    stop: StopRequest


@dataclass(kw_only=True)
class LeasedUnits(WorkUnits):
    """Work that processes share by leases."""

    options: ShardWorkers
    leases: Leases


def work_through(
    job: LeasedUnits, what: str, numerics: NumericsPlan | None, work: Callable[[Batches, ShardWriter, Progress], None]
) -> None:
    """Let `work` hand the batches of every work unit that nobody has committed to the writer, until all are committed.

    Args:
        numerics: where they differ from the plan's.
    """
    progress = Progress(what, job.plan.rows.count * job.plan.rows.row_tokens, unit="tokens")
    left = {unit: set(job.plan.shards_of(unit)) for unit in range(job.plan.num_units)}

    def on_commit(shard: int) -> None:
        unit = left[job.plan.unit_of(shard)]
        unit.discard(shard)
        if not unit:
            job.leases.done(job.plan.unit_of(shard))

    def commit(store: Store, buffer: ShardBuffer, numerics: NumericsPlan | None) -> None:
        if job.leases.holds(job.plan.unit_of(buffer.shard)):
            commit_shard(store, buffer, numerics)
        else:
            log.info(f"shard {buffer.shard} is left to the process that has taken it over")

    writer = ShardWriter(
        job.store,
        job.plan,
        max_bytes=job.options.max_in_flight_mib << 20,
        numerics=numerics,
        on_commit=on_commit,
        commit=commit,
    )
    with progress as bar:
        try:
            work(_leased_batches(job, writer, bar), writer, bar)
        finally:
            writer.close()


def _leased_batches(job: LeasedUnits, writer: ShardWriter, bar: Progress) -> Batches:
    """(first row, rows) of every teacher batch of the work units that this process leases, until none is left."""
    order = _order(job.plan.num_units, job.options.process_id, job.options.num_processes)
    committed = _Committed(job, bar)
    pauses = _pauses(job.store, job.options.claim_expiry_s)
    waiting = Waiting("for work units that another process has leased")
    while True:
        check_plan_is_ours(job.store, job.plan)
        committed.look()
        order = [unit for unit in order if not committed.has(unit)]
        if not order or _is_finished(job):
            return
        took_any = False
        for unit in order:
            _stop_between_units(job, writer)
            if committed.has_now(unit) or not job.leases.take(unit):
                continue
            if all(_has_receipt(job, shard) for shard in job.plan.shards_of(unit)):
                job.leases.done(unit)
                continue
            if _is_finished(job):  # by another process, which took the receipts away
                return
            took_any = True
            committed.ours(unit)
            yield from unit_batches(job, writer, unit)
        if took_any:
            pauses = _pauses(job.store, job.options.claim_expiry_s)
            waiting.over()
        else:
            waiting.tell(job.leases.holder())
            _wait(job.stop, next(pauses))
        _stop_between_units(job, writer)
        writer.wait()


class _Committed:
    """Which shards have a receipt, as far as this process knows; others' are counted as work that need not be done."""

    def __init__(self, job: LeasedUnits, bar: Progress) -> None:
        self._job, self._bar = job, bar
        self._shards: set[int] = set()
        self._counted: set[int] = set()
        self._looked = 0.0

    def look(self) -> None:
        """List the receipts."""
        self._shards, self._looked = committed_shards(self._job.store, self._job.plan), time.monotonic()
        for shard in self._shards - self._counted:
            start, stop = self._job.plan.shard_range(shard)
            self._bar.skip((stop - start) * self._job.plan.rows.row_tokens)
        self._counted |= self._shards

    def has(self, unit: int) -> bool:
        return self._shards.issuperset(self._job.plan.shards_of(unit))

    def has_now(self, unit: int) -> bool:
        """`has`, refreshed if the last look is old: cheaper than a lease on work that others have done."""
        if time.monotonic() - self._looked > self._job.options.claim_expiry_s / 4:
            self.look()
        return self.has(unit)

    def ours(self, unit: int) -> None:
        """Record that this process does the work unit and counts it itself."""
        self._counted.update(self._job.plan.shards_of(unit))


def _order(count: int, process: int, processes: int) -> list[int]:
    """A process's own work units, then the others', from a place of its own on, so that not all want the same."""
    mine = range(process, count, processes)
    start = process * count // processes
    others = [unit for unit in (*range(start, count), *range(start)) if unit % processes != process % processes]
    return [*mine, *others]


def _pauses(store: Store, expiry_s: float) -> Iterator[float]:
    """Yield the pauses between looks at other processes' progress; longer for buckets, which hundreds may be asking."""
    pause, longest = POLL_S, max(POLL_S, expiry_s / 4 if store.is_bucket else 0)
    while True:
        yield pause * random.uniform(0.7, 1.3)
        pause = min(2 * pause, longest)


def by_one_process(
    store: Store, plan: Plan, options: ShardWorkers, stop: StopRequest, finish: Callable[[], Manifest]
) -> Manifest:
    """The manifest, after one of the segment's processes has done `finish`: reading every receipt takes its time.

    Where only one process is known of, it does so without asking. Two that do it write the same.
    """
    if options.num_processes == 1:
        return finish()
    leases = Leases(store, plan.segment, options.claim_expiry_s, key=layout.finish_lease_key)
    waiting = Waiting("for another process to finish")
    try:
        for pause in _pauses(store, options.claim_expiry_s):
            manifest = read_manifest(store)
            if manifest is not None and lists_segment(manifest, plan.segment):
                tidy(store, plan)  # this process may have committed what another took for abandoned
                return manifest
            if leases.take(0):
                return finish()
            waiting.tell(leases.holder())
            _wait(stop, pause)
            _stop_if_asked(store, stop)
    finally:
        leases.close()
    raise AssertionError("unreachable: there is always another pause")


def unit_batches(job: WorkUnits, writer: ShardWriter, unit: int) -> Batches:
    """(first row, rows) of every teacher batch of a work unit."""
    start = unit * job.plan.unit_rows
    stop = min(start + job.plan.unit_rows, job.plan.rows.count)
    for first in range(start, stop, job.plan.batch_rows):
        _stop_if_asked(job.store, job.stop)
        writer.check()
        yield first, job.rows.slice(first, min(first + job.plan.batch_rows, stop))


def _has_receipt(job: LeasedUnits, shard: int) -> bool:
    return job.store.read(layout.receipt_key(job.plan.segment, shard)) is not None


def _is_finished(job: LeasedUnits) -> bool:
    """Return whether another process has finished the segment. Its manifest is there before any receipt goes."""
    manifest = read_manifest(job.store)
    return manifest is not None and lists_segment(manifest, job.plan.segment)


def _wait(stop: StopRequest, seconds: float) -> None:
    """Sleep, but no longer than until the process is asked to stop."""
    until = time.monotonic() + seconds
    while not stop.requested and time.monotonic() < until:
        time.sleep(min(0.2, seconds))


def _stop_between_units(job: WorkUnits, writer: ShardWriter) -> None:
    """`_stop_if_asked`, after the last batch of the work unit before is handed over: that unit can be committed."""
    if job.stop.requested:
        writer.before_wait()
    _stop_if_asked(job.store, job.stop)


def _stop_if_asked(store: Store, stop: StopRequest) -> None:
    if stop.requested:
        raise Interrupted(
            "the build was asked to stop",
            {"cache": store.url, "kept": "every committed shard"},
            "run the same command again to resume",
        )


def keep_batch(
    plan: Plan, writer: ShardWriter, bar: Progress, first: int, rows: list[Row], recording: Recording, begun: float
) -> None:
    """Wait for a recording, check it, and hand its rows to their shards.

    Args:
        begun: when it was requested, once that was compiled, by `time.perf_counter`.
    """
    codes = {part.array: np.asarray(recording.codes[tap.name][part.part]) for tap in plan.taps for part in tap.parts}
    sums = {name: type(tap)(*(np.asarray(value) for value in tap)) for name, tap in recording.sums.items()}
    seconds = writer.waited(begun)
    for tap in plan.taps:
        _raise_if_nonfinite(plan, tap.name, tap.slots, np.asarray(sums[tap.name].nonfinite)[: len(rows)], first)
        squares = np.asarray(sums[tap.name].square_sum)[: len(rows)]
        largest = np.asarray(sums[tap.name].abs_max)[: len(rows)]
        raise_if_too_large(tap.name, tap.slots, squares, largest, range(first, first + len(rows)))
    start = 0
    while start < len(rows):
        part = slice(start, min(start + plan.shard_rows - (first + start) % plan.shard_rows, len(rows)))
        writer.add(
            (first + start) // plan.shard_rows,
            rows[part],
            {array: values[part] for array, values in codes.items()},
            {name: type(tap)(*(value[part] for value in tap)) for name, tap in sums.items()},
            seconds * (part.stop - part.start) / len(rows),
        )
        start = part.stop
    bar.advance(len(rows) * plan.rows.row_tokens)


def _raise_if_nonfinite(plan: Plan, tap: str, slots: tuple[int, ...], counts: np.ndarray, first: int) -> None:
    if not counts.any():
        return
    # The first block that went wrong is the one to look at; later ones only inherit.
    row, slot = min(np.argwhere(counts).tolist(), key=lambda place: (place[1], place[0]))
    raise NonFiniteError(
        "the teacher gave numbers that are not finite",
        {
            "shard": (first + row) // plan.shard_rows,
            "row": first + row,
            **({} if tap == TOPK_LOGITS else {"block": slots[slot]}),
            "tap": tap,
            "found": f"{counted(counts[row, slot], 'number')} that are NaN or infinite",
        },
        "check the teacher's weights, or compute in another dtype: --dtype float32",
    )
