"""A mixture's experts applied to their tokens: MLPs, `down(gating(gate(x), up(x)))`, weighted and summed.

No token is ever dropped. Three ways, the same numbers to rounding:

- `ragged`: assignments sorted by expert, then `jax.lax.ragged_dot`, which TPUs and GPUs run natively. XLA on CPU
  expands it to every expert on every assignment, with masks as large.
- `dense`: every expert on every token, one expert after the other, most of it multiplied by zero.
- `tiled`: assignments sorted by expert, each expert's filled up to whole tiles, one tile after the other.

`auto` is `ragged` but on CPUs; there it is `tiled` from 2 k experts on, and `dense` below. CPU time on two cores, over
that of `dense` (forward and backward, float32, 2048 tokens, D = 256, F = 512):

| E, k | 8, 2 | 16, 2 | 64, 2 | 8, 8 | 16, 8 | 64, 8 |
| --- | --- | --- | --- | --- | --- | --- |
| `ragged` | 2.2 | 2.2 | 2.6 | 8.5 | 6.7 | 13.6 |
| `tiled` | 0.35 | 0.21 | 0.09 | 1.45 | 0.72 | 0.22 |

On a mesh (the ambient one) every device works on its own rows, so nothing is sorted across devices; along the axis
`expert` each holds its own experts and all of these rows, and what they add is summed over the axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from distillcache.models.mesh.ambient import EXPERT_AXIS, ROW_AXES, splitting_axes

# Gate and up to an expert's neurons, `act(gate) * up` in most families; where there is no gate, both are up.
Gating = Callable[[Array, Array], Array]
TILE = 64  # assignments that one product takes; each expert's are filled up to a multiple


class Experts(NamedTuple):
    """gate (there may be none), up: `[E, D, F]`; down: `[E, F, D]`; their biases `[E, F]` and `[E, D]`, all or none."""

    gate: Array | None
    up: Array
    down: Array
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


def apply_experts(
    experts: Experts,
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    gating: Gating,
    *,
    way: str = "auto",
    weighs_input: bool = False,
) -> Float[Array, "B T D"]:
    """The weighted sum of each token's experts.

    Args:
        weights: multiply an expert's output, or with `weighs_input` its input; float32, rounded to the dtype of `x`
            where they multiply it.
        way: `auto`, `dense`, `tiled` or `ragged`.
    """
    run = {"dense": _dense, "tiled": _tiled, "ragged": _ragged}[
        _fastest(experts.up.shape[0], ids.shape[-1]) if way == "auto" else way
    ]

    def local(mine: Experts, x: Array, ids: Array, weights: Array, first: Array | int = 0) -> Array:
        tokens, chosen, shares = (value.reshape(-1, value.shape[-1]) for value in (x, ids - first, weights))
        return run(mine, tokens, chosen, shares, gating, weighs_input).reshape(x.shape)

    sizes = splitting_axes((*ROW_AXES, EXPERT_AXIS))
    by_expert = experts.up.shape[0] % sizes.get(EXPERT_AXIS, 1) == 0 and EXPERT_AXIS in sizes
    rows = tuple(axis for axis in ROW_AXES if axis in sizes)
    if not (by_expert or rows):
        return local(experts, x, ids, weights)

    # XLA on CPU aborts the process where a shard_map sums bfloat16 over devices, forward or backward: float32 there.
    dtype, across = x.dtype, jnp.float32 if jax.default_backend() == "cpu" else x.dtype

    def on_device(mine: Experts, x: Array, ids: Array, weights: Array) -> Array:
        mine, x = _cast(mine, dtype), x.astype(dtype)
        if not by_expert:
            return local(mine, x, ids, weights).astype(across)
        first = jax.lax.axis_index(EXPERT_AXIS) * mine.up.shape[0]
        return jax.lax.psum(local(mine, x, ids, weights, first).astype(across), EXPERT_AXIS)

    of_experts = PartitionSpec(EXPERT_AXIS) if by_expert else PartitionSpec()
    of_rows = PartitionSpec(rows)
    out = jax.shard_map(
        on_device,
        in_specs=(of_experts, of_rows, of_rows, of_rows),
        out_specs=of_rows,
        axis_names={*rows, *([EXPERT_AXIS] if by_expert else [])},
        check_vma=False,  # scans begin with zeros that are the same everywhere
    )(_cast(experts, across), x.astype(across), ids, weights)
    return out.astype(dtype)


def _cast(experts: Experts, dtype: Any) -> Experts:
    return jax.tree.map(lambda matrix: matrix.astype(dtype), experts)


def _fastest(num_experts: int, top_k: int) -> str:
    if jax.default_backend() != "cpu":
        return "ragged"
    return "tiled" if num_experts >= 2 * top_k else "dense"


def _dense(experts: Experts, x: Array, ids: Array, weights: Array, gating: Gating, weighs_input: bool) -> Array:
    """One expert after the other; what one computed is not kept for the backward pass, but computed again."""

    @jax.checkpoint
    def one(total: Array, step: tuple[Experts, Array]) -> tuple[Array, None]:
        mine, number = step
        share = jnp.sum(jnp.where(ids == number, weights, 0.0), axis=-1, keepdims=True)
        given = (x * share).astype(x.dtype) if weighs_input else x
        out = _of_expert(gating, mine, given)
        return total + (out if weighs_input else out * share), None

    zeros = jnp.zeros(x.shape, jnp.float32)  # bfloat16 would round once for every expert
    return jax.lax.scan(one, zeros, (experts, jnp.arange(experts.up.shape[0])))[0].astype(x.dtype)


def _ragged(experts: Experts, x: Array, ids: Array, weights: Array, gating: Gating, weighs_input: bool) -> Array:
    """Assignments sorted by expert; those of experts that are not here come last and count nothing."""
    count, top_k = experts.up.shape[0], ids.shape[-1]
    here = (ids >= 0) & (ids < count)
    flat = jnp.where(here, ids, count).reshape(-1)
    share = jnp.where(here, weights, 0.0).reshape(-1, 1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)
    inside = (jnp.arange(flat.shape[0]) < jnp.sum(sizes))[:, None]
    # ragged_dot leaves open what it computes beyond the groups, forward and backward: both are cut off by `where`.
    given, share = jnp.where(inside, x[order // top_k], 0), share[order]
    if weighs_input:
        given = (given * share).astype(x.dtype)
    owner = jnp.minimum(flat[order], count - 1)

    def product(x: Array, matrices: Array, biases: Array | None) -> Array:
        found = jax.lax.ragged_dot(x, matrices, sizes)
        return found if biases is None else jnp.where(inside, found + biases[owner], 0)

    gate = None if experts.gate is None else product(given, experts.gate, experts.gate_bias)
    hidden = gated(gating, gate, product(given, experts.up, experts.up_bias))
    out = product(hidden, experts.down, experts.down_bias)
    out = jnp.where(inside, out if weighs_input else out * share, 0)
    back = jnp.argsort(order)  # a gather, not a scatter: the sum's order is fixed
    return jnp.sum(out[back].reshape(*ids.shape, -1), axis=1).astype(x.dtype)


def _tiled(experts: Experts, x: Array, ids: Array, weights: Array, gating: Gating, weighs_input: bool) -> Array:
    """Assignments sorted by expert, each expert's padded to whole tiles; one tile after the other, only as many as are.

    Assignments to experts that are not here are left out.
    """
    count, top_k = experts.up.shape[0], ids.shape[-1]
    here = (ids >= 0) & (ids < count)
    flat, share = jnp.where(here, ids, count).reshape(-1), jnp.where(here, weights, 0.0)
    size = flat.shape[0]
    tiles = size // TILE + count  # the most there can be
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=count)  # drops `count`
    room = (sizes + TILE - 1) // TILE * TILE
    ends = jnp.cumsum(room)
    shift = ends - room - (jnp.cumsum(sizes) - sizes)  # from place in order to slot
    owner = flat[order]
    slot = jnp.where(owner < count, jnp.arange(size) + shift[jnp.minimum(owner, count - 1)], tiles * TILE)
    filled_by = jnp.full(tiles * TILE, size, jnp.int32).at[slot].set(order.astype(jnp.int32), mode="drop")
    slots = jnp.zeros(size, jnp.int32).at[order].set(slot.astype(jnp.int32))
    expert_of = jnp.searchsorted(ends, TILE * jnp.arange(tiles), side="right")

    filled = (filled_by < size)[:, None]
    given = jnp.where(filled, x[jnp.minimum(filled_by, size - 1) // top_k], 0)
    if weighs_input:
        share_of = jnp.where(filled, share.reshape(-1, 1)[jnp.minimum(filled_by, size - 1)], 0)
        given = (given * share_of).astype(x.dtype)
    out: Array = _run_tiles(gating, experts, given, expert_of, ends[-1] // TILE)
    out = out.at[slots].get(mode="fill", fill_value=0).reshape(*ids.shape, -1)
    return jnp.sum(out if weighs_input else out * share[..., None], axis=1).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_tiles(gating: Gating, experts: Experts, given: Array, expert_of: Array, used: Array) -> Array:
    """The experts' outputs, `[tiles * TILE, D]`, zero beyond the first `used` tiles.

    Its own gradient: of a loop over a number of rounds that is not known while tracing, and with each tile's share of
    an expert's gradient added in place; differentiated, a scan would add arrays as large as all experts in each round.
    """

    def one(tile: Array, out: Array) -> Array:
        mine = _expert(experts, expert_of[tile])
        found = _of_expert(gating, mine, jax.lax.dynamic_slice_in_dim(given, tile * TILE, TILE))
        return jax.lax.dynamic_update_slice_in_dim(out, found, tile * TILE, 0)

    return jax.lax.fori_loop(0, used, one, jnp.zeros_like(given))


def _run_tiles_forward(gating: Gating, *args: Array) -> tuple[Array, tuple[Array, ...]]:
    return _run_tiles(gating, *args), args


def _run_tiles_backward(gating: Gating, kept: tuple[Any, ...], above: Array) -> tuple[Array | None, ...]:
    experts, given, expert_of, used = kept

    def one(tile: Array, slopes: tuple[Experts, Array]) -> tuple[Experts, Array]:
        number, at = expert_of[tile], tile * TILE
        inner = jax.lax.dynamic_slice_in_dim(given, at, TILE)
        back = jax.vjp(partial(_of_expert, gating), _expert(experts, number), inner)[1]
        of_expert, of_given = back(jax.lax.dynamic_slice_in_dim(above, at, TILE))
        total = jax.tree.map(lambda sum_, own: sum_.at[number].add(own), slopes[0], of_expert)
        return total, jax.lax.dynamic_update_slice_in_dim(slopes[1], of_given, at, 0)

    # Summed in float32: a busy expert has many tiles, and bfloat16 would lose the later ones.
    zeros = jax.tree.map(lambda matrix: jnp.zeros(matrix.shape, jnp.float32), experts), jnp.zeros_like(given)
    of_experts, of_given = jax.lax.fori_loop(0, used, one, zeros)
    rounded = jax.tree.map(lambda total, matrix: total.astype(matrix.dtype), of_experts, experts)
    return rounded, of_given, None, None


_run_tiles.defvjp(_run_tiles_forward, _run_tiles_backward)


def _expert(experts: Experts, number: Array) -> Experts:
    return jax.tree.map(lambda matrix: jax.lax.dynamic_index_in_dim(matrix, number, keepdims=False), experts)


def _of_expert(gating: Gating, mine: Experts, given: Array) -> Array:
    gate = None if mine.gate is None else given @ mine.gate
    hidden = gated(gating, gate, given @ mine.up, mine.gate_bias, mine.up_bias)
    out = hidden @ mine.down
    return out if mine.down_bias is None else out + mine.down_bias


def gated(
    gating: Gating, gate: Array | None, up: Array, gate_bias: Array | None = None, up_bias: Array | None = None
) -> Array:
    """The neurons that gate and up make: float32 inside, rounded once to the dtype of `up`."""
    wide = _biased(up, up_bias)
    return gating(wide if gate is None else _biased(gate, gate_bias), wide).astype(up.dtype)


def _biased(x: Array, bias: Array | None) -> Array:
    wide = x.astype(jnp.float32)
    return wide if bias is None else wide + bias
