"""What will be built: sizes, slots and fingerprints, from a config, a teacher's config and the rows."""

import platform
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jax

from models.config import ModelConfig
from schemas import layout
from schemas.canonical import from_canonical, to_canonical
from schemas.codecs import Codec, default_group, make_signs
from schemas.config import BuildConfig, TapConfig, TapsConfig
from schemas.errors import ConfigError, PlanMismatchError
from schemas.manifest import NumericsPlan, PartPlan, Plan, RowsPlan, TapPlan, TeacherPlan
from schemas.storage import Store
from schemas.tap_codec import tap_codec

NUMERIC_LIBRARIES = ("jax", "jaxlib", "flax")  # what turns a plan into bits


def make_plan(
    config: BuildConfig,
    segment: str,
    model: ModelConfig,
    teacher: TeacherPlan,
    rows: RowsPlan,
    dtype: str,
    rows_of: str | None = None,
    taps: Sequence[TapPlan] | None = None,
) -> Plan:
    """The plan of a segment. Pure but for the machine's platform, versions, name and clock.

    Args:
        rows_of: the segment whose rows they are, if another one's.
        taps: what to record, as `chosen_taps` gives it; default: all that the config asks for.

    Raises:
        ConfigError: the config asks for blocks, sizes or taps that cannot be.
    """
    blocks = _chosen_blocks(config.blocks, model.num_blocks)
    taps = chosen_taps(config, model) if taps is None else taps
    row_bytes = sum(part.bytes_per_token for tap in taps for part in tap.parts) * rows.row_tokens
    shard_rows = layout.choose_shard_rows(row_bytes, rows.count, config.batch_rows, config.shard_mib, config.shard_rows)
    return Plan(
        segment=segment,
        rows_of=rows_of,
        teacher=teacher,
        rows=rows,
        taps=with_objects(taps, rows.row_tokens, shard_rows, config.object_mib),
        blocks=blocks,
        batch_rows=config.batch_rows,
        shard_rows=shard_rows,
        numerics=describe_numerics(dtype),
        config=config.model_dump(mode="json"),
        created={
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "distillcache": version("distillcache"),
        },
    )


def chosen_taps(config: BuildConfig, model: ModelConfig) -> list[TapPlan]:
    """The taps that a config asks for, with their slots and arrays; the objects are not divided yet.

    Raises:
        ConfigError: the config asks for blocks, codecs or taps that cannot be.
    """
    return _choose_taps(config.taps, _chosen_blocks(config.blocks, model.num_blocks), model.hidden_size)


def tap_plan(name: str, config: TapConfig, slots: Sequence[int], hidden: int) -> TapPlan:
    """A tap in the codec that a config asks for; the objects are not divided yet.

    Raises:
        ConfigError: there is no such codec.
    """
    if config.delta and name != "resid":
        raise ConfigError(
            "delta coding is for the residual stream",
            {f"taps.{name}.delta": True, "why": "only the stream changes little from block to block"},
            f"leave out taps.{name}.delta",
        )
    integer = config.codec in ("int8", "int4")
    options = {
        "group": default_group(hidden) if integer and config.group is None else config.group,
        "rotate": config.rotate and integer,
        "delta": config.delta,
        "keyframe_every": config.keyframe_every if config.delta else 0,
    }
    return with_slots(TapPlan(name=name, codec=config.codec, slots=(), parts=(), **options), slots, hidden)


def with_slots(tap: TapPlan, slots: Sequence[int], hidden: int) -> TapPlan:
    """The tap with these slots alone; the objects are not divided yet."""
    codec = tap_codec(tap, {f"signs.{tap.name}": make_signs(tap.name, hidden)})
    return tap.model_copy(update={"slots": tuple(slots), "parts": _parts(tap.name, codec, hidden, len(slots))})


def with_objects(taps: Sequence[TapPlan], row_tokens: int, shard_rows: int, object_mib: int) -> tuple[TapPlan, ...]:
    """The taps with their objects divided."""
    return tuple(_with_objects(tap, row_tokens, shard_rows, object_mib) for tap in taps)


