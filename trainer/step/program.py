"""The training step: what it changes, and the jitted function that changes it, on one device or on a mesh.

A step is `(state, frozen, batch, table) -> (state, sums)`; the state's memory is given away. With a mesh axis `block`
each group of devices holds a run of every layer group's repeats (padded to equal lengths with blocks that are not
trained) and works on them alone: `shard_map` over `block` around the whole step, and no collective along it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from distillcache.models.routing import BalanceState
from distillcache.trainer.mesh.sharding import state_shardings
from distillcache.trainer.step.balance import BlockRouting, biases
from distillcache.trainer.step.blockwise import BlockwiseStep, StepSums
from distillcache.trainer.step.optimizer import PROGRAMS, init_blocks
from distillcache.trainer.step.parameters import Parameters, of_place, outer, place_prefix
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import Table

OUTER = "outer"  # the optimizer's unit of what belongs to no block
StepFunction = Callable[["TrainState", Parameters, Mapping[str, Any], Table], tuple["TrainState", Any]]


class TrainState(NamedTuple):
    """The state that a step changes; as a tree of shardings, its placement.

    moments: the optimizer's state by unit: `groups/<g>/blocks/<p>/`, stacked, and `outer`.
    step: how many were done in this stage, int32 `[]`.
    balance: biases of routers that move, by unit, `[repeats, groups, E]` (balance.py).
    """

    parameters: Any
    moments: Any
    step: Any
    balance: Any


class Update(Protocol):
    """A step on one device, or on one group of them."""

    def __call__(
        self, state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table
    ) -> tuple[TrainState, Any]: ...


def init_state(
    stack: StudentStack,
    trained: Parameters,
    optimizer: optax.GradientTransformation,
    balance: Mapping[str, BalanceState] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step of a stage; with a mesh, the parameters are on it already."""
    return TrainState(
        trained, _init_moments(stack, trained, optimizer, mesh), jnp.zeros((), jnp.int32), dict(balance or {})
    )


