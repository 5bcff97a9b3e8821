"""A decoder taken apart block by block and put together again, with the meaning of every parameter's axes.

Axis letters: D hidden, H query heads, K key/value heads, h width of a head, J and w the same of wide heads, F neurons
of a dense MLP, E experts, W neurons of an expert, Q what experts read and write if not the stream, S neurons of the
shared expert, V vocabulary. Of the gated delta rule and of Mamba-2: G key heads, N value heads, d and e their widths, t
taps of the convolution. Of the gated short convolution: C channels, s taps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flax import nnx

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.decoder import Decoder, abstract_decoder
from distillcache.models.layers.recurrent.mamba import BESIDE
from distillcache.models.mesh.sharding import device_copy
from distillcache.schemas.errors import CheckpointError, ConfigError

# Without the axis of the repeats. A norm of single heads has one weight for all of them: `axes_of`.
OUTER_AXES = {"embed": "VD", "final_norm": "D", "head": "DV"}
ATTENTION_AXES = {
    "norm": "D",
    "post_norm": "D",
    "q": "DHh",
    "k": "DKh",
    "v": "DKh",
    "o": "HhD",
    "o_bias": "D",
    "q_bias": "Hh",
    "k_bias": "Kh",
    "v_bias": "Kh",
    "q_norm": "Hh",
    "k_norm": "Kh",
    "sinks": "H",
    "gate": "DHh",
    "gate_bias": "Hh",
}
# Of latent attention. c: what the narrow vectors of keys and values are made with; r: width of the one of queries, l:
# of the one of keys and values; m: what is made of that for a head, v: width of a head's values; I and i: heads of an
# indexer and their width.
LATENT_AXES = {
    "norm": "D",
    "post_norm": "D",
    "q": "DHh",
    "q_a": "Dr",
    "q_a_bias": "r",
    "q_a_norm": "r",
    "q_b": "rHh",
    "kv_a": "Dc",
    "kv_a_bias": "c",
    "kv_a_norm": "l",
    "kv_b": "lHm",
    "o": "HvD",
    "o_bias": "D",
    "index_q": "rIi",
    "index_k": "Di",
    "index_norm": "i",
    "index_norm_bias": "i",
    "index_weight": "DI",
}
DELTA_AXES = {
    "norm": "D",
    "post_norm": "D",
    "q": "DGd",
    "k": "DGd",
    "v": "DNe",
    "z": "DNe",
    "alpha": "DN",
    "beta": "DN",
    "conv_q": "Gdt",
    "conv_k": "Gdt",
    "conv_v": "Net",
    "a_log": "N",
    "dt_bias": "N",
    "out_norm": "e",
    "o": "NeD",
}
SHORT_CONV_AXES = {
    "norm": "D",
    "post_norm": "D",
    "in_gate": "DC",
    "out_gate": "DC",
    "value": "DC",
    "conv": "Cs",
    "in_gate_bias": "C",
    "out_gate_bias": "C",
    "value_bias": "C",
    "conv_bias": "C",
    "o": "C1D",
    "o_bias": "D",
}
MAMBA_AXES = {name: letters for name, letters in DELTA_AXES.items() if name != "beta"} | {
    "skip": "N",
    "out_norm": "Ne",
    "q_bias": "Gd",
    "k_bias": "Gd",
    "v_bias": "Ne",
    "z_bias": "Ne",
    "alpha_bias": "N",
    "conv_q_bias": "Gd",
    "conv_k_bias": "Gd",
    "conv_v_bias": "Ne",
    "o_bias": "D",
}
KIMI_AXES = {name: letters for name, letters in DELTA_AXES.items() if name not in ("z", "alpha")} | {
    "q": "DNd",
    "k": "DNd",
    "conv_q": "Ndt",
    "conv_k": "Ndt",
    "decay_a": "Dd",
    "decay_b": "dNd",
    "gate_a": "Dd",
    "gate_b": "dNe",
    "dt_bias": "Nd",
}
BESIDE_AXES = ATTENTION_AXES | {f"{BESIDE}{name}": letters for name, letters in MAMBA_AXES.items()}
OTHER_AXES = {
    "gated_delta": DELTA_AXES,
    "short_conv": SHORT_CONV_AXES,
    "mamba2": MAMBA_AXES,
    "attention_mamba2": BESIDE_AXES,
}
MLP_AXES = {
    "positive_scale": "1",
    "negative_scale": "1",
    "linear_scale": "",
    "edge_scale": "",
    "norm": "D",
    "post_norm": "D",
    "gate": "DF",
    "up": "DF",
    "down": "FD",
    "gate_bias": "F",
    "up_bias": "F",
    "down_bias": "D",
    "block_scale": "1",
}
MOE_AXES = {
    "norm": "D",
    "post_norm": "D",
    "gate": "EDW",
    "up": "EDW",
    "down": "EWD",
    "gate_bias": "EW",
    "up_bias": "EW",
    "down_bias": "ED",
    "router": "DE",
    "router_bias": "E",
    "logit_bias": "E",
    "shared_gate": "DS",
    "shared_up": "DS",
    "shared_down": "SD",
    "shared_router": "D1",
    "latent_in": "DQ",
    "latent_out": "QD",
    "router_norm": "D",
    "shared_post_norm": "D",
    "expert_norm": "D",
    "expert_post_norm": "D",
    "expert_scale": "E",
    "block_scale": "1",
}
STREAM = "D"

Block = Mapping[str, np.ndarray]  # `attention/q` -> the block's own, without the axis of the repeats


@dataclass(frozen=True)
class Scores:
    """Importance of each part on some rows (trainer/run/importance.py): axis letter -> `[size]`, for every block of
    the decoder before any operation; `stream` `[D]` is for all of them.
    """

    blocks: tuple[Mapping[str, np.ndarray], ...]
    stream: np.ndarray


@dataclass(frozen=True)
class Parts:
    """A decoder taken apart: the parameters outside of blocks by name, those of each block, and the scores of what is
    left of it, if measured."""

    config: ModelConfig
    outer: Mapping[str, np.ndarray]
    blocks: tuple[Block, ...]
    scores: Scores | None = None
    unscored: frozenset[str] = field(default_factory=frozenset)  # letters that came into being in an operation


def take_apart(decoder: Decoder, scores: Scores | None = None) -> Parts:
    """The parameters on the host; views where JAX allows it."""
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    values = {tuple(map(str, path)): np.asarray(value.get_value()) for path, value in flat}
    places: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for path, value in values.items():
        if path[0] == "groups":
            places.setdefault((path[1], path[3]), {})["/".join(path[4:])] = value
    blocks = tuple(
        {name: value[repeat] for name, value in places[str(group), str(place)].items()}
        for _, group, repeat, place in decoder.config.places()
    )
    outer = {path[0]: value for path, value in values.items() if path[0] != "groups"}
    return Parts(decoder.config, outer, blocks, scores)


def put_together(parts: Parts) -> Decoder:
    """The decoder of these parts.

    Raises:
        CheckpointError: they are not the parameters of its config; names every one that is not.
    """
    config, dtype = parts.config, parts.outer["embed"].dtype
    graph, abstract = abstract_decoder(config, dtype)
    found, stacks = dict(parts.outer), dict[str, list[np.ndarray]]()
    for block, group, _, place in config.places():
        for name, value in parts.blocks[block].items():
            stacks.setdefault(f"groups/{group}/blocks/{place}/{name}", []).append(value)
    found |= {name: _stacked(values) for name, values in stacks.items()}
    flat = nnx.to_flat_state(abstract)
    expected = {"/".join(map(str, path)): value.shape for path, value in flat}
    check_shapes(expected, {name: value.shape for name, value in found.items()})
    state = [(path, value.replace(device_copy(found["/".join(map(str, path))]))) for path, value in flat]
    return nnx.merge(graph, nnx.from_flat_state(state))


def _stacked(values: Sequence[np.ndarray]) -> np.ndarray:
    """An empty array, which fits nowhere, where the blocks of a stack are not alike."""
    return np.stack(values) if len({value.shape for value in values}) == 1 else np.zeros((len(values), 0))


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` that names every parameter that is missing, unknown or of another shape."""
    facts = {f"{name} is missing": f"expected {list(shape)}" for name, shape in expected.items() if name not in found}
    facts |= {f"{name} is unknown": f"found {list(shape)}" for name, shape in found.items() if name not in expected}
    facts |= {
        name: f"found {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    }
    if facts:
        raise CheckpointError(
            "the student's parameters are not those of its config", facts, "name another checkpoint, or other surgery"
        )


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Axis letter -> size."""
    sizes = {
        "D": config.hidden_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "1": 1,
    }
    if (wide := config.wide) is not None:
        sizes |= {"J": wide.num_kv_heads, "w": wide.head_dim}
    if (latent := config.latent) is not None:
        sizes |= {"c": latent.rank + latent.rope_dim, "r": latent.query_rank or 0, "l": latent.rank}
        sizes |= {"m": latent.plain_dim + latent.value_dim, "v": latent.value_dim}
        if latent.index is not None:
            sizes |= {"I": latent.index.heads, "i": latent.index.head_dim}
    if (delta := config.delta) is not None:
        sizes |= {"G": delta.key_heads, "N": delta.value_heads, "t": delta.taps}
        sizes |= {"d": delta.key_dim, "e": delta.value_dim}
    if (conv := config.short_conv) is not None:
        sizes |= {"C": conv.channels, "s": conv.taps}
    if (mamba := config.mamba) is not None:
        sizes |= {"G": mamba.groups, "N": mamba.heads, "t": mamba.taps, "d": mamba.state, "e": mamba.head_dim}
    if config.moe is not None:
        sizes |= {"E": config.moe.num_experts, "W": config.moe.expert_size, "S": config.moe.shared_size}
        sizes |= {"Q": config.moe.latent or 0}
    return sizes


def axes_of(name: str, shape: tuple[int, ...], config: ModelConfig, kind: BlockKind | None) -> str:
    """The letters of a parameter's axes; `kind` of its block, None for a parameter of no block.

    Raises:
        ConfigError: surgery does not know this parameter, so it cannot tell what of it would have to go.
    """
    part, _, own = name.rpartition("/")
    attention = ATTENTION_AXES if config.latent is None else LATENT_AXES
    if kind is not None:
        attention = OTHER_AXES.get(kind.mixer, attention)
        if attention is DELTA_AXES and config.delta is not None and config.delta.by_channel:
            attention = KIMI_AXES
    table = {"": OUTER_AXES, "attention": attention}.get(part, MOE_AXES if kind and kind.moe else MLP_AXES)
    letters = table.get(own, "none such")  # the letters of which are no axes
    if own in ("q_norm", "k_norm") and config.qk_norm != "full":
        letters = "h"
    if part == "mlp" and config.moe is not None and config.moe.latent is not None and letters in ("EDW", "EWD"):
        letters = letters.replace("D", "Q")
    if part == "attention" and kind is not None and kind.wide:
        letters = letters.replace("K", "J").replace("h", "w")
    sizes = axis_sizes(config)
    if tuple(sizes.get(letter, 0) for letter in letters) != shape:
        raise ConfigError(
            "surgery does not know this parameter of the model",
            {"family": config.family, "parameter": name, "shape": list(shape), "expected": letters},
            "use operations that leave it alone, such as drop_blocks",
        )
    return letters


def keep(parts: Parts, letter: str, kept: Sequence[np.ndarray | None], config: ModelConfig) -> Parts:
    """The parts with only these entries along one kind of axis.

    Args:
        kept: of every block the places that stay, ascending; None: the block has no such axis. Of the stream all
            blocks keep the same.
        config: the new one.
    """
    blocks = tuple(
        block
        if places is None
        else {n: _take(v, axes_of(n, v.shape, parts.config, kind), letter, places) for n, v in block.items()}
        for block, kind, places in zip(parts.blocks, parts.config.kinds, kept, strict=True)
    )
    outer, scores = parts.outer, parts.scores
    if letter == STREAM and kept[0] is not None:
        outer = {n: _take(v, axes_of(n, v.shape, parts.config, None), letter, kept[0]) for n, v in outer.items()}
        scores = scores and replace(scores, stream=scores.stream[kept[0]])
    elif scores is not None:
        of_blocks = tuple(
            {**own, letter: own[letter][places]} if places is not None and letter in own else own
            for own, places in zip(scores.blocks, kept, strict=True)
        )
        scores = replace(scores, blocks=of_blocks)
    return replace(parts, config=config, blocks=blocks, outer=outer, scores=scores)


def _take(value: np.ndarray, letters: str, letter: str, places: np.ndarray) -> np.ndarray:
    return np.take(value, places, axis=letters.index(letter)) if letter in letters else value
