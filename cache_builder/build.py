"""The main loop of stage 1: rows through the teacher, codes into shards, shards into the store.

Three things go on at once: the teacher computes one batch, the batch before it is copied to the host, and a full
shard is being written by another thread (pipeline.py). A process works on *pieces*, the consecutive shards of whole
teacher batches, which it claims one by one (claims.py), so that any number of processes may build one cache.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tensorstore as ts

from cache_builder.claims import Claims
from cache_builder.finish import committed_shards, finish_segment, tidy
from cache_builder.pipeline import ShardWriter
from cache_builder.plan import describe_numerics, make_plan, settle_plan
from cache_builder.prepare import open_rows, prepare_rows
from cache_builder.text import inputs_digest
from models.checkpoint import load_pretrained, read_config, weights_digest
from models.decoder import Decoder
from models.recorder import Recording, make_recorder
from models.tokenizer import TextTokenizer, load_tokenizer
from schemas import layout
from schemas.config import BuildConfig, PrepareConfig
from schemas.errors import InputError, Interrupted, NonFiniteError, PlanMismatchError
from schemas.manifest import Manifest, Plan, RowsPlan, TeacherPlan
from schemas.progress import Progress
from schemas.rows import Row, RowReader
from schemas.segment import part_metadata, read_manifest, read_plan
from schemas.signals import StopRequest, watch_for_stop
from schemas.storage import Store

SEGMENT = "0000"
POLL_S = 1.0  # how often to look whether other processes have finished their pieces


def build_cache(config: BuildConfig) -> Manifest:
    """Build the cache that `config` describes, or go on with it where it was stopped.

    Text is prepared first. Running the same command again after any interruption gives the same bytes in `rows/` and
    `taps/` as an uninterrupted build; a finished cache is left as it is.

    Raises:
        PlanMismatchError: the place holds the work of another config.
        InputError, CheckpointError, ConfigError: what was given cannot be used; nothing is written.
        NonFiniteError, StorageError: the build stopped; committed shards stay, and the same command goes on.
        Interrupted: SIGTERM or SIGINT; likewise.
    """
    store = Store(config.cache)
    tokenizer = load_tokenizer(config.data.tokenizer or config.teacher.path, eos_token=config.data.eos_token)
    manifest = read_manifest(store)
    if manifest is not None:
        return _check_finished(store, config, tokenizer, manifest)
    with watch_for_stop() as stop:
        decoder, plan, rows = _begin(store, config, tokenizer)
        claims = Claims(store, plan.segment, config.claim_expiry_s)
        try:
            _build_pieces(_Job(config, store, plan, rows, decoder, claims, stop))
        finally:
            claims.close()
        return finish_segment(store, plan)


@dataclass
class _Job:
    """What the loop needs; built once."""

    config: BuildConfig
    store: Store
    plan: Plan
    rows: RowReader
    decoder: Decoder
    claims: Claims
    stop: StopRequest

    @property
    def piece_rows(self) -> int:
        return max(self.plan.shard_rows, self.plan.batch_rows)

    def shards_of(self, piece: int) -> list[int]:
        first = piece * self.piece_rows // self.plan.shard_rows
        return list(range(first, min(first + self.piece_rows // self.plan.shard_rows, self.plan.num_shards)))

    def piece_of(self, shard: int) -> int:
        return shard * self.plan.shard_rows // self.piece_rows


def _begin(store: Store, config: BuildConfig, tokenizer: TextTokenizer) -> tuple[Decoder, Plan, RowReader]:
    """Everything before the first teacher call: rows, plan, and the files that are known from the start."""
    model, named = read_config(config.teacher.path), config.data.tokenizer or config.teacher.path
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            "the tokenizer does not belong to the teacher",
            {
                "tokenizer": f"{named}  gives ids up to {tokenizer.vocab_size - 1}",
                "teacher": f"{config.teacher.path}  knows {model.vocab_size} ids",
            },
            "leave out data.tokenizer to use the teacher's own",
        )
    store.clear_stale_locks()
    rows = _open_or_prepare(store, config, tokenizer)
    decoder = load_pretrained(config.teacher.path, dtype=config.dtype)
    teacher = TeacherPlan(
        path=config.teacher.path,
        weights_digest=weights_digest(config.teacher.path),
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        family=model.family,
    )
    plan = make_plan(config, SEGMENT, model, teacher, _rows_plan(rows), str(decoder.embed[...].dtype))
    plan = settle_plan(store, plan, config.accept_platform)
    _write_fixed_files(store, plan, decoder, tokenizer)
    _warn_if_small(store, plan)
    return decoder, plan, rows


def _open_or_prepare(store: Store, config: BuildConfig, tokenizer: TextTokenizer) -> RowReader:
    rows = open_rows(config.data)
    if rows is None:
        out = f"{store.url}/{layout.segment_prefix(SEGMENT)}/prepared"
        prepare_rows(PrepareConfig(out=out, data=config.data), tokenizer=tokenizer)
        rows = RowReader(store, f"{layout.segment_prefix(SEGMENT)}/prepared/")
    if rows.index.tokenizer_digest != tokenizer.digest:
        raise InputError(
            "the rows were made with another tokenizer than the teacher's",
            {"rows": rows.index.tokenizer_digest, "teacher": tokenizer.digest},
            "prepare them with the teacher's tokenizer, or name theirs with --data.tokenizer",
        )
    return rows


def _rows_plan(rows: RowReader) -> RowsPlan:
    index = rows.index
    return RowsPlan(
        count=index.rows,
        eval_indices=index.eval_indices,
        row_tokens=index.row_tokens,
        tokens=index.tokens,
        content_digest=index.content_digest,
        text_digest=index.text_digest,
        tokenizer_digest=index.tokenizer_digest,
        vocab_size=index.vocab_size,
        eos_id=index.eos_id,
    )


def _check_finished(store: Store, config: BuildConfig, tokenizer: TextTokenizer, manifest: Manifest) -> Manifest:
    """The manifest of a finished cache, if it is of this config; tidies up what a crash at the very end left."""
    plan = read_plan(store, SEGMENT)
    if plan is None:
        raise InputError("the cache has a manifest but no plan", {"cache": store.url}, "build it elsewhere")
    ignored = {"cache", "teacher", "max_in_flight_mib", "claim_expiry_s", "process_id", "num_processes"}
    then = {**plan.config, "weights": plan.teacher.weights_digest, "tokenizer": plan.rows.tokenizer_digest}
    now = {
        **config.model_dump(mode="json"),
        "weights": weights_digest(config.teacher.path),
        "tokenizer": tokenizer.digest,
    }
    rows = open_rows(config.data)
    then["text"], now["text"] = plan.rows.text_digest, rows.index.text_digest if rows else inputs_digest(config.data)
    for values in (then, now):
        values["data"] = {key: value for key, value in values["data"].items() if key not in ("path", "tokenizer")}
        values.pop("accept_platform")
    facts = {
        key: f"there {then.get(key)!r}, here {now[key]!r}"
        for key in now
        if key not in ignored and then.get(key) != now[key]
    }
    if facts:
        raise PlanMismatchError(
            "the cache is finished, and belongs to another config", {"cache": store.url, **facts}, "name another cache"
        )
    tidy(store, plan)
    return manifest


def _write_fixed_files(store: Store, plan: Plan, decoder: Decoder, tokenizer: TextTokenizer) -> None:
    """What does not depend on the rows: the tokenizer, the arrays' metadata, the teacher's attention norms."""
    prefix = layout.segment_prefix(plan.segment)
    norms = np.concatenate([_attention_norms(group) for group in decoder.groups])
    files = {layout.TOKENIZER: tokenizer.to_json().encode()}
    files[f"{prefix}/side.safetensors"] = safetensors.numpy.save({"attention_norm": norms})
    for tap in plan.taps:
        for part in tap.parts:
            context = ts.Context()
            memory = {"driver": "memory", "path": "array/"}
            ts.open(layout.array_spec(memory, part_metadata(plan, tap, part)), create=True, context=context).result()
            metadata = ts.KvStore.open(memory, context=context).result().read("zarr.json").result().value
            files[f"{layout.array_folder(plan.segment, part.array)}/zarr.json"] = metadata
    for key, value in files.items():
        if store.read(key) != value:
            store.write(key, value)


def _attention_norms(group: Any) -> np.ndarray:
    """`[repeats * pattern, D]` float32, in block order."""
    stacked = np.stack([np.asarray(block.attention.norm[...], np.float32) for block in group.blocks], axis=1)
    return stacked.reshape(-1, stacked.shape[-1])


def _warn_if_small(store: Store, plan: Plan) -> None:
    if store.local is None:
        return
    missing = (plan.num_shards - len(committed_shards(store, plan))) * plan.shard_rows * plan.bytes_per_row
    free = shutil.disk_usage(store.local).free
    if missing > free:
        print(
            f"warning: {store.url} has {free / 1e9:.1f} GB free, and {missing / 1e9:.1f} GB are still to be written",
            file=sys.stderr,
        )


def _build_pieces(job: _Job) -> None:
    """Run the teacher over every piece that nobody has committed, and see all of them committed."""
    record, parameters = make_recorder(job.decoder, job.plan.taps)
    numerics = describe_numerics(job.plan.numerics.dtype)
    progress = Progress("build", job.plan.rows.count * job.plan.rows.row_tokens, unit="tokens")
    left = {piece: set(job.shards_of(piece)) for piece in range(-(-job.plan.rows.count // job.piece_rows))}

    def on_commit(shard: int) -> None:
        piece = left[job.piece_of(shard)]
        piece.discard(shard)
        if not piece:
            job.claims.done(job.piece_of(shard))

    writer = ShardWriter(
        job.store,
        job.plan,
        max_bytes=job.config.max_in_flight_mib << 20,
        numerics=numerics if numerics != job.plan.numerics else None,
        on_commit=on_commit,
    )
    with progress as bar:
        try:
            waiting: tuple[int, list[Row], Recording] | None = None
            for first, rows in _claimed_batches(job, writer, bar):
                recording = record(parameters, *_batch_arrays(rows, job.plan))  # returns before it is computed
                if waiting is not None:
                    _keep(job.plan, writer, bar, *waiting)
                waiting = (first, rows, recording)
                if first + len(rows) == job.plan.rows.count or (first + len(rows)) % job.piece_rows == 0:
                    _keep(job.plan, writer, bar, *waiting)
                    waiting = None
            writer.wait()
        finally:
            writer.close()


def _claimed_batches(job: _Job, writer: ShardWriter, bar: Progress) -> Iterator[tuple[int, list[Row]]]:
    """(first row, rows) of every teacher batch of the pieces that this process claims, until none is left."""
    count = -(-job.plan.rows.count // job.piece_rows)
    mine = [piece for piece in range(count) if piece % job.config.num_processes == job.config.process_id]
    order = mine + [piece for piece in range(count) if piece not in set(mine)]
    counted: set[int] = set()
    while True:
        committed = committed_shards(job.store, job.plan)
        for shard in committed - counted:  # earlier runs' and other processes' work
            start, stop = job.plan.shard_range(shard)
            bar.skip((stop - start) * job.plan.rows.row_tokens)
        counted |= committed
        order = [piece for piece in order if not committed.issuperset(job.shards_of(piece))]
        if not order or _is_finished(job):
            return
        took_any = False
        for piece in order:
            if not job.claims.take(piece):
                continue
            if all(_has_receipt(job, shard) for shard in job.shards_of(piece)):
                job.claims.done(piece)
                continue
            if _is_finished(job):  # by another process, which took the receipts away
                return
            took_any = True
            counted.update(job.shards_of(piece))
            yield from _piece_batches(job, writer, piece)
        if not took_any:
            time.sleep(POLL_S)
        _stop_if_asked(job)
        writer.wait()


def _piece_batches(job: _Job, writer: ShardWriter, piece: int) -> Iterator[tuple[int, list[Row]]]:
    start = piece * job.piece_rows
    stop = min(start + job.piece_rows, job.plan.rows.count)
    for first in range(start, stop, job.plan.batch_rows):
        _stop_if_asked(job)
        writer.check()
        yield first, job.rows.slice(first, min(first + job.plan.batch_rows, stop))


def _has_receipt(job: _Job, shard: int) -> bool:
    return job.store.read(layout.receipt_key(job.plan.segment, shard)) is not None


def _is_finished(job: _Job) -> bool:
    """Whether another process has finished the segment. Its manifest is there before any receipt goes."""
    return job.store.read(layout.MANIFEST) is not None


def _stop_if_asked(job: _Job) -> None:
    if job.stop.requested:
        raise Interrupted(
            "the build was asked to stop",
            {"cache": job.store.url, "kept": "every committed shard"},
            "run the same command again to go on",
        )


def _batch_arrays(rows: list[Row], plan: Plan) -> list[Any]:
    """tokens, positions, segment_ids as `[batch_rows, T]`; the last batch is padded with rows of padding."""
    arrays = []
    for name in ("tokens", "positions", "segment_ids"):
        array = np.zeros((plan.batch_rows, plan.rows.row_tokens), np.int32)
        array[: len(rows)] = [getattr(row, name) for row in rows]
        arrays.append(jnp.asarray(array))
    return arrays


def _keep(plan: Plan, writer: ShardWriter, bar: Progress, first: int, rows: list[Row], recording: Recording) -> None:
    """Wait for a recording, check it, and hand its rows to their shards."""
    codes = {part.array: np.asarray(recording.codes[tap.name][part.part]) for tap in plan.taps for part in tap.parts}
    sums = {name: type(tap)(*(np.asarray(value) for value in tap)) for name, tap in recording.sums.items()}
    for tap in plan.taps:
        _raise_if_nonfinite(plan, tap.name, tap.slots, np.asarray(sums[tap.name].nonfinite)[: len(rows)], first)
    for start in range(0, len(rows), plan.shard_rows):
        part = slice(start, min(start + plan.shard_rows, len(rows)))
        writer.add(
            (first + start) // plan.shard_rows,
            rows[part],
            {array: values[part] for array, values in codes.items()},
            {name: type(tap)(*(value[part] for value in tap)) for name, tap in sums.items()},
        )
    bar.advance(len(rows) * plan.rows.row_tokens)


def _raise_if_nonfinite(plan: Plan, tap: str, slots: tuple[int, ...], counts: np.ndarray, first: int) -> None:
    if not counts.any():
        return
    # The first block that went wrong is the one to look at; later ones only inherit.
    row, slot = min(np.argwhere(counts).tolist(), key=lambda place: (place[1], place[0]))
    raise NonFiniteError(
        "the teacher gave numbers that are not finite",
        {
            "shard": (first + row) // plan.shard_rows,
            "row": first + row,
            "block": slots[slot],
            "tap": tap,
            "found": f"{counts[row, slot]} numbers that are NaN or infinite",
        },
        "check the teacher's weights, or compute in another dtype: --dtype float32",
    )
