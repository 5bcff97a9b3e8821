"""A segment's rows in pieces, claimed one by one, and their way to the writer: what building and copying share.

A *piece* is the consecutive shards of whole batches. Any number of processes may work on one segment.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_builder.claims import Claims
from cache_builder.finish import lists_segment
from cache_builder.pipeline import ShardWriter
from models.recorder import Recording
from schemas import layout
from schemas.config import BuildConfig, CopyConfig
from schemas.errors import Interrupted, NonFiniteError
from schemas.manifest import TOPK_LOGITS, NumericsPlan, Plan
from schemas.progress import Progress
from schemas.rows import Row
from schemas.segment import committed_shards, read_manifest
from schemas.signals import StopRequest
from schemas.storage import Store

POLL_S = 1.0  # how often to look whether other processes have finished their pieces


Batches = Iterator[tuple[int, list[Row]]]  # (first row, rows)


class RowSource(Protocol):
    """Where rows come from: prepared ones, or those of a cache."""

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1` of the segment."""
        ...


@dataclass(kw_only=True)
class Pieces:
    """A segment's rows, in pieces of whole batches and whole shards."""

    store: Store
    plan: Plan
    rows: RowSource
    stop: StopRequest

    @property
    def piece_rows(self) -> int:
        return max(self.plan.shard_rows, self.plan.batch_rows)

    def shards_of(self, piece: int) -> list[int]:
        first = piece * self.piece_rows // self.plan.shard_rows
        return list(range(first, min(first + self.piece_rows // self.plan.shard_rows, self.plan.num_shards)))

    def piece_of(self, shard: int) -> int:
        return shard * self.plan.shard_rows // self.piece_rows


@dataclass(kw_only=True)
class ClaimedPieces(Pieces):
    """Work that processes share by claims."""

    config: BuildConfig | CopyConfig
    claims: Claims


def work_through(
    job: ClaimedPieces, what: str, numerics: NumericsPlan | None, work: Callable[[Batches, ShardWriter, Progress], None]
) -> None:
    """Let `work` hand the batches of every piece that nobody has committed to the writer, until all are committed.

    Args:
        numerics: where they differ from the plan's.
    """
    progress = Progress(what, job.plan.rows.count * job.plan.rows.row_tokens, unit="tokens")
    left = {piece: set(job.shards_of(piece)) for piece in range(-(-job.plan.rows.count // job.piece_rows))}

    def on_commit(shard: int) -> None:
        piece = left[job.piece_of(shard)]
        piece.discard(shard)
        if not piece:
            job.claims.done(job.piece_of(shard))

    writer = ShardWriter(
        job.store,
        job.plan,
        max_bytes=job.config.max_in_flight_mib << 20,
        numerics=numerics,
        on_commit=on_commit,
    )
    with progress as bar:
        try:
            work(_claimed_batches(job, writer, bar), writer, bar)
        finally:
            writer.close()


def _claimed_batches(job: ClaimedPieces, writer: ShardWriter, bar: Progress) -> Batches:
    """(first row, rows) of every teacher batch of the pieces that this process claims, until none is left."""
    count = -(-job.plan.rows.count // job.piece_rows)
    mine = [piece for piece in range(count) if piece % job.config.num_processes == job.config.process_id]
    order = mine + [piece for piece in range(count) if piece not in set(mine)]
    counted: set[int] = set()
    while True:
        committed = committed_shards(job.store, job.plan)
        for shard in committed - counted:  # earlier runs' and other processes' work
            start, stop = job.plan.shard_range(shard)
            bar.skip((stop - start) * job.plan.rows.row_tokens)
        counted |= committed
        order = [piece for piece in order if not committed.issuperset(job.shards_of(piece))]
        if not order or _is_finished(job):
            return
        took_any = False
        for piece in order:
            if not job.claims.take(piece):
                continue
            if all(_has_receipt(job, shard) for shard in job.shards_of(piece)):
                job.claims.done(piece)
                continue
            if _is_finished(job):  # by another process, which took the receipts away
                return
            took_any = True
            counted.update(job.shards_of(piece))
            yield from piece_batches(job, writer, piece)
        if not took_any:
            time.sleep(POLL_S)
        _stop_if_asked(job)
        writer.wait()


def piece_batches(job: Pieces, writer: ShardWriter, piece: int) -> Batches:
    """(first row, rows) of every teacher batch of a piece."""
    start = piece * job.piece_rows
    stop = min(start + job.piece_rows, job.plan.rows.count)
    for first in range(start, stop, job.plan.batch_rows):
        _stop_if_asked(job)
        writer.check()
        yield first, job.rows.slice(first, min(first + job.plan.batch_rows, stop))


def _has_receipt(job: ClaimedPieces, shard: int) -> bool:
    return job.store.read(layout.receipt_key(job.plan.segment, shard)) is not None


def _is_finished(job: ClaimedPieces) -> bool:
    """Whether another process has finished the segment. Its manifest is there before any receipt goes."""
    manifest = read_manifest(job.store)
    return manifest is not None and lists_segment(manifest, job.plan.segment)


def _stop_if_asked(job: Pieces) -> None:
    if job.stop.requested:
        raise Interrupted(
            "the build was asked to stop",
            {"cache": job.store.url, "kept": "every committed shard"},
            "run the same command again to go on",
        )


def keep_batch(
    plan: Plan, writer: ShardWriter, bar: Progress, first: int, rows: list[Row], recording: Recording
) -> None:
    """Wait for a recording, check it, and hand its rows to their shards."""
    codes = {part.array: np.asarray(recording.codes[tap.name][part.part]) for tap in plan.taps for part in tap.parts}
    sums = {name: type(tap)(*(np.asarray(value) for value in tap)) for name, tap in recording.sums.items()}
    for tap in plan.taps:
        _raise_if_nonfinite(plan, tap.name, tap.slots, np.asarray(sums[tap.name].nonfinite)[: len(rows)], first)
    for start in range(0, len(rows), plan.shard_rows):
        part = slice(start, min(start + plan.shard_rows, len(rows)))
        writer.add(
            (first + start) // plan.shard_rows,
            rows[part],
            {array: values[part] for array, values in codes.items()},
            {name: type(tap)(*(value[part] for value in tap)) for name, tap in sums.items()},
        )
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
            "found": f"{counts[row, slot]} numbers that are NaN or infinite",
        },
        "check the teacher's weights, or compute in another dtype: --dtype float32",
    )
