"""The plan of a build: sizes, slots and fingerprints, from a config, a teacher's config and the rows."""

import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.describe import describe_numerics
from distillcache.models.layers.kernels import chosen_kernel
from distillcache.schemas.cache.segment import begun_plan, named_by_plan, segment_names, segment_number
from distillcache.schemas.config import BuildSpec, TapsConfig
from distillcache.schemas.config.asked import asked
from distillcache.schemas.config.differences import differing, told
from distillcache.schemas.errors import ConfigError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.manifest import Plan, RowsPlan, TapPlan, TeacherPlan
from distillcache.schemas.format.tap_plan import choose_taps, chosen_blocks, counting_as_recorded
from distillcache.schemas.store.store import Store


def make_plan(
    spec: BuildSpec,
    segment: str,
    model: ModelConfig,
    teacher: TeacherPlan,
    rows: RowsPlan,
    dtype: str,
    rows_of: str | None = None,
    taps: Sequence[TapPlan] | None = None,
    processes: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a segment. Pure but for the machine's platform, versions, name and clock.

    Args:
        segment: its number, of four digits; the plan makes a name of it.
        rows_of: the segment whose rows they are, if another one's.
        taps: what to record, as `chosen_taps` gives it; default: all that the config asks for.
        processes: over which one replica of the teacher lies.
        config: the whole config of the build, for people; default: the spec.

    Raises:
        ConfigError: the config asks for blocks, sizes or taps that cannot be.
    """
    blocks = chosen_blocks(spec.blocks, model.num_blocks)
    taps = chosen_taps(spec, model, rows.vocab_size) if taps is None else taps
    row_bytes = sum(part.bytes_per_token for tap in taps for part in tap.parts) * rows.row_tokens
    shard_rows = layout.choose_shard_rows(row_bytes, rows.count, spec.batch_rows, spec.shard_mib, spec.shard_rows)
    plan = Plan(
        segment=segment,
        rows_of=rows_of,
        teacher=teacher,
        rows=rows,
        taps=with_objects(taps, rows.row_tokens, shard_rows, spec.object_mib),
        blocks=blocks,
        batch_rows=spec.batch_rows,
        shard_rows=shard_rows,
        numerics=describe_numerics(
            dtype,
            taps,
            spec.mesh.teacher_axes,
            counted_processes(spec.mesh.teacher_axes, spec.batch_rows, processes, shard_rows),
            chosen_kernel(spec.attention, model, dtype),
        ),
        config=dict(config or spec.model_dump(mode="json")),
        created={
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "distillcache": version("distillcache"),
        },
    )
    return named_by_plan(plan)


def counted_processes(axes: tuple[int, ...], batch_rows: int, processes: int, shard_rows: int) -> int:
    """The processes that a replica spans, if the bits may depend on their number; 1 if not.

    Args:
        axes: the mesh's sizes along data, fsdp, tensor and expert; (1,) without a mesh.
    """
    sums_more_than_two = max(axes[2:], default=1) > 2  # along tensor or expert; two are the same in any order
    in_order = batch_rows // processes % shard_rows == 0
    return processes if sums_more_than_two or not in_order else 1


def chosen_taps(spec: BuildSpec, model: ModelConfig, token_ids: int | None = None) -> list[TapPlan]:
    """The taps that a config asks for, with their slots and arrays; the objects are not divided yet.

    Args:
        token_ids: how many ids the tokenizer gives; None: as many as the teacher has rows.

    Raises:
        ConfigError: the config asks for blocks, codecs or taps that cannot be.
    """
    blocks = chosen_blocks(spec.blocks, model.num_blocks)
    return choose_taps(spec.taps, blocks, model.num_blocks, model.hidden_size, model.vocab_size, token_ids)


def with_objects(taps: Sequence[TapPlan], row_tokens: int, shard_rows: int, object_mib: int) -> tuple[TapPlan, ...]:
    """The taps with their objects divided."""
    return tuple(_with_objects(tap, row_tokens, shard_rows, object_mib) for tap in taps)


def idle_options(taps: TapsConfig) -> list[str]:
    """Return a note on each option of a codec that was asked for and that its tap's codec does not have."""
    found: list[str] = []
    for name in ("attn_out", "resid", "mlp_out"):
        tap = getattr(taps, name)
        if tap is None:
            continue
        integer, needs = tap.codec in ("int8", "int4"), {"keyframe_every": (tap.delta, "delta: true")}
        needs |= dict.fromkeys(("group", "rotate"), (integer, "codec int8 or int4"))
        for option, (used, needed) in needs.items():
            if not used and asked(tap, option) is not None:
                found.append(f"taps.{name}.{option} does nothing in this build: it needs {needed}")
    return found


def check_choices(spec: BuildSpec, model: ModelConfig, token_ids: int) -> None:
    """Raise `ConfigError` for blocks, taps or sizes that cannot be, before anything is prepared or written."""
    chosen_taps(spec, model, token_ids)
    layout.choose_shard_rows(1, 1, spec.batch_rows, spec.shard_mib, spec.shard_rows)


def refuse_foreign_folder(store: Store, flag: str) -> None:
    """A local folder that holds something else is no place for a cache; `flag` names the place."""
    if store.local is None or not store.local.exists():
        return
    found = sorted(path.name for path in store.local.iterdir())
    if found and "segments" not in found:
        raise ConfigError(
            "the cache's folder contains something else",
            {"cache": store.url, "found": ", ".join(found[:5])},
            f"name a new or empty folder with {flag}",
        )


def settle_plan(store: Store, plan: Plan, accept_platform: bool) -> Plan:
    """Settle the plan in the store: ours if there is none yet, otherwise the stored one if it describes the same work.

    Plans that differ have folders of their own, so a process that settles one checks once more afterwards: of two that
    were settled at one moment the later one sees the other, and goes.

    Raises:
        PlanMismatchError: the place holds another plan; the message lists what differs.
    """
    number = segment_number(plan.segment)
    stored = begun_plan(store, number)
    if stored is None:
        key = layout.plan_key(plan.segment)
        if not store.create(key, to_canonical(plan)):
            return settle_plan(store, plan, accept_platform)
        others = [name for name in segment_names(store, number) if name != plan.segment]
        if not others:
            return plan
        store.delete(key)
        raise PlanMismatchError(
            "another plan was written here at the same moment",
            {"plan": store.where(layout.plan_key(others[0]))},
            "build one of the two at another path, or run this one again when the other is finished",
        )
    differences = plan_differences(stored, plan)
    platform_only = all(name.startswith("numerics.") for name in differences)
    if differences and not (platform_only and accept_platform):
        facts = told(differences)
        advice = (
            "resume on the platform where it was started, or accept other bits with --accept-platform"
            if platform_only
            else "resume on the machine where it was started, or copy to another path"
            if all(name.startswith("recoded_on") for name in differences)
            else "use the config that it was begun with, or another cache"
        )
        raise PlanMismatchError("the cache belongs to another plan", {"cache": store.url, **facts}, advice)
    return stored


def plan_differences(stored: Plan, wanted: Plan) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (stored, wanted), for every field that the bytes of a segment depend on.

    Of which ids logits are is settled by the stored plan, which is the one that is resumed.
    """
    wanted = wanted.model_copy(update={"taps": tuple(counting_as_recorded(wanted.taps, stored.taps))})
    ignored = {"config", "created", "segment"}  # the segment's name follows from the rest
    differences = differing(
        stored.model_dump(mode="json", exclude=ignored), wanted.model_dump(mode="json", exclude=ignored)
    )
    differences.pop("teacher.path", None)  # identity is the weights, wherever they lie
    differences.pop("teacher.context", None)  # follows from them; plans of earlier versions do not say it
    return differences


def _with_objects(tap: TapPlan, row_tokens: int, shard_rows: int, object_mib: int) -> TapPlan:
    """The tap with its objects divided: keyframes lie in the object that starts with them, or in one like it."""
    slot_rows = row_tokens * shard_rows
    widest = max(layout.ITEM_BYTES[part.dtype] * part.width for part in tap.parts) * slot_rows
    size = layout.choose_slots_per_object(widest, len(tap.slots), object_mib, tap.name)
    if tap.keyframe_every:
        size = -(-size // tap.keyframe_every) * tap.keyframe_every
    parts = (
        part.model_copy(update={"slots_per_object": min(part.slots, max(1, size // part.every))}) for part in tap.parts
    )
    return tap.model_copy(update={"parts": tuple(parts)})
