"""A student's parameters on the hosts of a mesh: each process keeps the shards of its own devices.

Where all devices are this process's, an array is kept whole, as a NumPy array. Evaluation alone gathers the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distillcache.models.mesh.sharding import box_of, parameter_sharding
from distillcache.schemas.format.checkpoint import ArrayInfo, Box, Held
from distillcache.trainer.mesh.placement import put, to_host


@dataclass(frozen=True, eq=False)
class HostShards:
    """This process's part of an array.

    boxes: what its devices hold, each once; values: of each; written: which of them no other process writes.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding
    boxes: tuple[Box, ...]
    values: tuple[np.ndarray, ...]
    written: tuple[bool, ...]

    @classmethod
    def of(cls, value: jax.Array) -> "HostShards":
        """A copy of this process's shards of a global array."""
        found: dict[str, tuple[Box, np.ndarray, bool]] = {}
        for shard in value.addressable_shards:
            box, first = box_of(shard.index, value.shape), shard.replica_id == 0
            if first or str(box) not in found:
                found[str(box)] = (box, np.array(shard.data), first)
        boxes, values, written = zip(*found.values(), strict=True)
        if not isinstance(value.sharding, NamedSharding):
            raise TypeError(f"an array of several processes without a mesh: {value.sharding}")
        return cls(value.shape, value.sharding, boxes, values, written)

    def placed(self) -> jax.Array:
        """The array on its devices again, a copy."""
        at = dict(zip(map(str, self.boxes), self.values, strict=True))
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: at[str(box_of(index, self.shape))])

    def read(self, boxes: Callable[[Sequence[Box]], Sequence[np.ndarray]]) -> "HostShards":
        """Other values of the same parts."""
        return replace(self, values=tuple(boxes(self.boxes)))

    def held(self) -> Held:
        """Return the part of the array that this process writes."""
        parts = zip(self.boxes, self.values, self.written, strict=True)
        mine = tuple((tuple(axis.start for axis in box), value) for box, value, own in parts if own)
        return Held(ArrayInfo(dtype=str(self.values[0].dtype), shape=self.shape), mine)


Kept = np.ndarray | HostShards


def kept(value: jax.Array) -> Kept:
    """Return the part of an array that this process keeps on the host."""
    return np.asarray(value) if value.is_fully_addressable else HostShards.of(value)


def kept_rows(name: str, value: jax.Array, rows: int) -> Kept:
    """The same of a parameter's first `rows` repeats, without those that fill a mesh up; all processes call this."""
    if value.is_fully_addressable:
        return np.asarray(value)[:rows]
    if value.shape[0] == rows:
        return HostShards.of(value)
    mesh = cast("Mesh", getattr(value.sharding, "mesh"))  # noqa: B009 - of a NamedSharding, as all of these are
    where = parameter_sharding(mesh, name, (rows, *value.shape[1:]))
    return HostShards.of(jax.jit(lambda x: x[:rows], out_shardings=where)(value))


def on_devices(value: Any) -> Any:
    """A kept array as a step computes with it: on the mesh, or, whole, as it is."""
    return value.placed() if isinstance(value, HostShards) else value


def moved(value: Any, sharding: NamedSharding) -> jax.Array:
    """A value on the devices, in this place."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return put(value, sharding)
    return value if value.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(value)


def gathered(parameters: Mapping[str, Kept]) -> dict[str, Any]:
    """Gather every array in every process; all processes must call this at the same time."""
    return {name: to_host(on_devices(value)) for name, value in parameters.items()}
