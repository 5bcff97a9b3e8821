"""Agreement of a cache's small files: conditions on their numbers within one file and between two.

Digests say that bytes are what somebody wrote, not that it makes sense: a file may come from a stranger, or from a
program with a fault, with a digest that fits. So whoever reads such a file asks here, once, and all who use its
numbers may rely on them: sizes of arrays, offsets, names of codecs.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import MEND_NEXT, ConfigError, DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import (
    TOPK_LOGITS,
    TOPK_SLOTS,
    Manifest,
    PartPlan,
    Plan,
    SegmentEntry,
    ShardReceipt,
    TapPlan,
    TapStats,
)
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.format.tap_plan import with_slots

TAPS = ("attn_out", "resid", "mlp_out", TOPK_LOGITS)
LARGEST_HIDDEN = 1 << 24
RECORD_BYTES = 1 << 31  # of the index for one shard: NumPy's records are no larger

Contradictions = Iterator[tuple[str, object, object]]  # (field, found, expected)


def check_manifest(manifest: Manifest, where: str) -> Manifest:
    """The manifest, if it agrees with itself; raises `DamageError`."""
    _refuse(where, _of_manifest(manifest))
    return manifest


def check_plan(plan: Plan, where: str) -> Plan:
    """The plan, if it agrees with itself: its arrays are those that its codecs write; raises `DamageError`."""
    _refuse(where, _of_plan(plan))
    return plan


def check_entry(plan: Plan, entry: SegmentEntry, record_bytes: int, where: str) -> None:
    """Raise `DamageError` unless the manifest's line of a segment agrees with the segment's plan.

    Args:
        record_bytes: of the index for one shard.
        where: the manifest.
    """
    _refuse(where, _of_entry(plan, entry, record_bytes))


def check_together(plans: Sequence[Plan], where: str) -> None:
    """Raise `DamageError` unless the plans of a cache's segments are of one teacher and of rows of one length.

    Args:
        plans: in the order of the manifest.
        where: the cache.
    """
    _refuse(where, _of_plans(plans))


def check_receipt(plan: Plan, shard: int, receipt: ShardReceipt, where: str) -> ShardReceipt:
    """The receipt, if it is of this shard of this plan; raises `DamageError`."""
    _refuse(where, _of_receipt(plan, shard, receipt))
    return receipt


def check_stats(plan: Plan, stats: Mapping[str, TapStats], where: str) -> Mapping[str, TapStats]:
    """The statistics, if they are of the plan's taps and slots; raises `DamageError`."""
    _refuse(where, _of_stats(plan, stats))
    return stats


def side_arrays(plan: Plan, data: bytes, where: str) -> dict[str, np.ndarray]:
    """The arrays in a segment's side file.

    Raises:
        DamageError: it is no safetensors file, or lacks what the plan's taps need.
    """
    try:
        found = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # of bytes; of dtypes that NumPy lacks
        raise DamageError("a file of the cache cannot be read", {"file": where, "cause": error}, MEND_NEXT) from error
    _refuse(where, _of_side(plan, found))
    return found


def check_signs(plan: Plan, side: Mapping[str, np.ndarray], where: str) -> None:
    """Raise `DamageError` unless the sign vectors of a side file are those that builders write."""
    expected = signs_of(plan)
    differing = (name for name in expected if (side[name] != expected[name]).any())
    _refuse(where, ((name, "other signs", "those of the plan") for name in differing))


def _refuse(where: str, contradictions: Contradictions) -> None:
    for field, found, expected in contradictions:
        raise DamageError(
            "a file of the cache contradicts itself or another one",
            {"file": where, "field": field, "found": found, "expected": expected},
            MEND_NEXT,
        )


def _of_manifest(manifest: Manifest) -> Contradictions:
    if not manifest.segments:
        yield "segments", "none", "at least one"
    own: dict[str, SegmentEntry] = {}
    for number, entry in enumerate(manifest.segments):
        name = f"segments.{number}"
        if int(entry.segment.partition("-")[0]) != number:
            yield f"{name}.segment", entry.segment, f"number {number}"
        base = own.get(entry.rows_of or "")
        if entry.rows_of is None:
            own[entry.segment] = entry
        elif base is None:
            yield f"{name}.rows_of", entry.rows_of, "an earlier segment with rows of its own"
        elif entry.rows != base.rows:
            yield f"{name}.rows", entry.rows, f"{base.rows}, the rows of {base.segment}"
    rows = sum(entry.rows for entry in own.values())
    if manifest.rows != rows:
        yield "rows", manifest.rows, f"{rows}, those of its segments"


