"""Where a step's state and batches lie on a mesh, beside what teachers and students share (models/sharding.py).

XLA derives the collectives along all axes but `block`, over which the step is a `shard_map` without any (step.py).
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.ambient_mesh import ROW_AXES
from models.sharding import check_processes as check_processes
from models.sharding import make_mesh as make_mesh
from models.sharding import parameter_sharding as parameter_sharding
from models.sharding import rows_sharding as rows_sharding
from schemas.errors import ConfigError
from schemas.train_config import MeshConfig


def check_rows(config: MeshConfig, rows: int, name: str) -> None:
    """Raise `ConfigError` unless these rows can be dealt out evenly."""
    parts = config.data * config.fsdp
    if rows % parts:
        raise ConfigError(
            "the rows of a batch cannot be dealt out evenly",
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
    """Of a tap's part: `[S, B, T, W]`, or with a mesh axis `block` `[groups, S, B, T, W]`."""
    return NamedSharding(mesh, PartitionSpec(*(["block"] if blocks > 1 else []), None, ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def table_sharding(mesh: Mesh) -> NamedSharding:
    """Of a table's rows `[repeats, places, ...]`."""
    return NamedSharding(mesh, PartitionSpec("block"))
