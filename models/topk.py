"""A teacher's largest next-token logits, without the logits of a whole batch ever in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.decoder import Decoder
from schemas.codecs import TopK

LOGITS_BYTES = 256 << 20  # of float32 logits at a time: enough tokens to keep an accelerator busy


def topk_logits(decoder: Decoder, stream: Float[Array, "B T D"], k: int) -> TopK:
    """Every token's `k` largest logits and the logsumexp of all, float32; ties as `jax.lax.top_k` breaks them.

    The LM head runs over some tokens at a time: `[B, T, V]` would be the largest array by far.

    Args:
        stream: what leaves the last block.
    """
    batch, tokens, hidden = stream.shape
    size = min(batch * tokens, max(1, LOGITS_BYTES // (4 * decoder.config.vocab_size)))
    flat = stream.reshape(batch * tokens, hidden)
    chunks = jnp.pad(flat, ((0, -len(flat) % size), (0, 0))).reshape(-1, size, hidden)

    def take(chunk: Float[Array, "C D"]) -> TopK:
        logits = decoder.logits(chunk[None])[0].astype(jnp.float32)
        values, ids = jax.lax.top_k(logits, k)
        return TopK(values, ids, jax.nn.logsumexp(logits, axis=-1))

    found = jax.lax.map(take, chunks)
    return TopK(
        *(part.reshape(-1, *part.shape[2:])[: len(flat)].reshape(batch, tokens, *part.shape[2:]) for part in found)
    )
