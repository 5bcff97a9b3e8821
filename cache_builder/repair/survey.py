"""Survey of a cache: its manifest, its plans, and a listing that reveals foreign files.

The first half of checking (check.py is the other): no digest of an object is looked at yet.
"""

import re
from collections.abc import Set
from dataclasses import dataclass

from distillcache.cache_builder.repair.finding import Finding, What, told_in_a_line
from distillcache.schemas.cache.agreement import check_entry
from distillcache.schemas.cache.segment import no_cache, planned_segments, read_manifest, read_plan, segment_number
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import record_dtype
from distillcache.schemas.format.manifest import Manifest, Plan, SegmentEntry
from distillcache.schemas.store.store import Store

_SHARD_FILE = re.compile(r"(rows|receipts|claims)/(\d+)\.(?:array_record|json)")
_PREPARED = re.compile(r"segments/(\d+)\.prepared/")
_OBJECT = re.compile(r"taps/([^/]+)/c/(\d+)/(\d+)/0/0")


NEXT = ""  # no segment's name


@dataclass(frozen=True)
class SegmentView:
    """A segment as it was found.

    entry: the manifest's line; None while the segment is being built, or where the manifest is damaged.
    first_row: the cache's number of its first row.
    shards: those with a receipt; None: all, since the segment has an index.
    """

    plan: Plan
    entry: SegmentEntry | None
    first_row: int
    shards: frozenset[int] | None

    def key(self, name: str) -> str:
        """The key of a file of the segment."""
        return f"{layout.segment_prefix(self.plan.segment)}/{name}"

    @property
    def rows(self) -> tuple[int, int]:
        """The number of rows of the cache."""
        return self.first_row, self.first_row + self.plan.rows.count

    @property
    def num_objects(self) -> int:
        """Objects and files of rows that are to be checked."""
        shards = self.plan.num_shards if self.shards is None else len(self.shards)
        files = 0 if self.plan.rows_of else 1
        return shards * (files + sum(len(part.object_ranges()) for tap in self.plan.taps for part in tap.parts))


@dataclass(frozen=True)
class Survey:
    """Content of a cache by its listing, its manifest and its plans; `findings` are those made so far."""

    store: Store
    manifest: Manifest | None
    finished: bool
    segments: tuple[SegmentView, ...]
    findings: tuple[Finding, ...]

    @property
    def num_objects(self) -> int:
        """Objects and files of rows that are to be checked."""
        return sum(view.num_objects for view in self.segments)


def survey_cache(store: Store) -> Survey:
    """Read the manifest and the plans, and list the cache.

    Raises:
        InputError: there is no cache here.
        DamageError: there was one, whose plan is lost.
    """
    keys = frozenset(store.keys())
    names = planned_segments(keys)
    if not names and layout.MANIFEST not in keys:
        raise no_cache(store)
    findings: list[Finding] = []
    manifest = _read_manifest(store, keys, names, findings)
    entries = {entry.segment: entry for entry in manifest.segments} if manifest is not None else {}
    segments = []
    first_rows = first_row_numbers(manifest.segments if manifest is not None else ())
    for name in [*entries, *(name for name in names if name not in entries)]:
        view = _view_segment(store, keys, name, entries.get(name), first_rows, findings)
        if view is not None:
            segments.append(view)
    views = {view.plan.segment: view for view in segments}
    findings += [found for key in sorted(keys) if (found := _foreign(key, views, {*entries, *names})) is not None]
    findings += _stale_locks(store, manifest, [view for view in segments if view.entry is None])
    finished = layout.MANIFEST in keys or any(finding.object == layout.MANIFEST for finding in findings)
    return Survey(store, manifest, finished, tuple(segments), tuple(findings))


def _read_manifest(store: Store, keys: Set[str], names: list[str], findings: list[Finding]) -> Manifest | None:
    """The manifest, if it is there and whole. Without receipts, an index without a manifest has lost it."""
    try:
        manifest = read_manifest(store)
    except DamageError as error:
        detail = f"{told_in_a_line(error)}: no row can be read"
        findings.append(Finding(what="damaged", object=layout.MANIFEST, detail=detail))
        return None
    if manifest is None:
        first = f"segments/{names[0]}" if names else ""
        lost = f"{first}/index.bin" in keys and not any(key.startswith(f"{first}/receipts/") for key in keys)
        if lost:
            findings.append(Finding(what="missing", object=layout.MANIFEST, detail="the cache cannot be opened"))
    return manifest


