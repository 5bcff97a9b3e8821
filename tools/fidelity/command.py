"""`distillcache fidelity`: compare the decoded cache with the live teacher on a sample of rows.

Exit code 0: the cache is what its codecs make of this teacher. 2: it is not, or they lose much; the first line says
what it looks like, and why.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from distillcache.models.checkpoint import read_config
from distillcache.schemas import command_line
from distillcache.schemas.config.look import FidelityConfig
from distillcache.schemas.errors import DamageError, InputError
from distillcache.schemas.format.manifest import TOPK_LOGITS, Plan, Stats
from distillcache.schemas.format.rows import Row
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import using
from distillcache.tools.fidelity import compare
from distillcache.tools.fidelity import rows as texts
from distillcache.tools.fidelity.compare import RowMeasure, TapMeasure
from distillcache.tools.fidelity.live_teacher import VARIANTS, LiveTeacher, comparable
from distillcache.tools.fidelity.printing import print_fidelity
from distillcache.tools.fidelity.topk import (
    TopKMeasure,
    figures,
    judge_topk,
    kept_values,
    measure_topk,
    rounding_of,
    stored_logits,
)
from distillcache.tools.fidelity.verdict import GAIN, LOSSY, Look, Reference, file_looks, gravest, judge
from distillcache.tools.look.segment_facts import segment_stats
from distillcache.tools.look.stored_rows import StoredRows, StoredTap

TRIED_ROWS = 3  # wrong rows for which all variants of the teacher's input are tried; then those that have fitted
SEEN_TOKENS = 16  # compared with every row of the embedding


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Print the verdict and the figures as tables or as one JSON object; the exit code."""
    config = command_line.parse(FidelityConfig, argv, command, positional=("cache",))
    with using(config.storage):
        found = check_fidelity(StoredRows(config.cache), config.teacher, config.rows, config.seed)
    if as_json:
        print(json.dumps(found))
    else:
        print_fidelity(found, config.every_slot)
    return 0 if found["verdict"]["kind"] == "faithful" else 2


def check_fidelity(rows: StoredRows, teacher: str | None, count: int, seed: int) -> dict[str, Any]:
    """The verdict, all findings, and the figures of every tap and slot, as plain values.

    Args:
        teacher: its checkpoint; None: where the plan says that it was.
        count: rows to compare.

    Raises:
        InputError: there is no cache, or no committed row.
        CheckpointError: there is no usable checkpoint.
    """
    plan = rows.plan
    path = teacher or plan.teacher.path
    numbers = rows.sample(count, seed)
    if not numbers:
        raise InputError(
            "no row of the cache is committed yet",
            {"cache": rows.store.url},
            "try again when the first shards are committed",
        )
    misfit = _misfit(path, plan)
    if misfit is not None:
        return _report(rows, path, [], gravest([misfit]))
    logits = next((each.tap for each in rows.taps(numbers[0]) if each.tap.name == TOPK_LOGITS), None)
    names = [name for name in rows.tap_names(numbers[0]) if comparable(name)]
    live = LiveTeacher(path, plan.numerics.dtype, names, logits)
    return compare_rows(rows, live, numbers)


def compare_rows(rows: StoredRows, live: LiveTeacher, numbers: Sequence[int]) -> dict[str, Any]:
    """`check_fidelity` of these rows, with a teacher that is loaded already."""
    tokenizers = texts.open_texts(rows.store, rows.plan, live.path)
    padding = texts.padding_ids(tokenizers.of_cache)
    measured: list[RowMeasure] = []
    logits: list[TopKMeasure] = []
    looks: list[Look] = []
    codecs: dict[str, Look] = {}
    with Progress("fidelity", len(numbers), unit="rows") as bar:
        for number in numbers:
            bar.advance()
            try:
                row = rows.row(number)
                looks += _row_looks(number, row, tokenizers, padding)
                measure, lossy, of_logits = _measure(rows, live, number, row, _variants(measured))
                measured.append(measure)
                logits += [] if of_logits is None else [of_logits]
                codecs = {**lossy, **codecs}
            except DamageError as error:
                looks.append(_damage(number, error))
    reference = Reference("the teacher", live.path, live.digest, rows.plan.teacher.weights_digest)
    looks += judge(_without_known(measured, looks), reference)
    looks += judge_topk(logits, reference.name, [row.row for row in measured if row.wrong])
    looks += _statistics(rows)
    looks += file_looks(rows.segments)
    return _report(rows, live.path, measured, gravest([*_once(looks), *codecs.values()]), logits)


def _without_known(measured: Sequence[RowMeasure], looks: Sequence[Look]) -> list[RowMeasure]:
    """The rows whose masks can be right: where others are wrong, so are the numbers, and no more need be found."""
    known = {row for look in looks if look.kind == "padding-as-text" for row in look.where["rows"]}
    return [row for row in measured if not (row.wrong and row.row in known)]


