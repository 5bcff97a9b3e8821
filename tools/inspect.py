"""`distillcache inspect`: what a cache holds, finished or not, from its plan and receipts alone.

How large compressed taps came out is known shard by shard: it is taken from some of them.
"""

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from schemas import layout, settings
from schemas.addressing import row_groups
from schemas.canonical import from_canonical, read_canonical
from schemas.config import InspectConfig
from schemas.manifest import Plan, ShardReceipt, Stats, TapPlan, TapStats
from schemas.segment import Segment, open_cache
from schemas.storage import Store, use
from tools.inspect_warnings import find_warnings

SAMPLED_SHARDS = 64  # whose sizes are looked up, evenly drawn: a large cache has hundreds of thousands


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Print the cache's description as tables or as one JSON object."""
    config = settings.parse(InspectConfig, argv, command, positional=("cache",))
    use(config.storage)
    found = describe_cache(Store(config.cache))
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)


def describe_cache(store: Store) -> dict[str, Any]:
    """The cache as plain values: teacher, rows, taps with shapes and bytes, shards done, statistics.

    Raises:
        InputError: there is no cache here.
        DamageError: its plan, manifest or statistics are damaged.
    """
    segments = open_cache(store, partial=True)
    plan = segments[0].plan
    own = [segment.plan.rows for segment in segments if segment.plan.rows_of is None]
    count, held_out = sum(rows.count for rows in own), sum(len(rows.eval_indices) for rows in own)
    return {
        "cache": store.url,
        "finished": all(segment.committed is None for segment in segments),
        "format": plan.format,
        "created": plan.created,
        "teacher": plan.teacher.model_dump(),
        "numerics": plan.numerics.model_dump(mode="json"),
        "rows": {
            "count": count,
            "train": count - held_out,
            "eval": held_out,
            "row_tokens": plan.rows.row_tokens,
            "tokens": sum(rows.tokens for rows in own),
        },
        "blocks": sorted({block for segment in segments for block in segment.plan.blocks}),
        "shards": {
            "done": sum(len(_shards_done(segment)) for segment in segments),
            "of": sum(segment.plan.num_shards for segment in segments),
            "rows_per_shard": plan.shard_rows,
        },
        "bytes": sum(segment.plan.bytes_per_row * segment.plan.rows.count for segment in segments),
        "bytes_per_token": _bytes_per_token(segments),
        "stored_bytes": sum(_stored_bytes(segment, tap) for segment in segments for tap in segment.plan.taps),
        "segments": [_describe_segment(segment) for segment in segments],
        "taps": [
            _describe_tap(segment, tap, stats.get(tap.name))
            for segment in segments
            for stats in [_read_stats(segment)]
            for tap in segment.plan.taps
        ],
        "warnings": find_warnings(segments),
    }


def _describe_segment(segment: Segment) -> dict[str, Any]:
    plan, shards = segment.plan, len(_shards_done(segment))
    return {
        "segment": plan.segment,
        "rows_of": plan.rows_of,
        "rows": plan.rows.count,
        "finished": segment.committed is None,
        "shards": {"done": shards, "of": plan.num_shards, "rows_per_shard": plan.shard_rows},
    }


def _shards_done(segment: Segment) -> Collection[int]:
    return range(segment.plan.num_shards) if segment.committed is None else segment.committed


def _bytes_per_token(segments: Sequence[Segment]) -> int:
    """Of the rows that have the most."""
    return max(sum(member.plan.bytes_per_token for member in group.segments) for group in row_groups(segments))


def _tap_bytes(plan: Plan, tap: TapPlan) -> int:
    """Of all its rows, before compression."""
    return sum(part.bytes_per_token for part in tap.parts) * plan.rows.row_tokens * plan.rows.count


