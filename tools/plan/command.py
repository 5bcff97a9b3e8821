"""`distillcache plan`: estimate the cost of a build before anything is written.

    distillcache plan --config build.yaml

Takes the build's own config. Rows are counted by preparing them in a temporary folder; of a large corpus a sample is
tokenised instead, and the report says that its numbers are estimates.
"""

import json
import logging
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distillcache.cache_builder.prepare import open_rows, prepare_rows
from distillcache.cache_builder.text.document import Document, TokenDocument
from distillcache.cache_builder.text.documents import file_documents
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, input_files
from distillcache.cache_builder.text.packing import COUNTED
from distillcache.cache_builder.text.skipped import Skipped
from distillcache.cache_builder.text.tokenise import token_arrays
from distillcache.models.checkpoint import load_pretrained, read_config
from distillcache.models.config import ModelConfig
from distillcache.models.describe import describe_rows
from distillcache.models.recorder import make_recorder
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas import command_line
from distillcache.schemas.config import BuildConfig, BuildSpec, DataConfig, PlanConfig, PrepareConfig, TapsConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.layout import ITEM_BYTES
from distillcache.schemas.format.manifest import TOPK_LOGITS, PartPlan, Plan, RowsPlan, TapPlan
from distillcache.schemas.format.rows import RowReader, Split, too_long_for_teacher
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.store.buckets import check_scheme
from distillcache.schemas.store.path import ObjectPath, locate
from distillcache.schemas.store.store import Store, using
from distillcache.tools.plan.printing import print_next, print_sizes
from distillcache.tools.plan.sizes import plan_for, total_bytes

SAMPLE_BYTES = 16 << 20  # of text: a few seconds of tokenising; below it everything is counted


SAMPLE_FILES = 16  # the sample is drawn from so many files, evenly spaced


PACKED_SAMPLE = 4 << 20  # packed bytes that tell how much longer a .gz file is unpacked


TOKEN_RECORD_BYTES = 4  # of a record for each token that it holds: somewhat less in some formats, 12 in others


MEASURED_BATCHES = 2


MEASURE_S = 12.0  # for the timed calls; reading the teacher, compiling and a first look at its speed come on top


FIRST_LOOK = 64  # tokens of the call that tells how large a batch can be measured within that time


# label -> (codec, delta coding of `resid`): what the table compares
CODEC_CHOICES = {
    "bf16": ("bf16", False),
    "fp8": ("fp8", False),
    "int8": ("int8", False),
    "int8, resid as differences": ("int8", True),
    "int4": ("int4", False),
    "int4, resid as differences": ("int4", True),
}


BLOCK_STEPS = (1, 2, 4)  # every block, every second, every fourth


@dataclass(frozen=True)
class CountedRows:
    """The rows as a plan describes them; exact: counted, not estimated. without_targets: the splits in which no token
    is a target; of an estimate, `train` where there is none in the sample."""

    plan: RowsPlan
    exact: bool
    without_targets: tuple[Split, ...]


log = logging.getLogger(__name__)


class Speed(NamedTuple):
    """A teacher's speed with its recorder, and the calls that it was measured in, of rows x row_tokens tokens each."""

    tokens_per_s: float
    calls: int
    rows: int
    row_tokens: int


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Print the cost of the build that the command line describes; with `--simulate`, of large texts.

    Sizes are printed first, since the teacher's speed takes about half a minute to measure.
    """
    if "--simulate" in argv:
        from distillcache.tools.plan import scale_report  # here, since it is made of this module's parts

        words = [word for word in argv if word != "--simulate"]
        scale_report.run(words, f"{command} --simulate", as_json)
        return
    config = command_line.parse(PlanConfig, argv, command)
    with using(config.storage):
        plan, report = describe_sizes(config)
        if not as_json:
            print_sizes(report)
        report |= describe_time(config, plan)
    if as_json:
        print(json.dumps(report))
    else:
        print_next(report)


def describe_build(config: PlanConfig) -> dict[str, Any]:
    """Everything that can be known of a build beforehand: `describe_sizes` and `describe_time`."""
    plan, report = describe_sizes(config)
    return report | describe_time(config, plan)


def describe_time(config: PlanConfig, plan: Plan) -> dict[str, Any]:
    """The build's time in seconds as plain values, extrapolated from the measured speed; None if it is not wanted."""
    if not config.measure:
        return {"tokens_per_s": None, "measured": None, "seconds": None, "processes": config.num_processes}
    log.info("measuring the teacher's speed; `--measure false` leaves this out")
    speed = measure_speed(config.teacher.path, config.dtype, plan)
    tokens = plan.rows.count * plan.rows.row_tokens
    return {
        "tokens_per_s": speed.tokens_per_s,
        "measured": {"calls": speed.calls, "rows": speed.rows, "row_tokens": speed.row_tokens},
        "seconds": tokens / speed.tokens_per_s / config.num_processes,
        "processes": config.num_processes,
    }


