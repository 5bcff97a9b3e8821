"""Faults put into a cache by the repository's own writer: receipts, index and manifest agree with the changed bytes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from distillcache.cache_builder.record.finish import finish_segment
from distillcache.cache_builder.record.writer import ShardBuffer, commit_shard
from distillcache.models.recorder import SlotSums
from distillcache.schemas.cache.segment import Segment, open_cache
from distillcache.schemas.codecs import TopK
from distillcache.schemas.format.layout import MANIFEST
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.store.store import Store
from distillcache.tools.look.stored_rows import StoredTap

Values = dict[str, np.ndarray]  # tap -> [rows, S, T, D]; of topk_logits also its other parts, by their arrays' names
Change = Callable[[int, list[Row], Values], tuple[list[Row], Values]]  # (shard, ...) -> what is stored instead


def plant(cache: Path, to: Path, change: Change, *, tidy: bool = True) -> Path:
    """A copy of a cache with other rows and numbers in it, whole by its own digests.

    Args:
        tidy: finish it; otherwise it is as it was before that, with all receipts.
    """
    shutil.copytree(cache, to)
    store = Store(str(to))
    (segment,) = open_cache(store)
    taps = [StoredTap(segment, tap) for tap in segment.plan.taps]
    shards = [_shard(segment, taps, shard) for shard in range(segment.plan.num_shards)]
    for shard, (rows, values) in enumerate(shards):
        rows, values = change(shard, rows, values)
        commit_shard(store, _buffer(segment.plan, taps, shard, rows, values))
    store.delete(MANIFEST)
    if tidy:
        finish_segment(store, segment.plan)
    return to


def _shard(segment: Segment, taps: list[StoredTap], shard: int) -> tuple[list[Row], Values]:
    numbers = range(*segment.plan.shard_range(shard))
    values = {
        each.tap.name: np.stack([np.stack([v for _, v in each.decoded(each.read(row))]) for row in numbers])
        for each in taps
    }
    for each in (each for each in taps if each.tap.k is not None):
        codes = [each.read(row) for row in numbers]
        values |= {part.array: np.stack([row[part.part] for row in codes]) for part in each.tap.parts[1:]}
    return [segment.row(row) for row in numbers], values


def _buffer(plan: Plan, taps: list[StoredTap], shard: int, rows: list[Row], values: Values) -> ShardBuffer:
    buffer, codes, sums = ShardBuffer(shard, plan), {}, {}
    real = np.stack([row.segment_ids > 0 for row in rows])[:, None, :, None]
    for each in taps:
        name = each.tap.name
        given: Any = jnp.moveaxis(jnp.asarray(values[name]), 1, 0)
        if each.tap.k is not None:
            ids, total = (jnp.moveaxis(jnp.asarray(values[part.array]), 1, 0) for part in each.tap.parts[1:])
            given = TopK(given, ids, total[..., 0])
        encoded = each.codec.encode(given)
        codes |= {part.array: np.moveaxis(np.asarray(encoded[part.part]), 0, 1) for part in each.tap.parts}
        finite = np.isfinite(values[name]) & real
        clean = np.where(finite, values[name], 0)
        inner = (2, 3)
        sums[name] = SlotSums(
            np.square(clean.astype(np.float64)).sum(inner),
            np.abs(clean).max(inner),
            (real & ~np.isfinite(values[name])).sum(inner),
        )
    buffer.put(rows, codes, sums)
    return buffer


def in_every_row(tap: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """`change` of `[rows, S, T, D]` of one tap, in every shard."""
    return lambda _, rows, values: (rows, {**values, tap: change(values[tap])})


def with_rows(change: Callable[[Row], Row]) -> Change:
    """Other tokens or masks beside the same numbers."""
    return lambda _, rows, values: ([change(row) for row in rows], values)


def changed(row: Row, **values: np.ndarray) -> Row:
    return replace(row, **values)
