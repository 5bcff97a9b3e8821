"""Models of a cache's own description: the plan, one receipt a shard, the statistics, the manifest.

All are canonical JSON with a digest of their own (canonical.py): other bytes are damage. A segment exists once the
manifest lists it; a shard is committed once its receipt exists (and, later, once `index.bin` holds its record). What
one number must be is said here; what numbers of one file or of two must be to each other, in cache/agreement.py.
"""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat

from distillcache.schemas.base import Count, Hex, Name, RelativeName, SegmentName, Size
from distillcache.schemas.config import Config
from distillcache.schemas.format.layout import ITEM_BYTES, Compression
from distillcache.schemas.format.times import ShardSeconds

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
    dtype: str = Field(pattern=f"^({'|'.join(ITEM_BYTES)})$")
    width: Size
    bits_of: str | None = None
    every: Size = 1
    slots: Count
    slots_per_object: Size
    compress: Compression = Field(default="none", exclude_if=lambda value: value == "none")

    def object_ranges(self) -> list[tuple[int, int]]:
        """The stored-slot ranges `[start, stop)` of the objects of one shard."""
        step = self.slots_per_object
        return [(start, min(start + step, self.slots)) for start in range(0, self.slots, step)]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of all its slots for a token, before compression."""
        return self.slots * self.width * ITEM_BYTES[self.dtype]


class TapPlan(Config):
    """One tap: its codec with its options, and the slots that are stored.

    k: of `topk_logits`, how many logits a token has; a plan of any other tap does not name it.
    head: of `resid`, the segment keeps the teacher's last norm and head (`layout.head_key`).
    vocab_size: of `topk_logits`, where the teacher has rows for more ids than the tokenizer gives: how many ids count.
    Neither the largest logits nor their logsumexp know of the others. A plan without it counts every row, as all did
    before there was this field.
    slots: for `resid`, l is the stream entering block l (and L the one leaving the last); for `topk_logits`, which
    belongs to no block, 0 alone; for the others, block l.
    """

    name: Name
    codec: str
    group: Count | None = None
    rotate: bool = False
    delta: bool = False
    keyframe_every: Count = 0
    k: Size | None = Field(default=None, exclude_if=lambda value: value is None)
    head: bool = Field(default=False, exclude_if=lambda value: not value)
    vocab_size: Size | None = Field(default=None, exclude_if=lambda value: value is None)
    slots: tuple[Count, ...]
    parts: tuple[PartPlan, ...]

    @property
    def compress(self) -> Compression:
        """The compression of its arrays, the same for all."""
        return self.parts[0].compress if self.parts else "none"

    def numbers_per_token(self, hidden: int) -> int:
        """Return the count of numbers that one slot has for a token, given the teacher's hidden size."""
        return hidden if self.k is None else self.k


class TeacherPlan(Config):
    """The teacher: its path and its identity. Identity is `weights_digest`, not the path.

    norm_eps: of its norms; with the attention norms' weights in the side file it makes attention inputs of `resid`.
    context: the longest document that it is made for, in tokens (models/layers/rope.py); plans did not say before there
    was a warning.
    """

    path: str
    weights_digest: str
    num_blocks: Size
    hidden_size: Size
    vocab_size: Size
    family: str
    norm_eps: float
    context: Size | None = Field(default=None, exclude_if=lambda value: value is None)


class NumericsPlan(Config):
    """Facts that determine the teacher's bits: XLA's results depend on all of these and on the plan's batch_rows.

    mesh: devices along data, fsdp, tensor and expert; (1,) for a single one. processes: over how many the mesh lies,
    where that counts: more than two partial sums are added across devices, in the order of the collectives in use, or
    shards are larger than a process's part of a call, so that the rows of a call are not consecutive (lockstep.py).
    versions: of libraries, and `forward`, the revision of the decoder's roundings (models/describe.py).
    """

    dtype: str
    attention: str
    mesh: tuple[Size, ...]
    processes: Size = Field(default=1, exclude_if=lambda value: value == 1)
    platform: str
    versions: dict[str, str]


