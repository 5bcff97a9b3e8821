"""Checks of a cache: everything in it is compared with what was committed.

Which file holds which digest: the manifest carries its own digest; it holds the digests of the tokenizer, of each
segment's small files and of its index.bin; a record of index.bin holds those of a shard's objects, of their inner
chunks, and of its file of rows (check_shard.py). In a segment that is still being built a shard's receipt stands for
its record; shards without one are not looked at, and its small files are rewritten by the build that goes on.

Damage is told, not raised. Memory: MEMORY_BYTES for objects that are damaged (whole ones are read in chunks), the
names of all keys while the cache is listed, and one stretch of the index.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from distillcache.cache_builder.record.fixed_files import unvouched_damage
from distillcache.cache_builder.repair.check_shard import Fault, StoredObject, check_object, stored_objects
from distillcache.cache_builder.repair.finding import Finding, What, told_in_a_line
from distillcache.cache_builder.repair.survey import SegmentView, Survey
from distillcache.schemas.cache.segment import read_receipt, receipt_record
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import from_canonical, read_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import decode_record, record_dtype
from distillcache.schemas.format.layout import ITEM_BYTES
from distillcache.schemas.format.manifest import Plan, SegmentEntry, Stats, TapPlan
from distillcache.schemas.format.times import SegmentTimes
from distillcache.schemas.store.store import Store

WORKERS = 4  # reading and hashing overlap; more only help on a store with long latencies
MEMORY_BYTES = 1 << 30  # for objects being checked
COPIES = 3  # of an object that is damaged: as read, as TensorStore's memory store holds it, and its chunks
INDEX_READ_BYTES = 8 << 20  # of the index at a time

Checked = Callable[[str, int], None]  # (what was checked, how many)


def check_cache(
    survey: Survey, *, quick: bool = False, on_checked: Checked = lambda what, count: None
) -> Iterator[Finding]:
    """Every finding, in the order in which they are made; objects that were swapped come last.

    Args:
        quick: of objects and files of rows, check presence, lengths and shard indexes, not the data.
        on_checked: called with "files", "shards", "objects" or "rows_files", and how many more are checked.
    """
    store = survey.store
    yield from survey.findings
    if survey.manifest is not None:
        data = store.read(layout.TOKENIZER)
        on_checked("files", 2)
        yield from _small_file(layout.TOKENIZER, data, survey.manifest.tokenizer_digest)
    altered: list[Fault] = []
    for view in survey.segments:
        if view.entry is not None:
            yield from _check_small_files(store, view, view.entry)
            on_checked("files", len(view.entry.files) + 1)
        elif view.shards:
            yield from _check_unvouched(store, view)
        for found in _check_shards(store, view, quick, on_checked):
            if isinstance(found, Fault) and found.found_digest:
                altered.append(found)
            else:
                yield found.finding if isinstance(found, Fault) else found
    yield from _name_swapped(survey, altered)


def _check_small_files(store: Store, view: SegmentView, entry: SegmentEntry) -> Iterator[Finding]:
    for name, digest in entry.files.items():
        yield from _small_file(view.key(name), store.read(view.key(name)), digest, view)
    key = layout.times_key(view.plan.segment)
    try:
        read_canonical(store, key, SegmentTimes)
    except DamageError as error:
        detail = f"{error.what}; it says how long shards took, and nothing depends on it"
        yield Finding(what="damaged", object=key, detail=detail, segment=view.plan.segment)


def _check_unvouched(store: Store, view: SegmentView) -> Iterator[Finding]:
    """Check files of a segment that is being built; the resumed build writes them again."""
    side = view.key("side.safetensors")
    rotated = any(tap.rotate for tap in view.plan.taps)
    for key, error in unvouched_damage(store, view.plan):
        yield Finding(
            what="missing" if store.read(key) is None else "damaged",
            object=key,
            detail=told_in_a_line(error),
            segment=view.plan.segment,
            rows=view.rows if key == side and rotated else None,
        )


def _small_file(key: str, data: bytes | None, digest: str, view: SegmentView | None = None) -> Iterator[Finding]:
    found = None if data is None else digest_bytes(data)
    if found == digest:
        return
    what: What = "missing" if data is None else "stale" if _is_canonical(key, data) else "damaged"
    detail = f"digest {found or 'none'}, the manifest names {digest}"
    taps: list[TapPlan] = []
    if view is not None and key == view.key("side.safetensors"):
        taps = [tap for tap in view.plan.taps if tap.rotate]
        detail += f"; {', '.join(tap.name for tap in taps) or 'nothing'} cannot be decoded without it"
    elif key.endswith("zarr.json"):
        detail += "; readers other than this program need it, which takes it from the plan"
    yield Finding(
        what=what,
        object=key,
        detail=detail,
        segment=view.plan.segment if view is not None else None,
        rows=view.rows if view is not None and taps else None,
        tap=taps[0].name if len(taps) == 1 else None,
        slots=taps[0].slots if len(taps) == 1 else (),
    )


def _is_canonical(key: str, data: bytes) -> bool:
    """Return whether a JSON object of ours is whole, and so of another build."""
    model = {"plan.json": Plan, "stats.json": Stats}.get(key.rpartition("/")[2])
    if model is None:
        return False
    try:
        from_canonical(model, data, key)
    except DamageError:
        return False
    return True


def _check_shards(store: Store, view: SegmentView, quick: bool, on_checked: Checked) -> Iterator[Finding | Fault]:
    """The index or the receipts, and every object that they name."""
    stale = _stale_index(store, view)
    if stale is not None:  # it says nothing of the objects that are here
        yield stale
        return
    index = _IndexReading(store, view)
    records = index.records() if view.shards is None else receipt_records(store, view, view.shards)
    found: list[Finding] = []

    def objects() -> Iterator[StoredObject]:
        for shard, record in records:
            on_checked("shards", 1)
            if isinstance(record, Finding):
                found.append(record)
            else:
                yield from stored_objects(view.plan, view.first_row, shard, record)

    def check(stored: StoredObject) -> Fault | None:
        return check_object(store, view.plan, stored, quick)

    for stored, fault in map_windowed(check, objects(), _workers(view.plan)):
        on_checked("rows_files" if stored.tap_object is None else "objects", 1)
        if fault is not None:
            yield fault
    yield from found
    yield from index.findings(bool(found))


def map_windowed(
    work: Callable[[StoredObject], Fault | None], tasks: Iterable[StoredObject], workers: int
) -> Iterator[tuple[StoredObject, Fault | None]]:
    """Yield each task with its result, in order; at most `workers` run and as many wait."""
    waiting: deque[tuple[StoredObject, Future[Fault | None]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(work, task)))
                if len(waiting) == 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:  # after a failure: what runs is awaited by the pool
                future.cancel()


def _workers(plan: Plan) -> int:
    parts = [part for tap in plan.taps for part in tap.parts]
    largest = max(
        (plan.shard_rows * part.slots_per_object * plan.rows.row_tokens * part.width * ITEM_BYTES[part.dtype])
        for part in parts
    )
    return max(1, min(WORKERS, os.cpu_count() or 1, MEMORY_BYTES // (COPIES * largest)))


@dataclass
class _IndexReading:
    """index.bin, read once from start to end."""

    store: Store
    view: SegmentView
    length: int = 0
    digest: Any = field(default_factory=xxhash.xxh3_128)

    @property
    def key(self) -> str:
        return self.view.key("index.bin")

    def records(self) -> Iterator[tuple[int, Any]]:
        """Every shard with its record, or with the finding that it is lost."""
        plan, size = self.view.plan, record_dtype(self.view.plan).itemsize
        step = max(1, INDEX_READ_BYTES // size)
        whole = self.store.length_is(self.key, plan.num_shards * size)
        rest = b"" if whole else self.store.read(self.key) or b""  # of another length: all of it tells how much is left
        for first in range(0, plan.num_shards, step):
            last = min(first + step, plan.num_shards)
            span = slice(first * size, last * size)
            data = (self.store.read(self.key, span) or b"") if whole else rest[span]
            self._add(data)
            for shard in range(first, last):
                part = data[(shard - first) * size : (shard - first + 1) * size]
                yield shard, self._record(shard, part)
        self._add(rest[plan.num_shards * size :])

    def findings(self, explained: bool) -> Iterator[Finding]:
        """Yield the faults of the whole file, unless damaged records already explain them."""
        entry, view = self.view.entry, self.view
        if view.shards is not None or entry is None or explained or self.digest.hexdigest() == entry.index_digest:
            return
        longer = self.length > entry.index_length
        detail = "every record is whole, but together they are not what the manifest names: no object can be checked"
        if longer:
            detail = f"{counted(self.length, 'byte')}, {entry.index_length:,} were committed"
        yield Finding(
            what="damaged" if longer else "stale",
            object=self.key,
            detail=detail,
            segment=view.plan.segment,
            rows=view.rows,
        )

    def _add(self, data: bytes) -> None:
        self.length += len(data)
        self.digest.update(data)

    def _record(self, shard: int, data: bytes) -> Any:
        plan, view = self.view.plan, self.view
        try:
            return decode_record(plan, data, self.store.where(self.key), shard)
        except DamageError as error:
            size = record_dtype(plan).itemsize
            what: What = "damaged" if len(data) == size else "truncated" if self.length else "missing"
            start, stop = plan.shard_range(shard)
            problem = error.what if self.length else "the index is gone or empty"
            return Finding(
                what=what,
                object=self.key,
                detail=f"{problem}: the shard's objects cannot be checked or read",
                segment=plan.segment,
                shard=shard,
                rows=(view.first_row + start, view.first_row + stop),
            )


def _stale_index(store: Store, view: SegmentView) -> Finding | None:
    """The finding that every record of a finished segment's index is whole, but of another build."""
    index = _IndexReading(store, view)
    if view.entry is None or any(isinstance(record, Finding) for _, record in index.records()):
        return None
    return next((found for found in index.findings(explained=False) if found.what == "stale"), None)


