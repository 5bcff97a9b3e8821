"""`distillcache copy SRC DST --repair`: restore exactly what is damaged in a copy, from its source.

What was copied, and how, is in the copy's plan: the command needs no more than the two places. The source must be the
one that the plan names by its manifest's digest; that it has grown since does no harm.
"""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from distillcache.cache_builder.grow.copying import Copying, SelectedRows, copied_files
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.work_units import Batches, RowSource, WorkUnits
from distillcache.cache_builder.repair.from_teacher import check_whole, damages_of, drop_receipts, tell_repaired
from distillcache.cache_builder.repair.lost_manifest import lost_files, rebuild_manifest
from distillcache.cache_builder.repair.restore import mend_segment
from distillcache.cache_builder.repair.survey import SegmentView, survey_cache
from distillcache.schemas.cache.addressing import row_groups
from distillcache.schemas.cache.segment import Segment, open_cache, read_manifest
from distillcache.schemas.config import CopyConfig, CopySpec
from distillcache.schemas.errors import ConfigError, DamageError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import Manifest, Plan
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import watch_for_stop
from distillcache.schemas.store.store import Store

log = logging.getLogger(__name__)


def repair_copy(config: CopyConfig, source: Store, store: Store) -> tuple[CopyConfig, Manifest | None]:
    """Check a copy, and make a finished one whole, or an unfinished one ready to resume.

    Returns: the config that the copy was begun with, for this run; the manifest, None where the copy is not finished.

    Raises:
        InputError, ConfigError: there is no copy here, or its source is gone.
        PlanMismatchError: the source or the settings are not the copy's, or this machine computes other bits.
        DamageError: the plan is lost, or the source is damaged.
        Interrupted: SIGTERM or SIGINT; the same command goes on.
    """
    survey, findings = check_whole(store)
    copied = next((view.plan for view in survey.segments if view.plan.copied_from is not None), None)
    if copied is None and survey.segments:
        raise ConfigError(
            "the cache is not a copy",
            {"cache": store.url},
            f"let its teacher repair it: distillcache build --repair --cache {store.url}",
        )
    if copied is None:
        raise DamageError(
            "the record of how the copy was made is lost",
            {"cache": store.url, **{each.object: each.what for each in findings}},
            "delete it and copy again",
        )
    config = _config_of(copied, config)
    maker = _FromSource(source, copied, config.rows)
    if lost_files(findings):
        rebuild_manifest(survey, findings, maker.fixed_files_of)
        survey, findings = survey_cache(store), []
    drop_receipts(survey, findings)
    if survey.manifest is None:
        return config, None
    damages = damages_of(survey, findings)
    mine = [damage for damage in damages if damage.plan.copied_from is not None]
    with watch_for_stop() as stop:
        store.clear_stale_locks()
        for damage in mine:
            mend_segment(damage, maker, stop, config.max_in_flight_mib << 20)
    tell_repaired(survey, findings, mine)
    for damage in damages:
        if damage not in mine:
            advice = f"distillcache build --repair --cache {store.url}"
            log.info(f"not repaired: segment {damage.plan.segment}, which was recorded, not copied; use `{advice}`")
    return config, survey.manifest


def _config_of(plan: Plan, config: CopyConfig) -> CopyConfig:
    """The config that the copy was begun with, run as this one says."""
    then, now = plan.config["copy"], config.model_dump(mode="json", exclude_unset=True)
    facts = {
        name: f"there {then.get(name, 'not set')!r}, here {value!r}"
        for name, value in now.items()
        if name in CopySpec.model_fields and then.get(name) != value
    }
    if facts:
        raise PlanMismatchError(
            "the copy was made with other settings",
            {"cache": config.dst, **facts},
            "leave them out: a repair finds them in the copy's plan",
        )
    kept = {name: value for name, value in then.items() if name in CopySpec.model_fields}
    return CopyConfig.model_validate({**kept, **now})


@dataclass(frozen=True)
class _FromSource:
    """Makes a copied segment again. The source is opened when something is needed of it."""

    source: Store
    plan: Plan
    wanted_rows: str

    def fixed_files(self) -> dict[str, bytes]:
        """The source's tokenizer and side file, the arrays' metadata."""
        return copied_files(self.source, row_groups(self._segments), self.plan)

    def fixed_files_of(self, view: SegmentView) -> Mapping[str, bytes]:
        """Return the fixed files of a segment, which may be one that a teacher added: that part cannot be known
        from here.
        """
        if view.plan.copied_from is None:
            return {layout.MANIFEST: b""}
        return self.fixed_files()

    def rows(self, shards: Set[int]) -> RowSource:
        """The source's rows."""
        return self._rows

    def run(self, job: WorkUnits, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
        """Transcode these batches as the copy did."""
        Copying(self.plan, self._rows).run(batches, writer, bar)

    @cached_property
    def _rows(self) -> SelectedRows:
        return SelectedRows(row_groups(self._segments), self.wanted_rows)

    @cached_property
    def _segments(self) -> Sequence[Segment]:
        """The source's segments when it was copied.

        Raises:
            InputError: there is no finished cache there.
            PlanMismatchError: it is another cache.
        """
        segments, now = open_cache(self.source), read_manifest(self.source)
        for count in range(len(segments), 0, -1):
            if now is not None and _digest_then(now, segments[:count]) == self.plan.copied_from:
                return segments[:count]
        raise PlanMismatchError(
            "this is not the cache from which the copy was made",
            {
                "source": self.source.url,
                "manifest then": self.plan.copied_from,
                "manifest now": digest_bytes(self.source.read(layout.MANIFEST) or b""),
                "copied from": self.plan.config["copy"]["src"],
            },
            "name the source as it was, or delete the copy and copy again",
        )


def _digest_then(now: Manifest, segments: Sequence[Segment]) -> str:
    """The digest of the manifest that listed these segments, the first ones of a cache."""
    own = [segment.plan.rows for segment in segments if segment.plan.rows_of is None]
    then = now.model_copy(
        update={
            "segments": now.segments[: len(segments)],
            "rows": sum(rows.count for rows in own),
            "tokens": sum(rows.tokens for rows in own),
        }
    )
    return digest_bytes(to_canonical(then))
