"""The main loop of stage 1: rows through the teacher, codes into shards, shards into the store.

Three things go on at once: the teacher computes one batch, the batch before it is copied to the host, and a full
shard is being written by another thread (record/pipeline.py). A process works on *pieces*, the consecutive shards of
whole teacher batches, which it claims one by one (schemas/cache/lease.py), so that any number of processes may build
one cache.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from distillcache.cache_builder.prepare import PIECEWISE_BYTES, open_rows, prepare_rows
from distillcache.cache_builder.record.finish import finish_segment, tidy
from distillcache.cache_builder.record.fixed_files import fixed_files
from distillcache.cache_builder.record.lockstep import (
    Together,
    build_together,
    finished_together,
    held_together,
    settle_together,
)
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.plan import check_choices, make_plan, refuse_foreign_folder
from distillcache.cache_builder.record.replica import Replica, is_job, open_replica
from distillcache.cache_builder.record.work_units import (
    Batches,
    ClaimedPieces,
    Pieces,
    RowSource,
    by_one_process,
    keep_batch,
    work_through,
)
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.cache_builder.text.token_stream import rows_fingerprint
from distillcache.models.checkpoint import read_config, weights_digest
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.describe import describe_numerics, describe_rows
from distillcache.models.layers.rope import context_length
from distillcache.models.mesh.recording import mesh_sizes
from distillcache.models.mesh.sharding import put, rows_sharding
from distillcache.models.recorder import Recording, make_recorder
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.cache.lease import Claims
from distillcache.schemas.cache.segment import (
    begun_plan,
    check_place,
    committed_shards,
    is_manifest_lost,
    lost_manifest,
    read_manifest,
    read_plan,
    segment_name,
    small_file_damage,
)
from distillcache.schemas.config import BuildConfig, PrepareConfig
from distillcache.schemas.config.differences import differing, told
from distillcache.schemas.errors import (
    ConfigError,
    DamageError,
    DistillcacheError,
    InputError,
    PlaceLostError,
    PlanMismatchError,
    StorageError,
)
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Manifest, Plan
from distillcache.schemas.format.rows import Row, RowReader, no_targets_note, teacher_batch, too_long_for_teacher
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.runtime.peers import PeerError, have_met
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import Store, use

SEGMENT = "0000"

# What of a config says how and where a build runs, not what it records. The teacher is known by its weights.
OF_ONE_RUN = {
    "cache",
    "teacher",
    "max_in_flight_mib",
    "claim_expiry_s",
    "storage",
    "process_id",
    "num_processes",
    "replica",
    "coordinator",
    "timeout_s",
    "accept_platform",
    "repair",
    "extend",
    "abandon",
}


def build_cache(config: BuildConfig) -> Manifest:
    """Build the cache that `config` describes, or go on with it where it was stopped.

    Text is prepared first. Running the same command again after any interruption gives the same bytes in `rows/` and
    `taps/` as an uninterrupted build; a finished cache is left as it is.

    Raises:
        PlanMismatchError: the place holds the work of another config.
        InputError, CheckpointError, ConfigError: what was given cannot be used; nothing is written.
        NonFiniteError, StorageError: the build stopped; committed shards stay, and the same command goes on.
        Interrupted: SIGTERM or SIGINT; likewise.
        PeerError: another process of a job failed or died; likewise.
    """
    use(config.storage)
    store = Store(config.cache)
    # Processes of a job that have met could only meet again to extend; a finished first segment is found by each alone.
    return unless_finished(
        store, lambda: _build_cache(store, config), lambda: not (is_job(config) and config.extend and have_met())
    )


def unless_finished(
    store: Store, work: Callable[[], Manifest], may_repeat: Callable[[], bool] = lambda: True
) -> Manifest:
    """What `work` gives. Where it fails over what another process tidied up when it finished, it is done once more.

    It finds the finished segment then, and that nothing is left to do.

    Args:
        may_repeat: whether the work can be done again after it failed.
    """
    before = _num_segments(store)
    try:
        return work()
    except (InputError, DamageError, StorageError, PeerError):
        if _num_segments(store) <= before or not may_repeat():
            raise
    return work()


def _num_segments(store: Store) -> int:
    """How many segments are finished; a damaged manifest is for others to speak of."""
    try:
        manifest = read_manifest(store)
    except DamageError:
        return 0
    return 0 if manifest is None else len(manifest.segments)


def _build_cache(store: Store, config: BuildConfig) -> Manifest:
    """`build_cache`, in an open store."""
    if config.repair:
        if is_job(config):
            raise ConfigError(
                "a cache is repaired by one process",
                {"replica": "job", "repair": True},
                "leave out --replica: the mesh of that process's own devices is the plan's",
            )
        from distillcache.cache_builder.repair.from_teacher import (
            repair_cache,  # here, since it is made of this module's parts
        )

        manifest = repair_cache(store, config)
        if manifest is not None and not (config.extend or config.abandon):
            return manifest  # whatever of its segments this config describes
    read_config(config.teacher.path)  # first: a wrong path is the teacher's, not its tokenizer's
    tokenizer = load_tokenizer(config.data.tokenizer or config.teacher.path, eos_token=config.data.eos_token)
    manifest = read_manifest(store)
    if manifest is None and (config.abandon or config.extend) and is_manifest_lost(store):
        raise lost_manifest(store)
    if config.abandon or config.extend or manifest is None:
        number = len(manifest.segments) if manifest is not None else 0
        store.check_writable(f"{layout.prepared_prefix(number)}/")
    if config.abandon:
        from distillcache.cache_builder.grow.abandon import abandon_extension

        abandon_extension(store, manifest, config.claim_expiry_s)
    if config.extend:
        from distillcache.cache_builder.grow.extend import extend_cache  # likewise

        if manifest is not None:
            _check_small_files(store, manifest)
        return extend_cache(store, config, tokenizer, manifest)
    if manifest is not None:
        _check_small_files(store, manifest)
        return _check_finished(store, config, tokenizer, manifest)
    model = checked_model(config, tokenizer)
    check_choices(config, model, tokenizer.vocab_size)
    warn_of_length(config, model)
    refuse_foreign_folder(store, "--cache")
    if is_job(config):  # before the processes meet: from then on they wait for each other
        store.clear_stale_locks()
        open_or_prepare(store, config, tokenizer)
    with open_replica(config) as replica:
        decoder = replica.load(config)  # first: a long text is prepared for long
        store.clear_stale_locks()
        rows = open_or_prepare(store, config, tokenizer)
        teacher = replica.describe_teacher(config.teacher.path, model)
        plan = make_plan(
            config,
            SEGMENT,
            model,
            teacher,
            describe_rows(rows),
            str(decoder.dtype),
            processes=replica.peers.count,
        )
        return build_segment(store, config, tokenizer, decoder, plan, rows, replica)


@dataclass(kw_only=True)
class Work(Pieces):
    """What the teacher's loop needs; built once. mesh: where the decoder lies."""

    decoder: Decoder
    mesh: Mesh | None = None


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
    replica: Replica,
) -> Manifest:
    """Settle the plan, run the teacher over all rows that are not committed yet, and finish the segment."""
    peers = replica.peers
    with held_together(store, plan, config, peers) as check_held:
        plan = settle_together(store, plan, config, peers)
        finished = finished_together(store, plan, peers)
        if finished is not None:
            tidy(store, plan)
            return finished
        with keeping_place(store, plan, check_held) as placed:
            return _build_settled(store, placed, config, tokenizer, decoder, plan, rows, replica)


