"""Rows for which the teacher can compute any taps: those of a cache with other taps planned, or prepared rows.

A *planned segment* looks like one of a cache, but nothing of its taps is stored: its plan says how the teacher would
give them.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.describe import attention_norms, describe_numerics, describe_rows
from distillcache.schemas.cache.addressing import RowGroup
from distillcache.schemas.cache.segment import Segment, segment_name
from distillcache.schemas.config import ResidConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.manifest import Plan, TapPlan, TeacherPlan
from distillcache.schemas.format.rows import Row, RowReader
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.format.tap_plan import choose_taps
from distillcache.schemas.store.store import Store


class PlannedSegment(Segment):
    """A segment whose rows lie elsewhere and whose taps lie nowhere."""

    def __init__(self, store: Store, plan: Plan, row: Callable[[int], Row], side: Mapping[str, np.ndarray]) -> None:
        """`side`: what a side file would hold."""
        self.store, self.plan, self.entry, self.committed = store, plan, None, None
        self._row, self._side = row, dict(side)

    def row(self, index: int) -> Row:
        return self._row(index)

    def side(self) -> dict[str, np.ndarray]:
        return self._side


def planned_groups(
    groups: Sequence[RowGroup],
    taps: TapsConfig | None,
    dtype: str | None,
    batch_rows: int | None,
) -> tuple[RowGroup, ...]:
    """A cache's groups of rows, with other taps, another dtype or other batches than they were built with.

    Args:
        taps: of all blocks, in place of those that the segments hold; None: those.
    """
    return tuple(
        RowGroup(
            tuple(
                _planned(group, segment, taps, dtype, batch_rows) for segment in group.segments[: 1 if taps else None]
            )
        )
        for group in groups
    )


def prepared_group(
    store: Store, rows: RowReader, teacher: TeacherPlan, decoder: Decoder, taps: TapsConfig | None, batch_rows: int
) -> RowGroup:
    """Prepared rows, with all blocks of the teacher.

    Args:
        decoder: the teacher, in the dtype that it computes in.
        taps: None: attention output and stream, without loss.
    """
    dtype = str(decoder.dtype)
    described = describe_rows(rows)
    chosen = _all_blocks(taps or lossless_taps(dtype), teacher, described.vocab_size)
    plan = Plan(
        segment=segment_name(0),
        teacher=teacher,
        rows=described,
        taps=chosen,
        blocks=tuple(range(teacher.num_blocks)),
        batch_rows=batch_rows,
        shard_rows=batch_rows,
        numerics=describe_numerics(dtype, ()),
        config={},
        created={},
    )
    side = {**attention_norms(decoder), **signs_of(plan)}
    return RowGroup((PlannedSegment(store, plan, rows.__getitem__, side),))


def lossless_taps(dtype: str) -> TapsConfig:
    """Attention output and stream as a teacher of this dtype has them, bit for bit."""
    tap = TapConfig(codec="bf16" if dtype == "bfloat16" else "f32")
    return TapsConfig(attn_out=tap, resid=ResidConfig(codec=tap.codec))


def check_vocabulary(rows: RowReader, url: str, path: str, model: ModelConfig) -> None:
    """Raise `ConfigError` where prepared rows hold tokens that the teacher does not know."""
    if rows.index.vocab_size > model.vocab_size:
        raise ConfigError(
            "the rows were made with a tokenizer that is not the teacher's",
            {
                "rows": f"{url}  ids up to {rows.index.vocab_size - 1}",
                "teacher": f"{path}  knows {model.vocab_size:,} ids",
            },
            "prepare the text again with the teacher's tokenizer",
        )


def _planned(
    group: RowGroup, segment: Segment, taps: TapsConfig | None, dtype: str | None, batch_rows: int | None
) -> PlannedSegment:
    plan = segment.plan
    changes: dict[str, object] = {"batch_rows": batch_rows or plan.batch_rows}
    if dtype:
        changes["numerics"] = plan.numerics.model_copy(update={"dtype": dtype})
    if taps:
        chosen = _all_blocks(taps, plan.teacher, plan.rows.vocab_size)
        changes |= {"taps": chosen, "blocks": tuple(range(plan.teacher.num_blocks))}
    plan = plan.model_copy(update=changes)
    side = segment.side() | (signs_of(plan) if taps else {})
    return PlannedSegment(segment.store, plan, group.base.row, side)


def _all_blocks(taps: TapsConfig, teacher: TeacherPlan, token_ids: int) -> tuple[TapPlan, ...]:
    blocks = tuple(range(teacher.num_blocks))
    return tuple(choose_taps(taps, blocks, len(blocks), teacher.hidden_size, teacher.vocab_size, token_ids))
