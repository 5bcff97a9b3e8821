"""Sharding of parameters and rows over a mesh of devices: one rule for each kind of parameter, for teachers and
students.

| axis | of parameters | of a batch |
| --- | --- | --- |
| block | the repeats of every layer group, cut into runs; students only | slots, each group its own blocks' |
| data | copies | rows |
| fsdp | the hidden axis | rows |
| tensor | heads, MLP widths, the vocabulary | copies |
| expert | experts | copies |

An axis of an array that does not divide by the devices along it is left whole. Devices are in the order of their
processes, so that consecutive runs of a batch's rows are consecutive processes'.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distillcache.models.mesh.ambient import ROW_AXES
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.errors import ConfigError

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
    "attention/sinks": ("tensor",),
    "attention/gate": ("fsdp", "tensor", None),
    "attention/gate_bias": ("tensor", None),
    "attention/z": ("fsdp", "tensor", None),
    "attention/alpha": ("fsdp", "tensor"),
    "attention/beta": ("fsdp", "tensor"),
    "attention/decay_a": ("fsdp", None),
    "attention/decay_b": (None, "tensor", None),
    "attention/gate_a": ("fsdp", None),
    "attention/gate_b": (None, "tensor", None),
    "attention/conv_q": ("tensor", None, None),
    "attention/conv_k": ("tensor", None, None),
    "attention/conv_v": ("tensor", None, None),
    "attention/in_gate": ("fsdp", "tensor"),
    "attention/out_gate": ("fsdp", "tensor"),
    "attention/value": ("fsdp", "tensor"),
    "attention/conv": ("tensor", None),
    "attention/a_log": ("tensor",),
    "attention/dt_bias": ("tensor", None),
    "attention/z_bias": ("tensor", None),
    "attention/alpha_bias": ("tensor",),
    "attention/conv_q_bias": ("tensor", None),
    "attention/conv_k_bias": ("tensor", None),
    "attention/conv_v_bias": ("tensor", None),
    "attention/skip": ("tensor",),
    "attention/q_a": ("fsdp", None),
    "attention/q_b": (None, "tensor", None),
    "attention/kv_a": ("fsdp", None),
    "attention/kv_b": (None, "tensor", None),
    "attention/index_k": ("fsdp", None),
    "attention/index_weight": ("fsdp", None),
    "mlp/gate": ("fsdp", "tensor"),
    "mlp/up": ("fsdp", "tensor"),
    "mlp/down": ("tensor", "fsdp"),
    "mlp/gate_bias": ("tensor",),
    "mlp/up_bias": ("tensor",),
    "mlp/down_bias": (None,),
    "mlp/router": ("fsdp", None),
    "mlp/shared_gate": ("fsdp", "tensor"),
    "mlp/shared_up": ("fsdp", "tensor"),
    "mlp/shared_down": ("tensor", "fsdp"),
    "mlp/shared_router": ("fsdp", None),
    "mlp/latent_in": ("fsdp", None),
    "mlp/latent_out": (None, "fsdp"),
    "mlp/block_gate": ("fsdp", None),
    "mlp/block_up": (None, "fsdp"),
    "embed": ("tensor", "fsdp"),
    "block_embed": ("tensor", "fsdp"),
    "block_projection": ("fsdp", "tensor"),
    "head": ("fsdp", "tensor"),
}
# Of Mamba-2 beside attention (models/layers/recurrent/mamba.py).
RULES |= {name.replace("/", "/mamba_"): rule for name, rule in RULES.items() if name.startswith("attention/")}
# The same names where a block has experts: one more axis in front.
OF_EXPERTS = ("mlp/gate", "mlp/up", "mlp/down", "mlp/gate_bias", "mlp/up_bias", "mlp/down_bias")
EXPERT_RULES = {name: ("expert", *RULES[name]) for name in OF_EXPERTS}


def device_copy(value: np.ndarray | jax.Array) -> jax.Array:
    """A copy on the default device, or where a JAX array lies. It may be made later: a NumPy array must not change
    any more. For `jnp.asarray`, `jnp.array` and `jnp.copy`, JAX compiles a program for every shape.
    """
    return jax.device_put(value, may_alias=False)


def make_mesh(config: TeacherMeshConfig) -> Mesh | None:
    """The mesh of these devices; None for one device, where nothing needs placing.

    Raises:
        ConfigError: there are fewer devices.
    """
    sizes = [getattr(config, axis, 1) for axis in AXES]
    wanted, there = int(np.prod(sizes)), jax.device_count()
    if wanted == 1:
        return None
    if wanted > there:
        raise ConfigError(
            "the mesh needs more devices than there are",
            {"mesh": ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)), "devices": there},
            f"lower one of its axes: their product may be at most {there}",
        )
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered[:wanted]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_processes(mesh: Mesh | None, config: TeacherMeshConfig) -> None:
    """Raise `ConfigError` unless every process of the run has a device in the mesh."""
    count = jax.process_count()
    used = {0} if mesh is None else {device.process_index for device in mesh.devices.flat}
    if len(used) < count:
        raise ConfigError(
            "the mesh leaves processes of the run without work",
            {
                "processes": count,
                "devices": f"{jax.device_count()}, {jax.local_device_count()} of each process",
                "mesh": ", ".join(f"{axis} {getattr(config, axis, 1)}" for axis in AXES),
            },
            f"let the mesh use all devices, for instance mesh.data: {jax.device_count()}, or start fewer processes",
        )


def parameter_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a parameter of this name (`groups/0/blocks/0/attention/q`, `embed`), or of an optimizer
    moment of it.

    Repeats that do not divide by the axis `block` lie everywhere along it; a step has them filled up.
    """
    stacked = name.startswith("groups/")
    axes = _axes(mesh, name, shape[1:] if stacked else shape)
    repeats = ["block" if shape[0] % mesh.shape["block"] == 0 else None] if stacked else []
    return NamedSharding(mesh, PartitionSpec(*repeats, *axes))


