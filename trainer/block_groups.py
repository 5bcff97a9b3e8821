"""A source for each group of devices along the mesh axis `block`: each reads the slots of its own blocks only.

A group's taps are a stack of their own; the stacks lie side by side on a leading axis, `[groups, S, B, T, W]`, of which
each device gets its group's part. S is the longest stack's; shorter ones are filled up with zeros that nobody decodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.config import ModelConfig
from trainer.sharding import rows_sharding, taps_sharding
from trainer.source import Batch, Source, SplitName


class GroupedSource:
    """Several sources of the same rows as one: what `make_feed` needs. Taps come as lists, one entry a group."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.url = sources[0].url
        self.split: SplitName | None = sources[0].split

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        batches = [source[indices] for source in self.sources]
        taps = {
            name: {part: [batch[name][part] for batch in batches] for part in value}
            for name, value in batches[0].items()
            if isinstance(value, Mapping)
        }
        return {**batches[0], **taps}


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


def place_batch(batch: Batch, mesh: Mesh | None, blocks: int) -> Batch:
    """A host batch on its way to the devices. Of a tap in groups, each device is given its group's part alone."""
    if mesh is None:
        return jax.device_put(batch)
    rows, taps = rows_sharding(mesh), taps_sharding(mesh, blocks)

    def put(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return jax.device_put(value, rows)
        return {
            part: _assemble(x, taps) if isinstance(x, list) else jax.device_put(x, taps) for part, x in value.items()
        }

    return {name: put(value) for name, value in batch.items()}


def _assemble(stacks: Sequence[Any], sharding: jax.sharding.NamedSharding) -> jax.Array:
    slots = max(stack.shape[0] for stack in stacks)
    shape = (len(stacks), slots, *stacks[0].shape[1:])

    def part(index: Any) -> np.ndarray:
        found = [np.asarray(stacks[group])[:, *index[2:]] for group in range(*index[0].indices(len(stacks)))]
        short = [[(0, slots - len(stack))] + [(0, 0)] * (stack.ndim - 1) for stack in found]
        return np.stack([np.pad(stack, width) for stack, width in zip(found, short, strict=True)])

    return jax.make_array_from_callback(shape, sharding, part)
