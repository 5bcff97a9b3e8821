"""Presence of a finished cache's rows files and objects, by one listing of each segment."""

from collections.abc import Iterator, Sequence

from distillcache.schemas.cache.segment import read_plan
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import MEND_NEXT, DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Plan, SegmentEntry
from distillcache.schemas.store.store import Store


def refuse_missing_data(store: Store, entries: Sequence[SegmentEntry], next: str = MEND_NEXT) -> None:
    """Raise where a file of rows or an object of a finished segment is not there. Bytes are `verify`'s.

    Args:
        next: what repairs it.

    Raises:
        DamageError: files are missing.
        StorageError: something else is in a file's place.
    """
    for entry in entries:
        plan = read_plan(store, entry.segment)
        if plan is None:
            continue  # the small files say so
        there = frozenset(store.keys(f"{layout.segment_prefix(entry.segment)}/"))
        missing, count = None, 0
        for key in data_keys(plan):
            if key not in there:
                missing, count = missing or key, count + 1
        if missing is not None:
            store.check_readable(missing)
            raise DamageError(
                "a finished cache lacks rows or objects",
                {"missing": store.where(missing), "and others": counted(count - 1, "file")}
                if count > 1
                else {"missing": store.where(missing)},
                next,
            )


def data_keys(plan: Plan) -> Iterator[str]:
    """Yield the keys of a segment's rows files, where it has rows of its own, and of its objects."""
    for shard in range(plan.num_shards):
        if plan.rows_of is None:
            yield layout.rows_key(plan.segment, shard)
        for part in (part for tap in plan.taps for part in tap.parts):
            for group in range(len(part.object_ranges())):
                yield layout.object_key(plan.segment, part.array, shard, group)
