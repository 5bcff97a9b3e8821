"""Memory over a long epoch, and the cost of a step in a cache of a million rows."""

import pytest

from distillcache.schemas.runtime.memory import anonymous_kib
from distillcache.tools.bench.synthetic_cache import synthetic_plan, write_cache, write_large_index
from distillcache.trainer.feed.cache_source import CacheSource, make_feed

WARM_STEPS, STEPS = 40, 600


@pytest.mark.slow
def test_memory_stays_flat_over_a_long_epoch(tmp_path):
    """17 GB are read in batches of 28 MB, from more shards than the source keeps records of."""
    write_cache(tmp_path, synthetic_plan(200, (3, 512, 576), {"resid": "bf16", "attn_out": "int8"}, shard_rows=2))
    source = CacheSource(str(tmp_path))
    with make_feed(source, global_batch_rows=8, seed=0) as feed:
        for _ in range(WARM_STEPS):
            next(feed)
        before = anonymous_kib()
        for _ in range(STEPS - WARM_STEPS):
            next(feed)
        grown = anonymous_kib() - before
    batch_kib = source.bytes_per_row * 8 / 1024
    assert grown < batch_kib, f"{grown} KiB more after {STEPS} batches of {batch_kib:.0f} KiB"


def test_a_large_cache_is_read_by_offset(tmp_path):
    """Half a million shards: the last row costs one record of the index, not the index."""
    plan = synthetic_plan(1_000_000, (2, 8, 64), {"attn_out": "bf16"}, shard_rows=2)
    write_large_index(tmp_path, plan)
    before = anonymous_kib()
    source = CacheSource(str(tmp_path), ("attn_out",))
    assert len(source) == 1_000_000
    assert source[[999_999, 999_998]]["attn_out"]["codes"].shape == (2, 2, 8, 64)
    assert anonymous_kib() - before < 20_000
