"""Reading one segment of a cache: its plan, its arrays, its index records, its rows."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import tensorstore as ts
import xxhash

from distillcache.schemas.cache.agreement import (
    check_entry,
    check_manifest,
    check_plan,
    check_receipt,
    check_signs,
    check_together,
    side_arrays,
)
from distillcache.schemas.cache.lost_plan import step_for_file, step_without_plan
from distillcache.schemas.cache.unfinished import step_to_finish
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import MEND_NEXT, DamageError, FolderTakenError, InputError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import from_canonical, read_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import check_index, decode_record, encode_record, record_dtype
from distillcache.schemas.format.manifest import Manifest, PartPlan, Plan, SegmentEntry, ShardReceipt
from distillcache.schemas.format.rows import Row, decode_row, unpack_rows
from distillcache.schemas.format.run import IDENTITY
from distillcache.schemas.format.tap_codec import Signs
from distillcache.schemas.store.single_flight import Remembered
from distillcache.schemas.store.store import Store

RECORDS_KEPT = 256  # shards' index records and rows held in memory: some 50 MB, and the rows of 256 GB of taps

DAMAGE_NEXT = "run `distillcache verify` on the cache to see how much is damaged"
INDEX_BYTES = 8 << 20  # an index up to this length is read whole, and compared with the manifest; of others, records

NAME_DIGITS = 16  # of the plan's digest, in a segment's name
_PLAN_KEY = re.compile(r"segments/(\d{4,8}(?:-[0-9a-f]{16})?)/plan\.json$")

Value = TypeVar("Value")


class SmallFiles(Protocol):
    """A nearby copy of a segment's small files. The segment checks whatever it returns."""

    def get(self, name: str) -> bytes | None:
        """The bytes of this name, if they are kept."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Keep them, if that can be."""
        ...

    def drop(self, name: str) -> None:
        """They are damaged."""
        ...


