"""`distillcache build --repair`: compute again exactly what is damaged.

An unfinished cache loses the receipts of its damaged shards, and the build goes on: they are built like any other.

A finished one keeps its manifest, which stays true throughout: readers find the committed bytes or an
error. The teacher runs over the batches that hold damaged shards, on the cache's own rows where these are
whole. A shard whose index record is lost leaves a receipt, and every shard does if stats.json is lost (it is a sum
over all of them); so an interrupted repair goes on. The index and the statistics are written last, each at once.

The plan and the manifest alone say what was built: they cannot be computed again.
"""

import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import lru_cache

from cache_builder.build import (
    Work,
    describe_rows,
    finished_plan,
    open_or_prepare,
    record_batches,
)
from cache_builder.check import check_cache, receipt_records
from cache_builder.check_shard import check_object, stored_objects
from cache_builder.finding import Finding
from cache_builder.finish import BUILD_FOLDERS, total_stats
from cache_builder.fixed import fixed_files
from cache_builder.pieces import RowSource, piece_batches
from cache_builder.pipeline import ShardWriter
from cache_builder.plan import describe_numerics
from cache_builder.survey import SegmentView, Survey, survey_cache
from cache_builder.write import ShardBuffer, encode_shard
from models.checkpoint import load_pretrained
from models.decoder import Decoder
from models.tokenizer import TextTokenizer
from schemas import layout
from schemas.canonical import from_canonical, to_canonical
from schemas.config import BuildConfig
from schemas.digest import digest_bytes
from schemas.errors import DamageError, PlanMismatchError
from schemas.index import encode_record, record_dtype
from schemas.manifest import Manifest, NumericsPlan, Plan, SegmentEntry, ShardReceipt, Stats
from schemas.progress import Progress
from schemas.rows import Row, decode_row, unpack_rows
from schemas.signals import StopRequest, watch_for_stop
from schemas.storage import Store

FILES_KEPT = 4  # files of rows in memory: a teacher batch may span some


def repair_cache(store: Store, config: BuildConfig, tokenizer: TextTokenizer) -> None:
    """Check a cache, and make it whole, or ready for the build to go on.

    Raises:
        InputError: there is no cache here, or the text is needed and cannot be used.
        PlanMismatchError: the cache belongs to another config, or this machine computes other bits.
        DamageError: the manifest or a plan is lost.
        Interrupted: SIGTERM or SIGINT; the same command goes on.
    """
    survey = survey_cache(store)
    with Progress("verify", survey.num_objects, unit="objects") as bar:
        findings = list(check_cache(survey, on_checked=lambda what, count: _advance(bar, what, count)))
    _refuse_lost_plans(store, findings)
    for view in survey.segments:
        if view.shards is not None:
            _drop_receipts(store, view, findings)
    if survey.manifest is not None:
        plan = finished_plan(store, config, tokenizer)
        view = next(view for view in survey.segments if view.plan.segment == plan.segment)
        if view.entry is not None:
            damage = _Damage.of(store, view, view.entry, survey.manifest, findings)
            with watch_for_stop() as stop:
                _repair_segment(damage, config, tokenizer, stop)
        _tell(survey, findings, plan.segment)


def _advance(bar: Progress, what: str, count: int) -> None:
    if what in ("objects", "rows_files"):
        bar.advance(count)


def _refuse_lost_plans(store: Store, findings: list[Finding]) -> None:
    lost = [finding for finding in findings if finding.object.rpartition("/")[2] in (layout.MANIFEST, "plan.json")]
    lost = [finding for finding in lost if finding.what != "foreign"]
    if lost:
        names = " and ".join(finding.object for finding in lost)
        raise DamageError(
            "what says how the cache was built is lost, and cannot be computed again",
            {"cache": store.url, **{finding.object: f"{finding.what}: {finding.detail}" for finding in lost}},
            f"copy {names} back, or delete the cache's manifest.json, delete {names}, and build without --repair: "
            "then every shard is computed again",
        )


def _drop_receipts(store: Store, view: SegmentView, findings: list[Finding]) -> None:
    """Make damaged shards of an unfinished segment uncommitted, so that the build takes them up again."""
    plan = view.plan
    for shard in {finding.shard for finding in findings if finding.segment == plan.segment}:
        if shard is not None:
            store.delete(layout.receipt_key(plan.segment, shard))
            # Its builder may be alive and hold it as done; that would have to expire first.
            piece = shard * plan.shard_rows // max(plan.shard_rows, plan.batch_rows)
            store.delete(layout.claim_key(plan.segment, piece))


