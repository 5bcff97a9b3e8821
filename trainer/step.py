"""The training step: what it changes, and the jitted function that changes it, on one device or on a mesh.

A step is `(state, frozen, batch, table) -> (state, sums)`; the state's memory is given away. With a mesh axis `block`
each group of devices holds a run of every layer group's repeats (padded to equal lengths with blocks that are not
trained) and works on them alone: `shard_map` over `block` around the whole step, and no collective along it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from trainer.blockwise import BlockSums, BlockwiseStep, StepSums
from trainer.optimizer import init_blocks
from trainer.parameters import Parameters, of_place, outer, place_prefix
from trainer.sharding import state_shardings
from trainer.stack import StudentStack
from trainer.tables import Table

OUTER = "outer"  # the optimizer's unit of what belongs to no block
StepFunction = Callable[["TrainState", Parameters, Mapping[str, Any], Table], tuple["TrainState", Any]]


class TrainState(NamedTuple):
    """What a step changes; as a tree of shardings, where it lies.

    moments: the optimizer's state by unit: `groups/<g>/blocks/<p>/`, stacked, and `outer`.
    step: how many were done in this stage, int32 `[]`.
    """

    parameters: Any
    moments: Any
    step: Any


class Update(Protocol):
    """A step on one device, or on one group of them."""

    def __call__(
        self, state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table
    ) -> tuple[TrainState, Any]: ...


def init_state(stack: StudentStack, trained: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of a stage."""
    moments = {place_prefix(place): init_blocks(optimizer, of_place(trained, place)) for place in stack.places()}
    if rest := outer(trained):
        moments[OUTER] = optimizer.init(rest)
    return TrainState(trained, moments, jnp.zeros((), jnp.int32))


def blockwise_update(step: BlockwiseStep) -> Update:
    """The blockwise step on a state."""

    def update(
        state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table
    ) -> tuple[TrainState, StepSums]:
        moments = {place: state.moments[place_prefix(place)] for place in step.stack.places()}
        parameters, moments, sums, tokens = step.update(state.parameters, moments, frozen, batch, table, state.step)
        groups = [range(len(layers.pattern)) for layers in step.stack.config.layers]
        arranged = tuple(
            jax.tree.map(lambda *of_places: jnp.stack(of_places, 1), *(sums[g, p] for p in places))
            for g, places in enumerate(groups)
        )
        named = {place_prefix(place): value for place, value in moments.items()}
        return TrainState(parameters, named, state.step + 1), StepSums(arranged, tokens, step.weights(state.step))

    return update


def jit_step(update: Update, state: TrainState, mesh: Mesh | None, blocks: int = 1) -> StepFunction:
    """The compiled step.

    Args:
        state: of the shapes that it will be called with.
        blocks: size of the mesh axis `block`.
    """
    if mesh is None:
        return jax.jit(update, donate_argnums=0)
    parameters, moments = state_shardings(mesh, state.parameters, state.moments)
    everywhere = jax.sharding.NamedSharding(mesh, PartitionSpec())
    out = (TrainState(parameters, moments, everywhere), None)
    whole = over_blocks(update, mesh) if blocks > 1 else update
    return jax.jit(whole, donate_argnums=0, out_shardings=out)


def over_blocks(update: Update, mesh: Mesh) -> Update:
    """The same step, each group of devices on its own blocks; taps come as `[groups, S, B, T, W]`."""

    def local(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table) -> Any:
        own = {name: {part: x[0] for part, x in value.items()} if isinstance(value, Mapping) else value
               for name, value in batch.items()}  # fmt: skip
        return update(state, frozen, own, table)

    def apply(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table) -> Any:
        split, same = PartitionSpec("block"), PartitionSpec()
        states = TrainState(*(split, split, same))
        rows = {name: split if isinstance(value, Mapping) else same for name, value in batch.items()}
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(states, split, rows, split),
            out_specs=(states, StepSums(split, same, same)),  # type: ignore[arg-type]
            axis_names={"block"},
            check_vma=False,  # nothing is exchanged, so there is nothing whose sameness could be checked
        )(state, frozen, batch, table)

    return apply


def padded(tree: Any, stack: StudentStack, groups: int) -> Any:
    """`tree` of stacked leaves, keyed by names that begin with a place's prefix, with repeats filled up to a multiple
    of `groups`: the last block again, which is never trained there."""
    return _by_place(tree, stack, lambda leaf, repeats: _filled(leaf, -(-repeats // groups) * groups))


def unpadded(tree: Any, stack: StudentStack) -> Any:
    """The reverse."""
    return _by_place(tree, stack, lambda leaf, repeats: leaf[:repeats])


def padded_table(table: Table, groups: int) -> Table:
    """A table filled up alike, with rows that are not trained."""

    def fill(name: str, rows: np.ndarray) -> np.ndarray:
        missing = -rows.shape[0] % groups
        filled = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        if name == "trained" and missing:
            filled[-missing:] = False
        return filled

    return tuple({name: fill(name, rows) for name, rows in group.items()} for group in table)


def block_sums(sums: StepSums, stack: StudentStack) -> dict[str, np.ndarray]:
    """A step's sums by name, float64 `[L]`, on the host."""
    layers = stack.config.layers
    return {
        name: np.concatenate(
            [
                np.asarray(getattr(group, name), np.float64)[: layer.repeats].reshape(-1)
                for group, layer in zip(sums.blocks, layers, strict=True)
            ]
        )
        for name in BlockSums._fields
    }


def _filled(leaf: Array, repeats: int) -> Array:
    missing = repeats - leaf.shape[0]
    return jnp.concatenate([leaf, *[leaf[-1:]] * missing]) if missing else leaf


def _by_place(tree: Any, stack: StudentStack, change: Callable[[Array, int], Array]) -> Any:
    sizes = {place_prefix(place): repeats for place, repeats in stack.places().items()}

    def one(name: str, value: Any) -> Any:
        repeats = next((size for prefix, size in sizes.items() if name.startswith(prefix)), None)
        return value if repeats is None else jax.tree.map(lambda leaf: change(leaf, repeats), value)

    return {name: one(name, value) for name, value in tree.items()}
