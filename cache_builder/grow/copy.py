"""`distillcache copy`: copy a finished cache of any number of segments to one with a single segment.

A copy is built like any cache: a plan that is settled first, leases, shards with receipts, a manifest at the end. Only
that its numbers come from another cache (transcode.py), and no teacher runs.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from distillcache.cache_builder.grow.copying import Copying, SelectedRows, copied_files
from distillcache.cache_builder.grow.transcode import recoded_taps
from distillcache.cache_builder.record.finish import finish_segment, tidy, unless_finished
from distillcache.cache_builder.record.loop import guarded_by_plan
from distillcache.cache_builder.record.plan import refuse_foreign_folder, settle_plan, with_objects
from distillcache.cache_builder.record.presence import refuse_missing_data
from distillcache.cache_builder.record.work_units import LeasedUnits, by_one_process, work_through
from distillcache.cache_builder.repair.from_source import repair_copy
from distillcache.models.describe import COMPRESSING_LIBRARY, compressor_version, describe_numerics
from distillcache.schemas.cache.addressing import (
    RowGroup,
    check_same_codec,
    held_by_rows,
    row_groups,
    shared_blocks,
    slots_of,
)
from distillcache.schemas.cache.describe import numbers_in_runs
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.segment import named_by_plan, open_cache, read_manifest, segment_name
from distillcache.schemas.config import CopyConfig, CopySpec, TapConfig
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.schemas.format import layout
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import TOPK_LOGITS, Manifest, NumericsPlan, Plan, RowsPlan, TapPlan
from distillcache.schemas.format.rows import encode_row
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.format.tap_plan import tap_plan, with_compression, with_slots
from distillcache.schemas.runtime.signals import watch_for_stop
from distillcache.schemas.store.store import Store, using

log = logging.getLogger(__name__)

TAPS = ("attn_out", "resid", "mlp_out", TOPK_LOGITS)


def copy_cache(config: CopyConfig) -> Manifest:
    """Copy what `config` selects, or resume a copy; a finished copy is left as it is.

    Raises:
        InputError, ConfigError: the source is no finished cache, or does not hold what is requested.
        PlanMismatchError: the folder holds another cache, or a copy of another one.
        DamageError: the source is damaged; nothing of the shard is committed.
        StorageError, Interrupted: the copy stopped; the same command goes on.
    """
    with using(config.storage):
        source, store = Store(config.src), Store(config.dst)
        if source.spec("") == store.spec(""):
            facts = {"src": config.src, "dst": config.dst}
            raise ConfigError("a cache cannot be copied onto itself", facts, "name another path for the copy")
        refuse_foreign_folder(store, "DST")
        if config.repair:
            config, repaired = repair_copy(config, source, store)
            if repaired is not None:
                return repaired
        return unless_finished(store, lambda: _copy(config, source, store))


def _copy(config: CopyConfig, source: Store, store: Store) -> Manifest:
    """`copy_cache`, once the places are known to be right."""
    groups = row_groups(open_cache(source))
    rows = SelectedRows(groups, config.rows)
    with watch_for_stop() as stop:
        plan = _make_plan(config, source, rows)
        recoded = recoded_taps(list(rows.used.values()), plan.taps, signs_of(plan))
        store.clear_stale_locks()
        plan = settle_plan(store, _with_recoded(plan, recoded), accept_platform=False)
        finished = read_manifest(store)
        if finished is not None:
            next = "repair the copy from the same source: the same `distillcache copy` with --repair"
            refuse_missing_data(store, finished.segments, next)
            tidy(store, plan)
            return finished
        for tap, what in recoded.items():
            log.info(f"{tap}: {what}")
        for tap, slots in _left_out(config, list(rows.used.values()), plan).items():
            log.warning(f"{tap}: {_told(slots)}")
        with guarded_by_plan(store, plan) as placed:
            for key, value in copied_files(source, groups, plan).items():
                placed.put_once(key, value)
            leases = Leases(store, plan.segment, config.claim_expiry_s)
            try:
                job = LeasedUnits(store=placed, plan=plan, rows=rows, stop=stop, options=config, leases=leases)
                work_through(job, "copy", None, Copying(plan, rows).run)
            finally:
                leases.close()
            return by_one_process(store, plan, config, stop, lambda: finish_segment(placed, plan))


def _with_recoded(plan: Plan, recoded: Mapping[str, str]) -> Plan:
    """The plan with what is recoded, and with the machine that does it, whose arithmetic the codes depend on."""
    here = describe_numerics("float32", plan.taps) if recoded else None
    changed = {"recoded_on": here, "config": {**plan.config, "recoded": dict(recoded)}}
    return named_by_plan(plan.model_copy(update=changed))


def _make_plan(config: CopyConfig, source: Store, rows: SelectedRows) -> Plan:
    base = rows.groups[0].base.plan
    digest = digest_bytes(source.read(layout.MANIFEST) or b"")
    kept = _describe_rows(rows, digest)
    blocks = _chosen_blocks(config, rows)
    taps = _chosen_taps(config, list(rows.used.values()), blocks, base.teacher.hidden_size)
    row_bytes = sum(part.bytes_per_token for tap in taps for part in tap.parts) * kept.row_tokens
    batch_rows = config.batch_rows or base.batch_rows
    shard_rows = layout.choose_shard_rows(row_bytes, kept.count, batch_rows, config.shard_mib, config.shard_rows)
    stored = {tap.name: _as_configured(tap) for tap in taps}
    return base.model_copy(
        update={
            "segment": segment_name(0),
            "copied_from": digest,
            "rows": kept,
            "taps": with_objects(taps, kept.row_tokens, shard_rows, config.object_mib),
            "blocks": blocks,
            "batch_rows": batch_rows,
            "shard_rows": shard_rows,
            "numerics": _describe_numerics(base.numerics, taps),
            "config": {
                **base.config,
                "taps": {name: stored.get(name) for name in TAPS if name in stored or name != TOPK_LOGITS},
                "blocks": list(blocks),
                "copy": config.model_dump(mode="json", exclude_unset=True, exclude={"repair"}),
            },
        }
    )


def _as_configured(tap: TapPlan) -> dict[str, Any]:
    """Return the build settings that describe such a tap."""
    compression = {} if tap.compress == "none" else {"compress": tap.compress}
    if tap.k is not None:
        return {"k": tap.k, "dtype": tap.codec} | compression
    options = ("codec", "group", "rotate", "delta", "keyframe_every")
    kept = {"head": True} if tap.head else {}
    return {name: getattr(tap, name) for name in options} | compression | kept


def _describe_numerics(source: NumericsPlan, taps: Sequence[TapPlan]) -> NumericsPlan:
    """Return the facts that determined the source's numbers, and those that determine the compressed bytes here."""
    versions = {name: value for name, value in source.versions.items() if name != COMPRESSING_LIBRARY}
    return source.model_copy(update={"versions": versions | compressor_version(taps)})