def _variants(measured: Sequence[RowMeasure]) -> list[str]:
    """Which variants of the teacher's input to try on the next wrong row: each is another run of the teacher."""
    wrong = [row for row in measured if row.wrong]
    return list(VARIANTS) if len(wrong) < TRIED_ROWS else sorted({row.variant for row in wrong} - {""})


def _measure(
    rows: StoredRows, live: LiveTeacher, number: int, row: Row, variants: Sequence[str]
) -> tuple[RowMeasure, dict[str, Look], TopKMeasure | None]:
    """A row's figures, the taps whose codecs lose much of it, and the figures of its logits."""
    real, numerics = row.segment_ids > 0, rows.plan.numerics
    if not real.any():  # `row_faults` says so
        return RowMeasure(number, rows.shard(number), []), {}, None
    own, logits = live.taps_and_logits(row)
    noise = compare.teacher_noise(numerics.dtype, numerics.platform, live.platform)
    _, place = rows.locate(number)
    taps = [stored for stored in rows.taps(number) if comparable(stored.tap.name)]
    values = [np.stack([value for _, value in stored.decoded(stored.read(place))]) for stored in taps]
    teacher = [own[stored.tap.name][list(stored.tap.slots)] for stored in taps]
    measures = [
        compare.measure_tap(stored.tap.name, stored.tap.slots, given, there, stored.kept(there), real, noise)
        for stored, given, there in zip(taps, values, teacher, strict=True)
    ]
    found = RowMeasure(number, rows.shard(number), measures)
    if found.wrong:
        _explain(found, live, row, taps, values, own, variants)
    lossy = [
        _lossy(stored, there, measure, real) for stored, there, measure in zip(taps, teacher, measures, strict=True)
    ]
    of_logits = next((each for each in rows.taps(number) if each.tap.name == TOPK_LOGITS), None)
    return (
        found,
        {stored.tap.name: look for stored, look in zip(taps, lossy, strict=True) if look is not None},
        None
        if of_logits is None or logits is None
        else measure_topk(
            number,
            found.shard,
            stored_logits(of_logits, place),
            logits,
            kept_values(of_logits, logits),
            real,
            noise,
            rounding_of(of_logits),
        ),
    )


def _explain(
    found: RowMeasure,
    live: LiveTeacher,
    row: Row,
    taps: Sequence[StoredTap],
    values: Sequence[np.ndarray],
    own: dict[str, np.ndarray],
    variants: Sequence[str],
) -> None:
    """Try what wrong numbers could be, and keep what fits."""
    real = row.segment_ids > 0
    slots = [list(stored.tap.slots) for stored in taps]
    teacher = [own[stored.tap.name][chosen] for stored, chosen in zip(taps, slots, strict=True)]
    if all(measure.wrong.mean() > 0.5 for measure in found.taps):
        found.shift = compare.find_shift(found.taps, values, teacher, real)
        for name in variants if not found.shift else ():
            other = live.variant(row, name)
            there = [other[stored.tap.name][chosen] for stored, chosen in zip(taps, slots, strict=True)]
            if compare.explains(values, found.taps, there, real):
                found.variant = name
                break
        found.seen = _seen(live, row, taps, values)
    if not found.shift and not found.variant:
        for measure, given, stored in zip(found.taps, values, taps, strict=True):
            found.swapped += compare.find_swaps(measure, given, own[stored.tap.name], real)


def _seen(
    live: LiveTeacher, row: Row, taps: Sequence[StoredTap], values: Sequence[np.ndarray]
) -> tuple[list[int], list[int], list[float]] | None:
    """Which tokens the stored stream embeds, at some places; None where slot 0 is not stored."""
    for stored, given in zip(taps, values, strict=True):
        if stored.tap.name == "resid" and stored.tap.slots[0] == 0:
            places = np.flatnonzero(row.segment_ids > 0)[:SEEN_TOKENS]
            ids, distance = live.seen_tokens(given[0][places])
            return row.tokens[places].tolist(), ids.tolist(), [float(each) for each in distance]
    return None


def _lossy(stored: StoredTap, teacher: np.ndarray, measure: TapMeasure, real: np.ndarray) -> Look | None:
    """Report a loss that the codec alone explains, if it is large, and codecs that lose less."""
    worst = float(measure.expected.max())
    if worst < LOSSY / GAIN:
        return None
    place = int(measure.expected.argmax())
    at = measure.slots[place]
    evidence = f"{stored.tap.name} in {stored.tap.codec} has an error of {worst:.2g} at slot {at} by the codec alone"
    rotated, outliers = (
        compare.rotated_error(stored.tap, teacher, real),
        compare.outlier_dimensions(teacher[place, real]),
    )
    where: dict[str, Any] = {"tap": stored.tap.name, "codec_error": worst, "outlier_dimensions": list(outliers)[:8]}
    if outliers:
        words = ", ".join(
            f"{dimension} ({times:g} times the median)" for dimension, times in list(outliers.items())[:3]
        )
        evidence += f"; outlier dimensions {words}"
    if rotated is not None and float(rotated.max()) * GAIN < worst:
        where["rotated_error"] = float(rotated.max())
        evidence += f"; with rotate: true it would be {float(rotated.max()):.2g}"
    elif worst < LOSSY:
        return None
    return Look("lossy-codec", evidence, where)