def check_choices(config: BuildConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` for blocks, taps or sizes that cannot be, before anything is prepared or written."""
    _choose_taps(config.taps, _chosen_blocks(config.blocks, model.num_blocks), model.hidden_size)
    layout.choose_shard_rows(1, 1, config.batch_rows, config.shard_mib, config.shard_rows)


def describe_numerics(dtype: str) -> NumericsPlan:
    """What pins the bits on this machine. On a CPU also its architecture, since XLA compiles for it."""
    device = jax.devices()[0]
    kind = f"cpu:{platform.machine()}" if device.platform == "cpu" else device.device_kind
    return NumericsPlan(
        dtype=dtype,
        attention="xla",
        mesh=(1,),
        platform=kind,
        versions={name: version(name) for name in NUMERIC_LIBRARIES},
    )


def settle_plan(store: Store, plan: Plan, accept_platform: bool) -> Plan:
    """The plan that is in the store: ours if nobody was first, else the stored one if it describes the same work.

    Raises:
        PlanMismatchError: the place holds another plan; the message lists what differs.
    """
    key = layout.plan_key(plan.segment)
    if store.create(key, to_canonical(plan)):
        return plan
    stored = from_canonical(Plan, store.read(key) or b"", store.where(key))
    differences = plan_differences(stored, plan)
    platform_only = all(name.startswith("numerics.") for name in differences)
    if differences and not (platform_only and accept_platform):
        facts = {name: f"there {there!r}, here {here!r}" for name, (there, here) in differences.items()}
        advice = (
            "go on where it was begun, or accept other bits with --accept-platform"
            if platform_only
            else "use the config that it was begun with, or another cache"
        )
        raise PlanMismatchError("the cache belongs to another plan", {"cache": store.url, **facts}, advice)
    return stored


def plan_differences(stored: Plan, wanted: Plan) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (stored, wanted), for every field that the bytes of a segment depend on."""
    ignored = {"config", "created"}
    differences: dict[str, tuple[Any, Any]] = {}

    def compare(name: str, there: Any, here: Any) -> None:
        if isinstance(there, dict) and isinstance(here, dict):
            for key in sorted({*there, *here}):
                compare(f"{name}.{key}" if name else key, there.get(key), here.get(key))
        elif there != here:
            differences[name] = (there, here)

    compare("", stored.model_dump(mode="json", exclude=ignored), wanted.model_dump(mode="json", exclude=ignored))
    differences.pop("teacher.path", None)  # identity is the weights, wherever they lie
    return differences


def _chosen_blocks(blocks: str | list[int], num_blocks: int) -> tuple[int, ...]:
    if isinstance(blocks, str):
        return tuple(range(num_blocks))
    chosen = tuple(sorted(set(blocks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_blocks:
        raise ConfigError(
            "the blocks to record are not the teacher's",
            {"blocks": blocks, "expected": f"some of 0 to {num_blocks - 1}"},
        )
    return chosen


def _choose_taps(taps: TapsConfig, blocks: tuple[int, ...], hidden: int) -> list[TapPlan]:
    """The taps with their slots and arrays; the objects are not divided yet."""
    chosen = []
    for name in ("attn_out", "resid", "mlp_out"):
        config = getattr(taps, name)
        if config is None:
            continue
        # A block's mlp_out follows from the stream on both of its sides.
        slots = sorted({*blocks, *(block + 1 for block in blocks)}) if name == "resid" else blocks
        chosen.append(tap_plan(name, config, slots, hidden))
    if not chosen:
        raise ConfigError("there is nothing to record", {"taps": "all are null"}, "set taps.attn_out or taps.resid")
    return chosen


def _parts(tap: str, codec: Codec, hidden: int, slots: int) -> tuple[PartPlan, ...]:
    return tuple(
        PartPlan(
            array=tap if part.name == "codes" else f"{tap}.{part.name}",
            part=part.name,
            dtype=part.dtype,
            width=part.width,
            bits_of=part.bits_of,
            every=part.every,
            slots=part.slots(slots),
            slots_per_object=1,
        )
        for part in codec.parts(hidden)
    )


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
