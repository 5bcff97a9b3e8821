"""The end of a build: receipts become index and statistics, then the manifest makes the segment exist.

Every step can be repeated after a crash, and two processes may do them at once: they write the same bytes. Receipts,
claims and prepared rows go only after the manifest is durable.
"""

from collections.abc import Iterator

from cache_builder.write import add_stats
from schemas import layout
from schemas.canonical import from_canonical, to_canonical
from schemas.digest import digest_bytes
from schemas.errors import DistillcacheError
from schemas.index import encode_record
from schemas.manifest import Manifest, Plan, SegmentEntry, ShardReceipt, Stats, TapStats
from schemas.segment import read_manifest
from schemas.storage import Store

BUILD_FOLDERS = ("receipts", "claims", "prepared")  # what only an unfinished segment has


def committed_shards(store: Store, plan: Plan) -> set[int]:
    """The shards that have a receipt."""
    prefix = f"{layout.segment_prefix(plan.segment)}/receipts/"
    return {int(key.removeprefix(prefix).removesuffix(".json")) for key in store.keys(prefix)}


def finish_segment(store: Store, plan: Plan) -> Manifest:
    """Write index.bin, stats.json and the manifest of a segment whose shards are all committed, then tidy up."""
    prefix = layout.segment_prefix(plan.segment)
    receipts = _read_receipts(store, plan)
    if receipts is None:  # another process finished and tidied up meanwhile
        manifest = read_manifest(store)
        if manifest is None:
            raise DistillcacheError(
                "a receipt vanished while the build was being finished",
                {"cache": store.url},
                "run the same command again",
            )
        tidy(store, plan)
        return manifest
    index = b"".join(encode_record(plan, receipt) for receipt in receipts)
    store.write(f"{prefix}/index.bin", index)
    store.write(f"{prefix}/stats.json", to_canonical(Stats(taps=_total_stats(receipts))))
    entry = SegmentEntry(
        segment=plan.segment,
        rows=plan.rows.count,
        index_digest=digest_bytes(index),
        index_length=len(index),
        files=dict(_small_files(store, plan)),
    )
    manifest = Manifest(
        segments=(entry,),
        tokenizer_digest=digest_bytes(store.read(layout.TOKENIZER) or b""),
        rows=plan.rows.count,
        tokens=plan.rows.tokens,
    )
    store.write(layout.MANIFEST, to_canonical(manifest))
    tidy(store, plan)
    return manifest


def tidy(store: Store, plan: Plan) -> None:
    """Remove what a finished segment needs no more. Safe to repeat."""
    prefix = layout.segment_prefix(plan.segment)
    for folder in BUILD_FOLDERS:
        for key in store.keys(f"{prefix}/{folder}/"):
            store.delete(key)
    store.remove_stale_locks()
    for folder in BUILD_FOLDERS:
        store.remove_empty_folders(f"{prefix}/{folder}")


def _read_receipts(store: Store, plan: Plan) -> list[ShardReceipt] | None:
    receipts = []
    for shard in range(plan.num_shards):
        key = layout.receipt_key(plan.segment, shard)
        data = store.read(key)
        if data is None:
            return None
        receipts.append(from_canonical(ShardReceipt, data, store.where(key)))
    return receipts


def _total_stats(receipts: list[ShardReceipt]) -> dict[str, TapStats]:
    total = dict(receipts[0].stats)
    for receipt in receipts[1:]:
        total = {name: add_stats(stats, receipt.stats[name]) for name, stats in total.items()}
    return total


def _small_files(store: Store, plan: Plan) -> Iterator[tuple[str, str]]:
    prefix = layout.segment_prefix(plan.segment)
    arrays = [part.array for tap in plan.taps for part in tap.parts]
    for name in ("plan.json", "stats.json", "side.safetensors", *(f"taps/{array}/zarr.json" for array in arrays)):
        yield name, digest_bytes(store.read(f"{prefix}/{name}") or b"")
