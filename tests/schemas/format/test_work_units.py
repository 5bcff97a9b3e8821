"""A plan's work units: whole teacher batches and whole shards, all of them, each once."""

import pytest

from distillcache.schemas.config.teacher import TapConfig
from distillcache.tools.bench.synthetic_cache import synthetic_plan


@pytest.mark.parametrize(
    ("rows", "batch_rows", "shard_rows"), [(1, 4, 2), (17, 4, 2), (17, 2, 4), (24, 4, 4), (25, 6, 2)]
)
def test_units_are_whole_batches_and_whole_shards(rows: int, batch_rows: int, shard_rows: int) -> None:
    plan = synthetic_plan(rows, (2, 4, 8), {"attn_out": TapConfig()}, shard_rows=shard_rows)
    plan = plan.model_copy(update={"batch_rows": batch_rows})
    assert plan.unit_rows % batch_rows == plan.unit_rows % shard_rows == 0
    assert [shard for unit in range(plan.num_units) for shard in plan.shards_of(unit)] == list(range(plan.num_shards))
    for unit in range(plan.num_units):
        first, last = (plan.shard_range(shard) for shard in (plan.shards_of(unit)[0], plan.shards_of(unit)[-1]))
        assert first[0] == unit * plan.unit_rows
        assert last[1] == min(first[0] + plan.unit_rows, rows)
        assert {plan.unit_of(shard) for shard in plan.shards_of(unit)} == {unit}
