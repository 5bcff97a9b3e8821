"""Students in NumPy and double precision: blocks on given streams, the whole student, and distances of streams."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from distillcache.models.config import BlockKind
from distillcache.models.decoder import Decoder
from tests.models.test_decoder import numpy_attention, numpy_blocks, numpy_mlp

Block = tuple[BlockKind, dict[str, np.ndarray]]
SHARES = ("relative_l2", "cosine", "l2")


def documents(segments: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(row, tokens) of every document."""
    for row, ids in enumerate(segments):
        for document in sorted(set(ids[ids > 0].tolist())):
            places = np.flatnonzero(ids == document)
            yield row, slice(places[0], places[-1] + 1)


def block_outputs(
    decoder: Decoder, block: Block, x: np.ndarray, segments: np.ndarray, *, attends: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What attention and MLP of a block add to a stream `[B, T, Ds]`, document by document; zeros in padding.

    Args:
        attends: what attention is given, if not the stream.
    """
    kind, parameters = block
    attn, mlp = np.zeros(x.shape), np.zeros(x.shape)
    for row, at in documents(segments):
        attn[row, at] = numpy_attention(decoder.config, kind, parameters, (x if attends is None else attends)[row, at])
        mlp[row, at] = numpy_mlp(decoder.config, parameters, (x + attn)[row, at])
    return attn, mlp


def own_streams(decoder: Decoder, blocks: list[Block], batch: Mapping[str, Any]) -> list[np.ndarray]:
    """The student's own stream behind every block, from its tokens."""
    x, found = np.float64(decoder.embed[...])[batch["tokens"]], []
    for block in blocks:
        attn, mlp = block_outputs(decoder, block, x, batch["segment_ids"])
        x = x + attn + mlp
        found.append(x)
    return found


def distance(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, shares: Mapping[str, float]) -> float:
    """The sum over the mask's tokens of the mixed distances."""
    s, t = student[mask], np.float64(teacher)[mask]
    square = {name: np.maximum((x * x).sum(-1), 1e-6) for name, x in (("s", s), ("t", t))}
    each = {
        "relative_l2": ((s - t) ** 2).sum(-1) / square["t"],
        "cosine": 1 - (s * t).sum(-1) / np.sqrt(square["s"] * square["t"]),
        "l2": ((s - t) ** 2).mean(-1),
    }
    return float(sum(shares.get(name, 0.0) * each[name].sum() for name in SHARES))


def slope(total: Callable[[dict[str, np.ndarray]], float], at: dict[str, np.ndarray], name: str, way: Any) -> float:
    """The derivative of `total` at these parameters along `way` of one of them, by a central difference."""
    step = 1e-5
    ahead, behind = ({**at, name: at[name] + sign * step * np.float64(way)} for sign in (1, -1))
    return (total(ahead) - total(behind)) / (2 * step)


def blocks_of(decoder: Decoder) -> list[Block]:
    """Every block's kind and parameters, float64, by the names that a step gives them (`attention.q`)."""
    return numpy_blocks(decoder)
