"""Caches of random numbers in any shape, without a teacher, for `bench feed` and tests of size and memory.

They hold what a feed reads, committed as a build commits it: plan, objects, rows, index, manifest.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from distillcache.cache_builder.record.finish import finish_segment
from distillcache.cache_builder.record.plan import make_plan
from distillcache.cache_builder.record.writer import ShardBuffer, commit_shard
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.recorder import SlotSums
from distillcache.schemas.config import BuildConfig, DataConfig, TapConfig, TapsConfig, TeacherConfig
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.index import encode_record, record_dtype
from distillcache.schemas.format.manifest import Manifest, Plan, RowsPlan, SegmentEntry, ShardReceipt, TeacherPlan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.store.store import Store

SEGMENT = "0000"
VOCAB_SIZE = 49152

Codes = Mapping[str, np.ndarray]  # array name -> [rows, S, T, W], as the disk holds them


def synthetic_plan(
    rows: int, shape: tuple[int, int, int], taps: Mapping[str, str | TapConfig], shard_rows: int, object_mib: int = 256
) -> Plan:
    """The plan of such a cache.

    Args:
        rows: N.
        shape: (L, T, D) of a tap.
        taps: tap -> codec, by its name or with its options.
    """
    blocks, row_tokens, hidden = shape
    chosen = {
        name: codec if isinstance(codec, TapConfig) else TapConfig.model_validate({"codec": codec})
        for name, codec in taps.items()
    }
    config = BuildConfig(
        cache="synthetic",
        teacher=TeacherConfig(path="none"),
        data=DataConfig(path="none", row_tokens=row_tokens),
        taps=TapsConfig.model_validate({name: chosen.get(name) for name in ("attn_out", "resid", "mlp_out")}),
        batch_rows=shard_rows,
        shard_rows=shard_rows,
        object_mib=object_mib,
    )
    model = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_heads=1,
        num_kv_heads=1,
        head_dim=hidden,
        layers=(LayerGroup((BlockKind(),), blocks),),
    )
    teacher = TeacherPlan(
        path="none",
        weights_digest="0",
        num_blocks=blocks,
        hidden_size=hidden,
        vocab_size=VOCAB_SIZE,
        family="none",
        norm_eps=model.norm_eps,
    )
    counted = RowsPlan(
        count=rows,
        eval_indices=(),
        row_tokens=row_tokens,
        tokens=rows * row_tokens,
        content_digest="0",
        text_digest="0",
        tokenizer_digest="0",
        vocab_size=VOCAB_SIZE,
        eos_id=0,
    )
    return make_plan(config, SEGMENT, model, teacher, counted, "bfloat16")


def write_cache(
    folder: Path, plan: Plan, codes_of: Callable[[int], Codes] | None = None, distinct: int | None = None
) -> None:
    """Write and finish the cache.

    Args:
        codes_of: the codes of a shard; default: random bytes.
        distinct: how many different shards there are; those behind them are the same files once more, as hard links.
    """
    store, receipts = _begin(folder, plan), []
    for shard in range(plan.num_shards if distinct is None else distinct):
        receipts.append(_commit(store, plan, shard, codes_of(shard) if codes_of else random_codes(plan, shard)))
    for shard in range(len(receipts), plan.num_shards):
        _link(store, plan, shard, receipts[shard % len(receipts)])
    finish_segment(store, plan)


def write_large_index(folder: Path, plan: Plan) -> None:
    """A finished cache of which only the last shard exists; the index of all of them has its full length (sparse)."""
    store, size, last = _begin(folder, plan), record_dtype(plan).itemsize, plan.num_shards - 1
    receipt = _commit(store, plan, last, random_codes(plan, last))
    prefix = layout.segment_prefix(SEGMENT)
    with (folder / prefix / "index.bin").open("wb") as file:
        file.seek(last * size)
        file.write(encode_record(plan, receipt))
    files = {name: digest_bytes(store.read(f"{prefix}/{name}") or b"") for name in ("plan.json", "side.safetensors")}
    entry = SegmentEntry(
        segment=SEGMENT, rows=plan.rows.count, index_digest="0", index_length=plan.num_shards * size, files=files
    )
    manifest = Manifest(segments=(entry,), tokenizer_digest="0", rows=plan.rows.count, tokens=plan.rows.tokens)
    store.write(layout.MANIFEST, to_canonical(manifest))


def _link(store: Store, plan: Plan, shard: int, like: ShardReceipt) -> None:
    """Commit a shard that is the same as another one."""
    keys = [(layout.rows_key(SEGMENT, like.shard), layout.rows_key(SEGMENT, shard))]
    for part in (part for tap in plan.taps for part in tap.parts):
        for group in range(len(part.object_ranges())):
            old, new = (layout.object_key(SEGMENT, part.array, each, group) for each in (like.shard, shard))
            keys.append((old, new))
    for old, new in keys:
        target = Path(store.url) / new  # a local folder
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(Path(store.url) / old, target)
    receipt = like.model_copy(update={"shard": shard, "rows": plan.shard_range(shard)})
    store.write(layout.receipt_key(SEGMENT, shard), to_canonical(receipt))


def random_codes(plan: Plan, shard: int) -> dict[str, np.ndarray]:
    """Random bytes in the shapes of a shard's arrays, the same for the same shard."""
    start, stop = plan.shard_range(shard)
    rng, codes = np.random.default_rng(shard), {}
    for tap in plan.taps:
        for part in tap.parts:
            dtype, shape = np.dtype(part.dtype), (stop - start, part.slots, plan.rows.row_tokens, part.width)
            codes[part.array] = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    return codes


def _begin(folder: Path, plan: Plan) -> Store:
    store = Store(str(folder))
    store.write(layout.plan_key(SEGMENT), to_canonical(plan))
    store.write(f"{layout.segment_prefix(SEGMENT)}/side.safetensors", safetensors.numpy.save(signs_of(plan)))
    return store


def _commit(store: Store, plan: Plan, shard: int, codes: Codes) -> ShardReceipt:
    start, stop = plan.shard_range(shard)
    rng, tokens = np.random.default_rng(shard), plan.rows.row_tokens
    ones = np.ones(tokens, np.int32)
    rows = [
        Row(rng.integers(0, VOCAB_SIZE, tokens, np.int32), np.arange(tokens, dtype=np.int32), ones, ones > 0, "train")
        for _ in range(start, stop)
    ]
    zeros = {tap.name: np.zeros((stop - start, len(tap.slots))) for tap in plan.taps}
    buffer = ShardBuffer(shard, plan)
    buffer.put(rows, codes, {name: SlotSums(zero, zero, zero.astype(int)) for name, zero in zeros.items()})
    return commit_shard(store, buffer)
