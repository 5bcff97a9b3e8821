"""Facts about a segment that need neither rows nor taps: statistics and times, from its small files or its receipts.

Of an unfinished segment with many shards, some receipts are read, evenly drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from distillcache.cache_builder.record.finish import total_stats
from distillcache.cache_builder.record.fixed_files import unvouched_damage
from distillcache.schemas.cache.agreement import check_stats
from distillcache.schemas.cache.segment import Segment, read_manifest, read_receipt, small_file_damage
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import from_canonical, read_canonical
from distillcache.schemas.format.manifest import ShardReceipt, Stats, TapStats
from distillcache.schemas.format.times import SegmentTimes, summed_up

SAMPLED_SHARDS = 64  # a large cache has hundreds of thousands
READERS = 8  # of receipts at a time: a bucket takes tens of milliseconds for each


def shards_done(segment: Segment) -> Sequence[int]:
    """The committed shards, ascending."""
    return range(segment.plan.num_shards) if segment.committed is None else sorted(segment.committed)


def sampled_shards(segment: Segment) -> list[int]:
    """Up to `SAMPLED_SHARDS` of the committed shards, evenly drawn, the first and the last among them."""
    return evenly_drawn(shards_done(segment), SAMPLED_SHARDS)


def evenly_drawn(shards: Sequence[int], count: int) -> list[int]:
    """Up to `count` of them."""
    if not shards:
        return []
    return [shards[at] for at in sorted({*np.linspace(0, len(shards) - 1, count).round().astype(int).tolist()})]


def sampled_receipts(segment: Segment) -> list[ShardReceipt]:
    """Return the sampled receipts of an unfinished segment that still exist: it may be finished meanwhile."""

    def read(shard: int) -> ShardReceipt | None:
        return read_receipt(segment.store, segment.plan, shard)

    if segment.committed is None:
        return []
    with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as pool:
        return [receipt for receipt in pool.map(read, sampled_shards(segment)) if receipt is not None]


def damaged_files(segments: Sequence[Segment]) -> Iterator[DamageError]:
    """List the faults of small files; the index, and receipts, report their own when they are read."""
    manifest = read_manifest(segments[0].store) if segments else None
    if manifest is not None:
        entries = [segment.entry for segment in segments if segment.entry is not None]
        yield from small_file_damage(segments[0].store, entries, manifest.tokenizer_digest, indexes=False)
    for segment in segments:
        if segment.committed:
            yield from (error for _, error in unvouched_damage(segment.store, segment.plan))


def segment_stats(segment: Segment, receipts: Sequence[ShardReceipt]) -> Mapping[str, TapStats]:
    """Return the statistics of all its rows; of an unfinished segment, of the rows of these receipts.

    Raises:
        DamageError: the statistics are missing or damaged.
    """
    if segment.committed is not None:
        return total_stats(list(receipts)) if receipts else {}
    where = segment.store.where(f"{layout.segment_prefix(segment.plan.segment)}/stats.json")
    return check_stats(segment.plan, from_canonical(Stats, segment.small_file("stats.json"), where).taps, where)


def segment_times(segment: Segment, receipts: Sequence[ShardReceipt]) -> SegmentTimes | None:
    """Return the time that its shards took; of an unfinished segment, those of these receipts. None: it was built by a
    version that did not record it, or nothing is committed yet.

    Raises:
        DamageError: what was noted of it is damaged.
    """
    if segment.committed is None:
        return read_canonical(segment.store, layout.times_key(segment.plan.segment), SegmentTimes)
    return summed_up({receipt.shard: receipt.seconds for receipt in receipts if receipt.seconds is not None})
