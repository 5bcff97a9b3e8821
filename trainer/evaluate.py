"""How good a student is on held-out rows: perplexity of the whole model, cosine distance of every block.

Host loops over batches of one shape (the last one is filled up with masked rows), so each jitted function compiles
once; sums travel from batch to batch, in Python's own double precision.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from models.decoder import Decoder
from schemas.config import Config
from schemas.progress import Progress
from trainer.feed import Batch, CacheSource
from trainer.losses import MaskedSum, blockwise_cosine_loss, next_token_loss
from trainer.step import AttentionStack, Places, TapTable, visit_blocks


class Evaluation(Config):
    """What one evaluation found. blocks are the recorded ones; cosine is each one's mean distance, in their order."""

    step: int
    perplexity: float
    blocks: tuple[int, ...]
    cosine: tuple[float, ...]

    @property
    def mean_cosine(self) -> float:
        return sum(self.cosine) / len(self.cosine)


def held_out_perplexity(
    decoder: Decoder, source: CacheSource, batch_rows: int, title: str = "student's perplexity"
) -> float:
    """exp of the mean cross-entropy of every next token in the source's rows."""
    graph, parameters = nnx.split(decoder)
    total = weight = 0.0
    with Progress(title, len(source), unit="rows") as bar:
        for batch, rows in _batches(source, batch_rows):
            sums = _token_loss(graph, parameters, *(batch[name] for name in _ROW_FIELDS))
            total, weight = total + float(sums.total), weight + float(sums.weight)
            bar.advance(rows)
    return math.exp(total / max(weight, 1.0))


def blockwise_cosine(
    stack: AttentionStack, parameters: Places, source: CacheSource, table: TapTable, batch_rows: int
) -> np.ndarray:
    """The mean cosine distance of each block's attention output on the teacher's stream, float64 `[L]`."""
    total, weight = np.zeros(stack.config.num_blocks), 0.0
    with Progress("cosine", len(source), unit="rows") as bar:
        for batch, rows in _batches(source, batch_rows):
            sums = _block_cosines(stack, table, parameters, batch)
            total, weight = total + np.asarray(sums.total, np.float64), weight + float(sums.weight)
            bar.advance(rows)
    return total / max(weight, 1.0)


_ROW_FIELDS = ("tokens", "positions", "segment_ids", "loss_mask")


@partial(jax.jit, static_argnums=0)
def _token_loss(
    graph: Any,
    parameters: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> MaskedSum:
    decoder: Decoder = nnx.merge(graph, parameters)
    context = decoder.context(positions, segment_ids)
    stream, _, _ = decoder.scan_blocks(decoder.embed_tokens(tokens), context, lambda carry, *_: (carry, None), None)

    def row_loss(row: tuple[Array, Array, Array, Array]) -> MaskedSum:
        x, *fields = (value[None] for value in row)
        return next_token_loss(decoder.logits(x), *fields)

    # Row by row: logits of a whole batch would be the largest array by far ([B, T, V] float32).
    sums = jax.lax.map(row_loss, (stream, tokens, segment_ids, loss_mask))
    return MaskedSum(jnp.sum(sums.total), jnp.sum(sums.weight))


@partial(jax.jit, static_argnums=(0, 1))
def _block_cosines(stack: AttentionStack, table: TapTable, parameters: Places, batch: Batch) -> MaskedSum:
    mask = batch["segment_ids"] > 0

    def visit(attend: Any, state: Any, resid: Array, target: Array) -> Array:
        return blockwise_cosine_loss(attend(state), target, mask).total

    totals = stack.in_block_order(visit_blocks(stack, parameters, batch, table, visit))
    return MaskedSum(totals, jnp.sum(mask, dtype=jnp.float32))


def _batches(source: CacheSource, batch_rows: int) -> Iterator[tuple[Batch, int]]:
    """All rows in order, as batches of `batch_rows` and how many of these rows count; the others are masked."""
    for start in range(0, len(source), batch_rows):
        indices = list(range(start, min(start + batch_rows, len(source))))
        batch = source[indices + [start] * (batch_rows - len(indices))]
        batch["segment_ids"][len(indices) :] = 0
        yield batch, len(indices)
