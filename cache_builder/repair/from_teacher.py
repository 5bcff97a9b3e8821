"""`distillcache build --repair`: recompute exactly what is damaged, in every segment.

What is repaired is described by the plans: each segment's taps, batches and text are its own plan's. Of the command
line count the cache, and where teacher, tokenizer and text lie now. Rows come from the cache where they are whole
(restore.py), and otherwise from the text. A segment that adds to another one's rows is repaired after that one.

An unfinished segment loses the receipts of its damaged shards, and the build goes on: they are built like any other.
A copied segment has its source, not the teacher: `distillcache copy --repair` (from_source.py) makes it again.
"""

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from typing import Any

from jax.sharding import Mesh

from distillcache.cache_builder.prepare import open_rows
from distillcache.cache_builder.record.finish import BUILD_FOLDERS, tidy
from distillcache.cache_builder.record.fixed_files import fixed_files
from distillcache.cache_builder.record.identity import config_differences
from distillcache.cache_builder.record.inputs import open_or_prepare
from distillcache.cache_builder.record.loop import Work, record_batches
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.work_units import Batches, RowSource, WorkUnits
from distillcache.cache_builder.repair.check import check_cache
from distillcache.cache_builder.repair.finding import Finding
from distillcache.cache_builder.repair.lost_manifest import lost_files, rebuild_manifest
from distillcache.cache_builder.repair.restore import Damage, check_listed, mend_segment
from distillcache.cache_builder.repair.survey import Survey, survey_cache
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.models.checkpoint import load_pretrained, weights_digest
from distillcache.models.decoder import Decoder, with_attention
from distillcache.models.describe import describe_rows
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.models.mesh.sharding import make_mesh
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.cache.segment import check_plan_is_ours, no_cache, read_plan, segment_names
from distillcache.schemas.command_line import merge, validate
from distillcache.schemas.config import BuildConfig, BuildSpec, DataConfig, TeacherMeshConfig, Workers
from distillcache.schemas.config.differences import told
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError, InputError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Manifest, Plan
from distillcache.schemas.format.rows import Row, decode_row, unpack_rows
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import watch_for_stop
from distillcache.schemas.store.store import LOCK_SUFFIX, Store

log = logging.getLogger(__name__)

FILES_KEPT = 4  # files of rows in memory: a teacher batch may span some


def complete_config(values: dict[str, Any]) -> dict[str, Any]:
    """For `--repair`, the settings of a command that names places only, from the cache's first built plan.

    Raises:
        InputError: there is no cache here.
        ConfigError: the cache is a copy.
        DamageError: the plan is damaged.
    """
    if not isinstance(values.get("cache"), str) or _states_settings(values):
        return values
    store = Store(values["cache"], validate(StorageConfig, values.get("storage", {}), "storage"))
    plans = [plan for name in segment_names(store) if (plan := read_plan(store, name)) is not None]
    if not plans:
        raise no_cache(store)
    built = [plan for plan in plans if plan.copied_from is None]
    if not built:
        raise _is_a_copy(store, plans[0])
    recorded = {"teacher", *BuildSpec.model_fields}
    then = {name: value for name, value in built[0].config.items() if name in recorded}
    return merge({**then, "data": _stated(then["data"])}, values)


def _states_settings(values: dict[str, Any]) -> bool:
    """Return whether these values are a whole config, not only places and how to run."""
    data = values.get("data")
    inner = data.keys() - {"path", "tokenizer"} if isinstance(data, dict) else set()
    stated = values.keys() & BuildSpec.model_fields.keys() - {"data"}
    return {"teacher", "data"} <= values.keys() and bool(stated or inner)


def _stated(data: dict[str, Any]) -> dict[str, Any]:
    """A data config without its defaults: stating them would contradict prepared rows that were made with others."""
    return {name: value for name, value in data.items() if value != DataConfig.model_fields[name].default}


def repair_cache(store: Store, config: BuildConfig) -> Manifest | None:
    """Check a cache, and make its finished segments whole, and an unfinished one ready for the build to resume.

    Returns: the manifest; None where the cache is not finished.

    Raises:
        InputError: there is no cache here, or the text is needed and cannot be used.
        ConfigError: what is damaged is a copy.
        PlanMismatchError: the cache belongs to another config or teacher, or this machine computes other bits.
        DamageError: a plan is lost, or a manifest that cannot be made again.
        Interrupted: SIGTERM or SIGINT; the same command goes on.
    """
    survey, findings = check_whole(store)
    built = [view.plan for view in survey.segments if view.plan.copied_from is None]
    if survey.segments and not built:
        raise _is_a_copy(store, survey.segments[0].plan)
    if built and not config.extend:
        _check_describes_one(store, built, config)
    teacher = _Teacher(config)
    lost = lost_files(findings)
    if lost:
        rebuild_manifest(survey, findings, lambda view: _FromTeacher(store, view.plan, None, teacher).fixed_files())
        survey, findings = survey_cache(store), []
    drop_receipts(survey, findings)
    if survey.manifest is None:
        return None
    with watch_for_stop() as stop:
        store.clear_stale_locks()
        plans = {view.plan.segment: view.plan for view in survey.segments}
        damages = damages_of(survey, findings)
        for damage in damages:
            if damage.plan.copied_from is not None:
                raise _is_a_copy(store, damage.plan)
        for damage in damages:
            base = plans[damage.plan.rows_of or damage.plan.segment]
            maker = _FromTeacher(store, base, damage, teacher)
            mend_segment(damage, maker, stop, config.max_in_flight_mib << 20)
    tell_repaired(survey, findings, damages)
    return survey.manifest


