"""Reading one segment of a cache: its plan, its arrays, its index records, its rows."""

from collections import OrderedDict
from typing import Any

import numpy as np
import safetensors.numpy
import tensorstore as ts

from schemas import layout
from schemas.canonical import from_canonical
from schemas.digest import digest_bytes
from schemas.errors import DamageError, InputError
from schemas.index import decode_record, encode_record, record_dtype
from schemas.manifest import Manifest, PartPlan, Plan, SegmentEntry, ShardReceipt, TapPlan
from schemas.rows import Row, decode_row, unpack_rows
from schemas.storage import Store
from schemas.tap_codec import Signs

RECORDS_KEPT = 256  # shards' index records and rows held in memory: some 50 MB, and the rows of 256 GB of taps

DAMAGE_NEXT = "run `distillcache verify` on the cache to see how much is damaged"


class Segment:
    """One finished or unfinished segment. Reads are checked: damaged bytes raise `DamageError`, never come back."""

    def __init__(self, store: Store, plan: Plan, entry: SegmentEntry | None) -> None:
        """`entry`: the manifest's line of a finished segment; None while it is being built (receipts are read)."""
        self.store, self.plan, self.entry = store, plan, entry
        self.committed = None if entry is not None else frozenset(committed_shards(store, plan))  # None: all shards
        self._prefix = layout.segment_prefix(plan.segment)
        self._records: OrderedDict[int, Any] = OrderedDict()
        self._rows: OrderedDict[int, list[bytes]] = OrderedDict()

    def tap(self, name: str) -> TapPlan:
        """The plan of a tap, by name."""
        for tap in self.plan.taps:
            if tap.name == name:
                return tap
        found = ", ".join(tap.name for tap in self.plan.taps)
        raise InputError(
            "the cache does not hold this tap",
            {"cache": self.store.url, "wanted": name, "found": found},
            f"build a cache with taps.{name}",
        )

    def open_array(self, part: PartPlan, context: ts.Context | None = None) -> ts.TensorStore:
        """The zarr array `[N, slots, T, width]`, for reading; its metadata comes from the plan, not the disk."""
        spec = layout.array_spec(
            self.store.spec(layout.array_folder(self.plan.segment, part.array)), part_metadata(self.plan, part)
        )
        return ts.open(spec, read=True, open=True, assume_metadata=True, context=context).result()

    def signs(self) -> Signs:
        """The sign vectors of the rotated taps, out of the segment's side file."""
        return {name: value for name, value in self.side().items() if name.startswith("signs.")}

    def side(self) -> dict[str, np.ndarray]:
        """The arrays of the segment's side file."""
        key = f"{self._prefix}/side.safetensors"
        data = self.store.read(key)
        if data is None or (self.entry is not None and digest_bytes(data) != self.entry.files["side.safetensors"]):
            raise DamageError(
                "the side file of a segment is missing or damaged", {"file": self.store.where(key)}, DAMAGE_NEXT
            )
        return safetensors.numpy.load(data)

    def record(self, shard: int) -> Any:
        """The index record of a shard (a NumPy record of `index.record_dtype`)."""
        found = self._records.get(shard)
        if found is None:
            # Another thread may drop or add entries meanwhile: at worst a record is read twice.
            found = self._records[shard] = self._read_record(shard)
            if len(self._records) > RECORDS_KEPT:
                self._records.popitem(last=False)
        return found

    def row(self, index: int) -> Row:
        """One row, by its number in this segment, checked against its shard's digest."""
        shard, place = divmod(index, self.plan.shard_rows)
        found = self._rows.get(shard)
        if found is None:
            found = self._rows[shard] = self._read_rows(shard)
            if len(self._rows) > RECORDS_KEPT:
                self._rows.popitem(last=False)
        return decode_row(found[place])

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
        whole = self.store.length_is(key, self.plan.num_shards * size)
        data = self.store.read(key, slice(shard * size, (shard + 1) * size)) if whole else None
        return decode_record(self.plan, data or b"", f"{self.store.where(key)}, shard {shard}")

    def _read_receipt(self, shard: int) -> ShardReceipt | None:
        key = layout.receipt_key(self.plan.segment, shard)
        data = self.store.read(key)
        if data is None and self.committed is not None and shard in self.committed:
            return None  # the build was finished meanwhile: the index holds it
        if data is None:
            raise InputError(
                "this shard is not committed yet",
                {"cache": self.store.url, "shard": shard},
                "finish the build: run the same `distillcache build` again",
            )
        return from_canonical(ShardReceipt, data, self.store.where(key))

    def _read_rows(self, shard: int) -> list[bytes]:
        key = layout.rows_key(self.plan.segment, shard)
        data, record = self.store.read(key), self.record(shard)
        if data is None or digest_bytes(data) != bytes(record["rows_digest"]).hex():
            raise DamageError(
                "a file of rows is missing or damaged" if data else "a file of rows is missing",
                {"file": self.store.where(key), "shard": shard},
                DAMAGE_NEXT,
            )
        start, stop = self.plan.shard_range(shard)
        return unpack_rows(data, stop - start)


def receipt_record(plan: Plan, receipt: ShardReceipt) -> Any:
    """A receipt as the index record that it will become."""
    return np.frombuffer(encode_record(plan, receipt), record_dtype(plan))[0]


def part_metadata(plan: Plan, part: PartPlan) -> dict[str, Any]:
    """The zarr3 metadata of one array of the segment."""
    shape = (plan.rows.count, part.slots, plan.rows.row_tokens, part.width)
    outer = (plan.shard_rows, part.slots_per_object)
    return layout.array_metadata(shape, part.dtype, outer, part.bits_of, part.compress)


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a cache, or None where there is none (no cache, or an unfinished one)."""
    data = store.read(layout.MANIFEST)
    return None if data is None else from_canonical(Manifest, data, store.where(layout.MANIFEST))


def read_plan(store: Store, segment: str) -> Plan | None:
    """The plan of a segment, or None where nobody has started it."""
    key = layout.plan_key(segment)
    data = store.read(key)
    return None if data is None else from_canonical(Plan, data, store.where(key))


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
    finished = _open_finished(store, manifest) if manifest is not None or not partial else []
    if not partial:
        return finished
    plan = read_plan(store, segment_name(len(finished)))
    if plan is None and not finished:
        raise InputError("there is no cache here", {"cache": store.url}, "check the path, or build it first")
    return finished if plan is None else [*finished, Segment(store, plan, None)]


def segment_name(number: int) -> str:
    """Segments are numbered in the order in which they are added."""
    return f"{number:04d}"


def _open_finished(store: Store, manifest: Manifest | None) -> list[Segment]:
    if manifest is None:
        unfinished = read_plan(store, "0000") is not None
        raise InputError(
            "the cache is not finished" if unfinished else "there is no cache here",
            {"cache": store.url, "missing": layout.MANIFEST},
            "run the same `distillcache build` again" if unfinished else "check the path, or build it first",
        )
    segments = []
    for entry in manifest.segments:
        plan = read_plan(store, entry.segment)
        if plan is None or digest_bytes(store.read(layout.plan_key(entry.segment)) or b"") != entry.files["plan.json"]:
            raise DamageError(
                "the plan of a segment is missing or is not the one that the manifest names",
                {"file": store.where(layout.plan_key(entry.segment))},
                DAMAGE_NEXT,
            )
        segments.append(Segment(store, plan, entry))
    return segments
