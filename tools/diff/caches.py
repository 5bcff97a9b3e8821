"""Two caches side by side: plans, statistics, stored bytes by shard, and the numbers of a sample of rows.

The numbers are judged as `fidelity` judges them, with A in place of the teacher.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.manifest import TOPK_LOGITS, TapStats
from distillcache.schemas.format.rows import Row
from distillcache.schemas.store.redaction import shown
from distillcache.tools.diff.flat import differences, flattened
from distillcache.tools.fidelity import compare
from distillcache.tools.fidelity.compare import RowMeasure, TapMeasure
from distillcache.tools.fidelity.topk import (
    TopKMeasure,
    figures,
    judge_topk,
    kept_values,
    measure_topk,
    rounding_of,
    stored_logits,
)
from distillcache.tools.fidelity.verdict import Look, Reference, file_looks, judge
from distillcache.tools.look.segment_facts import segment_stats
from distillcache.tools.look.stored_rows import StoredRows, StoredTap, finite

SAMPLED_SHARDS = 64  # whose digests are compared, evenly drawn
NOISE = 1e-6  # float32's rounding between two decodings of the same codes
SAME_RMS = 1e-3  # a relative difference of two caches' rms that their codecs explain (they count before encoding)
LAYOUT_FIELDS = ("codec", "rotate", "delta", "slots", "k", "vocab_size")  # of a tap: why its codes differ
FREE = ("created.", "config.cache", "config.storage", "config.process_id", "config.num_processes")


def compare_caches(a: StoredRows, b: StoredRows, count: int, seed: int) -> dict[str, Any]:
    """Compare two caches; returns differences as plain values. The findings' `kind` is as in `fidelity`."""
    plans = differences(_plan(a), _plan(b), FREE)
    numbers = [number for number in a.sample(count, seed) if number < len(b) and b.committed(number)]
    measured, logits, other_rows, looks = _measured(a, b, numbers)
    looks += judge(measured, Reference("A"))
    looks += judge_topk(logits, "A", [row.row for row in measured if row.wrong])
    looks += [look for rows in (a, b) for look in file_looks(rows.segments)]
    found = {
        "plans": plans,
        "statistics": list(_statistics(a, b)),
        "shards": _shards(a, b),
        "rows": {"compared": numbers, "other_tokens": other_rows},
        "findings": [{"kind": look.kind, "line": look.line, "where": look.where} for look in looks],
        "taps": _figures(measured),
        "topk_logits": figures(logits),
    }
    return {"kind": "caches", "a": a.store.url, "b": b.store.url, "summary": _summary(found, len(a), len(b)), **found}


def _plan(rows: StoredRows) -> dict[str, Any]:
    """Describe the plan of all segments, by name; arrays follow from the rest."""
    return {
        f"{'' if len(rows.segments) == 1 else segment.plan.segment + '.'}{key}": value
        for segment in rows.segments
        for key, value in flattened(_settled(segment)).items()
    }


def _settled(segment: Segment) -> dict[str, Any]:
    plan = shown(segment.plan.model_dump(mode="json"))
    plan["taps"] = {tap["name"]: {k: v for k, v in tap.items() if k not in ("parts", "name")} for tap in plan["taps"]}
    for tap in segment.plan.taps:
        plan["taps"][tap.name]["compress"] = tap.compress
    plan["rows"]["eval_indices"] = len(plan["rows"]["eval_indices"])
    return plan


def _measured(
    a: StoredRows, b: StoredRows, numbers: Sequence[int]
) -> tuple[list[RowMeasure], list[TopKMeasure], list[int], list[Look]]:
    """The rows that have the same tokens in both, and their logits; the numbers of those that have not; damage."""
    measured, logits, others, looks = [], [], [], []
    for number in numbers:
        try:
            row, there = a.row(number), b.row(number)
            if not _same_tokens(row, there):
                others.append(number)
                continue
            measured.append(_measure(a, b, number, row))
            logits += _measured_logits(a, b, number, row)
        except DamageError as error:
            facts = error.facts
            kind = {"truncated": "truncated-object", "stale": "stale-shard"}.get(
                str(facts.get("found")), "damaged-object"
            )
            place = str(facts.get("file", ""))
            if place not in {look.where["file"] for look in looks}:
                looks.append(
                    Look(kind, f"{place}: {facts.get('detail', error.what)}", {"rows": [number], "file": place})
                )
    return measured, logits, others, looks


