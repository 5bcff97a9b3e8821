"""Repair of a damaged segment, with numbers from the teacher (from_teacher.py) or from a copy's source.

The manifest stays true throughout: readers find the committed bytes or an error. Every write asks first whether the
manifest still lists the segment as it was checked, and writes nothing over equal bytes. What is made again is written
only where it agrees with the digests that were committed. A shard whose index record is lost leaves a receipt, and
every shard does if stats.json is lost (it is a sum over all of them); so an interrupted repair goes on. The index and
the statistics are written last, each at once.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from distillcache.cache_builder.record.finish import total_stats
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.work_units import Batches, RowSource, WorkUnits, unit_batches
from distillcache.cache_builder.record.writer import ShardBuffer, encode_shard
from distillcache.cache_builder.repair.check import receipt_records
from distillcache.cache_builder.repair.check_shard import check_object, stored_objects
from distillcache.cache_builder.repair.finding import Finding
from distillcache.cache_builder.repair.survey import SegmentView
from distillcache.models.describe import describe_numerics
from distillcache.schemas.cache.segment import read_manifest, read_receipt, segment_number
from distillcache.schemas.errors import DamageError, DistillcacheError, FolderTakenError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import encode_record, record_dtype
from distillcache.schemas.format.manifest import Manifest, NumericsPlan, Plan, SegmentEntry, ShardReceipt, Stats
from distillcache.schemas.format.rows import Row
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store


@dataclass(frozen=True)
class Damage:
    """The damage of a finished segment, grouped by the repair that it needs.

    store: raises where the segment is another's by now (`check_listed`).
    keys: the damaged objects. shards: those whose objects, rows or index records are damaged.
    unindexed: shards whose index records are lost, all where the index is another one's. stats: whether stats.json is.
    """

    store: Store
    view: SegmentView
    entry: SegmentEntry
    manifest: Manifest
    keys: frozenset[str]
    shards: frozenset[int]
    unindexed: frozenset[int]
    stats: bool

    @classmethod
    def of(
        cls, store: Store, view: SegmentView, entry: SegmentEntry, manifest: Manifest, findings: Sequence[Finding]
    ) -> "Damage":
        """Select the findings about this segment; the first segment also answers for the tokenizer."""
        first = segment_number(view.plan.segment) == 0
        mine = [
            finding
            for finding in findings
            if finding.what != "foreign"
            and (finding.segment == view.plan.segment or (first and finding.object == layout.TOKENIZER))
        ]
        index = [finding for finding in mine if finding.object == view.key("index.bin")]
        unindexed = frozenset(finding.shard for finding in index if finding.shard is not None)
        if any(finding.what == "stale" for finding in index):
            unindexed = frozenset(range(view.plan.num_shards))
        return cls(
            store.guarded(lambda: check_listed(store, entry, manifest.tokenizer_digest)),
            view,
            entry,
            manifest,
            keys=frozenset(finding.object for finding in mine),
            shards=frozenset(finding.shard for finding in mine if finding.shard is not None),
            unindexed=unindexed,
            stats=any(finding.object == view.key("stats.json") for finding in mine),
        )

    @property
    def plan(self) -> Plan:
        return self.view.plan

    @property
    def needing_receipts(self) -> frozenset[int]:
        """Shards of which more must be known than their index records say."""
        return frozenset(range(self.plan.num_shards)) if self.stats else self.unindexed

    def lost_rows(self, shards: Set[int]) -> set[int]:
        """Select the shards whose own rows are damaged or may be."""
        lost = {shard for shard in shards if layout.rows_key(self.plan.segment, shard) in self.keys}
        return lost | (self.unindexed & shards)

    def committed_record(self, shard: int) -> bytes:
        """The index record of a shard that has one."""
        size = record_dtype(self.plan).itemsize
        return self.store.read(self.view.key("index.bin"), slice(shard * size, (shard + 1) * size)) or b""

    def receipt(self, shard: int) -> ShardReceipt:
        """The receipt that this or an earlier repair left."""
        receipt = read_receipt(self.store, self.plan, shard)
        if receipt is None:
            where = self.store.where(layout.receipt_key(self.plan.segment, shard))
            raise DamageError("the receipt of a repaired shard is missing", {"file": where}, "repair once more")
        return receipt


def check_listed(store: Store, entry: SegmentEntry, tokenizer_digest: str) -> None:
    """Raise `FolderTakenError` unless the manifest lists the segment as it did when it was checked.

    So a repair that was paused while its cache was deleted, or rebuilt with another plan, writes nothing there.
    """
    now = read_manifest(store)
    if now is not None and entry in now.segments and now.tokenizer_digest == tokenizer_digest:
        return
    raise FolderTakenError(
        "the cache under repair was deleted or rebuilt while the repair ran or was paused",
        {"cache": store.url, "segment": entry.segment},
        "nothing more was written; run the command again to repair what is there now",
    )


class Maker(Protocol):
    """Recomputes the content of a segment."""

    def fixed_files(self) -> Mapping[str, bytes]:
        """Return the files that do not depend on the rows, by key."""
        ...

    def rows(self, shards: Set[int]) -> RowSource:
        """Return the source of these shards' rows."""
        ...

    def run(self, job: WorkUnits, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
        """Hand the codes of all these batches to the writer."""
        ...


def mend_segment(damage: Damage, maker: Maker, stop: StopRequest, max_bytes: int) -> None:
    """Everything that is damaged in one finished segment, from the smallest to the index.

    Args:
        max_bytes: made and not yet stored, at most.

    Raises:
        PlanMismatchError: what is made now is not what was committed; the cache is another one by now.
        Interrupted: SIGTERM or SIGINT; doing the same again goes on.
    """
    try:
        _mend(damage, maker, stop, max_bytes)
    except DistillcacheError:
        damage.store.check_may_write()  # a cache that is replaced meanwhile fails in many ways: this is why
        raise


def _mend(damage: Damage, maker: Maker, stop: StopRequest, max_bytes: int) -> None:
    """`mend_segment`, whose errors may have the reason that the cache is another one by now."""
    _restore_fixed_files(damage, maker)
    shards = damage.shards | damage.needing_receipts
    shards -= {shard for shard in damage.needing_receipts if _is_repaired(damage, shard)}
    if shards:
        _make_again(damage, maker, shards, stop, max_bytes)
    _restore_index(damage)
    _restore_stats(damage)
    times = layout.times_key(damage.plan.segment)
    if times in damage.keys:  # nobody can tell now how long the shards took
        damage.store.delete(times)


def _restore_fixed_files(damage: Damage, maker: Maker) -> None:
    prefix = layout.segment_prefix(damage.plan.segment) + "/"
    digests = {prefix + name: digest for name, digest in damage.entry.files.items()}
    digests[layout.TOKENIZER] = damage.manifest.tokenizer_digest
    made_again = damage.keys & {layout.TOKENIZER, *digests} - {damage.view.key("stats.json")}
    for key, value in maker.fixed_files().items() if made_again else ():
        if key in made_again:
            _require_same(damage, key, digest_bytes(value) == digests[key])
            damage.store.put_once(key, value)


def _is_repaired(damage: Damage, shard: int) -> bool:
    """Return whether an interrupted repair has left this shard's receipt, and its objects are what the receipt says."""
    store, view = damage.store, damage.view
    if store.read(layout.receipt_key(view.plan.segment, shard)) is None:
        return False
    _, record = next(receipt_records(store, view, [shard]))
    if isinstance(record, Finding):
        return False
    stored = stored_objects(view.plan, view.first_row, shard, record)
    return all(check_object(store, view.plan, one, quick=False) is None for one in stored)


def _make_again(damage: Damage, maker: Maker, shards: Set[int], stop: StopRequest, max_bytes: int) -> None:
    """Go over the whole work units that hold these shards, and put back what is damaged of them."""
    plan = damage.plan

    def commit(store: Store, buffer: ShardBuffer, numerics: NumericsPlan | None) -> None:
        if buffer.shard in shards:
            _put_back(damage, buffer)

    units, touched = units_of(plan, shards)
    job = WorkUnits(store=damage.store, plan=plan, rows=maker.rows(touched), stop=stop)
    writer = ShardWriter(
        damage.store, plan, max_bytes=max_bytes, numerics=None, on_commit=lambda shard: None, commit=commit
    )

    def batches() -> Iterator[tuple[int, list[Row]]]:
        for unit in units:
            yield from unit_batches(job, writer, unit)

    tokens = sum(stop - start for start, stop in map(plan.shard_range, touched)) * plan.rows.row_tokens
    with Progress("repair", tokens, unit="tokens") as bar:
        try:
            maker.run(job, batches(), writer, bar)
        finally:
            writer.close()


def units_of(plan: Plan, shards: Set[int]) -> tuple[list[int], set[int]]:
    """The work units that hold these shards, and all shards of those work units."""
    units = sorted(set(map(plan.unit_of, shards)))
    return units, {shard for unit in units for shard in plan.shards_of(unit)}


def _put_back(damage: Damage, buffer: ShardBuffer) -> None:
    """Write the damaged objects of a shard, once all of it is known to be what was committed.

    Where the index record is lost nothing tells which objects are damaged, so all are written: nobody can read the
    shard before the index is back, and that is compared with the manifest.
    """
    store, plan, shard = damage.store, damage.plan, buffer.shard
    receipt = encode_shard(buffer, lambda key, data: None)
    unindexed = shard in damage.unindexed
    if not unindexed:
        same = encode_record(plan, receipt) == damage.committed_record(shard)
        _require_same(damage, f"shard {shard}", same)

    def put(key: str, data: bytes) -> None:
        if unindexed or key in damage.keys:
            store.put_once(key, data)  # another repairer may have been there meanwhile

    encode_shard(buffer, put)
    if shard in damage.needing_receipts:
        store.write(layout.receipt_key(plan.segment, shard), to_canonical(receipt))


def _restore_index(damage: Damage) -> None:
    key = damage.view.key("index.bin")
    if key not in damage.keys:
        return
    index = b"".join(
        encode_record(damage.plan, damage.receipt(shard))
        if shard in damage.unindexed
        else damage.committed_record(shard)
        for shard in range(damage.plan.num_shards)
    )
    _require_same(damage, key, digest_bytes(index) == damage.entry.index_digest)
    damage.store.put_once(key, index)


def _restore_stats(damage: Damage) -> None:
    if not damage.stats:
        return
    key = damage.view.key("stats.json")
    receipts = [damage.receipt(shard) for shard in range(damage.plan.num_shards)]
    stats = to_canonical(Stats(taps=total_stats(receipts)))
    _require_same(damage, key, digest_bytes(stats) == damage.entry.files["stats.json"])
    damage.store.put_once(key, stats)


def _require_same(damage: Damage, what: str, same: bool) -> None:
    """Raise unless what was made again is what was committed."""
    if same:
        return
    then = damage.plan.recoded_on or damage.plan.numerics
    now = describe_numerics(then.dtype, damage.plan.taps, attention=then.attention)
    raise PlanMismatchError(
        "the recomputed bytes are not what was committed",
        {
            "cache": damage.store.url,
            "segment": damage.plan.segment,
            "what": what,
            "made on": f"{then.platform}, {then.versions}",
            "this is": f"{now.platform}, {now.versions}",
        },
        "repair it on the platform and with the library versions that made it, or build another cache",
    )
