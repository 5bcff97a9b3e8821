"""A source for each group of devices along the mesh axis `block`: each reads only the slots of its own blocks.

A group's taps are a stack of their own; the stacks lie side by side on a leading axis, `[groups, S, B, T, W]`, of which
each device gets its group's part. S is the longest stack's; shorter ones are filled up with zeros that nobody decodes.
A process reads the stacks of its own devices' groups, and of each global batch the rows that they need.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distillcache.models.config import ModelConfig
from distillcache.trainer.feed.source import Batch, Rows, Source, SplitName
from distillcache.trainer.mesh.sharding import rows_sharding, taps_sharding


@dataclass(frozen=True, eq=False)
class Stacks:
    """A tap's part for the groups that this process feeds: group -> `[S', B, T, W]`, S' at most `slots`.

    groups: how many there are in all; slots: the longest stack's of all.
    """

    of_group: Mapping[int, np.ndarray]
    groups: int
    slots: int


class GroupedSource:
    """Several sources of the same rows as one, for `make_feed`. Taps come as `Stacks`."""

    def __init__(self, sources: Sequence[Source], held: Sequence[int]) -> None:
        """
        Args:
            sources: one for each group.
            held: the groups to read for.
        """
        self.sources, self._held = tuple(sources), tuple(held)
        self.url = sources[0].url
        self.split: SplitName | None = sources[0].split

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        batches = {group: self.sources[group][indices] for group in self._held}
        first = batches[self._held[0]]
        taps = {
            name: {
                part: Stacks(
                    {g: batch[name][part] for g, batch in batches.items()}, len(self.sources), self._slots(name, part)
                )
                for part in value
            }
            for name, value in first.items()
            if isinstance(value, Mapping)
        }
        return {**first, **taps}

    def _slots(self, tap: str, part: str) -> int:
        return max(
            source.reads[tap].size(plan)
            for source in self.sources
            for plan in source.taps[tap].parts
            if plan.part == part
        )


class HeldRows:
    """The rows at these positions of every requested batch alone: the share that one of several processes reads."""

    def __init__(self, source: Rows, places: Sequence[int]) -> None:
        self._source, self._places = source, tuple(places)
        self.url = source.url
        self.split: SplitName | None = source.split

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self._source[[indices[place] for place in self._places]]


def blocks_of_groups(student: ModelConfig, groups: int) -> list[list[int]]:
    """The student blocks of each group of devices: a run of every layer group's repeats, as the parameters are cut."""
    found: list[list[int]] = [[] for _ in range(groups)]
    start = 0
    for layers in student.layers:
        size, share = len(layers.pattern), -(-layers.repeats // groups)
        for repeat in range(layers.repeats):
            found[repeat // share].extend(range(start + repeat * size, start + (repeat + 1) * size))
        start += size * layers.repeats
    return found


def place_batch(batch: Batch, mesh: Mesh | None, blocks: int, places: Sequence[int], batch_rows: int) -> Batch:
    """A host batch on its way to the devices. Of a tap in groups, each device is given its group's part alone.

    Args:
        places: of the rows in the global batch, ascending, where the host batch has only some.
        batch_rows: of the global batch.
    """
    if mesh is None:
        return jax.device_put(batch)
    rows, taps = rows_sharding(mesh), taps_sharding(mesh, blocks)
    if len(places) == batch_rows:
        batch_rows = len(batch["positions"])
        places = range(batch_rows)

    def put(value: Any, axis: int, sharding: NamedSharding) -> jax.Array:
        if isinstance(value, Stacks):
            return _assemble(value, sharding, places, batch_rows)
        if len(places) == batch_rows and sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        shape = (*value.shape[:axis], batch_rows, *value.shape[axis + 1 :])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: value[_local(index or (), axis, places, batch_rows)]
        )

    return {
        name: {part: put(x, 1, taps) for part, x in value.items()}
        if isinstance(value, Mapping)
        else put(value, 0, rows)
        for name, value in batch.items()
    }


def _assemble(stacks: Stacks, sharding: NamedSharding, places: Sequence[int], batch_rows: int) -> jax.Array:
    anyone = next(iter(stacks.of_group.values()))
    shape = (stacks.groups, stacks.slots, batch_rows, *anyone.shape[2:])

    def part(index: Any) -> np.ndarray:
        inner = _local(index[1:], 1, places, batch_rows)
        found = [np.asarray(stacks.of_group[group])[:, *inner[1:]] for group in range(*index[0].indices(stacks.groups))]
        short = [[(0, stacks.slots - len(stack))] + [(0, 0)] * (stack.ndim - 1) for stack in found]
        return np.stack([np.pad(stack, width) for stack, width in zip(found, short, strict=True)])

    return jax.make_array_from_callback(shape, sharding, part)


def _local(index: tuple[slice, ...], axis: int, places: Sequence[int], batch_rows: int) -> tuple[slice, ...]:
    """A box of the global batch as one of the host batch, which has only the rows at `places`."""
    start, stop, _ = index[axis].indices(batch_rows)
    first = bisect_left(places, start)
    return (*index[:axis], slice(first, first + stop - start), *index[axis + 1 :])
