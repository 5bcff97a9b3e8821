"""Sizes of a planned cache."""

from distillcache.cache_builder.build import SEGMENT
from distillcache.cache_builder.record.plan import make_plan
from distillcache.models.config import ModelConfig
from distillcache.models.describe import describe_teacher
from distillcache.schemas.config import BuildSpec
from distillcache.schemas.format.index import record_dtype
from distillcache.schemas.format.manifest import Plan, RowsPlan

ROW_BYTES_PER_TOKEN = 13  # tokens, positions, segments as int32, and the loss mask


def plan_for(spec: BuildSpec, model: ModelConfig, rows: RowsPlan, teacher: str = "") -> Plan:
    """The plan that a build would make, with the teacher's weights unread."""
    described = describe_teacher(teacher, model, digest="")
    return make_plan(spec, SEGMENT, model, described, rows, spec.dtype or "")


def total_bytes(plan: Plan) -> int:
    """Return the bytes of the finished cache: taps, rows, index and, where it is kept, the teacher's head."""
    per_row = plan.bytes_per_row + ROW_BYTES_PER_TOKEN * plan.rows.row_tokens
    return plan.rows.count * per_row + plan.num_shards * record_dtype(plan).itemsize + head_bytes(plan)


def head_bytes(plan: Plan) -> int:
    """Return the bytes of the teacher's head in the cache, 2 a number if the plan does not name its dtype."""
    numbers = plan.teacher.vocab_size * plan.teacher.hidden_size if plan.keeps_head else 0
    return numbers * (4 if plan.numerics.dtype == "float32" else 2)