class Segment:
    """One finished or unfinished segment. Reads are checked: damaged bytes raise `DamageError`, never come back."""

    def __init__(self, store: Store, plan: Plan, entry: SegmentEntry | None) -> None:
        """`entry`: the manifest's line of a finished segment; None while it is being built (receipts are read)."""
        self.store, self.plan, self.entry = store, plan, entry
        self.committed = None if entry is not None else frozenset(committed_shards(store, plan))  # None: all shards
        self.kept: SmallFiles | None = None  # a reader may set it
        self._prefix = layout.segment_prefix(plan.segment)
        self._whole_index, self._index = False, b""
        self._inside: set[str] = set()  # objects that no link leads to from elsewhere
        self._records: Remembered[int, Any] = Remembered(RECORDS_KEPT)
        self._rows: Remembered[int, list[bytes]] = Remembered(RECORDS_KEPT)

    def open_array(self, part: PartPlan, context: ts.Context | None = None) -> ts.TensorStore:
        """The zarr array `[N, slots, T, width]`, for reading; its metadata comes from the plan, not the disk."""
        self.store.check_inside(layout.array_folder(self.plan.segment, part.array))
        spec = layout.array_spec(
            self.store.spec(layout.array_folder(self.plan.segment, part.array)), part_metadata(self.plan, part)
        )
        context = context or self.store.context()
        return ts.open(spec, read=True, open=True, assume_metadata=True, context=context).result()

    def check_objects_inside(self, array: str, shard: int, groups: Iterable[int]) -> None:
        """Raise where a link leads from these objects of an array out of the cache; each is looked at once.

        Args:
            groups: the numbers of the objects in the shard.
        """
        for group in groups:
            key = layout.object_key(self.plan.segment, array, shard, group)
            if key not in self._inside:
                self.store.check_readable(key)
                self._inside.add(key)

    def check_row_inside(self, part: PartPlan, row: int) -> None:
        """`check_objects_inside` of all objects that hold a row: before it is read through `open_array`."""
        if self.store.local is not None:
            groups = range(len(part.object_ranges()))
            self.check_objects_inside(part.array, row // self.plan.shard_rows, groups)

    def signs(self) -> Signs:
        """The sign vectors of the rotated taps, out of the segment's side file."""
        return {name: value for name, value in self.side().items() if name.startswith("signs.")}

    def side(self) -> dict[str, np.ndarray]:
        """The arrays of the segment's side file."""
        where = self.store.where(f"{self._prefix}/side.safetensors")
        found = side_arrays(self.plan, self.small_file("side.safetensors"), where)
        if self.entry is None:  # no digest says whether it is this plan's, but its writer made it like this
            check_signs(self.plan, found, where)
        return found

    def small_file(self, name: str) -> bytes:
        """A file of the segment, checked against the manifest where the segment is finished.

        Raises:
            DamageError: it is missing, or is not what was committed.
        """
        digest = None if self.entry is None else self.entry.files.get(name, "")
        return read_small_file(self.store, f"{self._prefix}/{name}", digest)

    def record(self, shard: int) -> Any:
        """The index record of a shard (a NumPy record of `index.record_dtype`)."""
        return self._records.get(shard, lambda: self._read_record(shard))

    def row(self, index: int) -> Row:
        """One row, by its number in this segment, checked against its shard's digest."""
        shard, place = divmod(index, self.plan.shard_rows)
        where = self.store.where(layout.rows_key(self.plan.segment, shard))
        row = decode_row(self._rows.get(shard, lambda: self._read_rows(shard))[place], where)
        if len(row.tokens) != self.plan.rows.row_tokens:
            facts = {"file": where, "row": index, "found": counted(len(row.tokens), "token")}
            expected = f"{self.plan.rows.row_tokens:,} tokens, as the plan says"
            raise DamageError("a row has another length", {**facts, "expected": expected}, MEND_NEXT)
        return row

    @property
    def identity(self) -> str:
        """The identity of the segment's content: the digest of all its digests; of an unfinished segment, that of
        its plan.
        """
        if self.entry is not None:
            return self.entry.index_digest
        return digest_bytes(self.plan.model_dump_json(exclude={"created"}).encode())

    def chunk_digests(self, array: str, row: int) -> list[int]:
        """The xxh3-64 of a row's inner chunks, by stored slot."""
        shard, place = divmod(row, self.plan.shard_rows)
        return self.record(shard)[f"{array}/chunks"][place].tolist()

    def chunk_damage(self, array: str, row: int, slot: int) -> DamageError:
        """The error to raise where the codes `[T, width]` of (row, stored slot) have another digest."""
        shard = row // self.plan.shard_rows
        (part,) = (part for tap in self.plan.taps for part in tap.parts if part.array == array)
        key = layout.object_key(self.plan.segment, array, shard, slot // part.slots_per_object)
        return DamageError(
            "stored activations are not what was committed",
            {"file": self.store.where(key), "array": array, "shard": shard, "row": row, "slot": slot},
            DAMAGE_NEXT,
        )

    def _read_record(self, shard: int) -> Any:
        size = record_dtype(self.plan).itemsize
        receipt = self._read_receipt(shard) if self.entry is None else None
        if receipt is not None:
            return receipt_record(self.plan, receipt)
        key = f"{self._prefix}/index.bin"
        where = self.store.where(key)

        def read() -> bytes:
            self._whole_index = self._whole_index or self.store.length_is(key, self.plan.num_shards * size)
            self._index = self._index or self._checked_index(key, self.plan.num_shards * size)
            if self._index:
                return self._index[shard * size : (shard + 1) * size]
            return self._read_range(key, shard * size, (shard + 1) * size) if self._whole_index else b""

        return self._checked(f"index/{shard}", read, lambda data: decode_record(self.plan, data, where, shard))

    def _checked_index(self, key: str, length: int) -> bytes:
        """All of the index, where it is short and what was committed; else nothing, and its records are read alone.

        Raises:
            DamageError: it is another build's. Of a long index nobody asks that: objects and rows that differ from
                such records are refused one by one.
        """
        if self.entry is None or length > INDEX_BYTES or not self._whole_index:
            return b""
        data = self.store.read(key) or b""
        return data if check_index(self.plan, data, self.entry.index_digest, self.store.where(key)) else b""

    def _checked(self, name: str, read: Callable[[], bytes], check: Callable[[bytes], Value]) -> Value:
        """Return the result of `check` on the kept bytes of this name, or on newly read ones, which are then kept.

        Raises:
            DamageError: from `check`, each time.
        """
        near = None if self.kept is None else self.kept.get(name)
        if near is not None and self.kept is not None:
            try:
                return check(near)
            except DamageError:
                self.kept.drop(name)
        value, data = self.store.checked(read, lambda data: (check(data), data))
        if self.kept is not None:
            self.kept.put(name, data)
        return value

    def _read_receipt(self, shard: int) -> ShardReceipt | None:
        receipt = read_receipt(self.store, self.plan, shard)
        if receipt is None and self.committed is not None and shard in self.committed:
            return None  # the build was finished meanwhile: the index holds it
        if receipt is None:
            raise InputError(
                "this shard is not committed yet",
                {"cache": self.store.url, "shard": shard},
                step_to_finish(self.store, self.plan),
            )
        return receipt

    def _read_rows(self, shard: int) -> list[bytes]:
        key, record = layout.rows_key(self.plan.segment, shard), self.record(shard)
        start, stop = self.plan.shard_range(shard)

        def check(data: bytes) -> list[bytes]:
            if digest_bytes(data) != bytes(record["rows_digest"]).hex():
                raise DamageError(
                    "a file of rows is missing or damaged" if data else "a file of rows is missing",
                    {"file": self.store.where(key), "shard": shard},
                    DAMAGE_NEXT,
                )
            return unpack_rows(data, stop - start)

        def read() -> bytes:
            # A bucket answers a range with one request; of a whole value, the length is requested as well.
            far, length = self.store.is_bucket, int(record["rows_length"])
            return self._read_range(key, 0, length) if far else self.store.read(key) or b""

        return self._checked(f"rows/{shard}", read, check)

    def _read_range(self, key: str, start: int, stop: int) -> bytes:
        """A range of a file; nothing where there is no file, or too short a one."""
        return self.store.read_range(key, start, stop)[0] or b""


def read_receipt(store: Store, plan: Plan, shard: int) -> ShardReceipt | None:
    """The receipt of a shard; None where there is none.

    Raises:
        DamageError: it is damaged, or another shard's or plan's.
    """
    key = layout.receipt_key(plan.segment, shard)
    where, next = store.where(key), f"{DAMAGE_NEXT}; `distillcache build --repair` removes it, and the build continues"

    def check(data: bytes) -> ShardReceipt:
        return check_receipt(plan, shard, from_canonical(ShardReceipt, data, where, next), where)

    return store.read_checked(key, check)


def receipt_record(plan: Plan, receipt: ShardReceipt) -> Any:
    """A receipt as the index record that it will become."""
    return np.frombuffer(encode_record(plan, receipt), record_dtype(plan))[0]


def part_metadata(plan: Plan, part: PartPlan) -> dict[str, Any]:
    """The zarr3 metadata of one array of the segment."""
    shape = (plan.rows.count, part.slots, plan.rows.row_tokens, part.width)
    outer = (plan.shard_rows, part.slots_per_object)
    return layout.array_metadata(shape, part.dtype, outer, part.bits_of, part.compress)


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a cache, or None where there is none (no cache, or an unfinished one).

    Raises:
        DamageError: it is damaged, or contradicts itself.
    """
    return store.read_checked(layout.MANIFEST, lambda data: manifest_in(store, data))


def manifest_in(store: Store, data: bytes) -> Manifest:
    """The manifest in these bytes of the store.

    Raises:
        DamageError: as `read_manifest`.
    """
    where = store.where(layout.MANIFEST)
    return check_manifest(from_canonical(Manifest, data, where, MEND_NEXT), where)


def read_small_file(store: Store, key: str, digest: str | None) -> bytes:
    """The whole of a file, if it has this digest; None: nothing vouches for it yet.

    Raises:
        DamageError: it is missing, or is not what was committed.
    """

    def check(data: bytes) -> bytes:
        if digest is not None and digest_bytes(data) != digest:
            raise DamageError(
                "a file of the cache is not what was committed",
                {"file": store.where(key), "found": f"{counted(len(data), 'byte')}, digest {digest_bytes(data)}"}
                | {"expected": f"digest {digest or 'absent: the manifest does not name this file'}"},
                step_for_file(store, key, MEND_NEXT),
            )
        return data

    data = store.read_checked(key, check)
    if data is None:
        step = step_for_file(store, key, MEND_NEXT)
        raise DamageError("a file of the cache is missing", {"file": store.where(key)}, step)
    return data


def read_tokenizer(store: Store) -> bytes:
    """The cache's tokenizer.json, checked against the manifest where there is one.

    Raises:
        DamageError: it is missing, or is not what was committed.
    """
    manifest = read_manifest(store)
    return read_small_file(store, layout.TOKENIZER, None if manifest is None else manifest.tokenizer_digest)


def small_file_damage(
    store: Store, entries: Sequence[SegmentEntry], tokenizer_digest: str, *, indexes: bool = True
) -> Iterator[DamageError]:
    """Yield one error for each damaged file beside rows and taps.

    Args:
        indexes: read the whole indexes, too.
    """
    files = {layout.TOKENIZER: tokenizer_digest}
    for entry in entries:
        prefix = layout.segment_prefix(entry.segment)
        files |= {f"{prefix}/{name}": digest for name, digest in entry.files.items()}
        damage = _index_damage(store, f"{prefix}/index.bin", entry) if indexes else None
        yield from [damage] if damage else []
    for key, digest in files.items():
        try:
            read_small_file(store, key, digest)
        except DamageError as error:
            yield error


def _index_damage(store: Store, key: str, entry: SegmentEntry) -> DamageError | None:
    """Check the index of a finished segment as a whole, a stretch at a time."""
    facts = {"file": store.where(key)}
    if not store.length_is(key, entry.index_length):
        return DamageError("the index of a segment is missing or truncated", facts, MEND_NEXT)
    digest = xxhash.xxh3_128()
    for start in range(0, entry.index_length, INDEX_BYTES):
        digest.update(store.read(key, slice(start, min(start + INDEX_BYTES, entry.index_length))) or b"")
    if digest.hexdigest() == entry.index_digest:
        return None
    found = {"found": f"digest {digest.hexdigest()}", "expected": f"digest {entry.index_digest}"}
    return DamageError("the index of a segment is not what was committed", {**facts, **found}, MEND_NEXT)


def read_plan(store: Store, segment: str) -> Plan | None:
    """The plan of a segment, or None if it was not started.

    Raises:
        DamageError: it is damaged, or another segment's.
    """
    key = layout.plan_key(segment)
    try:
        plan = read_canonical(store, key, Plan)
    except DamageError as error:
        raise DamageError(error.what, error.facts, step_without_plan(store, segment)) from error
    if plan is not None and plan.segment != segment:
        raise DamageError(
            "a plan is in another segment's folder",
            {"object": store.where(key), "found": plan.segment, "expected": segment},
            step_without_plan(store, segment),
        )
    return None if plan is None else check_plan(plan, store.where(key))


def segment_names(store: Store, number: int | None = None) -> list[str]:
    """The segments, finished or not, that have a plan; sorted, so in the order of their numbers.

    Args:
        number: only those of this number. Two plans of one number are never in one folder.
    """
    names = planned_segments(store.keys("segments/" if number is None else f"segments/{number:04d}"))
    return [name for name in names if number is None or segment_number(name) == number]


def planned_segments(keys: Iterable[str]) -> list[str]:
    """The segments that have a plan among these keys of a cache, in the order of their numbers."""
    found = {match[1] for key in keys if (match := _PLAN_KEY.match(key))}
    return sorted(found, key=lambda name: (segment_number(name), name))


def begun_plan(store: Store, number: int) -> Plan | None:
    """The plan of the segment with this number, finished or not; None if none was started.

    Raises:
        InputError: there are two.
    """
    names = segment_names(store, number)
    if len(names) > 1:
        raise InputError(
            "two segments with one number were begun",
            {"cache": store.url, "found": ", ".join(names)},
            "stop their builders, then delete the unwanted one, or both: --abandon",
        )
    return read_plan(store, names[0]) if names else None


def check_plan_is_ours(store: Store, plan: Plan) -> None:
    """Raise `FolderTakenError` unless the plan still lies in the store, as it was settled."""
    key = layout.plan_key(plan.segment)
    if store.holds(key, to_canonical(plan)):
        return
    found = store.read(key)
    raise FolderTakenError(
        "this build's plan is gone: it was abandoned or deleted while the build ran or was paused",
        {"plan": store.where(key), "found": "nothing" if found is None else "another plan"},
        "nothing more was written; run the command again if the cache is still wanted",
    )


def committed_shards(store: Store, plan: Plan) -> set[int]:
    """The shards of an unfinished segment that have a receipt. Files of other names are foreign, and say nothing."""
    found = set()
    for key in store.keys(f"{layout.segment_prefix(plan.segment)}/receipts/"):
        number = key.rpartition("/")[2].removesuffix(".json")
        shard = int(number) if number.isascii() and number.isdigit() else plan.num_shards
        if shard < plan.num_shards and key == layout.receipt_key(plan.segment, shard):
            found.add(shard)
    return found


def open_cache(store: Store, *, partial: bool = False) -> list[Segment]:
    """The finished segments of a cache.

    Args:
        partial: also the segment that is being built, if any, with its committed shards.

    Raises:
        InputError: there is no finished cache here; with `partial`, none at all.
        DamageError: its manifest or a plan is damaged.
    """
    manifest = read_manifest(store)
    lost = manifest is None and is_manifest_lost(store)
    found = _open_finished(store, manifest) if manifest is not None or lost or not partial else []
    plan = begun_plan(store, len(found)) if partial else None
    if plan is None and not found:
        raise no_cache(store)
    found += [] if plan is None else [Segment(store, plan, None)]
    check_together([segment.plan for segment in found], store.url)
    return found


def is_manifest_lost(store: Store) -> bool:
    """Return whether a cache without a manifest was finished once: receipts are deleted after the manifest is
    written, the index is not.
    """
    prefix = layout.segment_prefix(segment_name(0))
    left = f"{prefix}/index.bin" in store.keys(f"{prefix}/index.bin") and not store.keys(f"{prefix}/receipts/")
    return left and read_manifest(store) is None  # asked last: a build may have been finished meanwhile


def lost_manifest(store: Store) -> DamageError:
    """The error where `is_manifest_lost`."""
    return DamageError("the manifest of a finished cache is missing", {"file": store.where(layout.MANIFEST)}, MEND_NEXT)


def no_cache(store: Store) -> InputError | DamageError:
    """The error where no segment has a plan."""
    if any("/receipts/" in key or key.endswith("/index.bin") for key in store.keys("segments/")):
        return DamageError(
            "the plan of a cache is missing",
            {"file": store.where(layout.plan_key(segment_name(0)))},
            step_without_plan(store, segment_name(0)),
        )
    return InputError("there is no cache here", {"cache": store.url}, look_again(store))


def look_again(store: Store) -> str:
    """Return advice for a missing cache: to a reader, a missing bucket looks like an empty one."""
    if store.read(IDENTITY) is not None:
        return "this is a run of `distillcache train`, which `report`, `serve` and `diff` look at; name its cache here"
    place = "the path and the bucket's name" if store.is_bucket else "the path"
    return f"check {place}, or build it first"


def segment_name(number: int) -> str:
    """Segments are numbered in the order in which they are added. So were they called before plans named them, too."""
    return f"{number:04d}"


def segment_number(segment: str) -> int:
    """The number in a segment's name."""
    return int(segment.partition("-")[0])


def named_by_plan(plan: Plan) -> Plan:
    """The plan with its segment called by its number and, but for the first, by all that its bytes depend on.

    So two extensions never write to one path, whatever was paused or abandoned meanwhile. The first segment's folder
    can only be lost with the whole cache; what is written there depends on the generation of what it replaces.
    """
    number = segment_number(plan.segment)
    if number == 0:
        return plan
    facts = plan.model_dump(mode="json", exclude={"segment", "config", "created"})
    del facts["teacher"]["path"]  # the weights count, wherever they lie
    facts["teacher"].pop("context", None)  # follows from them
    digest = digest_bytes(json.dumps(facts, sort_keys=True).encode())
    return plan.model_copy(update={"segment": f"{segment_name(number)}-{digest[:NAME_DIGITS]}"})


def _open_finished(store: Store, manifest: Manifest | None) -> list[Segment]:
    if manifest is None:
        unfinished = bool(segment_names(store, 0))
        if unfinished and is_manifest_lost(store):
            raise lost_manifest(store)
        if not unfinished:
            raise no_cache(store)
        facts = {"cache": store.url, "missing": layout.MANIFEST}
        plan = begun_plan(store, 0)
        step = "run the same `distillcache build` again" if plan is None else step_to_finish(store, plan)
        raise InputError("the cache is not finished", facts, step)
    segments = []
    for entry in manifest.segments:
        plan = read_plan(store, entry.segment)
        if plan is None or digest_bytes(to_canonical(plan)) != entry.files.get("plan.json"):
            raise DamageError(
                "the plan of a segment is missing or is not the one that the manifest names",
                {"file": store.where(layout.plan_key(entry.segment))},
                step_without_plan(store, entry.segment),
            )
        check_entry(plan, entry, record_dtype(plan).itemsize, store.where(layout.MANIFEST))
        segments.append(Segment(store, plan, entry))
    return segments