def _misfit(path: str, plan: Plan) -> Look | None:
    """A teacher that cannot be the cache's by its shape alone."""
    model = read_config(path)
    pairs = {
        "blocks": (model.num_blocks, plan.teacher.num_blocks),
        "hidden size": (model.hidden_size, plan.teacher.hidden_size),
        "vocabulary": (model.vocab_size, plan.teacher.vocab_size),
    }
    differing = [
        f"{what} {found}, the cache's teacher had {had}" for what, (found, had) in pairs.items() if found != had
    ]
    return Look("other-teacher", f"{path}: {'; '.join(differing)}") if differing else None


def _row_looks(number: int, row: Row, tokenizers: texts.Texts, padding: set[int]) -> Iterator[Look]:
    kinds = {"padding": "padding-as-text", "positions": "padding-as-text"}
    for kind, evidence in texts.row_faults(row, sorted(padding)):
        yield Look(kinds[kind], f"row {number}: {evidence}", {"rows": [number]})
    words = texts.other_words(tokenizers, row)
    if words is not None:
        spelled = f"row {number} reads {words['by_the_cache']!r} by the cache's tokenizer"
        yield Look(
            "wrong-tokenizer", f"{spelled}, {words['by_the_teacher']!r} by the teacher's", {"rows": [number], **words}
        )


def _statistics(rows: StoredRows) -> Iterator[Look]:
    for segment in rows.segments:
        if segment.committed is not None:
            continue
        with suppress(DamageError):  # which is told as a file's
            evidence = texts.counted_padding(segment.plan, Stats(taps=dict(segment_stats(segment, ()))))
            if evidence:
                yield Look("padding-as-text", evidence, {"segment": segment.plan.segment})


def _damage(number: int, error: DamageError) -> Look:
    facts = error.facts
    found = str(facts.get("found", ""))
    kind = {"truncated": "truncated-object", "stale": "stale-shard"}.get(found, "damaged-object")
    detail = facts.get("detail", error.what)
    where = {"rows": [number], "file": str(facts.get("file", "")), "shard": facts.get("shard")}
    return Look(kind, f"{facts.get('file', error.what)}: {detail}", where)


def _once(looks: Sequence[Look]) -> list[Look]:
    """One finding of a kind and place: of rows with the same fault, the first, with the numbers of all."""
    first: dict[tuple[str, str], Look] = {}
    for look in looks:
        key = (look.kind, str(look.where.get("file", "")))
        if key in first and "rows" in look.where:
            first[key].where.setdefault("rows", []).extend(look.where["rows"])
        first.setdefault(key, look)
    return list(first.values())


def _report(
    rows: StoredRows,
    path: str,
    measured: Sequence[RowMeasure],
    looks: Sequence[Look],
    logits: Sequence[TopKMeasure] = (),
) -> dict[str, Any]:
    return {
        "cache": rows.store.url,
        "teacher": path,
        "finished": rows.finished,
        "rows": [row.row for row in measured],
        "verdict": {"kind": looks[0].kind, "line": looks[0].line, "next": looks[0].next},
        "findings": [{"kind": look.kind, "line": look.line, "next": look.next, "where": look.where} for look in looks],
        "taps": _figures(measured),
        "topk_logits": figures(logits),
    }


def _figures(measured: Sequence[RowMeasure]) -> list[dict[str, Any]]:
    """Compute figures of every tap and slot over all rows: means, and the worst token."""
    found: dict[tuple[str, int], list[tuple[int, TapMeasure, int]]] = {}
    for row in measured:
        for tap in row.taps:
            for at, slot in enumerate(tap.slots):
                found.setdefault((tap.tap, slot), []).append((row.row, tap, at))
    figures = []
    for (name, slot), entries in found.items():
        row, (token, error) = max(((n, tap.worst[at]) for n, tap, at in entries), key=lambda pair: pair[1][1])
        means = {
            key: float(np.mean([getattr(tap, attribute)[at] for _, tap, at in entries]))
            for key, attribute in (
                ("cosine_distance", "cosine"),
                ("error", "error"),
                ("codec_error", "expected"),
                ("weighted_error", "weighted"),
            )
        }
        wrong = sum(bool(tap.wrong[at]) for _, tap, at in entries)
        worst = {"row": row, "token": token, "error": error}
        figures.append({"tap": name, "slot": slot, **means, "wrong_rows": wrong, "worst": worst})
    return figures
