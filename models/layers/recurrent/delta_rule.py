"""The gated delta rule over packed rows, a chunk of tokens at a time.

A head's state S `[dk, dv]` is a memory of keys and values. With a token's decay a = exp(g), key k (a unit vector),
value v, strength b and query q:

    S := a S;  S := S + k (b (v - S^T k))^T;  o = S^T q

Within a chunk of C tokens this is a triangular system for what each token writes, and products of matrices; only the
chunks follow each other. Let D[i, j] = exp(g_{j+1} + ... + g_i) for j <= i in one document, 0 elsewhere; E[i] the same
from the chunk's start, 0 behind a document's start in the chunk; S the state at the start. Then the tokens write
W = (I + A)^-1 b (V - E K S) with A[i, j] = b_i D[i, j] k_i . k_j below the diagonal, and their output is
E Q S + (D * Q K^T) W.

Documents: D and E are cut at their starts, which is a decay of zero without its logarithm. Exponents are sums of the
tokens' own decays, never differences of long sums: after one strong decay these would keep no digits of weak ones.

A decay for each number of the key (`channel_delta_rule`) is a vector a, and D[i, j] and E[i] are vectors, within the
products: A[i, j] = b_i sum_c D[i, j]_c k_ic k_jc. For the rows of a half of a chunk and the columns of the half before
it, D is a product of what is left from the border to the row and from the column to the border, so a matrix product of
rows and columns that each carry their share; the halves themselves likewise, down to single tokens.

Source: Gated Delta Networks (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692); chunks by the WY representation as in
DeltaNet (arXiv 2406.06484). State and products are float32, whatever the dtype of the stream.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64  # tokens: products of this size fill a matrix unit, and the triangular system is still small
# TPUs and GPUs would multiply float32 in fewer bits, and a state adds up what that loses over a whole document.
EXACT = jax.lax.Precision.HIGHEST
einsum = partial(jnp.einsum, precision=EXACT)


def gated_delta_rule(
    q: Float[Array, "B T G dk"],
    k: Float[Array, "B T G dk"],
    v: Float[Array, "B T N dv"],
    log_decay: Float[Array, "B T N"],
    strength: Float[Array, "B T N"],
    runs: Int[Array, "B T"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B T N dv"]:
    """The output of every token's heads, float32.

    Args:
        q, k: float32, each of G heads serves the N / G value heads next to each other. k: unit vectors, or shorter.
        log_decay: at most 0. strength: of what a token writes, from 0 to 1, or to 2.
        runs: the state restarts where these change; see `document_runs`.
        chunk: tokens at a time, a power of two; fewer where rows are shorter.
    """
    batch, length, groups = q.shape[:3]
    size = min(chunk, 1 << (length - 1).bit_length())

    def grouped(x: Array) -> Array:
        return chunks(x.reshape(batch, length, groups, -1, *x.shape[3:]), size)

    parts = _within_chunks(
        chunks(q, size), chunks(k, size), grouped(v), grouped(log_decay), grouped(strength), chunks(runs, size, -1)
    )
    state = jnp.zeros((batch, groups, v.shape[2] // groups, k.shape[-1], v.shape[-1]), jnp.float32)
    out = jax.lax.scan(_next_chunk, state, parts)[1]  # [n, B, G, R, C, dv]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, *v.shape[2:])[:, :length]


def chunks(x: Float[Array, "B T ..."], size: int, fill: int = 0) -> Float[Array, "n B C ..."]:
    """Whole chunks, the last one filled up."""
    room = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _within_chunks(
    q: Float[Array, "n B C G dk"],
    k: Float[Array, "n B C G dk"],
    v: Float[Array, "n B C G R dv"],
    log_decay: Float[Array, "n B C G R"],
    strength: Float[Array, "n B C G R"],
    runs: Int[Array, "n B C"],
) -> dict[str, Any]:
    """The parts of each chunk that the walk over them needs, all at once. Axes i, j: tokens of a chunk."""
    size = q.shape[2]
    below = jnp.tril(jnp.ones((size, size), bool), -1)
    decay = decays(log_decay, runs)
    from_start = entering(log_decay, runs)
    b = strength.transpose(0, 1, 3, 4, 2)  # [n, B, G, R, C]
    likeness = einsum("nbigd,nbjgd->nbgij", k, k)[:, :, :, None]
    inverse = unit_lower_inverse(jnp.where(below, b[..., None] * likeness * decay, 0.0))
    return {
        "query": q,
        "key": k,
        "scores": einsum("nbigd,nbjgd->nbgij", q, k)[:, :, :, None] * decay,
        "written": einsum("nbgrij,nbjgre->nbgrie", inverse * b[..., None, :], v),
        "read": einsum("nbgrij,nbjgd->nbgrid", inverse * (b * from_start)[..., None, :], k),
        "entering": from_start,
        "leaving": decay[..., -1, :],  # from each token to the chunk's end
    }


def _next_chunk(
    state: Float[Array, "B G R dk dv"], part: dict[str, Any]
) -> tuple[Float[Array, "B G R dk dv"], Float[Array, "B G R C dv"]]:
    """The state behind a chunk, and the output of its tokens."""
    written = part["written"] - einsum("bgrid,bgrde->bgrie", part["read"], state)
    remembered = einsum("bigd,bgrde->bgrie", part["query"], state) * part["entering"][..., None]
    out = remembered + einsum("bgrij,bgrje->bgrie", part["scores"], written)
    added = einsum("bjgd,bgrje->bgrde", part["key"], written * part["leaving"][..., None])
    return state * part["entering"][..., -1, None, None] + added, out


def decays(log_decay: Float[Array, "n B C G R"], runs: Int[Array, "n B C"]) -> Float[Array, "n B G R C C"]:
    """D of the module's docstring."""
    size = runs.shape[-1]
    reached = jnp.tril(jnp.ones((size, size), jnp.float32))  # [i, l]: l <= i
    behind = jnp.tril(jnp.ones((size, size), jnp.float32), -1)  # [l, j]: l > j
    sums = einsum("il,nbgrl,lj->nbgrij", reached, log_decay.transpose(0, 1, 3, 4, 2), behind)
    seen = (runs[..., :, None] == runs[..., None, :]) & (reached > 0)
    return jnp.where(seen[:, :, None, None], jnp.exp(sums), 0.0)


