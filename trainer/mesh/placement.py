"""Transfers between a process's memory and the devices of a mesh, some of which belong to other processes.

On the way there every device is given its own part alone; on the way back a value is gathered only if it is requested
as a whole (metrics, evaluation), and a checkpoint takes what each process holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from distillcache.models.mesh.sharding import box_of
from distillcache.models.mesh.sharding import put as put
from distillcache.models.mesh.sharding import rows_held as rows_held
from distillcache.schemas.format.checkpoint import ArrayInfo, Box, Held

ReadBox = Callable[[tuple[Box, ...]], list[np.ndarray]]  # boxes of one array


def to_host(tree: Any) -> Any:
    """Gather every array as NumPy; if processes hold shards, all of them must call this at the same time."""
    return jax.tree.map(_whole, tree)


def _whole(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def held(value: jax.Array, rows: int | None) -> Held:
    """Return the part of an array that this process writes, copied to the host.

    Args:
        rows: how many of its first axis count (the others fill a mesh up); None: all.
    """
    shape = value.shape if rows is None else (rows, *value.shape[1:])
    boxes = []
    for shard in value.addressable_shards:
        if shard.replica_id:  # the same numbers as another device's
            continue
        start = tuple(axis.indices(size)[0] for axis, size in zip(shard.index, value.shape, strict=True))
        data = np.asarray(shard.data)
        if rows is not None:
            data = data[: max(0, rows - start[0])]
        if data.size:
            boxes.append((start, np.array(data)))  # a copy: a step gives the array's memory away
    return Held(ArrayInfo(dtype=str(value.dtype), shape=shape), tuple(boxes))


def restored(like: jax.Array, rows: int | None, read: ReadBox) -> jax.Array:
    """An array that lies like `like`, read from a checkpoint by the parts that this process's devices hold.

    Args:
        rows: how many of its first axis are stored; the last of them fills up the others.
    """
    shape = like.shape
    wanted = {}  # by its spelling: slices cannot be keys
    for index in like.sharding.addressable_devices_indices_map(shape).values():
        box = _stored(box_of(index, shape), rows)
        wanted[str(box)] = box
    values = dict(zip(wanted, read(tuple(wanted.values())), strict=True))

    def fill(index: tuple[slice, ...] | None) -> np.ndarray:
        box = box_of(index, shape)
        found = values[str(_stored(box, rows))]
        missing = (box[0].stop - box[0].start - found.shape[0]) if box else 0
        return np.concatenate([found, *[found[-1:]] * missing]) if missing else found

    return jax.make_array_from_callback(shape, like.sharding, fill)


def _stored(box: Box, rows: int | None) -> Box:
    """The box without the rows that are not stored; at least the last that is."""
    if rows is None:
        return box
    first, *others = box
    return (slice(min(first.start, rows - 1), min(first.stop, rows)), *others)


def groups_held(mesh: Mesh | None) -> tuple[int, ...]:
    """The places along the mesh axis `block` at which this process has devices."""
    if mesh is None:
        return (0,)
    here = jax.process_index()
    return tuple(at for at, group in enumerate(mesh.devices) if any(d.process_index == here for d in group.flat))