def _describe_rows(rows: SelectedRows, source_digest: str) -> RowsPlan:
    """Return the plan's facts about the chosen rows. Rows that one text did not give as a whole are identified by
    their cache.
    """
    base = rows.groups[0].base.plan.rows
    if rows.is_whole:
        return base
    content, tokens = xxhash.xxh3_128(), 0
    for number in range(len(rows.numbers)):
        (row,) = rows.slice(number, number + 1)
        content.update(encode_row(row))
        tokens += int(np.count_nonzero(row.segment_ids))
    return base.model_copy(
        update={
            "count": len(rows.numbers),
            "eval_indices": rows.eval_indices,
            "tokens": tokens,
            "content_digest": content.hexdigest(),
            "text_digest": digest_bytes(f"{source_digest} {rows.wanted}".encode()),
        }
    )


def _wanted_taps(spec: CopySpec, groups: Sequence[RowGroup]) -> list[str]:
    """The taps to copy. One that is kept by default may be absent; one with a codec must be there."""
    there = {tap.name for group in groups for segment in group.segments for tap in segment.plan.taps}
    wanted = [name for name in TAPS if getattr(spec.taps, name) is not None]
    found = [name for name in wanted if name in there or getattr(spec.taps, name) != "keep"]
    if not found:
        raise ConfigError("there is nothing to copy", {"taps": "all are null"}, "keep one of the taps")
    return found


