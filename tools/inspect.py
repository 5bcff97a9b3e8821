"""`distillcache inspect`: what a cache holds, finished or not, from its plan and receipts alone."""

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cache_builder.finish import committed_shards
from schemas import layout, settings
from schemas.canonical import from_canonical
from schemas.config import InspectConfig
from schemas.errors import InputError
from schemas.manifest import Plan, ShardReceipt, Stats, TapPlan, TapStats
from schemas.segment import read_manifest, read_plan
from schemas.storage import Store


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Print the cache's description as tables or as one JSON object."""
    config = settings.parse(InspectConfig, argv, command, positional=("cache",))
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
    plan = read_plan(store, "0000")
    if plan is None:
        raise InputError("there is no cache here", {"cache": store.url}, "check the path, or build it first")
    finished = read_manifest(store) is not None
    shards_done = set(range(plan.num_shards)) if finished else committed_shards(store, plan)
    stats = _read_stats(store, plan, finished, shards_done)
    return {
        "cache": store.url,
        "finished": finished,
        "format": plan.format,
        "created": plan.created,
        "teacher": plan.teacher.model_dump(),
        "numerics": plan.numerics.model_dump(mode="json"),
        "rows": {
            "count": plan.rows.count,
            "train": plan.rows.count - len(plan.rows.eval_indices),
            "eval": len(plan.rows.eval_indices),
            "row_tokens": plan.rows.row_tokens,
            "tokens": plan.rows.tokens,
        },
        "blocks": list(plan.blocks),
        "shards": {"done": len(shards_done), "of": plan.num_shards, "rows_per_shard": plan.shard_rows},
        "bytes": plan.bytes_per_row * plan.rows.count,
        "bytes_per_token": plan.bytes_per_token,
        "taps": [_describe_tap(plan, tap, stats.get(tap.name)) for tap in plan.taps],
    }


def _describe_tap(plan: Plan, tap: TapPlan, stats: TapStats | None) -> dict[str, Any]:
    token_bytes = sum(len(tap.slots) * part.width * layout.ITEM_BYTES[part.dtype] for part in tap.parts)
    described: dict[str, Any] = {
        "name": tap.name,
        "codec": tap.codec,
        "slots": list(tap.slots),
        "arrays": {
            part.array: {
                "shape": [plan.rows.count, len(tap.slots), plan.rows.row_tokens, part.width],
                "dtype": part.dtype,
                "bits_of": part.bits_of,
            }
            for part in tap.parts
        },
        "objects_per_shard": len(tap.object_ranges()) * len(tap.parts),
        "bytes_per_token": token_bytes,
        "bytes": token_bytes * plan.rows.row_tokens * plan.rows.count,
    }
    if stats is not None and stats.count:
        described["rms"] = [math.sqrt(total / stats.count) for total in stats.square_sum]
        described["abs_max"] = list(stats.abs_max)
        described["nonfinite"] = sum(stats.nonfinite)
    return described


def _read_stats(store: Store, plan: Plan, finished: bool, shards: set[int]) -> dict[str, TapStats]:
    """Of the whole segment; of an unfinished one, of its first committed shard: a look, not a sum."""
    if finished:
        key = f"{layout.segment_prefix(plan.segment)}/stats.json"
        data = store.read(key)
        return from_canonical(Stats, data or b"", store.where(key)).taps
    if not shards:
        return {}
    key = layout.receipt_key(plan.segment, min(shards))
    return from_canonical(ShardReceipt, store.read(key) or b"", store.where(key)).stats


def _print(found: dict[str, Any]) -> None:
    console = Console()
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
    facts.add_row("size", f"{found['bytes'] / 1e9:.2f} GB, {found['bytes_per_token']:,} bytes a token")
    facts.add_row("made", f"{found['created'].get('at')} on {found['created'].get('host')}")
    console.print(facts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (
        ("tap", "left"),
        ("codec", "left"),
        ("shape", "left"),
        ("dtype", "left"),
        ("bytes/token", "right"),
        ("GB", "right"),
        ("rms first..last", "right"),
        ("abs max", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for tap in found["taps"]:
        rms = tap.get("rms")
        for number, (array, facts_of) in enumerate(tap["arrays"].items()):
            table.add_row(
                array,
                tap["codec"],
                str(facts_of["shape"]),
                facts_of["dtype"] + (f" (bits of {facts_of['bits_of']})" if facts_of["bits_of"] else ""),
                f"{tap['bytes_per_token']:,}" if number == 0 else "",
                f"{tap['bytes'] / 1e9:.2f}" if number == 0 else "",
                f"{rms[0]:.3g}..{rms[-1]:.3g}" if rms and number == 0 else "",
                f"{max(tap['abs_max']):.3g}" if rms and number == 0 else "",
            )
    console.print()
    console.print(table)
