"""A teacher's largest next-token logits, without the logits of a whole batch ever in memory."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder, logits_of
from distillcache.models.mesh.recording import RecordingMesh
from distillcache.schemas.codecs import TopK

LOGITS_BYTES = 256 << 20  # of float32 logits at a time: enough tokens to keep an accelerator busy


def topk_logits(
    decoder: Decoder,
    stream: Float[Array, "B T D"],
    k: int,
    places: RecordingMesh | None = None,
    vocab_size: int | None = None,
) -> TopK:
    """Every token's `k` largest logits and the logsumexp of all, float32; ties as `jax.lax.top_k` breaks them.

    The LM head runs over some tokens at a time: `[B, T, V]` would be the largest array by far. On a mesh every device
    does so with its own tokens and the whole head.

    Args:
        stream: what leaves the last block.
        vocab_size: ids from here on are padding, and count nowhere; None: all rows of the vocabulary are ids.
    """
    of_tokens = partial(_of_tokens, decoder.config, k, vocab_size)
    weights = decoder.final_norm[...], decoder.head_matrix
    if places is None:
        return of_tokens(*weights, stream)
    own = PartitionSpec(places.row_axes, places.token_axes)
    return jax.shard_map(
        of_tokens,
        in_specs=(PartitionSpec(), PartitionSpec(), own),
        out_specs=TopK(own, own, own),  # type: ignore[arg-type]
        check_vma=False,
    )(*weights, stream)


def _of_tokens(
    config: ModelConfig,
    k: int,
    vocab_size: int | None,
    norm: Float[Array, " D"],
    head: Float[Array, "D V"],
    stream: Float[Array, "B T D"],
) -> TopK:
    batch, tokens, hidden = stream.shape
    size = min(batch * tokens, max(1, LOGITS_BYTES // (4 * config.vocab_size)))
    flat = stream.reshape(batch * tokens, hidden)
    chunks = jnp.pad(flat, ((0, -len(flat) % size), (0, 0))).reshape(-1, size, hidden)

    def take(chunk: Float[Array, "C D"]) -> TopK:
        logits = logits_of(config, norm, head, chunk[None])[0, :, :vocab_size].astype(jnp.float32)
        values, ids = jax.lax.top_k(logits, k)
        return TopK(values, ids, jax.nn.logsumexp(logits, axis=-1))

    found = jax.lax.map(take, chunks)
    return TopK(
        *(part.reshape(-1, *part.shape[2:])[: len(flat)].reshape(batch, tokens, *part.shape[2:]) for part in found)
    )