def _chosen_blocks(spec: CopySpec, rows: SelectedRows) -> tuple[int, ...]:
    used = list(rows.used.values())
    taps = _wanted_taps(spec, used)
    if _stream_slots(used) is not None:  # they belong to no block
        taps = [name for name in taps if name != "resid"]
    recorded = set(shared_blocks(rows.groups, taps, rows.used))
    wanted = recorded if spec.blocks == "all" else set(spec.blocks)
    if not wanted or wanted - recorded:
        facts = {
            "cache": rows.groups[0].base.store.url,
            "blocks": spec.blocks,
            "recorded": sorted(recorded),
            "taps": taps,
        }
        raise InputError(
            "the cache lacks these blocks",
            facts | held_by_rows(rows.groups),
            "choose recorded blocks, or leave out taps that lack them",
        )
    return tuple(sorted(wanted))


def _chosen_taps(spec: CopySpec, groups: Sequence[RowGroup], blocks: tuple[int, ...], hidden: int) -> list[TapPlan]:
    """The taps of the copy; their objects are not divided yet."""
    chosen = []
    for name in _wanted_taps(spec, groups):
        slots, codec = _wanted_slots(spec, groups, name, blocks), getattr(spec.taps, name)
        if codec != "keep":
            _check_codec_named(name, codec)
            tap, says_how = tap_plan(name, codec, slots, hidden), "compress" in codec.model_fields_set
        else:
            pairs = [(segment, tap) for group in groups for segment, tap, _ in group.locate(name, slots, as_one=False)]
            check_same_codec(name, pairs)
            tap, says_how = with_slots(pairs[0][1], slots, hidden), False
        tap = tap.model_copy(update={"head": name == "resid" and _keeps_head(groups, slots)})
        chosen.append(tap if says_how or spec.compress == "keep" else with_compression(tap, spec.compress))
    return chosen


def _wanted_slots(spec: CopySpec, groups: Sequence[RowGroup], name: str, blocks: tuple[int, ...]) -> list[int]:
    """The slots of a tap to copy: those of the blocks; of a stream of which a build chose the slots, these."""
    chosen = _stream_slots(groups) if name == "resid" else None
    if chosen is None:
        return sorted(slots_of(name, blocks))
    last = groups[0].base.plan.teacher.num_blocks
    kept = chosen if spec.blocks == "all" else chosen & (slots_of(name, blocks) | {last})
    if not kept:
        raise InputError(
            "the cache lacks the stream of these blocks",
            {"cache": groups[0].base.store.url, "blocks": spec.blocks, "recorded": f"slots {sorted(chosen)}"},
            "choose other blocks, or leave the stream out: --taps.resid null",
        )
    return sorted(kept)


def _stream_slots(groups: Sequence[RowGroup]) -> set[int] | None:
    """The slots of the stream that all rows hold, where they are not those on both sides of some blocks."""
    if not all(group.holds("resid") for group in groups):
        return None
    shared = set.intersection(*(group.slots("resid") for group in groups))
    blocks = [block for block in sorted(shared) if block + 1 in shared]
    return None if shared == slots_of("resid", blocks) else shared


def _left_out(spec: CopySpec, groups: Sequence[RowGroup], plan: Plan) -> dict[str, list[int]]:
    """The slots of each copied tap that were asked for, but that only some of the rows hold."""
    found = {}
    for copied in plan.taps:
        held = set[int]().union(*(group.slots(copied.name) for group in groups))
        asked = held if spec.blocks == "all" else held & slots_of(copied.name, spec.blocks)
        if rest := sorted(asked - set(copied.slots)):
            found[copied.name] = rest
    return found


def _told(slots: Sequence[int]) -> str:
    shown = f"slot {slots[0]} is" if len(slots) == 1 else f"slots {numbers_in_runs(slots)} are"
    which = "it" if len(slots) == 1 else "them"
    return f"{shown} left out: only some of the rows hold {which} (a copy of these, by --rows, keeps {which})"


def _keeps_head(groups: Sequence[RowGroup], slots: Sequence[int]) -> bool:
    """Return whether a copy of these slots of the stream keeps the teacher's head."""
    there = any(segment.plan.keeps_head for group in groups for segment in group.segments)
    return there and groups[0].base.plan.teacher.num_blocks in slots


def _check_codec_named(name: str, codec: TapConfig) -> None:
    """Raise `ConfigError` where only the compression is set: the default codec would replace the stored one."""
    if codec.model_fields_set == {"compress"}:
        raise ConfigError(
            "a tap's compression is set without its codec",
            {f"taps.{name}.compress": codec.compress, f"taps.{name}.codec": "not set"},
            f"set taps.{name}.codec, or keep the codec and compress the copy: --compress {codec.compress}",
        )
