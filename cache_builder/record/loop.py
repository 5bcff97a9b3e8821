"""The recording loop: rows through the teacher, codes into shards, shards into the store.

Three things happen at the same time: the teacher computes one batch, the batch before it is copied to the host, and a
full shard is being written by another thread (pipeline.py). A process works on *work units*, the consecutive shards of
whole teacher batches, which it leases one by one (schemas/cache/lease.py), so that any number of processes may build
one cache; the last batch of one unit is copied while the first of the next is computed.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from jax.sharding import Mesh

from distillcache.cache_builder.record.finish import finish_segment, tidy
from distillcache.cache_builder.record.fixed_files import fixed_files
from distillcache.cache_builder.record.lockstep import (
    Together,
    build_together,
    finished_together,
    held_together,
    settle_together,
)
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.replica import Replica
from distillcache.cache_builder.record.work_units import (
    Batches,
    LeasedUnits,
    RowSource,
    WorkUnits,
    by_one_process,
    keep_batch,
    work_through,
)
from distillcache.models.decoder import Decoder
from distillcache.models.describe import describe_numerics
from distillcache.models.mesh.recording import mesh_sizes
from distillcache.models.mesh.sharding import put, rows_sharding
from distillcache.models.recorder import Recording, make_recorder
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.segment import check_plan_is_ours, committed_shards
from distillcache.schemas.config import BuildOptions
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Manifest, Plan
from distillcache.schemas.format.rows import Row, RowReader, teacher_batch
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import Store

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Work(WorkUnits):
    """Inputs of the teacher's loop. mesh: the devices of the decoder."""

    decoder: Decoder
    mesh: Mesh | None = None


@dataclass(kw_only=True)
class _Job(LeasedUnits, Work):
    """A build."""


@dataclass(frozen=True, kw_only=True)
class SegmentBuild:
    """Everything that the build of one segment takes.

    store: the cache. teacher: the path of the checkpoint. rows: all of the segment's. replica: the teacher's processes
    and devices.
    """

    store: Store
    options: BuildOptions
    tokenizer: TextTokenizer
    teacher: str
    decoder: Decoder
    plan: Plan
    rows: RowSource
    replica: Replica


def build_segment(build: SegmentBuild) -> Manifest:
    """Settle the plan, run the teacher over all rows that are not committed yet, and finish the segment."""
    store, options, peers = build.store, build.options, build.replica.peers
    with held_together(store, build.plan, options.claim_expiry_s, peers) as check_held:
        plan = settle_together(store, build.plan, options.accept_platform, peers)
        finished = finished_together(store, plan, peers)
        if finished is not None:
            tidy(store, plan)
            return finished
        with guarded_by_plan(store, plan, check_held) as placed:
            return _build_settled(replace(build, plan=plan), placed)


@contextmanager
def guarded_by_plan(store: Store, plan: Plan, check_held: Callable[[], None] = lambda: None) -> Iterator[Store]:
    """The store for writing a segment with, as long as the segment's plan exists.

    What was written in the moment in which the plan went is deleted again.

    Args:
        check_held: raises where the segment is another job's by now.
    """

    def check() -> None:
        check_held()
        check_plan_is_ours(store, plan)

    try:
        yield store.guarded(check)
    except DistillcacheError:
        if store.read(layout.plan_key(plan.segment)) is None:
            store.delete_folder(layout.segment_prefix(plan.segment))
        check_plan_is_ours(store, plan)  # a folder that is deleted meanwhile fails in many ways: this is why
        raise


def _build_settled(build: SegmentBuild, placed: Store) -> Manifest:
    """`build_segment`, after the plan is settled.

    Args:
        placed: the store for everything but leases.
    """
    store, options, plan, rows, replica = build.store, build.options, build.plan, build.rows, build.replica
    if replica.peers.first:
        for key, value in fixed_files(plan, build.decoder, build.tokenizer, build.teacher).items():
            placed.put_once(key, value)
        _keep_skipped(placed, plan, rows)
        _warn_if_small(store, plan)
        size = f"{counted(plan.rows.count, 'row')} of {counted(plan.rows.row_tokens, 'token')}"
        log.info(f"recording {size}, after compiling the teacher")
    work = {"plan": plan, "options": options, "rows": rows, "decoder": build.decoder, "mesh": replica.mesh}
    if replica.peers.count > 1:
        return build_together(Together(store=placed, **work, replica=replica))
    leases = Leases(store, plan.segment, options.claim_expiry_s)
    try:
        _build_units(_Job(store=placed, **work, stop=replica.stop, leases=leases))
    finally:
        leases.close()
    return by_one_process(store, plan, options, replica.stop, lambda: finish_segment(placed, plan))


def _keep_skipped(store: Store, plan: Plan, rows: RowSource) -> None:
    """Keep the list of skipped records with the segment, and name it: prepared rows go when the build has finished."""
    if not isinstance(rows, RowReader) or not rows.index.skipped:
        return
    key = layout.skipped_key(plan.segment)
    store.put_once(key, rows.skipped())
    log.info(f"skipped: {counted(rows.index.skipped, 'record')} of the text, listed in {store.where(key)}")


def _warn_if_small(store: Store, plan: Plan) -> None:
    if store.local is None:
        return
    missing = (plan.num_shards - len(committed_shards(store, plan))) * plan.shard_rows * plan.bytes_per_row
    free = shutil.disk_usage(store.local).free
    if missing > free:
        size = f"{'up to ' if plan.is_compressed else ''}{missing / 1e6:,.0f} MB"
        log.warning(f"only {free / 1e6:,.0f} MB are free at {store.url}, and {size} have yet to be written")


def _build_units(job: _Job) -> None:
    """Run the teacher over every work unit that nobody has committed, and see all of them committed."""
    numerics = describe_numerics(
        job.plan.numerics.dtype, job.plan.taps, mesh_sizes(job.mesh), attention=job.decoder.config.attention
    )
    other = numerics if numerics != job.plan.numerics else None
    work_through(job, "build", other, lambda batches, writer, bar: record_batches(job, batches, writer, bar))


def record_batches(job: Work, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
    """Run the teacher over `(first row, rows)` batches and hand all of them to the writer, which is closed.

    A batch is handed over while the next one is computed, also across work units.
    """
    record, parameters = make_recorder(job.decoder, job.plan.taps, signs_of(job.plan), job.mesh)
    sharding = None if job.mesh is None else rows_sharding(job.mesh)
    waiting: list[tuple[int, list[Row], Recording, float]] = []

    def hand_over() -> None:
        while waiting:
            keep_batch(job.plan, writer, bar, *waiting.pop())

    writer.before_wait = hand_over
    try:
        for first, rows in batches:
            arrays = teacher_batch(rows, job.plan.batch_rows, job.plan.rows.row_tokens)
            recording = record(parameters, *(put(array, sharding) for array in arrays))  # returns before it is computed
            begun = time.perf_counter()
            hand_over()
            waiting.append((first, rows, recording, begun))
        writer.wait()
    finally:
        writer.close()
