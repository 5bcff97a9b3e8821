"""The main loop of stage 1: rows through the teacher, codes into shards, shards into the store.

Three things go on at once: the teacher computes one batch, the batch before it is copied to the host, and a full
shard is being written by another thread (pipeline.py). A process works on *pieces*, the consecutive shards of whole
teacher batches, which it claims one by one (claims.py), so that any number of processes may build one cache.
"""

import shutil
import sys
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from cache_builder.claims import Claims
from cache_builder.finish import finish_segment, tidy
from cache_builder.fixed import fixed_files
from cache_builder.pieces import Batches, ClaimedPieces, Pieces, RowSource, keep_batch, work_through
from cache_builder.pipeline import ShardWriter
from cache_builder.plan import check_choices, describe_numerics, make_plan, settle_plan
from cache_builder.prepare import open_rows, prepare_rows
from cache_builder.text import inputs_digest
from models.checkpoint import load_pretrained, read_config, weights_digest
from models.config import ModelConfig
from models.decoder import Decoder
from models.recorder import Recording, make_recorder
from models.tokenizer import TextTokenizer, load_tokenizer
from schemas import layout
from schemas.config import BuildConfig, PrepareConfig
from schemas.errors import ConfigError, InputError, PlanMismatchError
from schemas.manifest import Manifest, Plan, RowsPlan, TeacherPlan
from schemas.progress import Progress
from schemas.rows import Row, RowReader
from schemas.segment import committed_shards, read_manifest, read_plan
from schemas.signals import StopRequest, watch_for_stop
from schemas.storage import Store
from schemas.tap_codec import signs_of

SEGMENT = "0000"


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
    read_config(config.teacher.path)  # first: a wrong path is the teacher's, not its tokenizer's
    tokenizer = load_tokenizer(config.data.tokenizer or config.teacher.path, eos_token=config.data.eos_token)
    if config.repair:
        from cache_builder.repair import repair_cache  # here, since it is made of this module's parts

        repair_cache(store, config, tokenizer)
    manifest = read_manifest(store)
    if config.extend:
        from cache_builder.extend import extend_cache  # likewise

        return extend_cache(store, config, tokenizer, manifest)
    if manifest is not None:
        return _check_finished(store, config, tokenizer, manifest)
    model = checked_model(config, tokenizer)
    check_choices(config, model)
    _refuse_foreign_folder(store)
    with watch_for_stop() as stop:
        decoder = load_pretrained(config.teacher.path, dtype=config.dtype)  # first: a long text is prepared for long
        store.clear_stale_locks()
        rows = open_or_prepare(store, config, tokenizer)
        teacher = describe_teacher(config, model)
        plan = make_plan(config, SEGMENT, model, teacher, describe_rows(rows), str(decoder.embed[...].dtype))
        return build_segment(store, config, tokenizer, decoder, plan, rows, stop)


@dataclass(kw_only=True)
class Work(Pieces):
    """What the teacher's loop needs; built once."""

    decoder: Decoder


@dataclass(kw_only=True)
class _Job(ClaimedPieces, Work):
    """A build."""


def build_segment(
    store: Store,
    config: BuildConfig,
    tokenizer: TextTokenizer,
    decoder: Decoder,
    plan: Plan,
    rows: RowSource,
    stop: StopRequest,
) -> Manifest:
    """Settle the plan, run the teacher over all rows that are not committed yet, and finish the segment."""
    plan = settle_plan(store, plan, config.accept_platform)
    for key, value in fixed_files(plan, decoder, tokenizer).items():
        if store.read(key) != value:
            store.write(key, value)
    _warn_if_small(store, plan)
    claims = Claims(store, plan.segment, config.claim_expiry_s)
    try:
        _build_pieces(_Job(store=store, plan=plan, rows=rows, decoder=decoder, stop=stop, config=config, claims=claims))
    finally:
        claims.close()
    return finish_segment(store, plan)


