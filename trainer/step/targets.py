"""Which stored tensors each student block is trained against: rows of a table, one a block.

Student block i stands for a *span* of the teacher's blocks [a, b), usually one. It is given the stream that enters a;
its attention is compared with the sum of what the span's attentions added, its MLP with the sum of their MLPs:
`resid[b] - resid[a] - sum of attn_out`, or the recorded `mlp_out`.

The table is data, not part of the program: with a mesh axis `block`, each group of devices runs the same program on
its own rows. Rows are arranged as the parameters are: by layer group, then `[repeats, places of the pattern]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillcache.models.config import ModelConfig
from distillcache.models.surgery.sizes import kept_blocks
from distillcache.schemas.codecs import Codec
from distillcache.schemas.config.student import StudentConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.feed.source import Source

FROM_TEACHER = ("teacher", "random")  # student.init: of the teacher's config, so its blocks are known
Table = tuple[dict[str, np.ndarray], ...]  # for every layer group: name -> [repeats, places, ...]


@dataclass(frozen=True)
class Span:
    """The teacher's blocks [first, last) that a student block stands for."""

    first: int
    last: int


@dataclass(frozen=True)
class TapReading:
    """The static side of a table: how a batch's stacks are read.

    codecs: by tap. hidden: the teacher's width. in_step: block i's stream lies at index i and, if needed, the one
    leaving it at i + 1, so that a delta codec decodes one place a block.
    """

    codecs: Mapping[str, Codec]
    hidden: int
    in_step: bool

    def __hash__(self) -> int:
        return hash((frozenset(self.codecs), self.hidden, self.in_step))

    @property
    def records_mlp(self) -> bool:
        return "mlp_out" in self.codecs


def block_starts(config: StudentConfig, teacher_blocks: int) -> list[int] | None:
    """The teacher's blocks at which the student's begin: the layer map, or what `drop_blocks` leaves; None: block for
    block.

    A student whose first blocks were dropped begins with the teacher's stream all the same: at block 0.
    """
    if config.layer_map is not None or config.init not in FROM_TEACHER:
        return config.layer_map
    for op in config.surgery:
        if op.op == "drop_blocks":
            return [0, *kept_blocks(op, teacher_blocks)[1:]]
    return None


def real_vocab(student: ModelConfig, source: Source) -> int | None:
    """The tokenizer's highest id plus one, where padding is masked: where the student and the teacher have different
    numbers of rows in their vocabularies, or the recorded logits leave padding out. None elsewhere: padding is then
    trained like any other row."""
    taps = [tap for segment in source.segments() for tap in segment.plan.taps]
    if student.vocab_size != source.plan.teacher.vocab_size or any(tap.vocab_size is not None for tap in taps):
        return source.plan.rows.vocab_size
    return None


def student_spans(student: ModelConfig, teacher_blocks: int, layer_map: Sequence[int] | None) -> tuple[Span, ...]:
    """The spans of the student's blocks.

    Raises:
        ConfigError: the depths differ and no layer map says how, or it does not fit.
    """
    depth = student.num_blocks
    if layer_map is None:
        if depth != teacher_blocks:
            raise ConfigError(
                "the cache and the student disagree on the number of blocks",
                {"cache": teacher_blocks, "student": depth},
                "set student.layer_map to the teacher's blocks at which the student's begin",
            )
        return tuple(Span(block, block + 1) for block in range(depth))
    starts = list(layer_map)
    check_ascending(starts, teacher_blocks)
    if len(starts) != depth:
        raise ConfigError(
            "student.layer_map does not fit",
            {"found": starts, "expected": f"{counted(depth, 'number')}, one for each of the student's blocks"},
            "name the teacher's block at which each of the student's begins",
        )
    return tuple(Span(first, last) for first, last in zip(starts, [*starts[1:], teacher_blocks], strict=True))


