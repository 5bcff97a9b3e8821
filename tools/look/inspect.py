"""`distillcache inspect`: describe a cache, finished or not, from its plan and receipts alone.

How large compressed taps came out is known shard by shard: it is taken from some of them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distillcache.schemas import command_line
from distillcache.schemas.cache.addressing import row_groups
from distillcache.schemas.cache.describe import describe_codec
from distillcache.schemas.cache.segment import Segment, open_cache
from distillcache.schemas.cache.unfinished import step_to_finish
from distillcache.schemas.config import InspectConfig
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.manifest import Plan, TapPlan, TapStats
from distillcache.schemas.format.times import SegmentTimes
from distillcache.schemas.store.redaction import shown
from distillcache.schemas.store.store import Store, using
from distillcache.tools.look.inspect_print import print_cache
from distillcache.tools.look.inspect_warnings import find_warnings
from distillcache.tools.look.segment_facts import (
    sampled_receipts,
    sampled_shards,
    segment_stats,
    segment_times,
    shards_done,
)


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Print the cache's description as tables or as one JSON object."""
    config = command_line.parse(InspectConfig, argv, command, positional=("cache",))
    with using(config.storage):
        found = describe_cache(Store(config.cache))
    if as_json:
        print(json.dumps(found))
    else:
        print_cache(found)


def describe_cache(store: Store) -> dict[str, Any]:
    """The cache as plain values: teacher, rows, taps with shapes and bytes, shards done, statistics.

    Raises:
        InputError: there is no cache here.
        DamageError: its plan or manifest is damaged. What else is damaged is among the warnings.
    """
    segments = open_cache(store, partial=True)
    noted = [_noted(segment) for segment in segments]
    plan = segments[0].plan
    own = [segment.plan.rows for segment in segments if segment.plan.rows_of is None]
    count, held_out = sum(rows.count for rows in own), sum(len(rows.eval_indices) for rows in own)
    return {
        "cache": store.url,
        "finished": all(segment.committed is None for segment in segments),
        "to_finish": next((step_to_finish(store, each.plan) for each in segments if each.committed is not None), None),
        "format": plan.format,
        "created": shown(plan.created),
        "teacher": shown(plan.teacher.model_dump()),
        "numerics": shown(plan.numerics.model_dump(mode="json")),
        "keeps_head": any(segment.plan.keeps_head for segment in segments),
        "rows": {
            "count": count,
            "train": count - held_out,
            "eval": held_out,
            "row_tokens": plan.rows.row_tokens,
            "tokens": sum(rows.tokens for rows in own),
        },
        "blocks": sorted({block for segment in segments for block in segment.plan.blocks}),
        "shards": {
            "done": sum(len(shards_done(segment)) for segment in segments),
            "of": sum(segment.plan.num_shards for segment in segments),
            "rows_per_shard": plan.shard_rows,
        },
        "bytes": sum(segment.plan.bytes_per_row * segment.plan.rows.count for segment in segments),
        "bytes_per_token": _bytes_per_token(segments),
        "stored_bytes": sum(_stored_bytes(segment, tap) for segment in segments for tap in segment.plan.taps),
        "segments": [_describe_segment(segment, times) for segment, (_, times) in zip(segments, noted, strict=True)],
        "taps": [
            _describe_tap(segment, tap, stats.get(tap.name))
            for segment, (stats, _) in zip(segments, noted, strict=True)
            for tap in segment.plan.taps
        ],
        "warnings": find_warnings(segments),
    }


def _noted(segment: Segment) -> tuple[Mapping[str, TapStats], SegmentTimes | None]:
    """The statistics and times of a segment, as far as they can be read."""
    try:
        receipts = sampled_receipts(segment)
        return segment_stats(segment, receipts), segment_times(segment, receipts)
    except DamageError:  # find_warnings says so
        return {}, None


def _describe_segment(segment: Segment, times: SegmentTimes | None) -> dict[str, Any]:
    """seconds: how long shards took; None where that was not noted."""
    plan, shards = segment.plan, len(shards_done(segment))
    return {
        "segment": plan.segment,
        "rows_of": plan.rows_of,
        "rows": plan.rows.count,
        "finished": segment.committed is None,
        "shards": {"done": shards, "of": plan.num_shards, "rows_per_shard": plan.shard_rows},
        "seconds": None if times is None else times.model_dump(mode="json"),
    }


def _bytes_per_token(segments: Sequence[Segment]) -> int:
    """Return the bytes a token of the rows that have the most."""
    return max(sum(member.plan.bytes_per_token for member in group.segments) for group in row_groups(segments))


def _tap_bytes(plan: Plan, tap: TapPlan) -> int:
    """Return the bytes of all its rows, before compression."""
    return sum(part.bytes_per_token for part in tap.parts) * plan.rows.row_tokens * plan.rows.count


def _stored_bytes(segment: Segment, tap: TapPlan) -> int:
    """Return the stored bytes of all its rows after compression; for many shards, an estimate from some of them.

    Rows that are not committed yet count like those that are.
    """
    plan, drawn = segment.plan, sampled_shards(segment)
    if tap.compress == "none" or not drawn:
        return _tap_bytes(plan, tap)
    stored = sum(int(segment.record(shard)[f"{part.array}/lengths"].sum()) for shard in drawn for part in tap.parts)
    rows = sum(stop - start for start, stop in map(plan.shard_range, drawn))
    return round(stored / rows * plan.rows.count)


def _describe_tap(segment: Segment, tap: TapPlan, stats: TapStats | None) -> dict[str, Any]:
    plan, token_bytes = segment.plan, sum(part.bytes_per_token for part in tap.parts)
    described: dict[str, Any] = {
        "name": tap.name,
        "segment": plan.segment,
        "codec": describe_codec(tap),
        "slots": list(tap.slots),
        "arrays": {
            part.array: {
                "shape": [plan.rows.count, part.slots, plan.rows.row_tokens, part.width],
                "dtype": part.dtype,
                "bits_of": part.bits_of,
            }
            for part in tap.parts
        },
        "objects_per_shard": sum(len(part.object_ranges()) for part in tap.parts),
        "bytes_per_token": token_bytes,
        "bytes": _tap_bytes(plan, tap),
        "compress": tap.compress,
        "stored_bytes": _stored_bytes(segment, tap),
    }
    if stats is not None and stats.count:
        described["rms"] = [math.sqrt(total / stats.count) for total in stats.square_sum]
        described["abs_max"] = list(stats.abs_max)
        described["nonfinite"] = sum(stats.nonfinite)
    return described