def _of_plan(plan: Plan) -> Contradictions:
    rows, teacher = plan.rows, plan.teacher
    if teacher.hidden_size > LARGEST_HIDDEN:
        yield "teacher.hidden_size", teacher.hidden_size, f"at most {LARGEST_HIDDEN}"
    yield from _ascending("rows.eval_indices", rows.eval_indices, rows.count)
    yield from _ascending("blocks", plan.blocks, teacher.num_blocks)
    copy, data = plan.config.get("copy"), plan.config.get("data")
    if plan.copied_from is not None and not (isinstance(copy, dict) and isinstance(copy.get("src"), str)):
        yield "config.copy.src", copy, "the source of a copy"
    if plan.copied_from is None and not isinstance(data, dict):
        yield "config.data", data, "the settings of its text"
    if rows.tokens > rows.count * rows.row_tokens:
        yield "rows.tokens", rows.tokens, f"at most {rows.count * rows.row_tokens}"
    if not plan.taps or len({tap.name for tap in plan.taps}) < len(plan.taps):
        yield "taps", ", ".join(tap.name for tap in plan.taps) or "none", "one or more, each once"
    for number, tap in enumerate(plan.taps):
        yield from _of_tap(plan, tap, f"taps.{number}")
    parts = [part for tap in plan.taps for part in tap.parts]
    size = sum(16 + 24 * len(part.object_ranges()) + 8 * plan.shard_rows * part.slots for part in parts)
    if size > RECORD_BYTES:
        yield "shard_rows", plan.shard_rows, f"an index of less than {RECORD_BYTES} bytes a shard, not {size}"


def _of_tap(plan: Plan, tap: TapPlan, name: str) -> Contradictions:
    rows, teacher = plan.rows, plan.teacher
    if tap.name not in TAPS or not tap.slots:
        yield name, f"{tap.name} of {counted(len(tap.slots), 'slot')}", f"one of {', '.join(TAPS)}, of some slots"
    if (tap.k is not None) != (tap.name == TOPK_LOGITS) or (tap.k or 0) > teacher.vocab_size:
        yield f"{name}.k", tap.k, f"a number up to {teacher.vocab_size}, of {TOPK_LOGITS} alone"
    if tap.head and (tap.name != "resid" or teacher.num_blocks not in tap.slots):
        yield f"{name}.head", True, f"true of resid alone, with its last slot, {teacher.num_blocks}"
    if (tap.vocab_size or 0) > teacher.vocab_size:
        yield f"{name}.vocab_size", tap.vocab_size, f"at most {teacher.vocab_size}"
    if tap.name == TOPK_LOGITS and tap.slots != TOPK_SLOTS:
        yield f"{name}.slots", tap.slots, TOPK_SLOTS
    yield from _ascending(f"{name}.slots", tap.slots, teacher.num_blocks + (tap.name == "resid"))
    try:
        expected = with_slots(tap, tap.slots, teacher.hidden_size).parts
    except ConfigError as error:
        yield name, "; ".join(f"{key} {value}" for key, value in error.facts.items()), f"a codec ({error.what})"
        return
    found = tuple(part.model_copy(update={"slots_per_object": 1}) for part in tap.parts)
    if found != expected:
        yield f"{name}.parts", *next(_differing(found, expected))
    for part in tap.parts:
        slot_bytes = plan.shard_rows * rows.row_tokens * part.width * layout.ITEM_BYTES[part.dtype]
        if slot_bytes > layout.MAX_PUT_BYTES:
            yield f"{name}.parts", f"{slot_bytes} bytes for one slot of a shard", f"at most {layout.MAX_PUT_BYTES}"


def _differing(found: tuple[PartPlan, ...], expected: tuple[PartPlan, ...]) -> Iterator[tuple[object, object]]:
    """The first array that is not what a codec writes."""
    for one, other in itertools.zip_longest(found, expected):
        if one != other:
            yield one or "nothing", other or "nothing"


def _ascending(field: str, numbers: tuple[int, ...], end: int) -> Contradictions:
    if any(a >= b for a, b in itertools.pairwise(numbers)) or (numbers and numbers[-1] >= end):
        yield field, f"{list(numbers[:8])}{' ...' if len(numbers) > 8 else ''}", f"ascending, all below {end}"