def check_whole(store: Store) -> tuple[Survey, list[Finding]]:
    """Everything that is wrong with a cache, every byte of which is read."""
    survey = survey_cache(store)
    with Progress("verify", survey.num_objects, unit="objects") as bar:

        def on_checked(what: str, count: int) -> None:
            if what in ("objects", "rows_files"):
                bar.advance(count)

        return survey, list(check_cache(survey, on_checked=on_checked))


def drop_receipts(survey: Survey, findings: Sequence[Finding]) -> None:
    """Make damaged shards of an unfinished segment uncommitted, so that the build takes them up again."""
    for view in survey.segments:
        plan, store = view.plan, survey.store.guarded(partial(check_plan_is_ours, survey.store, view.plan))
        mine = [each.shard for each in findings if each.segment == plan.segment and view.shards is not None]
        for shard in {shard for shard in mine if shard is not None}:
            store.delete(layout.receipt_key(plan.segment, shard))
            # Its builder may be alive and hold it as done; that would have to expire first.
            store.delete(layout.lease_key(plan.segment, plan.unit_of(shard)))


def damages_of(survey: Survey, findings: Sequence[Finding]) -> list[Damage]:
    """List the damage of the finished segments, in the manifest's order: rows before what is added to them."""
    manifest = survey.manifest
    found = [
        Damage.of(survey.store, view, view.entry, manifest, findings)
        for view in survey.segments
        if manifest is not None and view.entry is not None
    ]
    return [damage for damage in found if damage.keys]


def tell_repaired(survey: Survey, findings: Sequence[Finding], repaired: Sequence[Damage]) -> None:
    """Remove leftovers of a build, and report what was repaired and what was left alone."""
    for view in survey.segments:
        if view.entry is not None and survey.manifest is not None:
            listed = partial(check_listed, survey.store, view.entry, survey.manifest.tokenizer_digest)
            tidy(survey.store.guarded(listed), view.plan)
    keys, shards = sum(len(damage.keys) for damage in repaired), sum(len(damage.shards) for damage in repaired)
    log.info(f"repaired: {counted(keys, 'file')}, {counted(shards, 'shard')}")
    for finding in findings:
        leftover = finding.segment is not None and finding.object.split("/")[2] in BUILD_FOLDERS
        leftover = leftover or not survey.store.keys(finding.object)  # removed just now
        if finding.what == "foreign" and not leftover and not finding.object.endswith(LOCK_SUFFIX):
            log.info(f"left alone: {survey.store.where(finding.object)} does not belong to the cache")
    for view in survey.segments:
        if view.entry is None:
            log.info(
                f"not finished: segment {view.plan.segment}; resume it with `build --extend` and its config, or delete "
                "it with `build --abandon`"
            )


def _is_a_copy(store: Store, plan: Plan) -> ConfigError:
    return ConfigError(
        "a copy is repaired from its source, not by the teacher",
        {"cache": store.url, "segment": plan.segment},
        f"distillcache copy {plan.config['copy']['src']} {store.url} --repair",
    )


def _check_describes_one(store: Store, plans: Sequence[Plan], spec: BuildSpec) -> None:
    """Settings that no segment was built with are a mistake, though none of them would count here."""
    found = [config_differences(plan, spec) for plan in plans]
    if all(found):
        raise PlanMismatchError(
            "the cache belongs to another config",
            {"cache": store.url, **told(min(found, key=len))},
            f"repair it with its own config: distillcache build --repair --cache {store.url}",
        )


class _Teacher:
    """The teacher and the tokenizers on this machine, each loaded when the first damaged segment asks for it."""

    def __init__(self, config: BuildConfig) -> None:
        self.config = config
        self.decoder = cache(self._load_decoder)
        self.tokenizer = cache(self._load_tokenizer)

    @cached_property
    def weights(self) -> str:
        """The digest of its weights."""
        return weights_digest(self.config.teacher.path)

    def check(self, store: Store, plan: Plan) -> None:
        """Raise unless this is the teacher of the plan."""
        if self.weights != plan.teacher.weights_digest:
            raise PlanMismatchError(
                "the cache was built with another teacher",
                {
                    "cache": f"{store.url}, segment {plan.segment}",
                    "weights": f"there {plan.teacher.weights_digest}, here {self.weights}",
                    "teacher": self.config.teacher.path,
                    "then": plan.teacher.path,
                },
                "name the same weights with --teacher.path",
            )

    def _load_decoder(self, dtype: str, mesh: Mesh | None, attention: str) -> Decoder:
        decoder = load_pretrained(self.config.teacher.path, dtype=dtype, mesh=mesh)
        return with_attention(decoder, chosen_kernel(attention, decoder.config, dtype))

    def _load_tokenizer(self, path: str, eos_token: str | None) -> TextTokenizer:
        return load_tokenizer(path, eos_token=eos_token)


