"""The operations: each makes a new decoder, in which everything that it does not name is copied from the old one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.surgery.choose import expert_neuron_scores, places_to_keep
from distillcache.models.surgery.parts import Parts, Scores, keep, put_together, take_apart
from distillcache.models.surgery.sizes import after, changed_config, kept_blocks, named_blocks
from distillcache.models.surgery.upcycle import upcycled
from distillcache.schemas.config.student import SurgeryOp


@dataclass(frozen=True)
class Operated:
    """The result of applying operations.

    kept: of each operation that chooses, what stayed, numbered as before it: for every block the heads, neurons or
    experts (None: the block has none), or one list of blocks or of numbers of the stream.
    """

    decoder: Decoder
    kept: tuple[list[Any], ...] = field(default_factory=tuple)


def apply_surgery(decoder: Decoder, ops: Sequence[SurgeryOp], scores: Scores | None = None) -> Decoder:
    """The decoder after all operations, as a new one; the given one is left as it was. See `operate`."""
    return operate(decoder, ops, scores).decoder


def operate(decoder: Decoder, ops: Sequence[SurgeryOp], scores: Scores | None = None) -> Operated:
    """Do these operations, in order, each in every block that it concerns.

    `query_heads` keeps `to` query heads of each key/value group; `kv_heads` keeps `to` key/value heads, each with all
    its query heads; `value_heads` keeps `to` value heads of each key head of the delta rule, or heads of Kimi delta
    attention; `mlp_width`,
    `expert_width` keep neurons, `experts` experts, `hidden_size` numbers of the stream and as many channels of
    short convolutions.
    What stays is in its old order: by `index` the first; by `weight_norm` those whose rows of the output projection
    have the largest norm; by `importance` those with the highest of `scores`. `drop_blocks` leaves out whole blocks,
    `upcycle` makes experts of dense MLPs.

    Args:
        scores: of this decoder; needed by `by: importance`.

    Raises:
        ConfigError: see `changed_config`.
    """
    if not ops:
        return Operated(decoder)
    changed_config(decoder.config, ops)  # all refusals that need no weights, before any work
    parts, kept = take_apart(decoder, scores), []
    for op in ops:
        parts, stayed = OPERATIONS[op.op](parts, after(parts.config, op), op)
        kept.append(stayed)
    return Operated(put_together(parts), tuple(kept))


def add_router_bias(decoder: Decoder) -> Decoder:
    """Add a zero bias to every expert; a decoder that has biases already is returned unchanged.

    Raises:
        ValueError: it has no experts.
    """
    moe = decoder.config.moe_config
    if moe.bias:
        return decoder
    parts, zeros = take_apart(decoder), np.zeros(moe.num_experts, np.float32)
    blocks = tuple(
        {**block, "mlp/router_bias": zeros} if kind.moe else block
        for block, kind in zip(parts.blocks, decoder.config.kinds, strict=True)
    )
    return put_together(replace(parts, config=replace(decoder.config, moe=replace(moe, bias=True)), blocks=blocks))


Done = tuple[Parts, list[Any]]


def _cut(letter: str) -> Callable[[Parts, ModelConfig, SurgeryOp], Done]:
    """An operation that keeps the best entries along one axis."""

    def cut(parts: Parts, config: ModelConfig, op: SurgeryOp) -> Done:
        counts = {
            "H": config.num_heads,
            "N": config.delta.value_heads if config.delta else config.mamba.heads if config.mamba else 0,
            "E": config.moe.num_experts if config.moe else 0,
        }
        to = counts.get(letter, op.to or 0)
        kept = places_to_keep(parts, letter, to, op)
        return keep(parts, letter, kept, config), [None if places is None else places.tolist() for places in kept]

    return cut


def _cut_kv_heads(parts: Parts, config: ModelConfig, op: SurgeryOp) -> Done:
    group = config.num_heads // config.num_kv_heads
    kept = places_to_keep(parts, "K", config.num_kv_heads, op)
    queries = [None if places is None else (places[:, None] * group + np.arange(group)).reshape(-1) for places in kept]
    halfway = replace(parts.config, num_heads=config.num_heads)  # `keep` knows a parameter by its sizes
    parts = keep(parts, "H", queries, halfway)
    return keep(parts, "K", kept, config), [None if places is None else places.tolist() for places in kept]


def _cut_stream(parts: Parts, config: ModelConfig, op: SurgeryOp) -> Done:
    """Channels of short convolutions are as many as numbers of the stream."""
    if config.short_conv is not None:
        channels, halfway = op.to or 0, replace(parts.config, short_conv=config.short_conv)
        parts = keep(parts, "C", places_to_keep(parts, "C", channels, op), halfway)
    parts, kept = _cut("D")(parts, config, op)
    return parts, kept[0]


def _cut_expert_width(parts: Parts, config: ModelConfig, op: SurgeryOp) -> Done:
    """Each expert keeps neurons of its own."""
    blocks, kept = [], []
    for block, kind in zip(parts.blocks, parts.config.kinds, strict=True):
        if not kind.moe:
            blocks.append(block)
            kept.append(None)
            continue
        order = np.argsort(-expert_neuron_scores(block, op), axis=1, kind="stable")
        places = np.sort(order[:, : op.to], axis=1)  # [E, to]
        rows = {
            name: np.take_along_axis(block[name], places[:, None], 2)
            for name in ("mlp/gate", "mlp/up")
            if name in block
        }
        rows["mlp/down"] = np.take_along_axis(block["mlp/down"], places[..., None], 1)
        rows |= {n: np.take_along_axis(block[n], places, 1) for n in ("mlp/gate_bias", "mlp/up_bias") if n in block}
        blocks.append({**block, **rows})
        kept.append(places.tolist())
    return replace(parts, config=config, blocks=tuple(blocks)), kept


def _drop_blocks(parts: Parts, config: ModelConfig, op: SurgeryOp) -> Done:
    kept = kept_blocks(op, len(parts.blocks))
    scores = parts.scores and replace(parts.scores, blocks=tuple(parts.scores.blocks[at] for at in kept))
    return replace(parts, config=config, blocks=tuple(parts.blocks[at] for at in kept), scores=scores), kept


def _upcycle(parts: Parts, config: ModelConfig, op: SurgeryOp) -> Done:
    named = named_blocks(op, len(parts.blocks))
    blocks = tuple(upcycled(parts, at, config, op) if at in named else block for at, block in enumerate(parts.blocks))
    unscored = parts.unscored | {"E"}
    return replace(parts, config=config, blocks=blocks, unscored=unscored), sorted(named)


OPERATIONS: Mapping[str, Callable[[Parts, ModelConfig, SurgeryOp], Done]] = {
    "query_heads": _cut("H"),
    "kv_heads": _cut_kv_heads,
    "value_heads": _cut("N"),
    "mlp_width": _cut("F"),
    "experts": _cut("E"),
    "expert_width": _cut_expert_width,
    "hidden_size": _cut_stream,
    "drop_blocks": _drop_blocks,
    "upcycle": _upcycle,
}
