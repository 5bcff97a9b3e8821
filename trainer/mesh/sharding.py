"""Sharding of a step's state and batches, besides the rules that teachers and students share (models/mesh/sharding.py).

XLA derives the collectives along all axes but `block`, over which the step is a `shard_map` without any
(step/program.py).
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillcache.models.mesh.ambient import ROW_AXES
from distillcache.models.mesh.sharding import check_processes as check_processes
from distillcache.models.mesh.sharding import make_mesh as make_mesh
from distillcache.models.mesh.sharding import parameter_sharding as parameter_sharding
from distillcache.models.mesh.sharding import rows_sharding as rows_sharding
from distillcache.schemas.config.train import MeshConfig
from distillcache.schemas.errors import ConfigError


def check_rows(config: MeshConfig, rows: int, name: str) -> None:
    """Raise `ConfigError` unless these rows can be dealt out evenly."""
    parts = config.data * config.fsdp
    if rows % parts:
        raise ConfigError(
            "the rows of a batch cannot be distributed evenly",
            {name: rows, "mesh.data * mesh.fsdp": parts},
            f"make {name} a multiple of {parts}",
        )


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


def taps_sharding(mesh: Mesh, blocks: int) -> NamedSharding:
    """Return the sharding of a tap's part: `[S, B, T, W]`, or with a mesh axis `block` `[groups, S, B, T, W]`."""
    return NamedSharding(mesh, PartitionSpec(*(["block"] if blocks > 1 else []), None, ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a table's rows `[repeats, places, ...]`."""
    return NamedSharding(mesh, PartitionSpec("block"))
