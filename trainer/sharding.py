"""Where parameters, optimizer state and batches lie on a mesh of devices: one rule a kind of parameter.

| axis | of parameters | of a batch |
| --- | --- | --- |
| block | the repeats of every layer group, cut into runs | each group of devices has the slots of its blocks |
| data | copies | rows |
| fsdp | the hidden axis | rows |
| tensor | heads, MLP widths, the vocabulary | copies |
| expert | experts | copies |

An axis of an array that does not divide by the devices along it is left whole. XLA derives the collectives along all
axes but `block`, over which the step is a `shard_map` without any (step.py).
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.experts import ROW_AXES
from schemas.errors import ConfigError
from schemas.train_config import MeshConfig

AXES = ("block", "data", "fsdp", "tensor", "expert")
# By the parameter's last names; a stacked parameter has its repeats, on `block`, in front.
RULES: dict[str, tuple[str | None, ...]] = {
    "attention/q": ("fsdp", "tensor", None),
    "attention/k": ("fsdp", "tensor", None),
    "attention/v": ("fsdp", "tensor", None),
    "attention/o": ("tensor", None, "fsdp"),
    "attention/q_bias": ("tensor", None),
    "attention/k_bias": ("tensor", None),
    "attention/v_bias": ("tensor", None),
    "mlp/gate": ("fsdp", "tensor"),
    "mlp/up": ("fsdp", "tensor"),
    "mlp/down": ("tensor", "fsdp"),
    "mlp/gate_bias": ("tensor",),
    "mlp/up_bias": ("tensor",),
    "mlp/router": ("fsdp", None),
    "mlp/shared_gate": ("fsdp", "tensor"),
    "mlp/shared_up": ("fsdp", "tensor"),
    "mlp/shared_down": ("tensor", "fsdp"),
    "mlp/shared_router": ("fsdp", None),
    "embed": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
}


# The same names where a block has experts: one more axis in front.
EXPERT_RULES = {name: ("expert", *RULES[name]) for name in ("mlp/gate", "mlp/up", "mlp/down")}


def make_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of these devices; None for one device, where nothing needs placing.

    Raises:
        ConfigError: there are fewer devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    wanted, there = int(np.prod(sizes)), jax.device_count()
    if wanted == 1:
        return None
    if wanted > there:
        raise ConfigError(
            "the mesh needs more devices than there are",
            {"mesh": ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)), "devices": there},
            f"lower one of its axes: their product may be at most {there}",
        )
    devices = np.asarray(jax.devices()[:wanted]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_rows(config: MeshConfig, rows: int, name: str) -> None:
    """Raise `ConfigError` unless these rows can be dealt out evenly."""
    parts = config.data * config.fsdp
    if rows % parts:
        raise ConfigError(
            "the rows of a batch cannot be dealt out evenly",
            {name: rows, "mesh.data * mesh.fsdp": parts},
            f"make {name} a multiple of {parts}",
        )


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter of this name lies (parameters.py), or an optimizer moment of it."""
    stacked = name.startswith("groups/")
    inner = shape[1:] if stacked else shape
    found = [suffix for suffix in RULES if name == suffix or name.endswith("/" + suffix)]
    rule: tuple[str | None, ...] = RULES[found[0]] if found else ()
    if found and len(inner) > len(rule):
        rule = EXPERT_RULES.get(found[0], ())
    axes = [_fitting(mesh, axis, size) for axis, size in zip(rule, inner, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*(["block"] if stacked else []), *axes))


def state_shardings(mesh: Mesh, parameters: Mapping[str, Any], moments: Mapping[str, Any]) -> tuple[Any, Any]:
    """Shardings of trained parameters and of their optimizer state (unit -> pytree, leaves stacked for places)."""

    def of_moment(unit: str) -> Any:
        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            last = path[-1]
            inner = last.key if isinstance(last, jax.tree_util.DictKey) else ""
            return parameter_sharding(mesh, f"{unit}{inner}", leaf.shape)

        return place

    return (
        {name: parameter_sharding(mesh, name, leaf.shape) for name, leaf in parameters.items()},
        {unit: jax.tree_util.tree_map_with_path(of_moment(unit), state) for unit, state in moments.items()},
    )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of `[B, T]`."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def taps_sharding(mesh: Mesh, blocks: int) -> NamedSharding:
    """Of a tap's part: `[S, B, T, W]`, or with a mesh axis `block` `[groups, S, B, T, W]`."""
    return NamedSharding(mesh, PartitionSpec(*(["block"] if blocks > 1 else []), None, ROW_AXES))


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Of a table's rows `[repeats, places, ...]`."""
    return NamedSharding(mesh, PartitionSpec("block"))


def _fitting(mesh: Mesh, axis: str | None, size: int) -> str | None:
    return axis if axis is not None and size % mesh.shape[axis] == 0 and mesh.shape[axis] > 1 else None
