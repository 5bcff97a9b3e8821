"""The recurrence of Mamba-2 over packed rows, a chunk of tokens at a time.

A head's state S `[dk, dv]` adds up keys and values. With a token's decay a = exp(g), key k, value v and query q:

    S := a S + k v^T;  o = S^T q

Within a chunk that is attention without softmax, its scores multiplied by the decays between the tokens; only the
chunks' states follow each other. With D, E and S as in delta_rule.py a chunk's output is E Q S + (D * Q K^T) V, and the
state behind it E_C S + K^T D_C V, of its last row. Documents and exponents: as there.

Source: Mamba-2 (arXiv 2405.21060), state space duality; its C, B and x are queries, keys and values here, and a value
is already multiplied by its token's step. State and products are float32, whatever the dtype of the stream.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distillcache.models.layers.recurrent.delta_rule import CHUNK, chunks, decays, einsum, entering


def state_space(
    q: Float[Array, "B T G dk"],
    k: Float[Array, "B T G dk"],
    v: Float[Array, "B T N dv"],
    log_decay: Float[Array, "B T N"],
    runs: Int[Array, "B T"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B T N dv"]:
    """The output of every token's heads, float32.

    Args:
        q, k: float32, each of G groups serves the N / G heads next to each other.
        log_decay: at most 0. runs: the state restarts where these change; see `document_runs`.
        chunk: tokens at a time; fewer where rows are shorter.
    """
    batch, length, groups = q.shape[:3]
    size = min(chunk, length)

    def grouped(x: Array) -> Array:
        return chunks(x.reshape(batch, length, groups, -1, *x.shape[3:]), size)

    queries, keys, values = chunks(q, size), chunks(k, size), grouped(v)
    within, run = grouped(log_decay), chunks(runs, size, -1)
    decay, from_start = decays(within, run), entering(within, run)
    scores = einsum("nbigd,nbjgd->nbgij", queries, keys)[:, :, :, None] * decay
    out = einsum("nbgrij,nbjgre->nbgrie", scores, values)
    left = values * decay[..., -1, :].transpose(0, 1, 4, 2, 3)[..., None]  # of each value at the chunk's end
    added = einsum("nbjgd,nbjgre->nbgrde", keys, left)

    def behind(state: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        return state * part[1][..., None, None] + part[0], state

    states = jax.lax.scan(behind, jnp.zeros(added.shape[1:], jnp.float32), (added, from_start[..., -1]))[1]
    out = out + einsum("nbigd,nbgrde->nbgrie", queries, states) * from_start[..., None]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, *v.shape[2:])[:, :length]