def entering(log_decay: Float[Array, "n B C G R"], runs: Int[Array, "n B C"]) -> Float[Array, "n B G R C"]:
    """E of the module's docstring."""
    sums = jnp.cumsum(log_decay, axis=2).transpose(0, 1, 3, 4, 2)
    return jnp.where(_continue(runs)[:, :, None, None], jnp.exp(sums), 0.0)


def _continue(runs: Int[Array, "n B C"]) -> Bool[Array, "n B C"]:
    """Tell which tokens' runs began before their chunk. The first chunk's state is zero, whatever it is multiplied
    by."""
    return runs == jnp.concatenate([runs[:1, :, 0], runs[:-1, :, -1]])[..., None]


def channel_delta_rule(
    q: Float[Array, "B T N dk"],
    k: Float[Array, "B T N dk"],
    v: Float[Array, "B T N dv"],
    log_decay: Float[Array, "B T N dk"],
    strength: Float[Array, "B T N"],
    runs: Int[Array, "B T"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B T N dv"]:
    """`gated_delta_rule` with a decay for each number of the key, where every value head has a key head of its own."""
    batch, length, heads = q.shape[:3]
    size = min(chunk, 1 << (length - 1).bit_length())
    state = jnp.zeros((batch, heads, k.shape[-1], v.shape[-1]), jnp.float32)
    q, k, v, log_decay, strength = (chunks(x, size).swapaxes(2, 3) for x in (q, k, v, log_decay, strength))
    parts = _channel_parts(q, k, v, log_decay, strength, chunks(runs, size, -1))
    out = jax.lax.scan(_next_channel_chunk, state, parts)[1]  # [n, B, N, C, dv]
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, v.shape[-1])[:, :length]


def _channel_parts(
    q: Float[Array, "n B N C dk"],
    k: Float[Array, "n B N C dk"],
    v: Float[Array, "n B N C dv"],
    log_decay: Float[Array, "n B N C dk"],
    strength: Float[Array, "n B N C"],
    runs: Int[Array, "n B C"],
) -> dict[str, Any]:
    """As `_within_chunks`."""
    scores, likeness, ahead, behind = _decayed_products(q, k, log_decay)
    same = (runs[..., :, None] == runs[..., None, :])[:, :, None]
    lower = jnp.where(same, strength[..., None] * likeness, 0.0)
    inverse = unit_lower_inverse(lower) * strength[..., None, :]
    from_start = jnp.where(_continue(runs)[:, :, None, :, None], jnp.exp(ahead), 0.0)
    to_end = jnp.where(same[..., -1, :, None], jnp.exp(behind), 0.0)
    return {
        "query": q * from_start,
        "key": k * to_end,
        "scores": jnp.where(same, scores, 0.0),
        "written": _product(inverse, v),
        "read": _product(inverse, k * from_start),
        "kept": from_start[..., -1, :, None],
    }


def _next_channel_chunk(
    state: Float[Array, "B N dk dv"], part: dict[str, Any]
) -> tuple[Float[Array, "B N dk dv"], Float[Array, "B N C dv"]]:
    """As `_next_chunk`."""
    written = part["written"] - _product(part["read"], state)
    out = _product(part["query"], state) + _product(part["scores"], written)
    return state * part["kept"] + _product(part["key"].swapaxes(-1, -2), written), out


def _decayed_products(
    q: Float[Array, "*n C d"], k: Float[Array, "*n C d"], log_decay: Float[Array, "*n C d"]
) -> tuple[Float[Array, "*n C C"], Float[Array, "*n C C"], Float[Array, "*n C d"], Float[Array, "*n C d"]]:
    """Return of a chunk that is one document the products of queries and keys with their decay in between, on and
    below the diagonal; the same of keys and keys, below it; and the logarithms of the decay from the chunk's start to
    each token, and from each token to its end.

    By halves, as `unit_lower_inverse`: of blocks of `width` tokens all these are known, and of two next to each other
    the products of the second one's rows and the first one's columns are added.
    """
    rows, ahead, behind = jnp.stack([q, k]), log_decay[..., None, :], jnp.zeros_like(log_decay)[..., None, :]
    found = jnp.stack([jnp.sum(q * k, axis=-1), jnp.zeros(q.shape[:-1], q.dtype)])[..., None, None]
    width = 1
    while width < q.shape[-2]:
        row, column = (_blocks(x, width) for x in (rows, k))
        (before, after), (left, right) = _pairs(ahead), _pairs(behind)
        upper, lower = _pairs(found)
        corner = einsum("...id,...jd->...ij", _pairs(row)[1] * jnp.exp(after), _pairs(column)[0] * jnp.exp(left))
        top = jnp.concatenate([upper, jnp.zeros_like(corner)], axis=-1)
        found = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        ahead, behind = (
            jnp.concatenate([before, after + before[..., -1:, :]], axis=-2),
            jnp.concatenate([left + after[..., -1:, :], right], axis=-2),
        )
        width *= 2
    return found[0, ..., 0, :, :], found[1, ..., 0, :, :], ahead[..., 0, :, :], behind[..., 0, :, :]


def _blocks(x: Float[Array, "*n C d"], width: int) -> Float[Array, "*n b w d"]:
    return x.reshape(*x.shape[:-2], -1, width, x.shape[-1])


def _pairs(x: Float[Array, "*n b w d"]) -> tuple[Float[Array, "*n h w d"], Float[Array, "*n h w d"]]:
    """The first and the second blocks of all pairs of neighbours."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*n C C"]) -> Float[Array, "*n C C"]:
    """(I + A)^-1 of matrices A that are zero on and above their diagonals; C is a power of two.

    By halves: [[P, 0], [X, Q]]^-1 = [[P^-1, 0], [-Q^-1 X P^-1, Q^-1]], for blocks of 1, 2, 4, ..., all of one size at
    once: with the blocks' inverses Y and their corners X in whole matrices that is Y - Y X Y. As exact as forward
    substitution, in log C steps of products. (The series of powers of A is not: of equal keys without decay these reach
    1e17 at C = 64.)
    """
    size = lower.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    width = 1
    while width < size:
        corners = jnp.where(_corners(size, width), lower, 0.0)
        # With blocks of 1 the inverses are ones.
        inverse = inverse - (corners if width == 1 else _product(_product(inverse, corners), inverse))
        width *= 2
    return inverse


def _corners(size: int, width: int) -> Bool[np.ndarray, "C C"]:
    """The places where rows of each second block of this width meet columns of the block before it."""
    block = np.arange(size) // width
    return (block[:, None] % 2 == 1) & (block[:, None] - 1 == block[None, :])


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: Array, above: Array) -> tuple[Array]:
    turned = inverse.swapaxes(-1, -2)
    return (jnp.tril(-_product(_product(turned, above), turned), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=EXACT)