def _stored_bytes(segment: Segment, tap: TapPlan) -> int:
    """Of all its rows, as they are compressed; with more than `SAMPLED_SHARDS` shards an estimate from some of them.

    Rows that are not committed yet count like those that are.
    """
    plan, shards = segment.plan, sorted(_shards_done(segment))
    if tap.compress == "none" or not shards:
        return _tap_bytes(plan, tap)
    drawn = [shards[place] for place in sorted({*np.linspace(0, len(shards) - 1, SAMPLED_SHARDS).round().astype(int)})]
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


def describe_codec(tap: TapPlan) -> str:
    """`int8, groups of 32, rotated, delta, keyframes every 8, zstd`."""
    words = [tap.codec]
    if tap.k is not None:
        words.append(f"the largest {tap.k}")
    if tap.group is not None:
        words.append(f"groups of {tap.group}" if tap.group else "one group")
    if tap.rotate:
        words.append("rotated")
    if tap.delta:
        words.append(f"delta, keyframes every {tap.keyframe_every}" if tap.keyframe_every else "delta")
    if tap.compress != "none":
        words.append(tap.compress)
    return ", ".join(words)


def _read_stats(segment: Segment) -> dict[str, TapStats]:
    """Of the whole segment; of an unfinished one, of its first committed shard: a look, not a sum."""
    store, plan, shards = segment.store, segment.plan, _shards_done(segment)
    if segment.committed is None:
        key = f"{layout.segment_prefix(plan.segment)}/stats.json"
        return (read_canonical(store, key, Stats) or from_canonical(Stats, b"", store.where(key))).taps
    if not shards:
        return {}
    key = layout.receipt_key(plan.segment, min(shards))
    return (read_canonical(store, key, ShardReceipt) or from_canonical(ShardReceipt, b"", store.where(key))).stats


def _is_compressed(found: dict[str, Any]) -> bool:
    return any(tap["compress"] != "none" for tap in found["taps"])


def _print(found: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    rows, shards, teacher, numerics = found["rows"], found["shards"], found["teacher"], found["numerics"]
    state = "finished" if found["finished"] else "not finished: run the same `distillcache build` again"
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("cache", f"{found['cache']}  ({state})")
    facts.add_row("teacher", f"{teacher['path']}  ({teacher['num_blocks']} blocks of {teacher['hidden_size']})")
    facts.add_row("weights", teacher["weights_digest"])
    facts.add_row("computed", f"{numerics['dtype']} on {numerics['platform']}, jax {numerics['versions']['jax']}")
    facts.add_row("rows", f"{rows['train']} train + {rows['eval']} eval of {rows['row_tokens']} tokens")
    facts.add_row("tokens", f"{rows['tokens']:,} without padding")
    facts.add_row("shards", f"{shards['done']} of {shards['of']} done, {shards['rows_per_shard']} rows each")
    stored = f"  (compressed to about {found['stored_bytes'] / 1e9:.2f} GB)" if _is_compressed(found) else ""
    facts.add_row("size", f"{found['bytes'] / 1e9:.2f} GB, {found['bytes_per_token']:,} bytes a token{stored}")
    facts.add_row("made", f"{found['created'].get('at')} on {found['created'].get('host')}")
    console.print(facts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (
        ("tap", "left"),
        ("codec", "left"),
        ("shape", "left"),
        ("dtype", "left"),
        ("bytes/token", "right"),
        ("rms", "right"),
        ("max", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for tap in found["taps"]:
        rms = tap.get("rms")
        for number, (array, facts_of) in enumerate(tap["arrays"].items()):
            first = number == 0
            table.add_row(
                array if tap["segment"] == found["segments"][0]["segment"] else f"{array} ({tap['segment']})",
                tap["codec"] if first else "",
                "x".join(map(str, facts_of["shape"])),
                facts_of["bits_of"] or facts_of["dtype"],
                f"{tap['bytes_per_token']:,}" if first else "",
                f"{rms[0]:.2g} to {rms[-1]:.2g}" if rms and first else "",
                f"{max(tap['abs_max']):.3g}" if rms and first else "",
            )
    console.print()
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
