"""What a cache says about itself: the plan, one receipt a shard, the statistics, the manifest.

All are canonical JSON with a digest of their own (canonical.py): other bytes are damage. A segment exists once the
manifest lists it; a shard is committed once its receipt exists (and, later, once `index.bin` holds its record).
"""

from typing import Any, Literal

from pydantic import Field

from schemas.base import Name, RelativeName, SegmentName
from schemas.config import Config
from schemas.layout import ITEM_BYTES, Compression
from schemas.times import ShardSeconds

FORMAT: Literal["distillcache/1"] = "distillcache/1"
TOPK_LOGITS = "topk_logits"  # the tap that belongs to no block
TOPK_SLOTS = (0,)  # its only one


class PartPlan(Config):
    """One zarr array of a tap, `[N, slots, T, width]`.

    array: its folder under taps/. part: the codec's name for it. every: it exists for the tap's stored slots 0, every,
    2 * every, ... only. slots_per_object: Lc, consecutive slots in one object. compress: of every inner chunk, without
    loss; a plan without compression does not name it, as plans did before there was any.
    """

    array: Name
    part: Name
    dtype: str
    width: int
    bits_of: str | None = None
    every: int = 1
    slots: int
    slots_per_object: int
    compress: Compression = Field(default="none", exclude_if=lambda value: value == "none")

    def object_ranges(self) -> list[tuple[int, int]]:
        """The stored-slot ranges `[start, stop)` of the objects of one shard."""
        step = self.slots_per_object
        return [(start, min(start + step, self.slots)) for start in range(0, self.slots, step)]

    @property
    def bytes_per_token(self) -> int:
        """Of all its slots, before compression."""
        return self.slots * self.width * ITEM_BYTES[self.dtype]


class TapPlan(Config):
    """One tap: its codec with its options, and the slots that are stored.

    k: of `topk_logits`, how many logits a token has; a plan of any other tap does not name it.
    vocab_size: of `topk_logits`, where the teacher has rows for more ids than the tokenizer gives: how many ids count.
    Neither the largest logits nor their logsumexp know of the others. A plan without it counts every row, as all did
    before there was this field.
    slots: for `resid`, l is the stream entering block l (and L the one leaving the last); for `topk_logits`, which
    belongs to no block, 0 alone; for the others, block l.
    """

    name: Name
    codec: str
    group: int | None = None
    rotate: bool = False
    delta: bool = False
    keyframe_every: int = 0
    k: int | None = Field(default=None, exclude_if=lambda value: value is None)
    vocab_size: int | None = Field(default=None, exclude_if=lambda value: value is None)
    slots: tuple[int, ...]
    parts: tuple[PartPlan, ...]

    @property
    def compress(self) -> Compression:
        """Of its arrays, which are all compressed alike."""
        return self.parts[0].compress if self.parts else "none"

    def numbers_per_token(self, hidden: int) -> int:
        """How many numbers one slot has for a token, given the teacher's hidden size."""
        return hidden if self.k is None else self.k


class TeacherPlan(Config):
    """Which teacher: where it was read from, and what it is. Identity is `weights_digest`, not the path.

    norm_eps: of its norms; with the attention norms' weights in the side file it makes attention inputs of `resid`.
    context: the longest document that it is made for, in tokens (models/rope.py); plans did not say before there was a
    warning.
    """

    path: str
    weights_digest: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    family: str
    norm_eps: float
    context: int | None = Field(default=None, exclude_if=lambda value: value is None)


class NumericsPlan(Config):
    """What pins the teacher's bits: XLA's results depend on all of these and on the plan's batch_rows.

    mesh: devices along data, fsdp, tensor and expert; (1,) for a single one. processes: over how many the mesh lies,
    where that counts: more than two partial sums are added across devices, in the order of the collectives in use, or
    shards are larger than a process's part of a call, so that the rows of a call are not consecutive (lockstep.py).
    versions: of libraries, and `forward`, the revision of the decoder's roundings (models/describe.py).
    """

    dtype: str
    attention: str
    mesh: tuple[int, ...]
    processes: int = Field(default=1, exclude_if=lambda value: value == 1)
    platform: str
    versions: dict[str, str]


