"""A build by processes that share one teacher and work in lockstep.

Of every teacher call each process keeps the rows that its own devices recorded (recording_mesh.py), and one process
writes a shard. So the rows of a call are *dealt*: process p of P gets B/P consecutive rows of its own run of whole
shards. Where shards fit into B/P rows, that is the batch in its order; otherwise a call has a part of P shards, and
several calls fill them. A *work unit* is what is begun and ended together: a run for each process.

Nothing but the first process's words (which work units are pending, that all is finished) is exchanged on the host, and
nothing recorded between devices: what a process copies and writes is its share of the cache, however many there are.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm

import jax
import numpy as np
from jax.sharding import Mesh

from distillcache.cache_builder.record.finish import finish_segment, lists_segment
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.plan import counted_processes, settle_plan
from distillcache.cache_builder.record.replica import Replica
from distillcache.cache_builder.record.work_units import RowSource, keep_batch
from distillcache.models.decoder import Decoder
from distillcache.models.describe import describe_numerics
from distillcache.models.mesh.recording import mesh_sizes, own_part
from distillcache.models.mesh.sharding import put, rows_held, rows_sharding
from distillcache.models.recorder import Recording, SlotSums, make_recorder
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.segment import (
    begun_plan,
    committed_shards,
    read_manifest,
    segment_names,
    segment_number,
)
from distillcache.schemas.cache.waiting import Waiting, holder_words
from distillcache.schemas.config import BuildOptions
from distillcache.schemas.errors import FolderTakenError, InputError, Interrupted, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.manifest import Manifest, Plan
from distillcache.schemas.format.rows import Row, teacher_batch
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.runtime.peers import Peers
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import Store

# Calls after which the processes wait for each other. On a mesh with `data` alone nothing else holds one back that is
# faster, and all of them stop where the fastest is.
STEPS_APART = 16
POLL_S = 1.0  # how often to look whether another job's lease has ended


@dataclass(frozen=True)
class Dealing:
    """The distribution of a segment's rows over the positions of teacher calls."""

    plan: Plan
    processes: int

    @property
    def own_rows(self) -> int:
        """The number of rows of each process in a call."""
        return self.plan.batch_rows // self.processes

    @property
    def run_rows(self) -> int:
        """The number of rows of each process in a work unit: whole shards from whole calls."""
        return lcm(self.own_rows, self.plan.shard_rows)

    @property
    def units(self) -> int:
        return -(-self.plan.rows.count // (self.processes * self.run_rows))

    def shards(self, unit: int) -> range:
        """List the shards that the work unit fills."""
        count = self.processes * self.run_rows // self.plan.shard_rows
        return range(unit * count, min((unit + 1) * count, self.plan.num_shards))

    def calls(self, unit: int) -> Iterator[np.ndarray]:
        """The row of every place in each call of a work unit, `[B]`; -1 for padding."""
        runs = (unit * self.processes + np.arange(self.processes)) * self.run_rows
        for offset in range(0, self.run_rows, self.own_rows):
            rows = (runs[:, None] + offset + np.arange(self.own_rows)).reshape(-1)
            if rows[0] < self.plan.rows.count:
                yield np.where(rows < self.plan.rows.count, rows, -1)

    def own(self, call: np.ndarray, process: int) -> np.ndarray:
        """The rows of a call that a process keeps: consecutive ones, perhaps none."""
        mine = call[process * self.own_rows : (process + 1) * self.own_rows]
        return mine[mine >= 0]


@dataclass(kw_only=True)
class Together:
    """One process's part of a build in lockstep."""

    store: Store
    plan: Plan
    options: BuildOptions
    rows: RowSource
    decoder: Decoder
    mesh: Mesh
    replica: Replica

    @property
    def peers(self) -> Peers:
        return self.replica.peers

    @property
    def dealing(self) -> Dealing:
        return Dealing(self.plan, self.peers.count)


@contextmanager
def held_together(store: Store, plan: Plan, expiry_s: float, peers: Peers) -> Iterator[Callable[[], None]]:
    """The segment, held against other jobs while this one works on it; by the first process, for all.

    Returns: what raises `FolderTakenError` where another job has it by now.

    Raises:
        InputError: another job works on it.
    """
    if peers.count == 1:
        yield lambda: None
        return
    begun = segment_names(store, segment_number(plan.segment))  # perhaps on another platform, which is accepted
    segment = begun[0] if begun else plan.segment
    leases = Leases(store, segment, expiry_s, key=layout.job_lease_key) if peers.first else None

    def check() -> None:
        if leases is not None and not leases.holds(0):
            raise FolderTakenError(
                "another job builds this cache now: this job's lease expired without a heartbeat",
                {"cache": store.url, "lease": store.where(layout.job_lease_key(segment, 0))},
                "let the other job finish, or stop it and start this one again",
            )

    try:
        peers.share("held", lambda: _hold(store, leases, expiry_s))
        yield check
        if leases is not None:
            leases.done(0)  # finished, and tidied up
    finally:
        if leases is not None:
            leases.close()


def finished_together(store: Store, plan: Plan, peers: Peers) -> Manifest | None:
    """The manifest, where another job finished the segment while this one waited for it; all processes say the same.

    Its rows and receipts are tidied up then, so there is nothing to work with, and nothing to do.
    """
    if peers.count == 1:
        return None  # other processes of this one's kind may finish at any time: build.unless_finished

    def look() -> bytes:
        manifest = read_manifest(store)
        listed = manifest is not None and lists_segment(manifest, plan.segment)
        return b"finished" if listed else b"pending"

    return read_manifest(store) if peers.share("finished before", look) == b"finished" else None


def _hold(store: Store, leases: Leases | None, expiry_s: float) -> bytes:
    """Take the lease; the one that a killed job left on another machine has to expire first."""
    until, waiting = time.monotonic() + 1.5 * expiry_s, Waiting("for another job")
    while leases is not None and not leases.take(0):
        holder = leases.holder()
        if time.monotonic() > until:
            raise InputError(
                "another job is building this cache",
                {
                    "cache": store.url,
                    "lease": "changing hands" if holder is None else holder_words(holder),
                    "waited": f"{1.5 * expiry_s:.0f} s",
                },
                "let it finish, or stop it first",
            )
        waiting.tell(holder)
        time.sleep(POLL_S)
    return b"held"


def settle_together(store: Store, plan: Plan, accept_platform: bool, peers: Peers) -> Plan:
    """The plan in the store; every process compares its own with the one that the first has settled.

    Raises:
        PlanMismatchError: the place holds another plan, or the processes do not agree.
        StorageError: a process does not see what the first one wrote.
    """
    if peers.count == 1:
        return settle_plan(store, plan, accept_platform)
    said = peers.share("plan", lambda: to_canonical(settle_plan(store, plan, accept_platform)))
    if peers.first:
        return from_canonical(Plan, said, store.where(layout.plan_key(plan.segment)))
    if begun_plan(store, segment_number(plan.segment)) is None:
        raise StorageError(
            "a process does not see what the first one wrote",
            {"cache": store.url, "process": f"{peers.number} of {peers.count}"},
            "name a --cache that all processes reach: a shared disk or a bucket",
        )
    return settle_plan(store, plan, accept_platform)


def build_together(job: Together) -> Manifest:
    """Record every work unit that is not committed, each process its part, and finish the segment."""
    axes = mesh_sizes(job.mesh)
    numerics = describe_numerics(
        job.plan.numerics.dtype,
        job.plan.taps,
        axes,
        counted_processes(axes, job.plan.batch_rows, job.peers.count, job.plan.shard_rows),
        job.decoder.config.attention,
    )
    writer = ShardWriter(
        job.store,
        job.plan,
        max_bytes=job.options.max_in_flight_mib << 20,
        numerics=numerics if numerics != job.plan.numerics else None,
        on_commit=lambda shard: None,
    )
    tokens = job.plan.rows.count * job.plan.rows.row_tokens
    with Progress("build", tokens, unit="tokens", quiet=not job.peers.first) as bar:
        try:
            _record_units(job, _pending(job, bar), writer, bar)
        finally:
            writer.close()
    job.peers.meet("written")
    said = job.peers.share("finished", lambda: to_canonical(finish_segment(job.store, job.plan)))
    return from_canonical(Manifest, said, job.store.where(layout.MANIFEST)) if job.peers.first else _manifest(job)


def _manifest(job: Together) -> Manifest:
    manifest = read_manifest(job.store)
    if manifest is None:
        raise StorageError(
            "the manifest disappeared after it was written",
            {"missing": job.store.where(layout.MANIFEST)},
            "find out what deletes files there, then run the same command again",
        )
    return manifest


def _pending(job: Together, bar: Progress) -> list[int]:
    """The work units with a shard that has no receipt, as the first process finds them."""

    def look() -> bytes:
        done, dealing = committed_shards(job.store, job.plan), job.dealing
        left = [not done.issuperset(dealing.shards(unit)) for unit in range(dealing.units)]
        return np.packbits(np.asarray(left, bool)).tobytes()

    bits = np.unpackbits(np.frombuffer(job.peers.share("pending", look), np.uint8))[: job.dealing.units]
    for unit in np.flatnonzero(bits == 0):
        ranges = [job.plan.shard_range(shard) for shard in job.dealing.shards(int(unit))]
        bar.skip(sum(stop - start for start, stop in ranges) * job.plan.rows.row_tokens)
    return np.flatnonzero(bits).tolist()


def _record_units(job: Together, units: list[int], writer: ShardWriter, bar: Progress) -> None:
    """Call the teacher for all of them, in the same order in every process; keep what is this process's."""
    record, parameters = make_recorder(job.decoder, job.plan.taps, signs_of(job.plan), job.mesh)
    calls = (call for unit in units for call in job.dealing.calls(unit))
    waiting: tuple[np.ndarray, dict[int, Row], Recording, float] | None = None
    stops = False
    for number, call in enumerate(calls, start=1):
        stops = job.peers.should_stop(job.replica.stop, number)  # all say the same
        if stops:
            break
        if number % STEPS_APART == 0:
            job.peers.meet(f"call {number}")
        writer.check()
        rows = _read_rows(job, call)
        recording = record(parameters, *_place(job, call, rows))  # returns before it is computed
        begun = time.perf_counter()
        if waiting is not None:
            _keep(job, writer, bar, *waiting)
        waiting = (call, rows, recording, begun)
    if waiting is not None:
        _keep(job, writer, bar, *waiting)
    writer.wait()
    if stops:
        raise Interrupted(
            "the build was asked to stop",
            {"cache": job.store.url, "kept": "every committed shard"},
            "run the same command again to resume",
        )


def _read_rows(job: Together, call: np.ndarray) -> dict[int, Row]:
    """The rows that this process's devices work on, by number, in reads of consecutive ones."""
    wanted = np.unique(call[list(rows_held(job.mesh, len(call)))])
    wanted = wanted[wanted >= 0]
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
    found: dict[int, Row] = {}
    for run in runs:
        if run.size:
            start, stop = int(run[0]), int(run[-1]) + 1
            found |= zip(range(start, stop), job.rows.slice(start, stop), strict=True)
    return found


def _place(job: Together, call: np.ndarray, rows: dict[int, Row]) -> list[jax.Array]:
    """tokens, positions, segment_ids on the devices; what others' devices need is left to them."""
    batch = teacher_batch([rows.get(int(number)) for number in call], len(call), job.plan.rows.row_tokens)
    return [put(array, rows_sharding(job.mesh)) for array in batch]


def _keep(
    job: Together,
    writer: ShardWriter,
    bar: Progress,
    call: np.ndarray,
    rows: dict[int, Row],
    recording: Recording,
    begun: float,
) -> None:
    """Copy this process's rows of a recording to the host and hand them to their shards."""
    own = job.dealing.own(call, job.peers.number).tolist()
    bar.advance((int(np.sum(call >= 0)) - len(own)) * job.plan.rows.row_tokens)
    if not own:
        return
    mine = Recording(
        {tap: {name: own_part(part) for name, part in parts.items()} for tap, parts in recording.codes.items()},
        {tap: SlotSums(*map(own_part, sums)) for tap, sums in recording.sums.items()},
    )
    keep_batch(job.plan, writer, bar, own[0], [rows[number] for number in own], mine, begun)