@dataclass(frozen=True)
class _FromTeacher:
    """Makes a built segment again.

    base: the plan of the segment whose files hold the rows. damage: None where only fixed files are requested.
    """

    store: Store
    base: Plan
    damage: Damage | None
    teacher: _Teacher

    @property
    def _plan(self) -> Plan:
        return self.base if self.damage is None else self.damage.plan

    @property
    def _decoder(self) -> Decoder:
        self.teacher.check(self.store, self._plan)
        numerics = self._plan.numerics
        return self.teacher.decoder(numerics.dtype, self._mesh, numerics.attention)

    @property
    def _mesh(self) -> Mesh | None:
        """The plan's, of this process's devices."""
        return make_mesh(TeacherMeshConfig.of_axes(self._plan.numerics.mesh))

    @property
    def _tokenizer(self) -> TextTokenizer:
        """The one that made the rows.

        Raises:
            PlanMismatchError: what is there now is another one.
        """
        config, own, rows = self.teacher.config, self._plan.config["data"], self._plan.rows
        path = config.data.tokenizer or own["tokenizer"] or config.teacher.path
        found = self.teacher.tokenizer(path, own["eos_token"])
        if found.digest != rows.tokenizer_digest:
            raise PlanMismatchError(
                "the rows of the cache were made with another tokenizer",
                {"cache": self.store.url, "there": rows.tokenizer_digest, "here": f"{found.digest}  {path}"},
                "name the same one with --data.tokenizer",
            )
        return found

    def fixed_files(self) -> dict[str, bytes]:
        """The tokenizer, the arrays' metadata, the teacher's norms and, where it is kept, its head."""
        return fixed_files(self._plan, self._decoder, self._tokenizer, self.teacher.config.teacher.path)

    def rows(self, shards: Set[int]) -> RowSource:
        """The cache's rows if those of all these shards are whole; otherwise the text's, prepared again."""
        self.teacher.check(self.store, self._plan)
        damage = self.damage
        lost = damage is not None and damage.plan.rows_of is None and damage.lost_rows(shards)
        if not lost:
            return self._whole
        config = self.teacher.config
        return _prepared_again(self.store, self.base, config.data.path, config, self._tokenizer)

    @property
    def _whole(self) -> "_CacheRows":
        return _CacheRows(self.store, self.base)

    def run(self, job: WorkUnits, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
        """Run the teacher over these batches."""
        work = Work(
            store=job.store, plan=job.plan, rows=job.rows, stop=job.stop, decoder=self._decoder, mesh=self._mesh
        )
        record_batches(work, batches, writer, bar)


class _CacheRows:
    """The rows in a segment's own files, which were found whole."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._file = lru_cache(FILES_KEPT)(self._load)

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1` of the segment."""
        size = self._plan.shard_rows
        return [self._file(number // size)[number % size] for number in range(start, stop)]

    def _load(self, shard: int) -> list[Row]:
        key = layout.rows_key(self._plan.segment, shard)
        start, stop = self._plan.shard_range(shard)
        records = unpack_rows(self._store.read(key) or b"", stop - start, self._store.where(key))
        return [decode_row(record, f"{self._store.where(key)} row {place}") for place, record in enumerate(records)]


def _prepared_again(
    store: Store, plan: Plan, path: str | list[str], workers: Workers, tokenizer: TextTokenizer
) -> RowSource:
    """The rows of the text that the plan names, or that the command does.

    Raises:
        PlanMismatchError: neither is the text that the rows are of, or it gives other rows now.
    """
    own = DataConfig.model_validate(_stated(plan.config["data"]))
    places = [own, own.model_copy(update={"path": path})]
    found = {str(data.path): _text_digest(data, tokenizer) for data in places}
    there = [data for data in places if found[str(data.path)] == plan.rows.text_digest]
    facts: dict[str, object] = {"cache": f"{store.url}, segment {plan.segment}"}
    advice = "bring back the text that the cache was built from, or name where it is with --data.path"
    if not there:
        facts |= {"text then": plan.rows.text_digest, **{f"now {path}": digest for path, digest in found.items()}}
        raise PlanMismatchError("rows of the cache are damaged, and their text is missing", facts, advice)
    rows = open_or_prepare(store, there[0], workers, tokenizer, plan=plan)
    if describe_rows(rows) != plan.rows:
        facts |= {
            "rows then": f"{plan.rows.count}, digest {plan.rows.content_digest}",
            "rows now": f"{rows.index.rows}, digest {rows.index.content_digest}",
        }
        raise PlanMismatchError("rows of the cache are damaged, and the text now gives other rows", facts, advice)
    return rows


def _text_digest(data: DataConfig, tokenizer: TextTokenizer) -> str:
    """The digest of the text, or why there is none."""
    try:
        rows = open_rows(data)
        return inputs_digest(data, tokenizer) if rows is None else rows.index.text_digest
    except (InputError, ConfigError) as error:
        return error.what
