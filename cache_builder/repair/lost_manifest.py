"""Reconstruction of a lost manifest from the plans and the indexes.

The manifest holds the digests of files that exist. Where every object is what the indexes say, every record of them
is whole, the rows are the plans', and what the teacher decides is what it decides now, writing it anew guesses nothing.
"""

from collections.abc import Callable, Mapping, Sequence

import xxhash

from distillcache.cache_builder.record.finish import segment_entry
from distillcache.cache_builder.repair.finding import Finding
from distillcache.cache_builder.repair.survey import SegmentView, Survey
from distillcache.schemas.cache.agreement import check_stats
from distillcache.schemas.cache.lost_plan import step_for_file
from distillcache.schemas.cache.segment import read_manifest, segment_number
from distillcache.schemas.errors import DamageError, FolderTakenError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import record_dtype
from distillcache.schemas.format.manifest import Manifest, Stats
from distillcache.schemas.format.rows import unpack_rows
from distillcache.schemas.store.store import Store

# What helps where the manifest is lost and something else is damaged.
MANIFEST_STEP = (
    f"copy {layout.MANIFEST} back, or delete what is left of it and build without --repair: then every shard is "
    "computed again, of each segment with the config that added it"
)


def lost_files(findings: Sequence[Finding]) -> list[Finding]:
    """The findings about the manifest and plans, which record how the cache was built."""
    names = (layout.MANIFEST, "plan.json")
    return [each for each in findings if each.object.rpartition("/")[2] in names and each.what != "foreign"]


def rebuild_manifest(
    survey: Survey, findings: Sequence[Finding], fixed_files: Callable[[SegmentView], Mapping[str, bytes]]
) -> None:
    """Write the manifest again. Nothing is written unless everything else is whole.

    Args:
        fixed_files: what a segment's files that do not depend on the rows must be, by key.

    Raises:
        DamageError: a plan is lost, or something is damaged that only the manifest could vouch for.
    """
    lost = lost_files(findings)
    damaged = [finding for finding in findings if finding.what != "foreign" and finding not in lost]
    if any(finding.object != layout.MANIFEST for finding in lost):
        raise _cannot_be_made_again(survey.store, lost)
    if damaged:
        raise _cannot_be_made_again(survey.store, [*lost, *damaged[:5]])
    views = [view for view in survey.segments if view.shards is None]
    for number, view in enumerate(views):
        wrong = _wrong_file(survey.store, number, view, fixed_files)
        if wrong:
            found = Finding(what="damaged", object=wrong, detail="not what the plan and the teacher give")
            raise _cannot_be_made_again(survey.store, [*lost, found])
    manifest = _manifest_of(survey.store, views)
    placed = survey.store.guarded(lambda: _check_unchanged(survey.store, manifest, views))
    _, generation = survey.store.read_with_generation(layout.MANIFEST)  # damaged bytes, or none
    if not placed.replace_whole(layout.MANIFEST, to_canonical(manifest), generation):
        raise _folder_taken(survey.store)


def _check_unchanged(store: Store, manifest: Manifest, views: Sequence[SegmentView]) -> None:
    """Raise `FolderTakenError` where the plans and indexes are others by now, or another process wrote a manifest."""
    try:
        written = read_manifest(store) is not None
    except DamageError:
        written = False
    if written or _manifest_of(store, views) != manifest:
        raise _folder_taken(store)


def _folder_taken(store: Store) -> FolderTakenError:
    return FolderTakenError(
        "the cache was deleted, rebuilt or repaired while this repair ran or was paused",
        {"cache": store.url},
        "nothing was written; run the command again",
    )


def _manifest_of(store: Store, views: Sequence[SegmentView]) -> Manifest:
    own = [view.plan.rows for view in views if view.plan.rows_of is None]
    return Manifest(
        segments=tuple(segment_entry(store, view.plan, store.read(view.key("index.bin")) or b"") for view in views),
        tokenizer_digest=digest_bytes(store.read(layout.TOKENIZER) or b""),
        rows=sum(rows.count for rows in own),
        tokens=sum(rows.tokens for rows in own),
    )


def _wrong_file(
    store: Store, number: int, view: SegmentView, fixed_files: Callable[[SegmentView], Mapping[str, bytes]]
) -> str:
    """A file of the segment that is not what it must be, of those that no index record vouches for; empty: none."""
    plan = view.plan
    if segment_number(plan.segment) != number:
        return layout.plan_key(plan.segment)
    if not store.length_is(view.key("index.bin"), plan.num_shards * record_dtype(plan).itemsize):
        return view.key("index.bin")
    for key, value in fixed_files(view).items():
        if store.read(key) != value:
            return key
    try:
        stats = from_canonical(Stats, store.read(view.key("stats.json")) or b"", view.key("stats.json"))
        check_stats(plan, stats.taps, view.key("stats.json"))
    except DamageError:
        return view.key("stats.json")
    return "" if plan.rows_of is not None or _rows_digest(store, view) == plan.rows.content_digest else view.key("rows")


def _rows_digest(store: Store, view: SegmentView) -> str:
    """As `RowsPlan.content_digest`."""
    content = xxhash.xxh3_128()
    for shard in range(view.plan.num_shards):
        for record in unpack_rows(store.read(layout.rows_key(view.plan.segment, shard)) or b""):
            content.update(record)
    return content.hexdigest()


def _cannot_be_made_again(store: Store, findings: Sequence[Finding]) -> DamageError:
    facts = {"cache": store.url, **{finding.object: f"{finding.what}: {finding.detail}" for finding in findings}}
    what = "the record of how the cache was built is lost and cannot be reconstructed"
    plans = [finding for finding in lost_files(findings) if finding.object != layout.MANIFEST]
    if plans:
        first = min(plans, key=lambda finding: finding.object)
        return DamageError(what, facts, step_for_file(store, first.object, ""))
    return DamageError(what, facts, MANIFEST_STEP)
