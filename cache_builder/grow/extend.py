"""`distillcache build --extend`: add one segment to a finished cache.

The config says what the cache should hold. Rows that no segment has become a segment with rows of its own; rows that
are there get the taps and blocks that they lack. What is there is neither written nor computed again, and the new
segment exists once the manifest that lists it has replaced the one that does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from distillcache.cache_builder.prepare import open_rows
from distillcache.cache_builder.record.finish import tidy
from distillcache.cache_builder.record.identity import row_settings
from distillcache.cache_builder.record.inputs import checked_model, open_or_prepare, warn_of_length
from distillcache.cache_builder.record.loop import SegmentBuild, build_segment
from distillcache.cache_builder.record.plan import chosen_taps, make_plan, plan_differences
from distillcache.cache_builder.record.presence import refuse_missing_data
from distillcache.cache_builder.record.replica import open_replica
from distillcache.cache_builder.record.work_units import RowSource
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.models.checkpoint import weights_digest
from distillcache.models.config import ModelConfig
from distillcache.models.describe import COMPRESSING_LIBRARY, describe_rows
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.cache.addressing import CODEC_FIELDS, RowGroup, row_groups
from distillcache.schemas.cache.segment import Segment, begun_plan, open_cache, segment_name
from distillcache.schemas.config import BuildConfig, BuildSpec, DataConfig, Workers
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError, FolderTakenError, InputError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Manifest, Plan, RowsPlan, TapPlan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.format.tap_plan import counting_as_recorded, with_slots
from distillcache.schemas.store.store import Store


def extend_cache(store: Store, config: BuildConfig, tokenizer: TextTokenizer, manifest: Manifest | None) -> Manifest:
    """Add what the config asks for and the cache lacks; a cache that lacks nothing stays unchanged.

    The same command resumes after any interruption.

    Raises:
        InputError: there is no finished cache, or what was given cannot be used.
        PlanMismatchError: the teacher, its tokenizer or its numerics are not the cache's.
        ConfigError: a tap is there in another codec.
    """
    if manifest is None:
        raise InputError(
            "there is no finished cache to add to",
            {"cache": store.url, "missing": layout.MANIFEST},
            "build it first: the same command without --extend, and with the first config",
        )
    model, groups = checked_model(config.teacher.path, config.data.tokenizer, tokenizer), row_groups(open_cache(store))
    number = len(manifest.segments)
    _check_same_teacher(store, groups[0].base.plan, config.teacher.path, tokenizer)
    store.clear_stale_locks()
    with _naming_unfinished(store, number):
        asked = _asked_taps(config, model, tokenizer, groups)
        addition = _choose_addition(store, config.data, config, tokenizer, groups, number, asked)
    if not addition.taps:
        return manifest
    warn_of_length(config.data, config.process_id, model)
    with open_replica(config.mesh, config.batch_rows, config) as replica:
        decoder = replica.load(config.teacher.path, config)
        plan = make_plan(
            config,
            segment_name(number),
            model,
            replica.describe_teacher(config.teacher.path, model),
            addition.plan,
            str(decoder.dtype),
            rows_of=addition.rows_of,
            taps=addition.taps,
            processes=replica.peers.count,
            config=config.model_dump(mode="json"),
        )
        _check_same_numerics(store, groups[0].base.plan, plan, config.accept_platform)
        with _naming_unfinished(store, number):
            return build_segment(
                SegmentBuild(
                    store=store,
                    options=config,
                    tokenizer=tokenizer,
                    teacher=config.teacher.path,
                    decoder=decoder,
                    plan=plan,
                    rows=addition.rows,
                    replica=replica,
                )
            )


def _asked_taps(
    spec: BuildSpec, model: ModelConfig, tokenizer: TextTokenizer, groups: Sequence[RowGroup]
) -> list[TapPlan]:
    """Return the taps that the config asks for, with logits over the ids that the cache's logits cover."""
    recorded = [tap for group in groups for segment in group.segments for tap in segment.plan.taps]
    asked = counting_as_recorded(chosen_taps(spec, model, tokenizer.vocab_size), recorded)
    if any(tap.head for tap in recorded):  # a cache keeps it once
        return [tap.model_copy(update={"head": False}) for tap in asked]
    return asked


@contextmanager
def _naming_unfinished(store: Store, number: int) -> Iterator[None]:
    """A plan that does not fit is an extension that another command began: say how to be rid of it."""
    try:
        yield
    except FolderTakenError:
        raise
    except PlanMismatchError as error:
        begun = begun_plan(store, number)
        if begun is None:
            raise
        raise PlanMismatchError(
            "an extension with another config is unfinished",
            {"unfinished": store.where(layout.segment_prefix(begun.segment)), **error.facts},
            "finish it with its own config, or delete it first: the same command with --abandon",
        ) from error


@dataclass(frozen=True)
class _Addition:
    """The taps to record, and the rows to record them for. rows_of: the segment that has the rows; None for new
    ones.
    """

    rows: RowSource
    plan: RowsPlan
    rows_of: str | None
    taps: Sequence[TapPlan]