def describe_sizes(config: PlanConfig) -> tuple[Plan, dict[str, Any]]:
    """The plan of a build, and its sizes in bytes and numbers of objects as plain values.

    at_most: taps are compressed, by how much nobody can know beforehand; sizes are those before compression.
    enough_room: None where that is unknown.

    Raises:
        ConfigError, InputError: the build would be refused as well.
    """
    model = read_config(config.teacher.path)
    tokenizer = load_tokenizer(config.data.tokenizer or config.teacher.path, eos_token=config.data.eos_token)
    rows = count_rows(config.data, tokenizer)
    build = BuildConfig.model_validate(config.model_dump(exclude={"measure"}))
    plan = plan_for(build, model, rows.plan, config.teacher.path)
    free, total = free_bytes(config.cache), total_bytes(plan)
    unsure = free is None or (plan.is_compressed and total > free)
    report = {
        "cache": config.cache,
        "teacher": plan.teacher.model_dump(exclude={"weights_digest"}) | {"dtype": plan.numerics.dtype},
        "rows": {
            "count": plan.rows.count,
            "row_tokens": plan.rows.row_tokens,
            "tokens": plan.rows.tokens,
            "exact": rows.exact,
        },
        "without_targets": rows.without_targets,
        "too_long": too_long_for_teacher(plan.rows.row_tokens, plan.teacher.context),
        "blocks": len(plan.blocks),
        "taps": [_describe_tap(plan, tap) for tap in plan.taps],
        "bytes_per_token": plan.bytes_per_token,
        "bytes": total,
        "at_most": plan.is_compressed,
        "shards": {
            "count": plan.num_shards,
            "rows": plan.shard_rows,
            "bytes": plan.shard_rows * plan.bytes_per_row,
        },
        "objects": sum(_objects(plan, part) for tap in plan.taps for part in tap.parts),
        "memory_in_flight": memory_in_flight(config.max_in_flight_mib, plan),
        "free_bytes": free,
        "enough_room": None if unsure or free is None else total <= free,
        "choices": compare_choices(build, model, rows.plan),
        "batch_rows": plan.batch_rows,
    }
    return plan, report