def gathered_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the sharding of a parameter while it is used: gathered along `fsdp`, so that weights travel and
    activations do not.

    Args:
        shape: without the repeats.
    """
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in _axes(mesh, name, shape)))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of `[B, T]` arrays."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def put(value: Any, sharding: NamedSharding | None) -> jax.Array:
    """A host value, the same in every process, on the devices, each of which is given its own part alone."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def rows_held(mesh: Mesh | None, batch_rows: int) -> tuple[int, ...]:
    """The places in a global batch whose rows this process's devices need, ascending."""
    if mesh is None or not mesh.is_multi_process:
        return tuple(range(batch_rows))
    found: set[int] = set()
    for index in rows_sharding(mesh).addressable_devices_indices_map((batch_rows, 1)).values():
        found.update(range(*(index or (slice(None),))[0].indices(batch_rows)))
    return tuple(sorted(found))


def box_of(index: tuple[slice, ...] | None, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return a device's part of an array of this shape, with starts and stops as numbers."""
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index or (), shape, strict=True))


def _axes(mesh: Mesh, name: str, inner: Sequence[int]) -> list[str | None]:
    """The mesh axis of every axis of a parameter, without its repeats."""
    found = [suffix for suffix in RULES if name == suffix or name.endswith("/" + suffix)]
    rule: tuple[str | None, ...] = RULES[found[0]] if found else ()
    if found and len(inner) > len(rule):
        rule = EXPERT_RULES.get(found[0], ())
    return [_fitting(mesh, axis, size) for axis, size in zip(rule, inner, strict=False)]


def _fitting(mesh: Mesh, axis: str | None, size: int) -> str | None:
    return axis if axis is not None and size % mesh.shape[axis] == 0 and mesh.shape[axis] > 1 else None