def receipt_records(store: Store, view: SegmentView, shards: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Every committed shard with its receipt as a record, or with the finding that the receipt is damaged."""
    plan = view.plan
    for shard in sorted(shards):
        key = layout.receipt_key(plan.segment, shard)
        start, stop = plan.shard_range(shard)
        finding = Finding(
            what="damaged",
            object=key,
            detail="a receipt is not what was committed",
            segment=plan.segment,
            shard=shard,
            rows=(view.first_row + start, view.first_row + stop),
        )
        try:
            receipt = read_receipt(store, plan, shard)
        except DamageError as error:
            whole = {"what": "stale", "detail": f"of another shard or another plan: {told_in_a_line(error)}"}
            yield shard, finding.model_copy(update=whole if "field" in error.facts else {"detail": error.what})
            continue
        lost = finding.model_copy(update={"what": "missing", "detail": "it vanished while the cache was checked"})
        yield shard, lost if receipt is None else receipt_record(plan, receipt)


def _name_swapped(survey: Survey, altered: list[Fault]) -> Iterator[Finding]:
    """The findings about objects of another content: swapped, where the content is another object's of this cache."""
    wanted = {fault.found_digest for fault in altered}
    owners: dict[str, str] = {}
    for view in survey.segments if wanted else ():
        records = (
            _IndexReading(survey.store, view).records()
            if view.shards is None
            else receipt_records(survey.store, view, view.shards)
        )
        for shard, record in records:
            if isinstance(record, np.void):
                for stored in stored_objects(view.plan, view.first_row, shard, record):
                    if stored.digest in wanted:
                        owners.setdefault(stored.digest, stored.key)
    for fault in altered:
        owner = owners.get(fault.found_digest)
        detail = {"what": "swapped", "detail": f"it holds what belongs to {owner}"} if owner else {}
        yield fault.finding.model_copy(update=detail)
