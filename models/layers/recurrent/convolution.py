"""Short causal convolution within documents: what recurrent mixers have in front of their state.

Every channel has its own few weights (depthwise). A packed row's documents do not see each other: the taps that reach
back beyond a document's first token find zeros there, as they do in a document alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def document_runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """A number for every run of tokens of one segment, from 0 at a row's first token.

    Padding (segment 0) is a run of its own. A segment that comes again behind another one is another run: what is
    recurrent restarts there.
    """
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def causal_convolution(
    x: Float[Array, "B T H d"], weight: Float[Array, "H d K"], runs: Int[Array, "B T"]
) -> Float[Array, "B T H d"]:
    """Sums of each channel's last K numbers in its run, the token's own times the last weight; in the dtype of `x`.

    Args:
        runs: see `document_runs`.
    """
    length, taps = x.shape[1], weight.shape[-1]
    total = x * weight[..., -1]
    for back in range(1, min(taps, length)):
        behind = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :length]
        same = jnp.pad(runs, ((0, 0), (back, 0)), constant_values=-1)[:, :length] == runs
        total = total + jnp.where(same[..., None, None], behind, 0) * weight[..., taps - 1 - back]
    return total