def count_rows(data: DataConfig, tokenizer: TextTokenizer) -> CountedRows:
    """The rows that `data` stands for: prepared ones as they are, a small text counted, a large one estimated."""
    prepared = open_rows(data)
    if prepared is not None:
        return _counted(prepared)
    total = sum(unpacked_bytes(file, data.text_field) for file in input_files(data))
    if total <= SAMPLE_BYTES:
        with tempfile.TemporaryDirectory(prefix="distillcache-plan-") as folder:
            prepare_rows(PrepareConfig(out=folder, data=data), tokenizer=tokenizer)
            return _counted(RowReader(Store(folder)))
    text, tokens, targets = _count_sample(data, tokenizer)
    # What surrounds the text of a .jsonl line is taken for text too: at most some percent too many.
    tokens = round(tokens / text * total)
    rows = -(-tokens // data.row_tokens)
    if data.max_rows is not None and rows > data.max_rows:
        rows, tokens = data.max_rows, data.max_rows * data.row_tokens
    return CountedRows(_estimated_rows(data, tokenizer, rows, tokens), False, () if targets else ("train",))


def _counted(rows: RowReader) -> CountedRows:
    return CountedRows(describe_rows(rows), True, rows.without_targets())


def unpacked_bytes(file: InputFile, text_field: str = "text") -> int:
    """An input file's length once it is unpacked; of a long .gz file an estimate from its beginning.

    Of a local parquet file, the length of its text's column; of a remote one, all that is stored.
    """
    if file.kind == ".parquet" and isinstance(file.place, Path):
        from distillcache.cache_builder.text.files.parquet import text_bytes  # here, since few corpora need its library

        return text_bytes(file, text_field)
    if not file.kind.endswith(".gz"):
        return file.size
    with InputReader(file) as reader:
        packed = BufferedReader(reader).read(PACKED_SAMPLE)
    unpacked = zlib.decompressobj(wbits=31).decompress(packed)  # 31: with gzip's header
    return round(len(unpacked) * file.size / max(len(packed), 1))


def measure_speed(teacher: str, dtype: str | None, plan: Plan) -> Speed:
    """Measure the teacher with its recorder on random tokens, without compiling, for about `MEASURE_S` at most.

    A call of a few tokens tells how much of a batch fits into that time; that much is measured.
    """
    log.info("reading the teacher")
    record, parameters = make_recorder(load_pretrained(teacher, dtype=dtype), plan.taps, signs_of(plan))
    timed = partial(_time_calls, jax.jit(record), parameters, plan.teacher.vocab_size)
    shape = (1, min(FIRST_LOOK, plan.rows.row_tokens))
    log.info(f"compiling, then timing {_said(shape)}")
    first = timed(shape, 1)
    shape = measured_shape(1 / first.tokens_per_s, plan.batch_rows, plan.rows.row_tokens)
    if shape == (first.rows, first.row_tokens):
        return first
    log.info(f"compiling, then timing {_said(shape)}, for at most about {MEASURE_S:.0f} s")
    return timed(shape, MEASURED_BATCHES)


def _said(shape: tuple[int, int]) -> str:
    return f"{counted(shape[0], 'row')} of {counted(shape[1], 'token')}"


def measured_shape(seconds_a_token: float, batch_rows: int, row_tokens: int) -> tuple[int, int]:
    """(rows, tokens of each) to measure within `MEASURE_S`: a batch if it fits, else fewer rows, else part of a row."""
    tokens = int(MEASURE_S / seconds_a_token)
    if tokens >= row_tokens:
        return min(tokens // row_tokens, batch_rows), row_tokens
    return 1, min(max(tokens, FIRST_LOOK), row_tokens)


def _time_calls(record: Any, parameters: Any, vocab_size: int, shape: tuple[int, int], most: int) -> Speed:
    """Compile the jitted recorder for random tokens `[rows, tokens]`, and time up to `most` calls."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
    inputs = (tokens, np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape), np.ones(shape, np.int32))
    arrays = [jax.numpy.asarray(each) for each in inputs]
    compiled = record.lower(parameters, *arrays).compile()
    start, took, calls = time.perf_counter(), 0.0, 0
    while calls < most and took + took / max(calls, 1) <= MEASURE_S:  # another call only if it fits
        jax.block_until_ready(compiled(parameters, *arrays))
        calls, took = calls + 1, time.perf_counter() - start
    return Speed(calls * tokens.size / took, calls, *shape)


def free_bytes(cache: str) -> int | None:
    """Free space where the cache would go; None for a bucket."""
    folder = locate(cache)
    if isinstance(folder, ObjectPath):
        check_scheme(cache)
        return None
    folder = folder.absolute()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free


def memory_in_flight(max_in_flight_mib: int, plan: Plan) -> int:
    """Host bytes at most between teacher and store: shards within their bound, and two batches on their way there."""
    shards = max(max_in_flight_mib << 20, plan.shard_rows * plan.bytes_per_row)
    return shards + 2 * plan.batch_rows * plan.bytes_per_row


def compare_choices(config: BuildSpec, model: ModelConfig, rows: RowsPlan) -> list[dict[str, Any]]:
    """Compare the cost of the same rows and taps in other codecs, and with fewer of the config's blocks."""
    chosen = list(range(model.num_blocks)) if isinstance(config.blocks, str) else sorted(set(config.blocks))
    found: list[dict[str, Any]] = []
    whole = plan_for(_with_choice(config, "bf16", False, chosen), model, rows).bytes_per_token
    for step in BLOCK_STEPS:
        blocks = chosen[step - 1 :: step]
        for label, (codec, delta) in CODEC_CHOICES.items() if blocks else ():
            if delta and config.taps.resid is None:
                continue
            entry: dict[str, Any] = {"codec": label, "blocks": len(blocks)}
            try:
                plan = plan_for(_with_choice(config, codec, delta, blocks), model, rows)
            except ConfigError as error:  # this choice does not fit this teacher: said, since others may
                found.append({**entry, "impossible": error.what})
                continue
            share = plan.bytes_per_token / whole
            found.append(
                {**entry, "bytes_per_token": plan.bytes_per_token, "bytes": total_bytes(plan), "of_bf16": share}
            )
    return found


def _with_choice(config: BuildSpec, codec: str, delta: bool, blocks: list[int]) -> BuildSpec:
    taps: dict[str, Any] = {
        name: {"codec": codec, "delta": delta and name == "resid"} if getattr(config.taps, name) else None
        for name in TapsConfig.model_fields
        if name != TOPK_LOGITS
    } | {TOPK_LOGITS: config.taps.topk_logits}
    if config.taps.resid is not None:
        taps["resid"] |= config.taps.resid.model_dump(include={"slots", "head"})
    return config.model_copy(update={"taps": TapsConfig.model_validate(taps), "blocks": blocks, "shard_rows": None})


def _count_sample(data: DataConfig, tokenizer: TextTokenizer) -> tuple[int, int, bool]:
    """(bytes of text, tokens, whether any is a target) of the beginnings of some files."""
    files = input_files(data)
    sampled = files[:: -(-len(files) // SAMPLE_FILES)]
    text, tokens, targets = 0, 0, False
    log.info(f"tokenising a sample of the text, from {len(sampled):,} of {counted(len(files), 'file')}")
    for file in sampled:
        for document in _beginning(file, data, tokenizer, SAMPLE_BYTES // len(sampled)):
            arrays = [
                marked
                for marked in token_arrays([document], tokenizer, data.on_error)
                if not isinstance(marked, Skipped)
            ]
            one = sum(marked.size for marked in arrays)
            targets = targets or any((marked["marks"][1:] & COUNTED).any() for marked in arrays)
            is_text = isinstance(document, Document)
            text += len(document.text.encode()) if is_text else one * TOKEN_RECORD_BYTES
            tokens += one
    return text, tokens, targets


def _beginning(
    file: InputFile, data: DataConfig, tokenizer: TextTokenizer, limit: int
) -> Iterator[Document | TokenDocument]:
    """The first documents of a file, of about `limit` characters or tokens; a longer text is cut."""
    with InputReader(file) as reader, closing(file_documents(file, reader, data, tokenizer)) as found:
        for document in found:
            if isinstance(document, Skipped):
                continue
            yield replace(document, text=document.text[:limit]) if isinstance(document, Document) else document
            limit -= len(document.text) if isinstance(document, Document) else document.tokens.size
            if limit <= 0:
                return


def _estimated_rows(data: DataConfig, tokenizer: TextTokenizer, rows: int, tokens: int) -> RowsPlan:
    return RowsPlan(
        count=rows,
        eval_indices=(),
        row_tokens=data.row_tokens,
        tokens=tokens,
        content_digest="",
        text_digest="",
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def _describe_tap(plan: Plan, tap: TapPlan) -> dict[str, Any]:
    per_token = sum(part.bytes_per_token for part in tap.parts)
    return {
        "name": tap.name,
        "codec": tap.codec
        + (", differences" if tap.delta else "")
        + (f", the largest {tap.k}" if tap.k else "")
        + (f" of {tap.vocab_size:,} ids" if tap.vocab_size else ""),
        "compress": tap.compress,
        "slots": len(tap.slots),
        "bytes_per_token": per_token,
        "bytes": per_token * plan.rows.row_tokens * plan.rows.count,
        "arrays": {
            part.array: {
                "objects": _objects(plan, part),
                "object_bytes": _object_bytes(plan, part),
                "slots_per_object": part.slots_per_object,
            }
            for part in tap.parts
        },
    }


def _objects(plan: Plan, part: PartPlan) -> int:
    return plan.num_shards * len(part.object_ranges())


def _object_bytes(plan: Plan, part: PartPlan) -> int:
    """Return the bytes of a full object; its index of chunks, 16 bytes each, is not counted."""
    return plan.shard_rows * part.slots_per_object * plan.rows.row_tokens * part.width * ITEM_BYTES[part.dtype]