class RowsPlan(Config):
    """Which rows: their number and size, and the digest of their contents and split.

    eval_indices: the rows held out for evaluation, ascending; all others are for training.
    text_digest: of the input files' bytes; with the config and the tokenizer it stands for the rows.
    """

    count: int
    eval_indices: tuple[int, ...]
    row_tokens: int
    tokens: int
    content_digest: str
    text_digest: str
    tokenizer_digest: str
    vocab_size: int
    eos_id: int


class Plan(Config):
    """Everything that a segment's bytes depend on; written first, once, and compared with at every resume.

    rows_of: the segment whose rows these taps belong to, where this one brings no rows of its own.
    copied_from: the digest of the manifest that a copy was made from. recoded_on: where a copy decoded and encoded
    taps again, the machine that did; `numerics` are those of the teacher's run.
    `created` (when, where, by which version) and `config` (as the user gave it) inform people; they do not count in
    the comparison.
    """

    format: Literal["distillcache/1"] = FORMAT
    segment: SegmentName
    rows_of: SegmentName | None = None
    copied_from: str | None = None
    recoded_on: NumericsPlan | None = Field(default=None, exclude_if=lambda value: value is None)
    teacher: TeacherPlan
    rows: RowsPlan
    taps: tuple[TapPlan, ...]
    blocks: tuple[int, ...]
    batch_rows: int
    shard_rows: int
    numerics: NumericsPlan
    config: dict[str, Any]
    created: dict[str, str]

    @property
    def num_shards(self) -> int:
        return -(-self.rows.count // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The rows `[start, stop)` of a shard; the last one may be short."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows.count)

    @property
    def bytes_per_row(self) -> int:
        """Of all taps; the rows' own tokens not counted."""
        return self.bytes_per_token * self.rows.row_tokens

    @property
    def is_compressed(self) -> bool:
        """Whether any tap is: then sizes that follow from the plan are upper limits."""
        return any(tap.compress != "none" for tap in self.taps)

    @property
    def bytes_per_token(self) -> int:
        """Of all taps, scales included, before compression."""
        return sum(part.bytes_per_token for tap in self.taps for part in tap.parts)


class ObjectReceipt(Config):
    """One stored object: its length in bytes and the xxh3-128 of its bytes."""

    length: int
    digest: str


class PartReceipt(Config):
    """One array of one shard.

    digest: xxh3-128 of its codes `[rows, slots, T, width]` in C order. chunks: the xxh3-64 of every inner chunk
    (one row of one slot), row by row, 16 hex digits each. objects: one per range of slots, in order.
    """

    digest: str
    chunks: str
    objects: tuple[ObjectReceipt, ...]


class TapStats(Config):
    """Sums over the real tokens of a shard, one entry a slot: they add up across shards.

    count is of numbers (tokens times hidden size, or times k); abs_max combines by maximum.
    """

    square_sum: tuple[float, ...]
    abs_max: tuple[float, ...]
    nonfinite: tuple[int, ...]
    count: int


class ShardReceipt(Config):
    """Commits a shard: written after all of its objects are durable.

    rows_file: None in a segment that adds to another one's rows. seconds: how long it took; receipts of earlier
    versions, and of what was made again, do not say.
    """

    shard: int
    rows: tuple[int, int]
    rows_file: ObjectReceipt | None
    parts: dict[Name, PartReceipt]
    stats: dict[str, TapStats]
    numerics: NumericsPlan | None = Field(
        default=None, description="where they differ from the plan's (--accept-platform)"
    )
    seconds: ShardSeconds | None = Field(default=None, exclude_if=lambda value: value is None)


class Stats(Config):
    """The receipts' statistics of a finished segment, summed over its shards."""

    taps: dict[str, TapStats]


class SegmentEntry(Config):
    """A finished segment, as the manifest lists it: the digests of everything in it but its shards' objects.

    rows: of the segment's own; with `rows_of`, of the segment that they belong to. index_digest is of the whole
    index.bin; files maps every other small file of the segment to its digest.
    """

    segment: SegmentName
    rows_of: SegmentName | None = None
    rows: int
    index_digest: str
    index_length: int
    files: dict[RelativeName, str]


class Manifest(Config):
    """The cache's list of finished segments. Written last. O(1) in the number of rows."""

    format: Literal["distillcache/1"] = FORMAT
    segments: tuple[SegmentEntry, ...]
    tokenizer_digest: str
    rows: int
    tokens: int
