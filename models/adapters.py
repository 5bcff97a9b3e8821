"""Low-rank adapters of a decoder's matrices: which may have one, their names, and what they add.

A matrix W with an adapter counts as W + (alpha / rank) * A @ B, where A `[in, rank]` and B `[rank, out]` have W's axes
of each side as one. They are named after W, `groups/0/blocks/0/lora/attention/q/{a,b}`, and stacked over the repeats
like it. Names within a block (`attention/q`, `lora/attention/q/a`) are treated alike.

Source: LoRA (arXiv 2106.09685).
"""

from collections.abc import Iterable, Mapping
from math import prod

import jax
import numpy as np
from jaxtyping import Array

LORA = "lora"
# The matrices that may have one, and how many of their leading axes their product sums over. Those of experts have the
# names of an MLP's and one more axis.
IN_AXES = {
    "attention/q": 1,
    "attention/k": 1,
    "attention/v": 1,
    "attention/o": 2,
    "attention/gate": 1,
    "attention/z": 1,
    "attention/decay_a": 1,
    "attention/decay_b": 1,
    "attention/gate_a": 1,
    "attention/gate_b": 1,
    "attention/in_gate": 1,
    "attention/out_gate": 1,
    "attention/value": 1,
    **{f"attention/mamba_{name}": 1 for name in ("q", "k", "v", "z")},
    "attention/mamba_o": 2,
    "attention/q_a": 1,
    "attention/q_b": 1,
    "attention/kv_a": 1,
    "attention/kv_b": 1,
    "mlp/gate": 1,
    "mlp/up": 1,
    "mlp/down": 1,
    "mlp/latent_in": 1,
    "mlp/latent_out": 1,
    "mlp/shared_gate": 1,
    "mlp/shared_up": 1,
    "mlp/shared_down": 1,
}
OF_EXPERTS = ("mlp/gate", "mlp/up", "mlp/down")  # where a block has them


def short_name(name: str) -> str:
    """`attention/q` of `groups/0/blocks/0/attention/q`."""
    return "/".join(name.split("/")[-2:])


def is_adapter(name: str) -> bool:
    return LORA in name.split("/")


def is_of_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a stacked parameter of this shape holds a matrix of every expert."""
    return short_name(name) in OF_EXPERTS and len(shape) == 4


def sides(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return how many numbers enter and leave a stacked matrix `[repeats, ...]`; None if it may have no adapter."""
    axes = IN_AXES.get(short_name(name))
    if axes is None or is_of_experts(name, shape):
        return None
    return prod(shape[1 : 1 + axes]), prod(shape[1 + axes :])


def adapter_names(matrix: str) -> tuple[str, str]:
    """The names of a matrix's A and B."""
    *prefix, sublayer, name = matrix.split("/")
    own = "/".join([*prefix, LORA, sublayer, name])
    return f"{own}/a", f"{own}/b"


def adapted_matrices(names: Iterable[str]) -> list[str]:
    """The names of the matrices whose adapters are among these names."""
    whole = [name.split("/") for name in names if is_adapter(name) and name.endswith("/a")]
    return ["/".join([*parts[:-4], *parts[-3:-1]]) for parts in whole]


def addition(a: Array, b: Array, alpha: float) -> Array:
    """The matrix that an adapter adds, `[..., in, out]`; of a stack, all of them.

    The product has an axis more than it needs: `remat: dots` keeps products without such an axis, and these are as
    large as the weights.
    """
    batch = tuple(range(a.ndim - 1))
    dimensions = (((a.ndim,), (a.ndim - 1,)), (batch, batch))
    product = jax.lax.dot_general(a[None], b[None], dimensions, precision=jax.lax.Precision.HIGHEST)
    return (alpha / a.shape[-1]) * product[0]


def merged(parameters: Mapping[str, Array], alpha: float) -> dict[str, Array]:
    """The same parameters with every adapter added to its matrix, and without adapters."""
    found = {name: value for name, value in parameters.items() if not is_adapter(name)}
    for matrix in adapted_matrices(parameters):
        if matrix in found:
            a, b = (parameters[name] for name in adapter_names(matrix))
            found[matrix] = found[matrix] + addition(a, b, alpha).reshape(found[matrix].shape)
    return found


def addition_on_host(a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """`addition` of one matrix, `[in, out]` float32, without a device."""
    return np.float32(alpha / a.shape[-1]) * (a @ b)