def _measured_logits(a: StoredRows, b: StoredRows, number: int, row: Row) -> list[TopKMeasure]:
    """Measure a row whose logits are in both caches, with equally many a token and of the same ids."""
    if not all(TOPK_LOGITS in rows.tap_names(number) for rows in (a, b)):
        return []
    (one, own), (other, given) = (
        (stored, stored_logits(stored, rows.locate(number)[1]))
        for rows in (a, b)
        for stored in [_codec(rows, number, TOPK_LOGITS)]
    )
    same = own.values.shape == given.values.shape and one.tap.vocab_size == other.tap.vocab_size
    if not same or not (row.segment_ids > 0).any():
        return []
    values = np.asarray(finite(np.asarray(given.values)), np.float64)
    # A's own codec may have lost what B keeps.
    lost = float(np.linalg.norm(kept_values(one, given._replace(values=finite(np.asarray(given.values)))) - values))
    noise = NOISE + compare.CODEC_MARGIN * lost / max(float(np.linalg.norm(values)), compare.TINY)
    real, kept = row.segment_ids > 0, kept_values(other, own)
    return [measure_topk(number, b.shard(number), given, own, kept, real, noise, rounding_of(other))]


def _same_tokens(a: Row, b: Row) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "positions", "segment_ids"))


def _measure(a: StoredRows, b: StoredRows, number: int, row: Row) -> RowMeasure:
    real = row.segment_ids > 0
    found = RowMeasure(number, b.shard(number), [])
    stacks: list[tuple[TapMeasure, np.ndarray, np.ndarray]] = []
    if not real.any():  # padding has nothing to compare
        return found
    for name in a.tap_names(number):
        if name == TOPK_LOGITS or name not in b.tap_names(number):
            continue
        own, given = dict(a.slots(number, name)), dict(b.slots(number, name))
        slots = sorted(own.keys() & given.keys())
        if not slots:
            continue
        stack, values = (np.stack([each[slot] for slot in slots]) for each in (own, given))
        codec_a, codec_b = (_codec(rows, number, name) for rows in (a, b))
        # A's own codec may have lost what B keeps.
        clean = finite(values)
        noise = NOISE + compare.CODEC_MARGIN * compare.weighted_error(codec_a.kept(clean)[:, real], clean[:, real])
        measure = compare.measure_tap(name, slots, values, stack, codec_b.kept(finite(stack)), real, noise)
        stacks.append((measure, values, stack))
    found.taps = [measure for measure, _, _ in stacks]
    if found.wrong:
        _explain(found, stacks, real)
    return found


def _explain(found: RowMeasure, stacks: Sequence[tuple[TapMeasure, np.ndarray, np.ndarray]], real: np.ndarray) -> None:
    if all(measure.wrong.mean() > 0.5 for measure in found.taps):
        values, own = [values for _, values, _ in stacks], [stack for _, _, stack in stacks]
        found.shift = compare.find_shift(found.taps, values, own, real)
    if not found.shift:
        for measure, values, stack in stacks:
            places = compare.find_swaps(measure, values, stack, real)
            found.swapped += [(tap, slot, measure.slots[at]) for tap, slot, at in places]


def _codec(rows: StoredRows, number: int, name: str) -> StoredTap:
    return next(stored for stored in rows.taps(number) if stored.tap.name == name)


def _statistics(a: StoredRows, b: StoredRows) -> Iterator[dict[str, Any]]:
    """Compare the statistics of finished caches: where the rms of a tap's slot differs, over all rows of each."""
    first, second = _rms(a), _rms(b)
    for tap, slot in sorted(first.keys() & second.keys()):
        one, other = first[tap, slot], second[tap, slot]
        if abs(one - other) > SAME_RMS * max(one, other):
            yield {"tap": tap, "slot": slot, "rms_a": one, "rms_b": other}