@contextmanager
def keeping_place(store: Store, plan: Plan, check_held: Callable[[], None] = lambda: None) -> Iterator[Store]:
    """The store for writing a segment with, as long as the segment's plan lies where it was settled.

    What was written in the moment in which the plan went is deleted again.

    Args:
        check_held: raises where the segment is another job's by now.
    """

    def check() -> None:
        check_held()
        check_place(store, plan)

    try:
        yield store.guarded(check)
    except DistillcacheError:
        if store.read(layout.plan_key(plan.segment)) is None:
            store.delete_folder(layout.segment_prefix(plan.segment))
        check_place(store, plan)  # a folder that is deleted meanwhile fails in many ways: this is why
        raise


def _build_settled(
    store: Store,
    placed: Store,
    config: BuildConfig,
    tokenizer: TextTokenizer,
    decoder: Decoder,
    plan: Plan,
    rows: RowSource,
    replica: Replica,
) -> Manifest:
    """`build_segment`, after the plan is settled.

    Args:
        store: for claims. placed: for everything else.
    """
    peers = replica.peers
    if peers.first:
        for key, value in fixed_files(plan, decoder, tokenizer).items():
            placed.put_once(key, value)
        _keep_skipped(placed, plan, rows)
        _warn_if_small(store, plan)
    work = {"store": placed, "plan": plan, "config": config, "rows": rows, "decoder": decoder, "mesh": replica.mesh}
    if peers.count > 1:
        return build_together(Together(**work, replica=replica))
    claims = Claims(store, plan.segment, config.claim_expiry_s)
    try:
        _build_pieces(_Job(**work, stop=replica.stop, claims=claims))
    finally:
        claims.close()
    return by_one_process(store, plan, config, replica.stop, lambda: finish_segment(placed, plan))


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


