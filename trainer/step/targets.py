"""Targets: the stored tensors that each student block is trained against.

Student block i stands for a *span* of the teacher's blocks [a, b), usually one. It is given the stream that enters a;
its attention is compared with the sum of what the span's attentions added, its MLP with the sum of their MLPs:
`resid[b] - resid[a] - sum of attn_out`, or the recorded `mlp_out`; and the stream that leaves it with `resid[b]`.

Targets are data, not part of the program: with a mesh axis `block`, each group of devices runs the same program on
its own blocks' targets. They are arranged as parameters are: by layer group, then `[repeats, places of the pattern]`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from distillcache.models.config import ModelConfig, NormProduct
from distillcache.models.head import LogitShape
from distillcache.models.surgery.sizes import kept_blocks
from distillcache.schemas.codecs import Codec
from distillcache.schemas.config.student import StudentConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.feed.source import Source

FROM_TEACHER = ("teacher", "random")  # student.init: of the teacher's config, so its blocks are known
StackIndices = Mapping[str, Mapping[int, int]]  # tap -> slot -> index on the slot axis of a batch's stack


@dataclass(frozen=True)
class Span:
    """The teacher's blocks [first, last) that a student block stands for."""

    first: int
    last: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockTargets:
    """The indices, on the slot axes of a batch's stacks, of the tensors that blocks are trained against.

    Leaves have one shape in front, `*at`: `[repeats, places]` of a layer group, `[L]` of a whole student, `[]` of one
    block. None: the tap is not read, or nobody asks. Places of a block that is not trained are 0 and mean nothing.

    block: the block's number. weight: in the feature loss. count: of teacher blocks in its span, the longest of which
    has `S`. resid: the stream that enters it; leaving: the one that leaves it. compared: in feature mode, whether the
    student's own stream is compared with the latter. norm: the weight of the teacher's attention norm, where it takes
    the place of the block's own (`inject: attn_in`). runs: on several groups of devices, whether any of them trains the
    block that it comes to at the same time (`padded_targets`).
    """

    block: Int[Array, "*at"]
    trained: Bool[Array, "*at"]
    weight: Float[Array, "*at"]
    count: Int[Array, "*at"]
    attn_out: Int[Array, "*at S"] | None = None
    mlp_out: Int[Array, "*at S"] | None = None
    resid: Int[Array, "*at"] | None = None
    leaving: Int[Array, "*at"] | None = None
    compared: Bool[Array, "*at"] | None = None
    norm: Float[Array, "*at D"] | None = None
    runs: Bool[Array, "*at"] | None = None

    @property
    def computed(self) -> Bool[Array, "*at"]:
        """The blocks that are computed: more than the trained ones if `runs` is given."""
        return self.trained if self.runs is None else self.runs

    def at(self, *index: int | slice | Int[Array, ""]) -> "BlockTargets":
        """The targets at this index of the leaves' common axes."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self)


Targets = Sequence[BlockTargets]  # of every layer group, `[repeats, places]`


@dataclass(frozen=True)
class TeacherEnd:
    """The static side of the teacher's logits: where the stream that leaves its last block lies in a batch's stack of
    `resid`, the epsilon and the form of its last norm, and what follows its head."""

    place: int
    norm_eps: float
    shape: LogitShape
    norm_product: NormProduct = "wide"


@dataclass(frozen=True)
class TapReading:
    """The static side of targets: how a batch's stacks are read.

    codecs: by tap. hidden: the teacher's width. in_step: block i's stream lies at index i and, if needed, the one
    leaving it at i + 1, so that a delta codec decodes one place a block. end: where a loss needs the teacher's logits.
    """

    codecs: Mapping[str, Codec]
    hidden: int
    in_step: bool
    end: TeacherEnd | None = None

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


def block_targets(
    student: ModelConfig,
    spans: Sequence[Span],
    places: Sequence[StackIndices],
    weights: Mapping[int, float],
    *,
    needs_entering: bool = True,
    needs_leaving: bool = False,
    norms: np.ndarray | None = None,
    compared: Collection[int] = (),
) -> tuple[BlockTargets, ...]:
    """The targets of every layer group, in batches whose stacks hold the teacher's slots at `places`.

    Args:
        places: for each block, in the stacks that its devices are given.
        weights: of the feature loss, by student block; a block that is not here is not trained.
        needs_entering, needs_leaving: a trained block needs the stream that enters it, where one is recorded, or the
            one that leaves it.
        norms: the teacher's, `[L, D]`, for `BlockTargets.norm`.
        compared: the blocks whose own streams are compared, in feature mode.
    """
    width = max(span.last - span.first for span in spans)

    def place(tap: str, block: int, slot: int, read_by: Collection[int] = weights) -> int:
        return places[block][tap][slot] if block in read_by else 0

    def of_spans(tap: str) -> np.ndarray | None:
        if tap not in places[0]:
            return None
        found = np.zeros((len(spans), width), np.int32)
        for block, span in enumerate(spans):
            found[block, : span.last - span.first] = [place(tap, block, slot) for slot in range(span.first, span.last)]
        return found

    def of_stream(slots: Sequence[int], read_by: Collection[int] = weights) -> np.ndarray:
        return np.asarray([place("resid", block, slot, read_by) for block, slot in enumerate(slots)], np.int32)

    blocks = range(len(spans))
    whole: dict[str, np.ndarray | None] = {
        "block": np.asarray(blocks, np.int32),
        "trained": np.asarray([block in weights for block in blocks]),
        "weight": np.asarray([weights.get(block, 0.0) for block in blocks], np.float32),
        "count": np.asarray([span.last - span.first for span in spans], np.int32),
        "attn_out": of_spans("attn_out"),
        "mlp_out": of_spans("mlp_out"),
        "resid": of_stream([span.first for span in spans]) if needs_entering and "resid" in places[0] else None,
        "leaving": of_stream([span.last for span in spans], compared or weights) if needs_leaving or compared else None,
        "compared": np.asarray([block in compared for block in blocks]) if compared else None,
        "norm": None if norms is None else norms[[span.first for span in spans]],
    }
    return _by_group(student, BlockTargets(**whole))  # type: ignore[arg-type]


def _by_group(student: ModelConfig, whole: BlockTargets) -> tuple[BlockTargets, ...]:
    """Cut `[L]` into layer groups."""
    found, start = [], 0
    for layers in student.layers:
        shape = (layers.repeats, len(layers.pattern))
        mine = slice(start, start + shape[0] * shape[1])
        found.append(
            jax.tree.map(lambda leaf, mine=mine, shape=shape: leaf[mine].reshape(*shape, *leaf.shape[1:]), whole)
        )
        start = mine.stop
    return tuple(found)


def in_block_order(targets: Targets) -> BlockTargets:
    """The targets of all blocks, `[L]`."""
    return jax.tree.map(
        lambda *groups: jnp.concatenate([jnp.asarray(group).reshape(-1, *group.shape[2:]) for group in groups]),
        *targets,
    )


def padded_targets(targets: Targets, groups: int) -> tuple[BlockTargets, ...]:
    """Targets with repeats filled up to a multiple of `groups`, as parameters are: by blocks that are not trained.

    With several groups `runs` says whether any of them trains the block of its own that it comes to at the same time.
    Then all of them run theirs, those that do not train it for nothing: a collective inside a branch that some devices
    do not take would wait for them for ever.
    """
    if groups == 1:
        return tuple(targets)

    def fill(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, [(0, -rows.shape[0] % groups)] + [(0, 0)] * (rows.ndim - 1), mode="edge")

    def one(group: BlockTargets) -> BlockTargets:
        filled = jax.tree.map(fill, group)
        trained = np.asarray(filled.trained) & (np.arange(len(filled.trained)) < len(group.trained))[:, None]
        anywhere = trained.reshape(groups, -1, trained.shape[1]).any(axis=0)
        return replace(filled, trained=trained, runs=np.tile(anywhere, (groups, 1)))

    return tuple(one(group) for group in targets)


def is_in_step(spans: Sequence[Span], places: Mapping[str, Mapping[int, int]], trained: Sequence[int]) -> bool:
    """Return whether all blocks are trained and their streams are consecutive."""
    resid = places.get("resid", {})
    return len(trained) == len(spans) and all(
        span.last == span.first + 1 and resid.get(span.first) == block for block, span in enumerate(spans)
    )


def evaluation_targets(
    student: ModelConfig, spans: Sequence[Span], source: Source, norms: np.ndarray | None
) -> tuple[tuple[BlockTargets, ...], TapReading, tuple[int, ...]]:
    """The targets of all comparable blocks, how they are read, and these blocks."""
    places, recorded = {name: source.reads[name].at for name in ("resid", "attn_out")}, set(source.blocks)
    whole = (span.first in places["resid"] and set(range(span.first, span.last)) <= recorded for span in spans)
    blocks = tuple(at for at, comparable in enumerate(whole) if comparable)
    targets = block_targets(student, spans, [places] * len(spans), dict.fromkeys(blocks, 1.0), norms=norms)
    codecs = {name: source.codecs[name] for name in places}
    in_step = is_in_step(spans, places, blocks)
    return targets, TapReading(codecs, source.plan.teacher.hidden_size, in_step), blocks
