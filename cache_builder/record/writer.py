"""Writing of a shard from memory to the store: objects, then the receipt.

An object is encoded in memory (objects.py) and stored by one write: no shard is ever read back to be completed, a
stale object of a killed build is replaced whatever it holds, and its length and digest are known.
"""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash

from distillcache.cache_builder.record.objects import encode_object
from distillcache.models.recorder import SlotSums
from distillcache.schemas.errors import DistillcacheError, FolderTakenError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import (
    NumericsPlan,
    ObjectReceipt,
    PartPlan,
    PartReceipt,
    Plan,
    ShardReceipt,
    TapStats,
)
from distillcache.schemas.format.rows import Row, encode_row, pack_rows
from distillcache.schemas.format.times import ShardSeconds
from distillcache.schemas.store.store import Store

Put = Callable[[str, bytes], None]


@dataclass
class ShardBuffer:
    """One shard being filled: codes `[rows, S, T, W]` by array name, and the statistics of its rows.

    begun: when the first of its numbers were requested, by `time.perf_counter`. computing: seconds of waiting for them.
    """

    shard: int
    plan: Plan
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    stats: dict[str, TapStats] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    computing: float = 0.0

    def __post_init__(self) -> None:
        start, stop = self.plan.shard_range(self.shard)
        tokens = self.plan.rows.row_tokens
        for tap in self.plan.taps:
            for part in tap.parts:
                self.codes[part.array] = np.empty((stop - start, part.slots, tokens, part.width), part.dtype)

    def put(self, rows: list[Row], codes: Mapping[str, np.ndarray], sums: Mapping[str, SlotSums]) -> None:
        """Append consecutive rows: their codes (array name -> `[rows, S, T, W]`) and sums (`[rows, S]`)."""
        place = len(self.rows)
        for array, values in codes.items():
            self.codes[array][place : place + len(rows)] = values
        self.rows.extend(rows)
        tokens = sum(int(np.count_nonzero(row.segment_ids)) for row in rows)
        numbers = {tap.name: tap.numbers_per_token(self.plan.teacher.hidden_size) for tap in self.plan.taps}
        for name, new in sums.items():
            added = TapStats(
                square_sum=tuple(np.asarray(new.square_sum, np.float64).sum(axis=0).tolist()),
                abs_max=tuple(np.asarray(new.abs_max, np.float64).max(axis=0).tolist()),
                nonfinite=tuple(np.asarray(new.nonfinite).sum(axis=0).tolist()),
                count=tokens * numbers[name],
            )
            self.stats[name] = add_stats(self.stats[name], added) if name in self.stats else added

    @property
    def is_full(self) -> bool:
        start, stop = self.plan.shard_range(self.shard)
        return len(self.rows) == stop - start


def add_stats(one: TapStats, other: TapStats) -> TapStats:
    """The statistics of two disjoint sets of tokens together."""
    return TapStats(
        square_sum=tuple(a + b for a, b in zip(one.square_sum, other.square_sum, strict=True)),
        abs_max=tuple(max(a, b) for a, b in zip(one.abs_max, other.abs_max, strict=True)),
        nonfinite=tuple(a + b for a, b in zip(one.nonfinite, other.nonfinite, strict=True)),
        count=one.count + other.count,
    )


def commit_shard(store: Store, buffer: ShardBuffer, numerics: NumericsPlan | None = None) -> ShardReceipt:
    """Write a full shard's objects and rows, then its receipt, each awaited before the next kind.

    Args:
        numerics: where this process's platform differs from the plan's.

    Raises:
        StorageError: a write failed; the message names the shard, and there is no receipt.
    """
    plan, shard, start_s = buffer.plan, buffer.shard, time.perf_counter()
    try:
        receipt = encode_shard(buffer, store.write, numerics)
        now = time.perf_counter()
        seconds = {"compute": buffer.computing, "write": now - start_s, "total": now - buffer.begun}
        rounded = {phase: round(value, 4) for phase, value in seconds.items()}
        receipt = receipt.model_copy(update={"seconds": ShardSeconds(**rounded, host=socket.gethostname())})
        store.write(layout.receipt_key(plan.segment, shard), to_canonical(receipt))
    except FolderTakenError:
        raise
    except DistillcacheError as error:
        start, stop = plan.shard_range(shard)
        facts = {"shard": f"{shard} (rows {start} to {stop - 1}), not committed", **error.facts}
        raise StorageError(f"the build stopped: {error.what}", facts, error.next) from error
    return receipt


def encode_shard(buffer: ShardBuffer, put: Put, numerics: NumericsPlan | None = None) -> ShardReceipt:
    """The receipt of a full shard, after `put(key, bytes)` of its objects and its rows, one at a time."""
    plan, shard = buffer.plan, buffer.shard
    parts = {
        part.array: _put_part(put, plan, part, shard, buffer.codes[part.array])
        for tap in plan.taps
        for part in tap.parts
    }
    return ShardReceipt(
        shard=shard,
        rows=plan.shard_range(shard),
        rows_file=None if plan.rows_of else _put_rows(put, buffer),
        parts=parts,
        stats=buffer.stats,
        numerics=numerics,
        plan=digest_bytes(to_canonical(plan)),
    )


def _put_rows(put: Put, buffer: ShardBuffer) -> ObjectReceipt:
    data = pack_rows([encode_row(row) for row in buffer.rows])
    put(layout.rows_key(buffer.plan.segment, buffer.shard), data)
    return ObjectReceipt(length=len(data), digest=digest_bytes(data))


def _put_part(put: Put, plan: Plan, part: PartPlan, shard: int, codes: np.ndarray) -> PartReceipt:
    objects = []
    for group, (start, stop) in enumerate(part.object_ranges()):
        data = encode_object(plan, part, codes[:, start:stop])
        put(layout.object_key(plan.segment, part.array, shard, group), data)
        objects.append(ObjectReceipt(length=len(data), digest=digest_bytes(data)))
    chunks = "".join(xxhash.xxh3_64_hexdigest(chunk) for row in codes for chunk in row)
    return PartReceipt(digest=digest_bytes(codes), chunks=chunks, objects=tuple(objects))