def _init_moments(
    stack: StudentStack, trained: Parameters, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> dict[str, Any]:
    """The optimizer's state, lying as the parameters do."""

    def init(parameters: Parameters) -> dict[str, Any]:
        moments = {place_prefix(place): init_blocks(optimizer, of_place(parameters, place)) for place in stack.places()}
        if rest := outer(parameters):
            moments[OUTER] = optimizer.init(rest)
        return moments

    if mesh is None:
        return init(trained)
    _, shardings = state_shardings(mesh, trained, jax.eval_shape(init, trained))
    return jax.jit(init, out_shardings=shardings)(trained)


@lru_cache(maxsize=PROGRAMS)
def blockwise_update(step: BlockwiseStep) -> Update:
    """The blockwise step on a state."""

    def update(
        state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table
    ) -> tuple[TrainState, StepSums]:
        moments = {place: state.moments[place_prefix(place)] for place in step.stack.places()}
        fixed = {**frozen, **biases(state.balance)}
        parameters, moments, sums, tokens = step.update(state.parameters, moments, fixed, batch, table, state.step)
        groups = [range(len(layers.pattern)) for layers in step.stack.config.layers]
        arranged = tuple(
            jax.tree.map(lambda *of_places: jnp.stack(of_places, 1), *(sums[g, p] for p in places))
            for g, places in enumerate(groups)
        )
        named = {place_prefix(place): value for place, value in moments.items()}
        balance = state.balance
        if step.balancing is not None:
            loads = {place_prefix(place): found.routing.loads for place, found in sums.items() if found.routing}
            balance = step.balancing.after_step(balance, loads, state.step)
        new = TrainState(parameters, named, state.step + 1, balance)
        return new, StepSums(arranged, tokens, step.weights(state.step))

    return update


def jit_step(update: Update, state: TrainState, mesh: Mesh | None, blocks: int = 1) -> StepFunction:
    """The compiled step.

    Args:
        state: of the shapes that it will be called with.
        blocks: size of the mesh axis `block`.
    """
    if mesh is None:
        return jax.jit(update, donate_argnums=0)
    whole = over_blocks(update, mesh) if blocks > 1 else on_mesh(update, mesh)
    return jax.jit(whole, donate_argnums=0, out_shardings=(shardings_of(mesh, state), None))


def shardings_of(mesh: Mesh, state: TrainState) -> Any:
    """Return the shardings of a state."""
    parameters, moments = state_shardings(mesh, state.parameters, state.moments)
    stacked, everywhere = NamedSharding(mesh, PartitionSpec("block")), NamedSharding(mesh, PartitionSpec())
    return TrainState(parameters, moments, everywhere, jax.tree.map(lambda _: stacked, state.balance))


@lru_cache(maxsize=PROGRAMS)
def on_mesh(update: Update, mesh: Mesh) -> Update:
    """The same step with the mesh as the ambient one: experts are split by it (models/layers/experts.py)."""

    def apply(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, frozen, batch, table)

    return apply


@lru_cache(maxsize=PROGRAMS)
def over_blocks(update: Update, mesh: Mesh) -> Update:
    """The same step, each group of devices on its own blocks; taps come as `[groups, S, B, T, W]`."""

    def local(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table) -> Any:
        own = {name: {part: x[0] for part, x in value.items()} if isinstance(value, Mapping) else value
               for name, value in batch.items()}  # fmt: skip
        return update(state, frozen, own, table)

    def apply(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], table: Table) -> Any:
        split, same = PartitionSpec("block"), PartitionSpec()
        states = TrainState(split, split, same, split)
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
    """A table padded with rows that are not trained.

    With several groups there is a column `runs`: whether any of them trains the block of its own that it comes to at
    the same time. Then all of them run theirs, those that do not train it for nothing: a collective inside a branch
    that some devices do not take would wait for them for ever.
    """

    def fill(name: str, rows: np.ndarray) -> np.ndarray:
        missing = -rows.shape[0] % groups
        filled = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        if name == "trained" and missing:
            filled[-missing:] = False
        return filled

    def with_runs(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if groups == 1:
            return group
        trained = group["trained"]
        anywhere = trained.reshape(groups, -1, *trained.shape[1:]).any(axis=0)
        return {**group, "runs": np.tile(anywhere, (groups, *[1] * (trained.ndim - 1)))}

    return tuple(with_runs({name: fill(name, rows) for name, rows in group.items()}) for group in table)


def block_sums(sums: StepSums, stack: StudentStack) -> dict[str, np.ndarray]:
    """A step's sums by name, float64 `[L]`, on the host."""
    return {name: _rows([getattr(group, name) for group in sums.blocks], stack) for name in ("feature", "mlp")}


def block_routing(sums: StepSums, stack: StudentStack) -> BlockRouting | None:
    """Fetch the routing of a step to the host in float64, stacked over the blocks with experts."""
    groups = [group.routing for group in sums.blocks]
    if groups[0] is None:
        return None
    blocks = list(stack.config.moe_blocks)
    return jax.tree.map(lambda *leaves: _rows(leaves, stack)[blocks], *groups)


def _rows(of_groups: Sequence[Any], stack: StudentStack) -> np.ndarray:
    """Values `[repeats, places, ...]` of every layer group, padding left out, as one `[L, ...]`."""
    found = [np.asarray(value, np.float64) for value in of_groups]
    return np.concatenate(
        [
            value[: layer.repeats].reshape(-1, *value.shape[2:])
            for value, layer in zip(found, stack.config.layers, strict=True)
        ]
    )


def _filled(leaf: Array, repeats: int) -> Array:
    missing = repeats - leaf.shape[0]
    return jnp.concatenate([leaf, *[leaf[-1:]] * missing]) if missing else leaf


def _by_place(tree: Any, stack: StudentStack, change: Callable[[Array, int], Array]) -> Any:
    sizes = {place_prefix(place): repeats for place, repeats in stack.places().items()}

    def one(name: str, value: Any) -> Any:
        repeats = next((size for prefix, size in sizes.items() if name.startswith(prefix)), None)
        return value if repeats is None else jax.tree.map(lambda leaf: change(leaf, repeats), value)

    return {name: one(name, value) for name, value in tree.items()}
