"""Choice of the heads, neurons, experts or stream dimensions that stay: the first, the heaviest, or the most
important."""

import numpy as np

from distillcache.models.config import BlockKind
from distillcache.models.layers.recurrent.mamba import BESIDE
from distillcache.models.surgery.parts import STREAM, Block, Parts
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import ConfigError


def places_to_keep(parts: Parts, letter: str, to: int, op: SurgeryOp) -> list[np.ndarray | None]:
    """Choose for every block the indices that stay along an axis, ascending; None if a block has no such axis.

    `H` is kept by KV group, `N` by key head, and `E` by group of experts: `to` counts for all of them.
    """
    config = parts.config
    if letter == STREAM:
        return [_best(_stream_scores(parts, op), 1, to)] * len(parts.blocks)
    groups = {
        "H": config.num_kv_heads,
        "E": config.moe.groups if config.moe else 1,
        "N": config.delta.groups if config.delta else config.mamba.groups if config.mamba else 1,
    }.get(letter, 1)
    return [
        _best(block_scores(parts, at, letter, op), groups, to) if has_axis(kind, letter) else None
        for at, kind in enumerate(config.kinds)
    ]


def has_axis(kind: BlockKind, letter: str) -> bool:
    """Tell whether a block of this kind has heads (H, K; N of a recurrence), dense neurons (F) or experts (E);
    channels of the short convolution (C)."""
    return {
        "H": kind.attends,
        "K": kind.attends,
        "N": kind.mixer == "gated_delta" or kind.is_mamba,
        "C": kind.mixer == "short_conv",
        "E": kind.moe,
        "F": kind.is_dense,
    }.get(letter, True)


def block_scores(parts: Parts, block: int, letter: str, op: SurgeryOp) -> np.ndarray:
    """Score each entry along an axis of a block, `[size]`; `index` ranks the first entries highest."""
    config = parts.config
    if letter == "K":
        by_head = block_scores(parts, block, "H", op).reshape(config.num_kv_heads, -1)
        return np.arange(config.num_kv_heads, 0, -1) if op.chosen_by == "index" else np.sum(by_head, axis=1)
    if op.chosen_by == "importance":
        if parts.scores is None or letter in parts.unscored:
            raise _unmeasured(op, parts)
        return parts.scores.blocks[block][letter]
    value = _output_norms(parts.blocks[block], letter)
    return np.arange(len(value), 0, -1) if op.chosen_by == "index" else value


def expert_neuron_scores(block: Block, op: SurgeryOp) -> np.ndarray:
    """Score the neurons of every expert, `[E, W]`."""
    down = block["mlp/down"]
    if op.chosen_by == "index":
        return np.broadcast_to(np.arange(down.shape[1], 0, -1), down.shape[:2])
    return _norm(down, 2)


def _output_norms(block: Block, letter: str) -> np.ndarray:
    """Bound the contribution of each entry to the stream: the squared norm of its rows of the output projection,
    float64.
    """
    beside = f"attention/{BESIDE}o"
    heads = beside if letter == "N" and beside in block else "attention/o"
    return _norm(block[heads if letter in "HNC" else "mlp/down"], (1, 2) if letter in "HNCE" else 1)


def _norm(value: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    return np.sum(np.square(value.astype(np.float64)), axis=axes)


def _stream_scores(parts: Parts, op: SurgeryOp) -> np.ndarray:
    """Score the dimensions of the stream, `[D]`. By weights: the squared norm of all that is written into each."""
    if op.chosen_by == "index":
        return np.arange(parts.config.hidden_size, 0, -1)
    if op.chosen_by == "importance":
        if parts.scores is None:
            raise _unmeasured(op, parts)
        return parts.scores.stream
    written = [value for block in parts.blocks for value in _output_projections(block)]
    return np.sum([_norm(v.reshape(-1, v.shape[-1]), 0) for v in (parts.outer["embed"], *written)], axis=0)


def _output_projections(block: Block) -> list[np.ndarray]:
    """The matrices of a block that write into the stream, but for a shared expert's."""
    last = "mlp/latent_out" if "mlp/latent_out" in block else "mlp/down"
    return [block[name] for name in ("attention/o", f"attention/{BESIDE}o", last) if name in block]


def _best(scores: np.ndarray, groups: int, to: int) -> np.ndarray:
    """The places of the best `to / groups` of each group of neighbours, ascending; of equals the earlier."""
    split = scores.reshape(groups, -1)
    order = np.argsort(-split, axis=1, kind="stable")[:, : to // groups]
    return (np.sort(order, axis=1) + split.shape[1] * np.arange(groups)[:, None]).reshape(-1)


def _unmeasured(op: SurgeryOp, parts: Parts) -> ConfigError:
    made = "an operation before this one made them" if parts.scores is not None else "no rows of a cache were given"
    return ConfigError(
        "the importance of these was not measured",
        {"surgery": op.spelled, "found": made},
        "choose by: index or by: weight_norm",
    )
