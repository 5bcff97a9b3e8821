"""Predictions of a decoder on held-out rows: cross-entropy, KL to recorded logits, load of the experts.

Host loops over batches of one shape (the last one is filled up with masked rows), so each jitted function compiles
once; sums travel from batch to batch, in Python's own double precision.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import BlockOutput, Decoder
from distillcache.models.routing import expert_load
from distillcache.schemas.runtime.peers import ALONE, Peers
from distillcache.schemas.runtime.progress import Progress
from distillcache.trainer.feed.source import Batch, Source
from distillcache.trainer.losses import (
    MaskedSum,
    next_token_loss,
    perplexity_of,
    topk_kl_loss,
    without_padding,
)
from distillcache.trainer.step.targets import (
    real_vocab,
)


class HeldOut(NamedTuple):
    """A decoder on held-out rows.

    perplexity: exp of the mean cross-entropy of every next token; None where none counts. load: of every expert,
    `[Lm, E]`; None without experts.
    """

    perplexity: float | None
    load: np.ndarray | None


def held_out(
    decoder: Decoder,
    source: Source,
    batch_rows: int,
    title: str = "student's perplexity",
    peers: Peers = ALONE,
    student: ModelConfig | None = None,
) -> HeldOut:
    """Evaluate predictions on the source's rows, and the load of the experts there.

    Args:
        student: whose padding of the vocabulary is left out; default: the decoder's.
    """
    loss, load = _mean_token_loss(decoder, source, batch_rows, title, None, peers, student)
    return HeldOut(None if loss is None else perplexity_of(loss), load)


def teacher_divergence(
    decoder: Decoder, source: Source, batch_rows: int, *, rest_bucket: bool, peers: Peers = ALONE
) -> float | None:
    """The mean KL from the teacher's recorded top k to the student, at temperature 1, in nats; None where no token is a
    target."""
    record = _Record(source.codecs["topk_logits"], rest_bucket)
    return _mean_token_loss(decoder, source, batch_rows, "KL", record, peers)[0]


@dataclass(frozen=True)
class _Record:
    """Reading and comparison of the teacher's recorded logits."""

    codec: Any
    rest_bucket: bool


def _mean_token_loss(
    decoder: Decoder,
    source: Source,
    batch_rows: int,
    title: str,
    record: _Record | None,
    peers: Peers,
    student: ModelConfig | None = None,
) -> tuple[float | None, np.ndarray | None]:
    """The mean over next tokens of the divergence from the record, or, without one, of the cross-entropy; None where no
    token is a target. And the load of every expert."""
    graph, parameters = nnx.split(decoder)
    total = weight = 0.0
    model, real = decoder.config, real_vocab(student or decoder.config, source)
    load = np.zeros((len(model.moe_blocks), model.moe.num_experts)) if model.moe is not None else None
    with Progress(title, len(source), unit="rows", quiet=not peers.first) as bar:
        for batch, rows in batches(source, batch_rows, peers):
            stored = None if record is None else batch["topk_logits"]
            sums, loads = _token_loss(graph, record, real, parameters, stored, *(batch[name] for name in ROW_FIELDS))
            total, weight = total + float(sums.total), weight + float(sums.weight)
            if load is not None:
                load = load + np.asarray(loads, np.float64)
            bar.advance(rows)
    total, weight = peers.sum(np.asarray([total, weight]))
    return float(total / weight) if weight else None, None if load is None else peers.sum(load)


ROW_FIELDS = ("tokens", "positions", "segment_ids", "loss_mask")


def run_stream(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Array, Array | None]:
    """The stream that leaves the last block, and the load of every expert, `[Lm, E]`."""
    context = decoder.context(positions, segment_ids, tokens)

    def emit(carry: None, out: BlockOutput, _: Array) -> tuple[None, dict[str, Array]]:
        if out.router is None:
            return carry, {}
        return carry, {"load": expert_load(out.router.ids, segment_ids > 0, out.router.probs.shape[-1])}

    stream, _, found = decoder.scan_layers(decoder.embed_tokens(tokens), context, emit, None)
    return stream, found.get("load")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _token_loss(
    graph: Any,
    record: _Record | None,
    real: int | None,
    parameters: Any,
    stored: Mapping[str, Array] | None,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> tuple[MaskedSum, Array | None]:
    """The loss of a batch, and the load of every expert, `[Lm, E]`.

    Row by row: logits of the whole batch would be the largest array by far (`[B, T, V]`).
    """
    decoder = nnx.merge(graph, parameters)
    stream, load = run_stream(decoder, tokens, positions, segment_ids)

    def one(row: Any) -> MaskedSum:
        x, fields, parts = jax.tree.map(lambda leaf: leaf[None], row)
        logits = decoder.logits(x)
        if record is None:
            return next_token_loss(without_padding(logits, real), *fields)
        recorded = record.codec.decode(parts)
        return topk_kl_loss(logits, *recorded, *fields, tau=1.0, rest_bucket=record.rest_bucket, real_vocab=real)

    parts = stored and {name: value[0] for name, value in stored.items()}
    sums = jax.lax.map(one, (stream, (tokens, segment_ids, loss_mask), parts))
    return MaskedSum(jnp.sum(sums.total), jnp.sum(sums.weight)), load


def batches(source: Source, batch_rows: int, peers: Peers) -> Iterator[tuple[Batch, int]]:
    """This process's share of all rows, in order, as batches of `batch_rows` and how many of these rows count; the
    others are masked."""
    for start in range(peers.number * batch_rows, len(source), peers.count * batch_rows):
        indices = list(range(start, min(start + batch_rows, len(source))))
        batch = source[indices + [start] * (batch_rows - len(indices))]
        batch["segment_ids"][len(indices) :] = 0
        yield batch, len(indices)
