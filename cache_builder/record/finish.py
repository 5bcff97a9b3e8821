"""The end of a build: receipts become index and statistics, then the manifest makes the segment exist.

Every step can be repeated after a crash, and two processes may do them at once: they write the same bytes. Receipts,
leases and prepared rows go only after the manifest is durable.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from distillcache.cache_builder.record.writer import add_stats
from distillcache.schemas.cache.segment import (
    check_plan_is_ours,
    manifest_in,
    read_manifest,
    read_receipt,
    segment_number,
)
from distillcache.schemas.errors import DamageError, DistillcacheError, InputError, PlanMismatchError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import encode_record
from distillcache.schemas.format.manifest import Manifest, Plan, SegmentEntry, ShardReceipt, Stats, TapStats
from distillcache.schemas.format.times import summed_up
from distillcache.schemas.runtime.peers import PeerError
from distillcache.schemas.store.store import Store

READERS = 16  # of receipts: a bucket takes tens of milliseconds for each
READ_AT_ONCE = 1024  # receipts before looking whether one is gone

BUILD_FOLDERS = ("receipts", "claims", "prepared")  # what only an unfinished segment has


def finish_segment(store: Store, plan: Plan) -> Manifest:
    """Write index.bin, stats.json and the manifest of a segment whose shards are all committed, then tidy up."""
    prefix = layout.segment_prefix(plan.segment)
    check_plan_is_ours(store, plan)
    receipts = _read_receipts(store, plan)
    if receipts is None:  # another process finished and tidied up meanwhile
        manifest = read_manifest(store)
        if manifest is None or not lists_segment(manifest, plan.segment):
            raise DistillcacheError(
                "a receipt disappeared while the build was being finished",
                {"cache": store.url},
                "run the same command again",
            )
        tidy(store, plan)
        return manifest
    index = b"".join(encode_record(plan, receipt) for receipt in receipts)
    store.write(f"{prefix}/index.bin", index)
    store.write(f"{prefix}/stats.json", to_canonical(Stats(taps=total_stats(receipts))))
    times = summed_up({receipt.shard: receipt.seconds for receipt in receipts if receipt.seconds is not None})
    if times is not None:
        store.write(layout.times_key(plan.segment), to_canonical(times))
    manifest = _list_segment(store, plan, segment_entry(store, plan, index))
    tidy(store, plan)
    return manifest


def segment_entry(store: Store, plan: Plan, index: bytes) -> SegmentEntry:
    """The manifest's line of a segment whose files are all there."""
    return SegmentEntry(
        segment=plan.segment,
        rows_of=plan.rows_of,
        rows=plan.rows.count,
        index_digest=digest_bytes(index),
        index_length=len(index),
        files=dict(_small_files(store, plan)),
    )


def lists_segment(manifest: Manifest, segment: str) -> bool:
    """Return whether the segment is finished."""
    return any(entry.segment == segment for entry in manifest.segments)


def _list_segment(store: Store, plan: Plan, entry: SegmentEntry) -> Manifest:
    """Atomically replace the manifest by one that lists the segment; returns it."""
    while True:
        data, generation = store.read_with_generation(layout.MANIFEST)
        before = None if data is None else manifest_in(store, data)
        if before is not None and lists_segment(before, plan.segment):
            return before  # another process was first: it wrote the same
        if len(before.segments if before else ()) != segment_number(plan.segment):
            raise PlanMismatchError(
                "another segment was added under this one's number",
                {"cache": store.url, "segment": plan.segment, "listed": len(before.segments if before else ())},
                "run the command again: it adds what the cache still lacks",
            )
        own_rows = plan.rows_of is None
        manifest = Manifest(
            segments=(*(before.segments if before else ()), entry),
            tokenizer_digest=digest_bytes(store.read(layout.TOKENIZER) or b""),
            rows=(before.rows if before else 0) + (plan.rows.count if own_rows else 0),
            tokens=(before.tokens if before else 0) + (plan.rows.tokens if own_rows else 0),
        )
        if store.replace_whole(layout.MANIFEST, to_canonical(manifest), generation):
            return manifest


def tidy(store: Store, plan: Plan) -> None:
    """Remove files that a finished segment no longer needs. Safe to repeat."""
    prefix = layout.segment_prefix(plan.segment)
    for folder in BUILD_FOLDERS:
        store.delete_keys(f"{prefix}/{folder}/")
    prepared = layout.prepared_prefix(segment_number(plan.segment))
    store.delete_folder(prepared)
    store.remove_stale_locks()
    for folder in BUILD_FOLDERS:
        store.remove_empty_folders(f"{prefix}/{folder}")


def _read_receipts(store: Store, plan: Plan) -> list[ShardReceipt] | None:
    def read(shard: int) -> ShardReceipt | None:
        return read_receipt(store, plan, shard)

    receipts = []
    with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as pool:
        for first in range(0, plan.num_shards, READ_AT_ONCE):
            found = list(pool.map(read, range(first, min(first + READ_AT_ONCE, plan.num_shards))))
            if None in found:
                return None
            receipts += [receipt for receipt in found if receipt is not None]
    return receipts


def total_stats(receipts: list[ShardReceipt]) -> dict[str, TapStats]:
    """The statistics of all shards together, in the shards' order: sums of floats depend on it."""
    total = dict(receipts[0].stats)
    for receipt in receipts[1:]:
        total = {name: add_stats(stats, receipt.stats[name]) for name, stats in total.items()}
    return total


def _small_files(store: Store, plan: Plan) -> Iterator[tuple[str, str]]:
    prefix = layout.segment_prefix(plan.segment)
    arrays = [part.array for tap in plan.taps for part in tap.parts]
    head = [layout.HEAD_FILE] if plan.keeps_head else []
    for name in (
        "plan.json",
        "stats.json",
        "side.safetensors",
        *head,
        *(f"taps/{array}/zarr.json" for array in arrays),
    ):
        yield name, digest_bytes(store.read(f"{prefix}/{name}") or b"")


def unless_finished(
    store: Store, work: Callable[[], Manifest], may_repeat: Callable[[], bool] = lambda: True
) -> Manifest:
    """Run `work`. If it fails because another process finished the segment and tidied up, run it once more.

    It finds the finished segment then, and that nothing is left to do.

    Args:
        may_repeat: whether the work can be done again after it failed.
    """
    before = _num_segments(store)
    try:
        return work()
    except (InputError, DamageError, StorageError, PeerError):
        if _num_segments(store) <= before or not may_repeat():
            raise
    return work()


def _num_segments(store: Store) -> int:
    """Count the finished segments; a damaged manifest is reported elsewhere."""
    try:
        manifest = read_manifest(store)
    except DamageError:
        return 0
    return 0 if manifest is None else len(manifest.segments)
