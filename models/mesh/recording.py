"""The mesh on which a teacher runs, and the distribution of its recordings over that mesh.

The teacher works on rows cut over `data` and `fsdp`, and the devices along `tensor` and `expert` hold copies of the
stream. Each of these copies records other rows (or, where there are too few, other tokens of them): a cut that needs no
exchange, since every device takes a part of what it has. Devices are in the order of their processes (sharding.py), so
each process ends up with consecutive whole rows of the batch, whatever the mesh.

Weights travel (`fsdp`), and sums of partial products do (`tensor`, `expert`); nothing recorded ever does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillcache.models.mesh.ambient import ROW_AXES
from distillcache.models.mesh.sharding import box_of, gathered_spec, rows_sharding
from distillcache.schemas.errors import ConfigError

TEACHER_AXES = (*ROW_AXES, "tensor", "expert")  # from the outermost to the innermost, as the mesh has them


@dataclass(frozen=True)
class RecordingMesh:
    """mesh: of the devices. row_axes: those over which recorded rows are cut. token_axes: recorded tokens."""

    mesh: Mesh
    row_axes: tuple[str, ...]
    token_axes: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh, batch_rows: int, row_tokens: int) -> "RecordingMesh":
        """The finest cut of rows that these fit into; the axes that are left cut tokens, if these do.

        The program depends on the mesh and on the batch's shape, never on the number of processes.

        Raises:
            ConfigError: the rows cannot be dealt out over `data` and `fsdp`.
        """
        for count in range(len(TEACHER_AXES), len(ROW_AXES) - 1, -1):
            rows, left = TEACHER_AXES[:count], TEACHER_AXES[count:]
            if batch_rows % _size(mesh, rows) == 0:
                return cls(mesh, rows, left if row_tokens % _size(mesh, left) == 0 else ())
        parts = _size(mesh, ROW_AXES)
        raise ConfigError(
            "the rows of a teacher call cannot be distributed evenly",
            {"batch_rows": batch_rows, "mesh.data * mesh.fsdp": parts},
            f"make batch_rows a multiple of {parts}",
        )

    @property
    def row_cuts(self) -> int:
        """Into how many parts recorded rows are cut."""
        return _size(self.mesh, self.row_axes)

    def stream(self, x: jax.Array) -> jax.Array:
        """`[B, ...]` of the teacher's own work."""
        return jax.lax.with_sharding_constraint(x, rows_sharding(self.mesh))

    def own(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` of the teacher's own work, for recording: XLA must not cut the work itself like this, since it
        would then have to gather weights, or the stream, along `tensor`."""
        return self.values(self.stream(x))

    def values(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` of what is recorded, or of a codec's carry."""
        return self._place(x, self.row_axes, self.token_axes)

    def stacks(self, x: jax.Array) -> jax.Array:
        """`[B, S, T, W]` of codes."""
        return self._place(x, self.row_axes, None, self.token_axes)

    def sums(self, x: Any) -> jax.Array:
        """`[B, S]` of statistics."""
        return self._place(x, self.row_axes)

    def gathered(self, parameters: Any) -> Any:
        """A state of parameters as they lie while they are used; stacks, of which a slice is used at a time, stay."""
        return nnx.from_flat_state([(path, self._gather(path, value)) for path, value in nnx.to_flat_state(parameters)])

    def of_blocks(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of the scan over blocks, with the stream and the parameters of each block in their places."""

        def placed(state: tuple[Any, Any], step: tuple[Any, Any]) -> Any:
            (x, carry), (parameters, first) = state, step
            (x, carry), found = body((self.stream(x), carry), (self.gathered(parameters), first))
            return (self.stream(x), carry), found

        return placed

    def _gather(self, path: tuple[Any, ...], value: Any) -> Any:
        name = "/".join(map(str, path))
        if name.startswith("groups/"):
            return value
        array = value.get_value()
        spec = gathered_spec(self.mesh, name, array.shape)
        return value.replace(jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec)))

    def _place(self, x: jax.Array, *axes: tuple[str, ...] | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


def own_part(value: Any) -> np.ndarray:
    """The rows of `[B, ...]` that this process's devices hold, in one array on the host.

    They are whole and consecutive where `value` was recorded on a mesh; of one process they are all.
    """
    if value.is_fully_addressable:
        return np.asarray(value)
    shards = {str(shard.index): shard for shard in value.addressable_shards}.values()  # copies once
    boxes = [box_of(shard.index, value.shape) for shard in shards]
    first, last = min(box[0].start for box in boxes), max(box[0].stop for box in boxes)
    out = np.empty((last - first, *value.shape[1:]), value.dtype)
    for shard in shards:
        shard.data.copy_to_host_async()
    for box, shard in zip(boxes, shards, strict=True):
        out[slice(box[0].start - first, box[0].stop - first), *box[1:]] = np.asarray(shard.data)
    return out


def mesh_sizes(mesh: Mesh | None) -> tuple[int, ...]:
    """As a plan pins them: along data, fsdp, tensor and expert; (1,) without a mesh."""
    return (1,) if mesh is None else tuple(mesh.shape[axis] for axis in TEACHER_AXES)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return prod(mesh.shape[axis] for axis in axes)
