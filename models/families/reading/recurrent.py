"""Shared parts of families whose blocks differ in their mixer: which are recurrent, and the delta rule's sizes.

Source: HF transformers, `layer_types` and the `linear_*` keys of `configuration_qwen3_next`, `configuration_qwen3_5`.
"""

from collections.abc import Sequence
from typing import Any

from distillcache.models.config import BlockKind, DeltaConfig, Mixer, ModelConfig
from distillcache.models.families.reading.family import not_exportable
from distillcache.models.families.reading.keys import LINEAR
from distillcache.models.families.reading.kinds import FULL
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, TensorSlice

MIXERS: dict[str, Mixer] = {LINEAR: "gated_delta", FULL: "attention"}
TYPES = {mixer: name for name, mixer in MIXERS.items()}
DELTA_DEFAULTS: dict[str, Any] = {
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def mixers(values: Values, interval: int | None = None) -> list[Mixer]:
    """Every block's mixer, by `layer_types`, or else attention in every `interval`-th block; None: in every
    `full_attention_interval`-th."""
    depth = values.size("num_hidden_layers")
    types = values.per_block("layer_types", tuple(MIXERS), depth)
    if types is None:
        interval = interval or values.size("full_attention_interval")
        types = [FULL if (block + 1) % interval == 0 else LINEAR for block in range(depth)]
    return [MIXERS[name] for name in types]


def delta_sizes(values: Values) -> DeltaConfig:
    """Sizes of the gated delta rule.

    Raises:
        CheckpointError: the value heads do not divide into the key heads.
    """
    keys, heads = values.size("linear_num_key_heads"), values.size("linear_num_value_heads")
    if heads % keys:
        raise values.bad("linear_num_value_heads", f"a multiple of linear_num_key_heads, which is {keys}")
    return DeltaConfig(
        key_heads=keys,
        value_heads=heads,
        key_dim=values.size("linear_key_head_dim"),
        value_dim=values.size("linear_value_head_dim"),
        taps=values.size("linear_conv_kernel_dim"),
    )


def check_mixers(config: ModelConfig, *, rotary: bool = True) -> None:
    """Raise `CheckpointError` where blocks differ in more than their mixer and their experts, or where those with
    attention do not rotate as `rotary` says."""
    for kind in config.kinds:
        plain = BlockKind(mixer=kind.mixer, moe=kind.moe, rotary=rotary or not kind.attends)
        if kind != plain or kind.mixer not in TYPES:
            raise not_exportable(str(kind), "blocks without windows or chunks", "export it in another family")


def delta_keys(config: ModelConfig, *, rotary: bool = True) -> dict[str, Any]:
    """`layer_types` and `linear_*` of an export. See `check_mixers` for what is refused."""
    check_mixers(config, rotary=rotary)
    delta = config.delta_config
    return {
        "layer_types": layer_types(config.kinds),
        "linear_conv_kernel_dim": delta.taps,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
    }


def layer_types(kinds: Sequence[BlockKind]) -> list[str]:
    """`layer_types` of these blocks."""
    return [TYPES[kind.mixer] for kind in kinds]


def delta_tensors(config: ModelConfig, *, by_key_head: bool) -> list[BlockTensor]:
    """`linear_attn.*`.

    by_key_head: the projections of Qwen3-Next: for one key head after the other its rows of the query, the key, and the
        values and gates of its value heads; and likewise those of strength and decay. Else all queries, all keys, all
        values, and tensors of their own for the rest.
    """
    delta, prefix = config.delta_config, "linear_attn."
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    spans = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, 2 * keys + values)}
    channels = 2 * keys + values
    return [
        *(_by_key_head(config) if by_key_head else _apart(spans, channels)),
        *(
            BlockTensor(f"{prefix}conv1d.weight", f"attention/conv_{n}", None, TensorSlice(0, *span, channels), True)
            for n, span in spans.items()
        ),
        BlockTensor(f"{prefix}dt_bias", "attention/dt_bias"),
        BlockTensor(f"{prefix}A_log", "attention/a_log"),
        BlockTensor(f"{prefix}norm.weight", "attention/out_norm"),
        BlockTensor(f"{prefix}out_proj.weight", "attention/o", 2),
    ]


def _apart(spans: dict[str, tuple[int, int]], channels: int) -> list[BlockTensor]:
    return [
        *(
            BlockTensor("linear_attn.in_proj_qkv.weight", f"attention/{name}", 1, TensorSlice(0, *span, channels))
            for name, span in spans.items()
        ),
        BlockTensor("linear_attn.in_proj_z.weight", "attention/z", 1),
        BlockTensor("linear_attn.in_proj_b.weight", "attention/beta", 1),
        BlockTensor("linear_attn.in_proj_a.weight", "attention/alpha", 1),
    ]


def _by_key_head(config: ModelConfig) -> list[BlockTensor]:
    delta = config.delta_config
    served = delta.value_heads // delta.key_heads
    of_tensor = {
        "in_proj_qkvz": {
            "q": delta.key_dim,
            "k": delta.key_dim,
            "v": served * delta.value_dim,
            "z": served * delta.value_dim,
        },
        "in_proj_ba": {"beta": served, "alpha": served},
    }
    found = []
    for tensor, rows in of_tensor.items():
        start, total = 0, delta.key_heads * sum(rows.values())
        for name, size in rows.items():
            part = TensorSlice(0, start, start + size, total, groups=delta.key_heads)
            found.append(BlockTensor(f"linear_attn.{tensor}.weight", f"attention/{name}", 1, part))
            start += size
    return found