def check_ascending(layer_map: Sequence[int], teacher_blocks: int) -> None:
    """Raise `ConfigError` unless these are the teacher's blocks, each once, in order."""
    starts = list(layer_map)
    if twice := sorted({block for block in starts if starts.count(block) > 1}):
        raise ConfigError(
            "student.layer_map does not fit: it names a block twice",
            {"found": starts, "twice": twice},
            "name each block once: two of the student's blocks cannot stand for the same ones",
        )
    if not starts or starts != sorted(starts) or starts[0] < 0 or starts[-1] >= teacher_blocks:
        raise ConfigError(
            "student.layer_map does not fit",
            {"found": starts, "expected": f"ascending numbers from 0 to {teacher_blocks - 1}, the teacher's blocks"},
            "name the teacher's block at which each of the student's begins",
        )


def make_table(
    student: ModelConfig,
    spans: Sequence[Span],
    places: Mapping[str, Mapping[int, int]],
    weights: Mapping[int, float],
    *,
    needs_leaving: bool,
) -> Table:
    """The table of a batch whose stacks hold the teacher's slots at `places`.

    Args:
        places: tap -> slot -> place on the stack's slot axis.
        weights: of the feature loss, by student block; a block that is not here is not trained.
        needs_leaving: a trained block needs the stream that leaves it, to derive its MLP's output.
    """
    width = max(span.last - span.first for span in spans)
    rows = [
        _row(span, places, weights.get(block), width, needs_leaving) | {"block": block}
        for block, span in enumerate(spans)
    ]
    table, start = [], 0
    for group in student.layers:
        size = len(group.pattern)
        mine = rows[start : start + size * group.repeats]
        table.append(
            {
                name: np.stack([np.asarray(row[name]) for row in mine]).reshape(
                    group.repeats, size, *np.shape(mine[0][name])
                )
                for name in mine[0]
            }
        )
        start += len(mine)
    return tuple(table)


def _row(
    span: Span, places: Mapping[str, Mapping[int, int]], weight: float | None, width: int, needs_leaving: bool
) -> dict[str, Any]:
    """A block's row; places of an untrained block are 0 and mean nothing."""
    inside = range(span.first, span.last)
    trained = weight is not None

    def spread(tap: str) -> np.ndarray:
        found = [places[tap][slot] for slot in inside] if trained and tap in places else []
        return np.asarray(found + [0] * (width - len(found)), np.int32)

    return {
        "trained": trained,
        "weight": np.float32(weight or 0.0),
        "resid": np.int32(places["resid"][span.first] if trained and "resid" in places else 0),
        "leaving": np.int32(places["resid"][span.last] if trained and needs_leaving else 0),
        "count": np.int32(len(inside)),
        "attn_out": spread("attn_out"),
        "mlp_out": spread("mlp_out"),
    }


def is_in_step(spans: Sequence[Span], places: Mapping[str, Mapping[int, int]], trained: Sequence[int]) -> bool:
    """Return whether all blocks are trained and their streams are consecutive."""
    resid = places.get("resid", {})
    return len(trained) == len(spans) and all(
        span.last == span.first + 1 and resid.get(span.first) == block for block, span in enumerate(spans)
    )


def evaluation_table(
    student: ModelConfig, spans: Sequence[Span], source: Source, norms: np.ndarray | None
) -> tuple[Table, TapReading, tuple[int, ...]]:
    """The table of all blocks that a source can be compared with, how it is read, and these blocks."""
    blocks = tuple(at for at, span in enumerate(spans) if set(range(span.first, span.last)) <= set(source.blocks))
    places = {name: source.reads[name].at for name in ("resid", "attn_out")}
    table = make_table(student, spans, places, dict.fromkeys(blocks, 1.0), needs_leaving=False)
    if norms is not None:
        table = with_column(table, "norm", norms[[span.first for span in spans]])
    codecs = {name: source.codecs[name] for name in places}
    whole = len(blocks) == len(spans)
    return (
        table,
        TapReading(codecs, source.plan.teacher.hidden_size, whole and is_in_step(spans, places, blocks)),
        blocks,
    )


def with_column(table: Table, name: str, rows: np.ndarray) -> Table:
    """A table with one more column, `rows` `[L, ...]`."""
    found, start = [], 0
    for group in table:
        shape = group["block"].shape
        count = shape[0] * shape[1]
        found.append({**group, name: rows[start : start + count].reshape(*shape, *rows.shape[1:])})
        start += count
    return tuple(found)