class RowsPlan(Config):
    """Which rows: their number and size, and the digest of their contents and split.

    eval_indices: the rows held out for evaluation, ascending; all others are for training.
    text_digest: of the input files' bytes; with the config and the tokenizer it stands for the rows.
    """

    count: Size
    eval_indices: tuple[Count, ...]
    row_tokens: Size
    tokens: Count
    content_digest: str
    text_digest: str
    tokenizer_digest: str
    vocab_size: Size
    eos_id: Count


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
    blocks: tuple[Count, ...]
    batch_rows: Size
    shard_rows: Size
    numerics: NumericsPlan
    config: dict[str, Any]
    created: dict[str, str]

    @property
    def keeps_head(self) -> bool:
        """Return whether the segment holds the teacher's last norm and head."""
        return any(tap.head for tap in self.taps)

    @property
    def num_shards(self) -> int:
        return -(-self.rows.count // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The rows `[start, stop)` of a shard; the last one may be short."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows.count)

    @property
    def unit_rows(self) -> int:
        """Rows of a work unit: whole teacher batches and whole shards."""
        return max(self.shard_rows, self.batch_rows)

    @property
    def num_units(self) -> int:
        return -(-self.rows.count // self.unit_rows)

    def unit_of(self, shard: int) -> int:
        """The work unit that a shard belongs to."""
        return shard * self.shard_rows // self.unit_rows

    def shards_of(self, unit: int) -> range:
        """The shards of a work unit; the last one may have fewer."""
        each = self.unit_rows // self.shard_rows
        return range(unit * each, min((unit + 1) * each, self.num_shards))

    @property
    def bytes_per_row(self) -> int:
        """Bytes of all taps for a row, without the row's own tokens."""
        return self.bytes_per_token * self.rows.row_tokens

    @property
    def is_compressed(self) -> bool:
        """Return whether any tap is compressed: then sizes that follow from the plan are upper limits."""
        return any(tap.compress != "none" for tap in self.taps)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of all taps for a token, scales included, before compression."""
        return sum(part.bytes_per_token for tap in self.taps for part in tap.parts)


class ObjectReceipt(Config):
    """One stored object: its length in bytes and the xxh3-128 of its bytes."""

    length: Count
    digest: Hex


class PartReceipt(Config):
    """One array of one shard.

    digest: xxh3-128 of its codes `[rows, slots, T, width]` in C order. chunks: the xxh3-64 of every inner chunk
    (one row of one slot), row by row, 16 hex digits each. objects: one per range of slots, in order.
    """

    digest: Hex
    chunks: str = Field(pattern=r"^([0-9a-f]{16})*$")
    objects: tuple[ObjectReceipt, ...]


class TapStats(Config):
    """Sums over the real tokens of a shard, one entry a slot: they add up across shards.

    count is of numbers (tokens times hidden size, or times k); abs_max combines by maximum.
    """

    square_sum: tuple[NonNegativeFloat, ...]
    abs_max: tuple[NonNegativeFloat, ...]
    nonfinite: tuple[Count, ...]
    count: Count


class ShardReceipt(Config):
    """Commits a shard: written after all of its objects are durable.

    rows_file: None in a segment that adds to another one's rows. plan: the digest of the plan's file, since other plans
    may have arrays of the same shapes. seconds: how long it took; receipts of earlier versions do not say either, and
    those of what was made again not how long.
    """

    shard: Count
    rows: tuple[Count, Count]
    rows_file: ObjectReceipt | None
    parts: dict[Name, PartReceipt]
    stats: dict[str, TapStats]
    numerics: NumericsPlan | None = Field(
        default=None, description="where they differ from the plan's (--accept-platform)"
    )
    seconds: ShardSeconds | None = Field(default=None, exclude_if=lambda value: value is None)
    plan: Hex | None = Field(default=None, exclude_if=lambda value: value is None)


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
    rows: Size
    index_digest: str
    index_length: Count
    files: dict[RelativeName, str]


class Manifest(Config):
    """The cache's list of finished segments. Written last. O(1) in the number of rows."""

    format: Literal["distillcache/1"] = FORMAT
    segments: tuple[SegmentEntry, ...]
    tokenizer_digest: str
    rows: Size
    tokens: Count