def warn_of_length(config: BuildConfig, model: ModelConfig) -> None:
    """Say, before anything long begins, that rows will be longer than what the teacher is made for.

    No refusal: positions are rotations in every family, which have no end, and a test of a stretched context may be
    just what somebody wants.
    """
    rows = open_rows(config.data)
    row_tokens = config.data.row_tokens if rows is None else rows.index.row_tokens
    if (said := too_long_for_teacher(row_tokens, context_length(model))) and not config.process_id:
        print(f"warning: {said}", file=sys.stderr)


def open_or_prepare(
    store: Store, config: BuildConfig, tokenizer: TextTokenizer, number: int = 0, plan: Plan | None = None
) -> RowReader:
    """The prepared rows that the config names; where it names text, they are prepared inside the cache first.

    Args:
        number: of the segment that they are for.
        plan: of a segment whose rows are made again.
    """
    rows = open_rows(config.data)
    if rows is None:
        folder = _prepared_folder(store, config, tokenizer, number, plan)
        prepare = PrepareConfig(
            out=f"{store.url}/{folder}",
            data=config.data,
            storage=config.storage,
            process_id=config.process_id,
            num_processes=config.num_processes,
            claim_expiry_s=config.claim_expiry_s,
        )
        _prepare(store, prepare, tokenizer, folder, planned=begun_plan(store, number) is not None)
        rows = RowReader(store, f"{folder}/")
    if without := rows.without_targets():
        print(f"warning: {no_targets_note(without)}", file=sys.stderr)
    if rows.index.tokenizer_digest != tokenizer.digest:
        raise InputError(
            "the rows were made with another tokenizer than the teacher's",
            {"rows": rows.index.tokenizer_digest, "teacher": tokenizer.digest},
            "prepare them with the teacher's tokenizer, or name theirs with --data.tokenizer",
        )
    return rows


def _prepare(store: Store, config: PrepareConfig, tokenizer: TextTokenizer, folder: str, planned: bool) -> None:
    """Prepare rows inside the cache. Without a plan, what lies there belongs to a build that never began."""
    try:
        prepare_rows(config, tokenizer=tokenizer, shared_from_bytes=PIECEWISE_BYTES)
    except PlaceLostError as error:  # finished or deleted by others: `unless_finished` looks which
        raise StorageError(error.what, error.facts, error.next) from error
    except PlanMismatchError:  # another text of the same length
        if planned:
            raise
        store.delete_folder(folder)
        prepare_rows(config, tokenizer=tokenizer, shared_from_bytes=PIECEWISE_BYTES)
    except InputError:  # the text's fault, so no other process of this build gets further
        if not planned:
            store.delete_folder(folder)
        raise


def _prepared_folder(
    store: Store, config: BuildConfig, tokenizer: TextTokenizer, number: int, plan: Plan | None
) -> str:
    """Where the rows of this text go. Rows of other text or settings never lie there, whoever is paused meanwhile.

    A segment that an earlier version began has them in its own folder, and so has one that is repaired.
    """
    begun = plan or begun_plan(store, number)
    if begun is not None and (plan is not None or begun.segment == segment_name(number)):
        return f"{layout.segment_prefix(begun.segment)}/prepared"
    return f"{layout.prepared_prefix(number)}/{rows_fingerprint(config.data, tokenizer)[:16]}"


def _check_small_files(store: Store, manifest: Manifest) -> None:
    """Raise the first damage to the files beside rows and taps, so that nobody is told of a whole cache."""
    for damage in small_file_damage(store, manifest.segments, manifest.tokenizer_digest):
        raise damage


def _check_finished(store: Store, config: BuildConfig, tokenizer: TextTokenizer, manifest: Manifest) -> Manifest:
    """The manifest of a finished cache, if it is of this config; tidies up what a crash at the very end left."""
    tidy(store, finished_plan(store, config, tokenizer, manifest))
    return manifest


