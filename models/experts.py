"""A mixture's experts applied to their tokens: gated MLPs, `down(act(gate(x)) * up(x))`, weighted and summed.

No token is ever dropped. Two ways, the same numbers to rounding:

- `ragged`: assignments sorted by expert, then `jax.lax.ragged_dot`, which TPUs and GPUs run natively.
- `dense`: every expert on every token, one expert after the other, most of it multiplied by zero. XLA on CPU expands
  `ragged_dot` to the same work and more memory.

`auto` is `dense` on CPUs and `ragged` elsewhere.

On a mesh (the ambient one) every device works on its own rows, so nothing is sorted across devices; along the axis
`expert` each holds its own experts and all of these rows, and what they add is summed over the axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

EXPERT_AXIS = "expert"
ROW_AXES = ("data", "fsdp")  # the mesh axes over which a batch's rows are cut
Activation = Callable[[Array], Array]


class Experts(NamedTuple):
    """gate, up: `[E, D, F]`; down: `[E, F, D]`."""

    gate: Array
    up: Array
    down: Array


def apply_experts(
    experts: Experts,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    activation: Activation,
    *,
    way: str = "auto",
    weighs_input: bool = False,
) -> Float[Array, "B T D"]:
    """The weighted sum of each token's experts.

    Args:
        weights: multiply an expert's output, or with `weighs_input` its input; float32, rounded to the dtype of `x`
            where they multiply it.
        way: `auto`, `dense` or `ragged`.
    """
    way = ("dense" if jax.default_backend() == "cpu" else "ragged") if way == "auto" else way
    run = {"dense": _dense, "ragged": _ragged}[way]

    def local(mine: Experts, x: Array, ids: Array, weights: Array, first: Array | int = 0) -> Array:
        tokens, chosen, shares = (value.reshape(-1, value.shape[-1]) for value in (x, ids - first, weights))
        return run(mine, tokens, chosen, shares, activation, weighs_input).reshape(x.shape)

    sizes = _splitting_axes()
    by_expert = experts.gate.shape[0] % sizes.get(EXPERT_AXIS, 1) == 0 and EXPERT_AXIS in sizes
    rows = tuple(axis for axis in ROW_AXES if axis in sizes)
    if not (by_expert or rows):
        return local(experts, x, ids, weights)

    def on_device(mine: Experts, x: Array, ids: Array, weights: Array) -> Array:
        if not by_expert:
            return local(mine, x, ids, weights)
        first = jax.lax.axis_index(EXPERT_AXIS) * mine.gate.shape[0]
        return jax.lax.psum(local(mine, x, ids, weights, first), EXPERT_AXIS)

    of_experts = PartitionSpec(EXPERT_AXIS) if by_expert else PartitionSpec()
    of_rows = PartitionSpec(rows)
    return jax.shard_map(
        on_device,
        in_specs=(Experts(of_experts, of_experts, of_experts), of_rows, of_rows, of_rows),  # type: ignore[arg-type]
        out_specs=of_rows,
        axis_names={*rows, *([EXPERT_AXIS] if by_expert else [])},
        check_vma=False,  # scans begin with zeros that are the same everywhere
    )(experts, x, ids, weights)


def _splitting_axes() -> dict[str, int]:
    """The axes of the ambient mesh that split something here, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        axis: size
        for axis, size in dict(mesh.shape).items()
        if size > 1 and axis in (*ROW_AXES, EXPERT_AXIS) and kinds[axis] != AxisType.Manual
    }


def _dense(experts: Experts, x: Array, ids: Array, weights: Array, activation: Activation, weighs_input: bool) -> Array:
    """One expert after the other; what one computed is not kept for the backward pass, but computed again."""

    @jax.checkpoint
    def one(total: Array, step: tuple[Experts, Array]) -> tuple[Array, None]:
        mine, number = step
        share = jnp.sum(jnp.where(ids == number, weights, 0.0), axis=-1, keepdims=True).astype(x.dtype)
        given = x * share if weighs_input else x
        out = (activation(given @ mine.gate) * (given @ mine.up)) @ mine.down
        return total + (out if weighs_input else out * share), None

    return jax.lax.scan(one, jnp.zeros_like(x), (experts, jnp.arange(experts.gate.shape[0])))[0]


def _ragged(
    experts: Experts, x: Array, ids: Array, weights: Array, activation: Activation, weighs_input: bool
) -> Array:
    """Assignments sorted by expert; those of experts that are not here come last and count nothing."""
    count, top_k = experts.gate.shape[0], ids.shape[-1]
    here = (ids >= 0) & (ids < count)
    flat = jnp.where(here, ids, count).reshape(-1)
    share = jnp.where(here, weights, 0.0).reshape(-1, 1).astype(x.dtype)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)
    inside = (jnp.arange(flat.shape[0]) < jnp.sum(sizes))[:, None]
    # ragged_dot leaves open what it computes beyond the groups, forward and backward: both are cut off by `where`.
    given, share = jnp.where(inside, x[order // top_k], 0), share[order]
    if weighs_input:
        given = given * share
    hidden = activation(jax.lax.ragged_dot(given, experts.gate, sizes)) * jax.lax.ragged_dot(given, experts.up, sizes)
    out = jax.lax.ragged_dot(hidden, experts.down, sizes)
    out = jnp.where(inside, out if weighs_input else out * share, 0)
    back = jnp.argsort(order)  # a gather, not a scatter: the sum's order is fixed
    return jnp.sum(out[back].reshape(*ids.shape, -1), axis=1)