def checked_model(config: BuildConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """The teacher's config, if the tokenizer can be its own."""
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
    return model


def describe_teacher(config: BuildConfig, model: ModelConfig) -> TeacherPlan:
    """What the plan says about the teacher."""
    return TeacherPlan(
        path=config.teacher.path,
        weights_digest=weights_digest(config.teacher.path),
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        family=model.family,
    )


def open_or_prepare(store: Store, config: BuildConfig, tokenizer: TextTokenizer, segment: str = SEGMENT) -> RowReader:
    """The prepared rows that the config names; where it names text, they are prepared inside the segment first."""
    rows = open_rows(config.data)
    if rows is None:
        _prepare(store, config, tokenizer, segment)
        rows = RowReader(store, f"{layout.segment_prefix(segment)}/prepared/")
    if rows.index.tokenizer_digest != tokenizer.digest:
        raise InputError(
            "the rows were made with another tokenizer than the teacher's",
            {"rows": rows.index.tokenizer_digest, "teacher": tokenizer.digest},
            "prepare them with the teacher's tokenizer, or name theirs with --data.tokenizer",
        )
    return rows


def _prepare(store: Store, config: BuildConfig, tokenizer: TextTokenizer, segment: str) -> None:
    """Prepare rows inside the segment. Without a plan, what lies there belongs to a build that never began."""
    folder = f"{layout.segment_prefix(segment)}/prepared"
    prepare = PrepareConfig(out=f"{store.url}/{folder}", data=config.data)
    planned = read_plan(store, segment) is not None
    try:
        prepare_rows(prepare, tokenizer=tokenizer)
    except PlanMismatchError:
        if planned:
            raise
        store.delete_folder(folder)
        prepare_rows(prepare, tokenizer=tokenizer)
    except InputError:  # the text's fault, so no other process of this build gets further
        if not planned:
            store.delete_folder(folder)
        raise


def _refuse_foreign_folder(store: Store) -> None:
    """A local folder that holds something else is no place for a cache."""
    if store.local is None or not store.local.exists():
        return
    found = sorted(path.name for path in store.local.iterdir())
    if found and "segments" not in found:
        raise ConfigError(
            "the cache's folder holds something else",
            {"cache": store.url, "found": ", ".join(found[:5])},
            "name a new or an empty folder with --cache",
        )


def describe_rows(rows: RowReader) -> RowsPlan:
    """What the plan says about these rows."""
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
    tidy(store, finished_plan(store, config, tokenizer))
    return manifest


def finished_plan(store: Store, config: BuildConfig, tokenizer: TextTokenizer) -> Plan:
    """The plan of a finished cache.

    Raises:
        PlanMismatchError: the cache belongs to another config.
    """
    plan = read_plan(store, SEGMENT)
    if plan is None:
        raise InputError("the cache has a manifest but no plan", {"cache": store.url}, "build it elsewhere")
    ignored = {
        "cache",
        "teacher",
        "max_in_flight_mib",
        "claim_expiry_s",
        "process_id",
        "num_processes",
        "repair",
        "extend",
    }
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
            "the cache is finished, and belongs to another config",
            {"cache": store.url, **facts},
            "name another cache, or add to this one with --extend",
        )
    return plan


def _warn_if_small(store: Store, plan: Plan) -> None:
    if store.local is None:
        return
    missing = (plan.num_shards - len(committed_shards(store, plan))) * plan.shard_rows * plan.bytes_per_row
    free = shutil.disk_usage(store.local).free
    if missing > free:
        print(
            f"warning: {store.url} has {free / 1e6:,.0f} MB free, and {missing / 1e6:,.0f} MB are still to be written",
            file=sys.stderr,
        )


def _build_pieces(job: _Job) -> None:
    """Run the teacher over every piece that nobody has committed, and see all of them committed."""
    numerics = describe_numerics(job.plan.numerics.dtype)
    other = numerics if numerics != job.plan.numerics else None
    work_through(job, "build", other, lambda batches, writer, bar: record_batches(job, batches, writer, bar))


def record_batches(job: Work, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
    """Run the teacher over `(first row, rows)` batches and hand all of them to the writer, which is closed."""
    record, parameters = make_recorder(job.decoder, job.plan.taps, signs_of(job.plan))
    try:
        waiting: tuple[int, list[Row], Recording] | None = None
        for first, rows in batches:
            recording = record(parameters, *_batch_arrays(rows, job.plan))  # returns before it is computed
            if waiting is not None:
                keep_batch(job.plan, writer, bar, *waiting)
            waiting = (first, rows, recording)
            if first + len(rows) == job.plan.rows.count or (first + len(rows)) % job.piece_rows == 0:
                keep_batch(job.plan, writer, bar, *waiting)
                waiting = None
        writer.wait()
    finally:
        writer.close()


def _batch_arrays(rows: list[Row], plan: Plan) -> list[Any]:
    """tokens, positions, segment_ids as `[batch_rows, T]`; the last batch is padded with rows of padding."""
    arrays = []
    for name in ("tokens", "positions", "segment_ids"):
        array = np.zeros((plan.batch_rows, plan.rows.row_tokens), np.int32)
        array[: len(rows)] = [getattr(row, name) for row in rows]
        arrays.append(jnp.asarray(array))
    return arrays