def _tell(survey: Survey, findings: list[Finding], repaired: str) -> None:
    """On standard error: what was repaired, and what is left as it is."""
    damaged = [finding for finding in findings if finding.what != "foreign" and finding.segment in (None, repaired)]
    shards = {finding.shard for finding in damaged if finding.shard is not None}
    print(f"repaired: {len(damaged)} findings, {len(shards)} shards", file=sys.stderr)
    for finding in findings:
        leftover = finding.segment is not None and finding.object.split("/")[2] in BUILD_FOLDERS
        if finding.what == "foreign" and not leftover:
            print(f"left there: {survey.store.where(finding.object)} is not the cache's", file=sys.stderr)
    entries = survey.manifest.segments if survey.manifest is not None else ()
    others = {finding.segment for finding in findings} & {entry.segment for entry in entries} - {repaired}
    for segment in sorted(others - {None}, key=str):
        print(f"left damaged: segment {segment}; repair it with the config that added it", file=sys.stderr)


@dataclass(frozen=True)
class _Damage:
    """What is wrong with a finished segment, sorted by what it takes to repair it.

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
        cls, store: Store, view: SegmentView, entry: SegmentEntry, manifest: Manifest, findings: list[Finding]
    ) -> "_Damage":
        mine = [
            finding
            for finding in findings
            if finding.what != "foreign" and finding.segment in (None, view.plan.segment)
        ]
        index = [finding for finding in mine if finding.object == view.key("index.bin")]
        unindexed = frozenset(finding.shard for finding in index if finding.shard is not None)
        if any(finding.what == "stale" for finding in index):
            unindexed = frozenset(range(view.plan.num_shards))
        return cls(
            store,
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

    def committed_record(self, shard: int) -> bytes:
        """The index record of a shard that has one."""
        size = record_dtype(self.plan).itemsize
        return self.store.read(self.view.key("index.bin"), slice(shard * size, (shard + 1) * size)) or b""

    def receipt(self, shard: int) -> ShardReceipt:
        """The receipt that this or an earlier repair left."""
        key = layout.receipt_key(self.plan.segment, shard)
        return from_canonical(ShardReceipt, self.store.read(key) or b"", self.store.where(key))


def _repair_segment(damage: _Damage, config: BuildConfig, tokenizer: TextTokenizer, stop: StopRequest) -> None:
    """Everything that is damaged in one finished segment, from the smallest to the index."""
    if not damage.keys:
        return
    damage.store.clear_stale_locks()
    decoder = load_pretrained(config.teacher.path, dtype=config.dtype)
    _restore_fixed_files(damage, decoder, tokenizer)
    shards = damage.shards | damage.needing_receipts
    shards -= {shard for shard in damage.needing_receipts if _is_repaired(damage, shard)}
    if shards:
        rows = _CacheRows(damage.store, damage.plan)
        work = Work(store=damage.store, plan=damage.plan, rows=rows, stop=stop, decoder=decoder)
        pieces = sorted({work.piece_of(shard) for shard in shards})
        work.rows = _choose_rows(damage, config, tokenizer, {s for piece in pieces for s in work.shards_of(piece)})
        _compute_again(damage, work, pieces, shards, config.max_in_flight_mib << 20)
    _restore_index(damage)
    _restore_stats(damage)


def _restore_fixed_files(damage: _Damage, decoder: Decoder, tokenizer: TextTokenizer) -> None:
    prefix = layout.segment_prefix(damage.plan.segment) + "/"
    digests = {prefix + name: digest for name, digest in damage.entry.files.items()}
    digests[layout.TOKENIZER] = damage.manifest.tokenizer_digest
    for key, value in fixed_files(damage.plan, decoder, tokenizer).items():
        if key in damage.keys:
            _require_same(damage, key, digest_bytes(value) == digests[key])
            damage.store.write(key, value)


def _is_repaired(damage: _Damage, shard: int) -> bool:
    """Whether an interrupted repair has left this shard's receipt, and its objects are what the receipt says."""
    store, view = damage.store, damage.view
    if store.read(layout.receipt_key(view.plan.segment, shard)) is None:
        return False
    _, record = next(receipt_records(store, view, [shard]))
    if isinstance(record, Finding):
        return False
    stored = stored_objects(view.plan, view.first_row, shard, record)
    return all(check_object(store, view.plan, one, quick=False) is None for one in stored)


