"""What will be built: sizes, slots and fingerprints, from a config, a teacher's config and the rows."""

import platform
import socket
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jax

from models.config import ModelConfig
from schemas import layout
from schemas.canonical import from_canonical, to_canonical
from schemas.codecs import get_codec
from schemas.config import BuildConfig, TapsConfig
from schemas.errors import ConfigError, PlanMismatchError
from schemas.manifest import NumericsPlan, PartPlan, Plan, RowsPlan, TapPlan, TeacherPlan
from schemas.storage import Store

NUMERIC_LIBRARIES = ("jax", "jaxlib", "flax")  # what turns a plan into bits


def make_plan(
    config: BuildConfig, segment: str, model: ModelConfig, teacher: TeacherPlan, rows: RowsPlan, dtype: str
) -> Plan:
    """The plan of a segment. Pure but for the machine's platform, versions, name and clock.

    Raises:
        ConfigError: the config asks for blocks, sizes or taps that cannot be.
    """
    blocks = _chosen_blocks(config.blocks, model.num_blocks)
    taps = _choose_taps(config.taps, blocks, model.hidden_size)
    row_bytes = sum(_slot_row_bytes(part, rows.row_tokens) * len(tap.slots) for tap in taps for part in tap.parts)
    shard_rows = layout.choose_shard_rows(row_bytes, rows.count, config.batch_rows, config.shard_mib, config.shard_rows)
    return Plan(
        segment=segment,
        teacher=teacher,
        rows=rows,
        taps=tuple(_with_objects(tap, rows.row_tokens, shard_rows, config.object_mib) for tap in taps),
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
    chosen = []
    for name in ("attn_out", "resid", "mlp_out"):
        tap = getattr(taps, name)
        if tap is None:
            continue
        # A block's mlp_out follows from the stream on both of its sides.
        slots = sorted({*blocks, *(block + 1 for block in blocks)}) if name == "resid" else blocks
        parts = tuple(
            PartPlan(
                array=name if part.name == "codes" else f"{name}.{part.name}",
                part=part.name,
                dtype=part.dtype,
                width=part.width,
                bits_of=part.bits_of,
            )
            for part in get_codec(tap.codec).parts(hidden)
        )
        chosen.append(TapPlan(name=name, codec=tap.codec, slots=tuple(slots), slots_per_object=1, parts=parts))
    if not chosen:
        raise ConfigError("there is nothing to record", {"taps": "all are null"}, "set taps.attn_out or taps.resid")
    return chosen


def _slot_row_bytes(part: PartPlan, row_tokens: int) -> int:
    return layout.ITEM_BYTES[part.dtype] * part.width * row_tokens


def _with_objects(tap: TapPlan, row_tokens: int, shard_rows: int, object_mib: int) -> TapPlan:
    widest = max(_slot_row_bytes(part, row_tokens) for part in tap.parts) * shard_rows
    size = layout.choose_slots_per_object(widest, len(tap.slots), object_mib, tap.name)
    return tap.model_copy(update={"slots_per_object": size})