def _of_plans(plans: Sequence[Plan]) -> Contradictions:
    own: dict[str, Plan] = {}
    for plan in plans:
        first, name = plans[0], f"segment {plan.segment}"
        pairs = {"rows.row_tokens": (plan.rows.row_tokens, first.rows.row_tokens)}
        for field in ("weights_digest", "num_blocks", "hidden_size", "vocab_size"):
            pairs[f"teacher.{field}"] = (getattr(plan.teacher, field), getattr(first.teacher, field))
        for field, (found, expected) in pairs.items():
            if found != expected:
                yield f"{name}, {field}", found, f"{expected}, as in segment {first.segment}"
        if plan.rows_of is None:
            own[plan.segment] = plan
        elif plan.rows_of not in own:
            yield f"{name}, rows_of", plan.rows_of, "an earlier segment with rows of its own"
        elif plan.rows != own[plan.rows_of].rows:
            yield f"{name}, rows", "other rows", f"those of segment {plan.rows_of}"


def _of_entry(plan: Plan, entry: SegmentEntry, record_bytes: int) -> Contradictions:
    name = f"segment {entry.segment}"
    arrays = [f"taps/{part.array}/zarr.json" for tap in plan.taps for part in tap.parts]
    pairs: dict[str, tuple[object, object]] = {
        "rows": (entry.rows, plan.rows.count),
        "rows_of": (entry.rows_of, plan.rows_of),
        "index_length": (entry.index_length, plan.num_shards * record_bytes),
    }
    head = [layout.HEAD_FILE] if plan.keeps_head else []
    strange = sorted({*entry.files} - {"plan.json", "stats.json", "side.safetensors", *head, *arrays})
    if strange or "plan.json" not in entry.files:
        yield f"{name}, files", ", ".join(strange) or "no plan.json", "the files of its plan"
    for field, (found, expected) in pairs.items():
        if found != expected:
            yield f"{name}, {field}", found, f"{expected}, as its plan says"


def _of_receipt(plan: Plan, shard: int, receipt: ShardReceipt) -> Contradictions:
    rows, parts = plan.shard_range(shard), {part.array: part for tap in plan.taps for part in tap.parts}
    if (receipt.shard, receipt.rows) != (shard, rows):
        yield "shard", f"{receipt.shard}, rows {list(receipt.rows)}", f"{shard}, rows {list(rows)}"
    if receipt.plan is not None and receipt.plan != digest_bytes(to_canonical(plan)):
        yield "plan", receipt.plan, "the digest of this segment's plan: the receipt is of another build"
    if (receipt.rows_file is None) != (plan.rows_of is not None):
        yield "rows_file", receipt.rows_file, "none" if plan.rows_of else "a file"
    if receipt.parts.keys() != parts.keys():
        yield "parts", sorted(receipt.parts), sorted(parts)
        return
    for name, part in parts.items():
        found, objects = receipt.parts[name], len(part.object_ranges())
        chunks = part.slots * (rows[1] - rows[0])
        if (len(found.objects), len(found.chunks)) != (objects, 16 * chunks):
            expected = f"{counted(objects, 'object')}, digests of {counted(chunks, 'chunk')}"
            yield (
                f"parts.{name}",
                f"{counted(len(found.objects), 'object')}, {counted(len(found.chunks), 'digit')} of chunks",
                expected,
            )
    yield from _of_stats(plan, receipt.stats)


def _of_stats(plan: Plan, stats: Mapping[str, TapStats]) -> Contradictions:
    slots = {tap.name: len(tap.slots) for tap in plan.taps}
    if stats.keys() != slots.keys():
        yield "taps", sorted(stats), sorted(slots)
        return
    for name, found in stats.items():
        lengths = {len(values) for values in (found.square_sum, found.abs_max, found.nonfinite)}
        if lengths != {slots[name]}:
            yield f"taps.{name}", f"{sorted(lengths)} numbers", f"{slots[name]}, one for each slot"


def _of_side(plan: Plan, found: Mapping[str, np.ndarray]) -> Contradictions:
    hidden = plan.teacher.hidden_size
    for name in [f"signs.{tap.name}" for tap in plan.taps if tap.rotate]:
        signs: Any = found.get(name)
        if signs is None or signs.dtype != np.int8 or signs.shape != (hidden,) or not (np.abs(signs) == 1).all():
            described = "nothing" if signs is None else f"{signs.dtype} {list(signs.shape)}"
            yield name, described, f"int8 [{hidden}], +1 and -1"
    norms = found.get("attention_norm")
    if norms is not None and (norms.dtype != np.float32 or norms.shape != (plan.teacher.num_blocks, hidden)):
        yield "attention_norm", f"{norms.dtype} {list(norms.shape)}", f"float32 [{plan.teacher.num_blocks}, {hidden}]"