def _choose_addition(
    store: Store,
    data: DataConfig,
    workers: Workers,
    tokenizer: TextTokenizer,
    groups: Sequence[RowGroup],
    number: int,
    taps: Sequence[TapPlan],
) -> _Addition:
    """Choose what the config asks for and the cache lacks; no taps if nothing is missing."""
    group = _group_of_text(groups, data, tokenizer)
    if group is None:
        _check_new_rows(store, groups, data, taps)
        rows = open_or_prepare(store, data, workers, tokenizer, number)
        plan = describe_rows(rows)
        # The same rows may come from other files, or from prepared ones.
        group = next((each for each in groups if each.base.plan.rows == plan), None)
        if group is None:
            return _Addition(rows, plan, None, taps)
    base = group.base.plan
    missing = _missing_taps(group, taps, base.teacher.hidden_size)
    if not missing:  # perhaps since a moment ago, when a crash kept the build from tidying up
        refuse_missing_data(store, [each.entry for each in group.segments if each.entry is not None])
        for each in group.segments:
            tidy(store, each.plan)
        if begun_plan(store, number) is None:  # only rows were prepared there, to find that the cache has them
            tidy(store, base.model_copy(update={"segment": segment_name(number)}))
    return _Addition(_SegmentRows(group.base), base.rows, base.segment, missing)


class _SegmentRows:
    """The rows of a finished segment."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1`."""
        return [self._segment.row(number) for number in range(start, stop)]


def _group_of_text(groups: Sequence[RowGroup], data: DataConfig, tokenizer: TextTokenizer) -> RowGroup | None:
    """The rows that this very text gave, with these settings; None for prepared rows and other text."""
    if open_rows(data) is not None:
        return None
    digest, settings = inputs_digest(data, tokenizer), row_settings(data.model_dump(mode="json"))
    for group in groups:
        plan = group.base.plan
        same = (plan.rows.text_digest, plan.rows.tokenizer_digest) == (digest, tokenizer.digest)
        if same and row_settings(plan.config.get("data", {})) == settings:
            return group
    return None


def _missing_taps(group: RowGroup, taps: Sequence[TapPlan], hidden: int) -> list[TapPlan]:
    """The slots that these rows lack. Delta-coded slots cannot lean on another segment's: they bring their keyframe."""
    missing = []
    for tap in taps:
        _check_same_codec(group, tap)
        slots = sorted(set(tap.slots) - group.slots(tap.name))
        if slots and tap.delta:
            first = min(slots)  # a block needs the stream on both of its sides, and both of one segment
            slots = [slot for slot in tap.slots if first - 1 <= slot]
        if slots:
            missing.append(with_slots(tap, slots, hidden))
        elif tap.head:
            raise ConfigError(
                "the head is kept with slots of the stream, and these rows hold all of them already",
                {"cache": group.base.store.url, "taps.resid.head": True},
                "leave it out: train reads the head from the teacher's checkpoint; or build another cache with it",
            )
    return missing


def _check_same_codec(group: RowGroup, tap: TapPlan) -> None:
    for segment in group.segments:
        for there in segment.plan.taps:
            differing = [name for name in CODEC_FIELDS if getattr(there, name) != getattr(tap, name)]
            if there.name == tap.name and differing:
                facts = {
                    f"taps.{tap.name}.{name}": f"there {getattr(there, name)!r}, here {getattr(tap, name)!r}"
                    for name in differing
                }
                raise ConfigError(
                    "the cache holds this tap in another codec",
                    {"cache": segment.store.url, "segment": segment.plan.segment, **facts},
                    f"use the same codec, leave the tap out (taps.{tap.name}: null), or copy the cache to this codec",
                )


def _check_new_rows(store: Store, groups: Sequence[RowGroup], data: DataConfig, taps: Sequence[TapPlan]) -> None:
    """New rows must be read together with those that are there."""
    prepared, there = open_rows(data), groups[0].base.plan.rows.row_tokens
    row_tokens = data.row_tokens if prepared is None else prepared.index.row_tokens
    if row_tokens != there:
        raise ConfigError(
            "all rows of a cache have one length",
            {"cache": f"{store.url}  {counted(there, 'token')}", "data.row_tokens": row_tokens},
            f"set data.row_tokens to {there}, or build another cache",
        )
    for group in groups:
        for tap in taps:
            _check_same_codec(group, tap)


def _check_same_teacher(store: Store, there: Plan, teacher: str, tokenizer: TextTokenizer) -> None:
    pairs = {
        "weights": (there.teacher.weights_digest, weights_digest(teacher)),
        "tokenizer": (there.rows.tokenizer_digest, tokenizer.digest),
    }
    facts = {name: f"there {then!r}, here {now!r}" for name, (then, now) in pairs.items() if then != now}
    if facts:
        raise PlanMismatchError(
            "the cache was built with another teacher",
            {"cache": store.url, **facts},
            "extend it with its own teacher and tokenizer, or build another cache",
        )


def _check_same_numerics(store: Store, there: Plan, plan: Plan, accept_platform: bool) -> None:
    """Check that all numbers of a cache come from one computation; other platforms only if the user accepts them.

    What compresses a segment's bytes is its own: the numbers do not depend on it.
    """
    found = plan_differences(there, plan)
    found.pop(f"numerics.versions.{COMPRESSING_LIBRARY}", None)
    facts = {
        name: f"there {then!r}, here {now!r}" for name, (then, now) in found.items() if name.startswith("numerics.")
    }
    if facts and ("numerics.dtype" in facts or not accept_platform):
        raise PlanMismatchError(
            "the cache was computed with other numerics",
            {"cache": store.url, **facts},
            "extend it on the platform of its build and in its dtype, or accept other bits with --accept-platform",
        )
