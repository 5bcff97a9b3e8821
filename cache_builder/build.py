"""`build_cache`: dispatch of `distillcache build` to build, extend, repair or abandon."""

import logging

from distillcache.cache_builder.grow.abandon import abandon_extension
from distillcache.cache_builder.grow.extend import extend_cache
from distillcache.cache_builder.record.finish import tidy, unless_finished
from distillcache.cache_builder.record.identity import finished_plan
from distillcache.cache_builder.record.inputs import checked_model, open_or_prepare, warn_of_length
from distillcache.cache_builder.record.loop import SegmentBuild, build_segment
from distillcache.cache_builder.record.plan import check_choices, idle_options, make_plan, refuse_foreign_folder
from distillcache.cache_builder.record.presence import refuse_missing_data
from distillcache.cache_builder.record.replica import is_job, open_replica
from distillcache.cache_builder.repair.from_teacher import repair_cache
from distillcache.models.checkpoint import read_config
from distillcache.models.describe import describe_rows
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.cache.segment import (
    is_manifest_lost,
    lost_manifest,
    read_manifest,
    segment_names,
    small_file_damage,
)
from distillcache.schemas.config import BuildConfig, BuildSpec
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Manifest
from distillcache.schemas.runtime.peers import have_met
from distillcache.schemas.store.store import Store, using

log = logging.getLogger(__name__)
SEGMENT = "0000"


def build_cache(config: BuildConfig) -> Manifest:
    """Build the cache that `config` describes, or resume it.

    Text is prepared first. Running the same command again after any interruption gives the same bytes in `rows/` and
    `taps/` as an uninterrupted build; a finished cache is left as it is.

    Raises:
        PlanMismatchError: the place holds the work of another config.
        InputError, CheckpointError, ConfigError: what was given cannot be used; nothing is written.
        NonFiniteError, StorageError: the build stopped; committed shards stay, and the same command goes on.
        Interrupted: SIGTERM or SIGINT; likewise.
        PeerError: another process of a job failed or died; likewise.
    """
    with using(config.storage):
        store = Store(config.cache)
        # Processes of a job that have met could only meet again to extend; a finished first segment is found by each
        # alone.
        return unless_finished(
            store, lambda: _build_cache(store, config), lambda: not (is_job(config) and config.extend and have_met())
        )


def _build_cache(store: Store, config: BuildConfig) -> Manifest:
    """`build_cache`, in an open store."""
    if config.repair:
        if is_job(config):
            raise ConfigError(
                "a cache is repaired by one process",
                {"replica": "job", "repair": True},
                "leave out --replica: the mesh of that process's own devices is the plan's",
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
        abandon_extension(store, manifest, config.claim_expiry_s)
    if manifest is not None:
        _check_small_files(store, manifest)
    if config.extend:
        return extend_cache(store, config, tokenizer, manifest)
    if manifest is not None:
        return _check_finished(store, config, config.teacher.path, tokenizer, manifest)
    model = checked_model(config.teacher.path, config.data.tokenizer, tokenizer)
    check_choices(config, model, tokenizer.vocab_size)
    if not segment_names(store, 0) and not config.process_id:
        for note in idle_options(config.taps):
            log.warning(note)
    warn_of_length(config.data, config.process_id, model)
    refuse_foreign_folder(store, "--cache")
    if is_job(config):  # before the processes meet: from then on they wait for each other
        store.clear_stale_locks()
        open_or_prepare(store, config.data, config, tokenizer)
    with open_replica(config.mesh, config.batch_rows, config) as replica:
        decoder = replica.load(config.teacher.path, config)  # first: a long text is prepared for long
        store.clear_stale_locks()
        rows = open_or_prepare(store, config.data, config, tokenizer)
        teacher = replica.describe_teacher(config.teacher.path, model)
        plan = make_plan(
            config,
            SEGMENT,
            model,
            teacher,
            describe_rows(rows),
            str(decoder.dtype),
            processes=replica.peers.count,
            config=config.model_dump(mode="json"),
        )
        return build_segment(
            SegmentBuild(
                store=store,
                options=config,
                tokenizer=tokenizer,
                teacher=config.teacher.path,
                decoder=decoder,
                plan=plan,
                rows=rows,
                replica=replica,
            )
        )


def _check_small_files(store: Store, manifest: Manifest) -> None:
    """Raise the first damage to the files beside rows and taps, so that a damaged cache is not reported as intact."""
    for damage in small_file_damage(store, manifest.segments, manifest.tokenizer_digest):
        raise damage


def _check_finished(
    store: Store, spec: BuildSpec, teacher: str, tokenizer: TextTokenizer, manifest: Manifest
) -> Manifest:
    """The manifest of a finished cache, if it is of this config; tidies up what a crash at the very end left."""
    plan = finished_plan(store, spec, teacher, tokenizer, manifest)
    refuse_missing_data(store, manifest.segments)
    tidy(store, plan)
    return manifest