def _rms(rows: StoredRows) -> dict[tuple[str, int], float]:
    found = {}
    for segment in rows.segments:
        stats: Mapping[str, TapStats] = {}
        with suppress(DamageError):  # which is told as a file's
            stats = segment_stats(segment, ()) if segment.committed is None else {}
        for tap in [tap for tap in segment.plan.taps if tap.name in stats and stats[tap.name].count]:
            of = stats[tap.name]
            for slot, total in zip(tap.slots, of.square_sum, strict=True):
                found.setdefault((tap.name, slot), math.sqrt(total / of.count))
    return found


def _shards(a: StoredRows, b: StoredRows) -> dict[str, Any]:
    """Compare some shards that both caches have: in which the codes of a tap differ. Reads receipts alone."""
    found: dict[str, Any] = {"compared": 0, "differing": {}}
    for one, other in zip(a.segments, b.segments, strict=False):
        if _division(one) != _division(other):
            continue
        both = sorted(_committed(one) & _committed(other)) if one.committed or other.committed else None
        of = both if both is not None else range(one.plan.num_shards)
        drawn = (
            [of[at] for at in sorted({*np.linspace(0, len(of) - 1, SAMPLED_SHARDS).round().astype(int).tolist()})]
            if of
            else []
        )
        for shard in drawn:
            records = one.record(shard), other.record(shard)
            for array in [part.array for tap in one.plan.taps for part in tap.parts]:
                if bytes(records[0][f"{array}/digest"]) != bytes(records[1][f"{array}/digest"]):
                    found["differing"].setdefault(f"{one.plan.segment}/{array}", []).append(shard)
        found["compared"] += len(drawn)
    return found


def _committed(segment: Segment) -> set[int]:
    return set(range(segment.plan.num_shards)) if segment.committed is None else set(segment.committed)


def _division(segment: Segment) -> Any:
    plan = segment.plan
    return plan.rows.count, plan.shard_rows, [part.model_dump() for tap in plan.taps for part in tap.parts]


def _figures(measured: Sequence[RowMeasure]) -> list[dict[str, Any]]:
    found: dict[tuple[str, int], list[tuple[float, float, bool]]] = {}
    for row in measured:
        for tap in row.taps:
            for at, slot in enumerate(tap.slots):
                entry = (float(tap.cosine[at]), float(tap.error[at]), bool(tap.wrong[at]))
                found.setdefault((tap.tap, slot), []).append(entry)
    return [
        {
            "tap": tap,
            "slot": slot,
            "cosine_distance": float(np.mean([cosine for cosine, _, _ in entries])),
            "error": float(np.mean([error for _, error, _ in entries])),
            "wrong_rows": sum(wrong for _, _, wrong in entries),
        }
        for (tap, slot), entries in found.items()
    ]


def _summary(found: dict[str, Any], rows_a: int, rows_b: int) -> list[str]:
    """Summarise the differences in a few lines, most serious first."""
    lines = [look["line"] for look in found["findings"]]
    plans = found["plans"]
    words = {
        "teacher.weights_digest": "another teacher's weights",
        "rows.tokenizer_digest": "another tokenizer",
        "rows.content_digest": "other rows",
    }
    lines += [text for key, text in words.items() if any(name.endswith(key) for name in plans)]
    taps = {key: values for key, values in plans.items() if "taps." in key and "config." not in key}
    lines += [f"{key} {a} and {b}" for key, (a, b) in taps.items() if key.endswith(LAYOUT_FIELDS)]
    if rows_a != rows_b:
        lines.append(f"{rows_a:,} and {counted(rows_b, 'row')}")
    if found["rows"]["other_tokens"]:
        of = len(found["rows"]["compared"])
        lines.append(f"{len(found['rows']['other_tokens'])} of {of} sampled rows hold other tokens or boundaries")
    shards = found["shards"]
    if shards["compared"] and not shards["differing"]:
        lines.append(f"the same codes in {shards['compared']} of {shards['compared']} compared shards")
    for array, numbers in shards["differing"].items():
        lines.append(
            f"{array}: different codes in {len(numbers)} of {shards['compared']} compared shards, such as {numbers[:4]}"
        )
    return lines or ["no difference found"]