class _CacheRows:
    """The rows in the cache's own files, which were found whole."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._file = lru_cache(FILES_KEPT)(self._load)

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1` of the segment."""
        size = self._plan.shard_rows
        return [self._file(number // size)[number % size] for number in range(start, stop)]

    def _load(self, shard: int) -> list[Row]:
        key = layout.rows_key(self._plan.segment, shard)
        start, stop = self._plan.shard_range(shard)
        records = unpack_rows(self._store.read(key) or b"", stop - start, self._store.where(key))
        return [decode_row(record, f"{self._store.where(key)} row {place}") for place, record in enumerate(records)]


def _choose_rows(damage: _Damage, config: BuildConfig, tokenizer: TextTokenizer, shards: Set[int]) -> RowSource:
    """The cache's rows if those of all these shards are whole; otherwise the text's, prepared again.

    Raises:
        PlanMismatchError: the text gives other rows now.
    """
    plan = damage.plan
    lost = {shard for shard in shards if layout.rows_key(plan.segment, shard) in damage.keys}
    if not lost | (damage.unindexed & shards):
        return _CacheRows(damage.store, plan)
    rows = open_or_prepare(damage.store, config, tokenizer)
    if describe_rows(rows) != plan.rows:
        raise PlanMismatchError(
            "rows of the cache are damaged, and the text gives other rows now",
            {
                "cache": damage.store.url,
                "rows then": f"{plan.rows.count}, digest {plan.rows.content_digest}",
                "rows now": f"{rows.index.rows}, digest {rows.index.content_digest}",
            },
            "use the text, the tokenizer and the version that the cache was built with",
        )
    return rows


def _compute_again(damage: _Damage, work: Work, pieces: list[int], shards: Set[int], max_bytes: int) -> None:
    """Run the teacher over whole pieces, and put back what is damaged of these shards."""

    def commit(store: Store, buffer: ShardBuffer, numerics: NumericsPlan | None) -> None:
        if buffer.shard in shards:
            _put_back(damage, buffer)

    writer = ShardWriter(
        damage.store, damage.plan, max_bytes=max_bytes, numerics=None, on_commit=lambda shard: None, commit=commit
    )

    def batches() -> Iterator[tuple[int, list[Row]]]:
        for piece in pieces:
            yield from piece_batches(work, writer, piece)

    ranges = [damage.plan.shard_range(shard) for piece in pieces for shard in work.shards_of(piece)]
    tokens = sum(stop - start for start, stop in ranges) * damage.plan.rows.row_tokens
    with Progress("repair", tokens, unit="tokens") as bar:
        record_batches(work, batches(), writer, bar)


def _put_back(damage: _Damage, buffer: ShardBuffer) -> None:
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
            store.write(key, data)

    encode_shard(buffer, put)
    if shard in damage.needing_receipts:
        store.write(layout.receipt_key(plan.segment, shard), to_canonical(receipt))


def _restore_index(damage: _Damage) -> None:
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
    damage.store.write(key, index)


def _restore_stats(damage: _Damage) -> None:
    if not damage.stats:
        return
    key = damage.view.key("stats.json")
    receipts = [damage.receipt(shard) for shard in range(damage.plan.num_shards)]
    stats = to_canonical(Stats(taps=total_stats(receipts)))
    _require_same(damage, key, digest_bytes(stats) == damage.entry.files["stats.json"])
    damage.store.write(key, stats)


def _require_same(damage: _Damage, what: str, same: bool) -> None:
    """Raise unless what was computed again is what was committed."""
    if same:
        return
    then = damage.plan.numerics
    now = describe_numerics(then.dtype)
    raise PlanMismatchError(
        "what was computed again is not what was committed",
        {
            "cache": damage.store.url,
            "what": what,
            "built on": f"{then.platform}, {then.versions}",
            "this is": f"{now.platform}, {now.versions}",
        },
        "repair it on the platform and with the library versions that built it, or build another cache",
    )