def finished_plan(store: Store, config: BuildConfig, tokenizer: TextTokenizer, manifest: Manifest) -> Plan:
    """The plan of a finished cache.

    Raises:
        PlanMismatchError: the cache belongs to another config.
    """
    plan = read_plan(store, manifest.segments[0].segment)
    if plan is None:
        raise InputError("the cache has a manifest but no plan", {"cache": store.url}, "build it elsewhere")
    rows = open_rows(config.data)
    identities = {
        "weights": (plan.teacher.weights_digest, weights_digest(config.teacher.path)),
        "tokenizer": (plan.rows.tokenizer_digest, tokenizer.digest),
        "text": (plan.rows.text_digest, rows.index.text_digest if rows else inputs_digest(config.data, tokenizer)),
    }
    differences = config_differences(plan, config) | {
        name: (then, now) for name, (then, now) in identities.items() if then != now
    }
    if differences:
        raise PlanMismatchError(
            "the cache is finished, and belongs to another config",
            {"cache": store.url, **told(differences)},
            "name another cache, or add to this one with --extend",
        )
    return plan


def config_differences(plan: Plan, config: BuildConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (plan's config, this one), where that decides what is recorded; places do not."""
    # Some fields are written only where they are set.
    there, here = plan.config, config.model_dump(mode="json")
    known = (here.keys() | there.keys()) & BuildConfig.model_fields.keys() - OF_ONE_RUN
    then, now = ({name: _compared(name, values.get(name)) for name in known} for values in (there, here))
    return differing(then, now)


def _compared(name: str, value: Any) -> Any:
    return _row_settings(value or {}) if name == "data" else value


def _row_settings(data: dict[str, Any]) -> dict[str, Any]:
    """What of a data config the rows depend on, beside the text and the tokenizer."""
    return {name: value for name, value in data.items() if name not in ("path", "tokenizer")}


def _keep_skipped(store: Store, plan: Plan, rows: RowSource) -> None:
    """Keep the list of skipped records with the segment, and name it: prepared rows go when the build has finished."""
    if not isinstance(rows, RowReader) or not rows.index.skipped:
        return
    key = layout.skipped_key(plan.segment)
    store.put_once(key, rows.skipped())
    print(f"{rows.index.skipped} records of the text were skipped, see {store.where(key)}", file=sys.stderr)


def _warn_if_small(store: Store, plan: Plan) -> None:
    if store.local is None:
        return
    missing = (plan.num_shards - len(committed_shards(store, plan))) * plan.shard_rows * plan.bytes_per_row
    free = shutil.disk_usage(store.local).free
    if missing > free:
        size = f"{'up to ' if plan.is_compressed else ''}{missing / 1e6:,.0f} MB"
        print(
            f"warning: {store.url} has {free / 1e6:,.0f} MB free, and {size} are still to be written",
            file=sys.stderr,
        )


def _build_pieces(job: _Job) -> None:
    """Run the teacher over every piece that nobody has committed, and see all of them committed."""
    numerics = describe_numerics(
        job.plan.numerics.dtype, job.plan.taps, mesh_sizes(job.mesh), attention=job.decoder.config.attention
    )
    other = numerics if numerics != job.plan.numerics else None
    work_through(job, "build", other, lambda batches, writer, bar: record_batches(job, batches, writer, bar))


def record_batches(job: Work, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
    """Run the teacher over `(first row, rows)` batches and hand all of them to the writer, which is closed."""
    record, parameters = make_recorder(job.decoder, job.plan.taps, signs_of(job.plan), job.mesh)
    sharding = None if job.mesh is None else rows_sharding(job.mesh)
    try:
        waiting: tuple[int, list[Row], Recording, float] | None = None
        for first, rows in batches:
            arrays = teacher_batch(rows, job.plan.batch_rows, job.plan.rows.row_tokens)
            recording = record(parameters, *(put(array, sharding) for array in arrays))  # returns before it is computed
            begun = time.perf_counter()
            if waiting is not None:
                keep_batch(job.plan, writer, bar, *waiting)
            waiting = (first, rows, recording, begun)
            if first + len(rows) == job.plan.rows.count or (first + len(rows)) % job.piece_rows == 0:
                keep_batch(job.plan, writer, bar, *waiting)
                waiting = None
        writer.wait()
    finally:
        writer.close()