def _view_segment(
    store: Store,
    keys: Set[str],
    name: str,
    entry: SegmentEntry | None,
    first_rows: dict[str, int],
    findings: list[Finding],
) -> SegmentView | None:
    """The segment, unless its plan is lost: then nothing else of it can be understood."""
    first_row = first_rows.get(name, 0)
    key = layout.plan_key(name)
    what: What = "missing"
    problem = "without it"
    try:
        plan = read_plan(store, name)
    except DamageError as error:
        plan, what, problem = None, "damaged", told_in_a_line(error)
    committed = None if entry is None else entry.files.get("plan.json", "")
    if plan is not None and committed is not None and (found := digest_bytes(to_canonical(plan))) != committed:
        plan, what, problem = None, "stale", f"digest {found}, the manifest names {committed}"
    if plan is None:
        rows = (first_row, first_row + entry.rows) if entry is not None else None
        detail = f"{problem}: nothing else of the segment can be checked or read"
        findings.append(Finding(what=what, object=key, detail=detail, segment=name, rows=rows))
        return None
    if entry is None:
        first_row = first_rows.get(plan.rows_of or NEXT, 0)
    elif contradiction := _contradiction(store, plan, entry):
        rows = (first_row, first_row + entry.rows)
        findings.append(Finding(what="damaged", object=layout.MANIFEST, detail=contradiction, segment=name, rows=rows))
        return None
    shards = frozenset(shard for shard in range(plan.num_shards) if layout.receipt_key(name, shard) in keys)
    has_index = entry is not None or (not shards and f"{layout.segment_prefix(name)}/index.bin" in keys)
    return SegmentView(plan, entry, first_row, None if has_index else shards)


def _contradiction(store: Store, plan: Plan, entry: SegmentEntry) -> str:
    """Return how the manifest contradicts a plan of the digest that it names; empty if it does not."""
    try:
        check_entry(plan, entry, record_dtype(plan).itemsize, store.where(layout.MANIFEST))
    except DamageError as error:
        return f"{told_in_a_line(error)}: nothing of the segment can be checked or read"
    return ""


def first_row_numbers(entries: tuple[SegmentEntry, ...]) -> dict[str, int]:
    """Segment -> the cache's number of its first row; under NEXT, of the rows that will be added."""
    first, found = 0, {}
    for entry in entries:
        found[entry.segment] = found[entry.rows_of] if entry.rows_of else first
        first += 0 if entry.rows_of else entry.rows
    return {**found, NEXT: first}


def _foreign(key: str, views: dict[str, SegmentView], listed: set[str]) -> Finding | None:
    """The finding about a key that the cache has no use for."""
    if key in (layout.MANIFEST, layout.TOKENIZER):
        return None
    top, _, rest = key.partition("/")
    name, _, inner = rest.partition("/")
    view = views.get(name) if top == "segments" else None
    if view is not None and _belongs(inner, view):
        return None
    if view is None and top == "segments" and (name in listed or inner == "plan.json"):
        return None  # of a segment whose plan is lost: nobody knows
    prepared = _PREPARED.match(key)
    building = {each for each in listed if each not in views or views[each].shards is not None}
    if prepared and int(prepared[1]) in map(segment_number, building):
        return None  # rows of a segment that is being built
    left = view is not None and inner.split("/")[0] in ("receipts", "claims", "prepared")
    build = left or prepared is not None
    detail = "left over from building: the same `distillcache build` removes it" if build else "not the cache's"
    return Finding(what="foreign", object=key, detail=detail, segment=name if view is not None else None)


def _stale_locks(store: Store, manifest: Manifest | None, unfinished: list[SegmentView]) -> list[Finding]:
    """Lock files of dead writers in a finished cache. What is being built clears its own before it writes."""
    building = tuple(view.key("") for view in unfinished)
    return [
        Finding(what="foreign", object=key, detail="the lock file of a writer that was killed; nothing holds it now")
        for key in (store.stale_locks() if manifest is not None else ())
        if not building or not key.startswith(building)
    ]


def _belongs(name: str, view: SegmentView) -> bool:
    """Return whether a segment has a file of this name."""
    plan, building = view.plan, view.shards is not None
    arrays = {part.array: len(part.object_ranges()) for tap in plan.taps for part in tap.parts}
    small = {"plan.json", "index.bin", "stats.json", "times.json", "side.safetensors", "skipped.jsonl"}
    small |= {layout.HEAD_FILE} if plan.keeps_head else set()
    small |= set(view.entry.files if view.entry is not None else ())
    if name in small | {f"taps/{array}/zarr.json" for array in arrays}:
        return True
    if match := _OBJECT.fullmatch(name):
        array, shard, group = match[1], int(match[2]), int(match[3])
        known = shard < plan.num_shards and group < arrays.get(array, 0)
        return known and view.key(name) == layout.object_key(plan.segment, array, shard, group)
    if match := _SHARD_FILE.fullmatch(name):
        number = int(match[2])
        spelled = {"rows": layout.rows_key, "receipts": layout.receipt_key, "claims": layout.lease_key}[match[1]]
        right = number < plan.num_shards and view.key(name) == spelled(plan.segment, number)
        return right and (building or match[1] == "rows")
    if building and view.key(name) == layout.finish_lease_key(plan.segment, 0):
        return True
    return building and name.startswith("prepared/")
