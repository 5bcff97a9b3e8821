"""Shared parts of families with multi-head latent attention: its sizes, its scale, and the names of its tensors.

Source: HF transformers `configuration_deepseek_v3`, `modeling_deepseek_v3`.
"""

import math
from typing import Any

from distillcache.models.config import LatentConfig, ModelConfig, RopeConfig
from distillcache.models.families.reading.family import not_exportable
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor


def latent_config(values: Values) -> LatentConfig:
    """The sizes of latent attention."""
    return LatentConfig(
        query_rank=values.size_or_none("q_lora_rank"),
        rank=values.size("kv_lora_rank"),
        plain_dim=values.size("qk_nope_head_dim"),
        rope_dim=values.size("qk_rope_head_dim"),
        value_dim=values.size("v_head_dim"),
    )


def one_head_each(values: Values) -> int:
    """The number of key and value heads, which is that of the query heads.

    Raises:
        CheckpointError: `num_key_value_heads` is another.
    """
    heads = values.size("num_attention_heads")
    if (values.size_or_none("num_key_value_heads") or heads) != heads:
        raise values.bad("num_key_value_heads", f"{heads}: every query head has keys and values of its own")
    return heads


def softmax_scale(width: int, rope: RopeConfig) -> float:
    """Compute the softmax scale of queries and keys of this width: YaRN's amplitude is squared into it if
    `mscale_all_dim` is set.
    """
    amplitude = 1.0
    if rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:
        amplitude = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
    return width**-0.5 * amplitude * amplitude


def latent_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the config keys that say this decoder's latent attention, but for its rotation.

    Raises:
        CheckpointError: they cannot say it.
    """
    latent = config.latent
    if latent is None or config.attention_scale != softmax_scale(config.head_dim, config.rope):
        raise not_exportable("attention without latent vectors, or another scale", "both", "use another family")
    if config.qkv_bias != config.output_bias:
        raise not_exportable("some biases of attention", "all or none", "use another family")
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": config.rope.interleaved,
        "attention_bias": config.qkv_bias,
    }


def latent_tensors(config: ModelConfig) -> list[BlockTensor]:
    """`self_attn.*` of latent attention."""
    found = [
        BlockTensor("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_a", 1),
        BlockTensor("self_attn.kv_a_layernorm.weight", "attention/kv_a_norm"),
        BlockTensor("self_attn.kv_b_proj.weight", "attention/kv_b", 1),
        BlockTensor("self_attn.o_proj.weight", "attention/o", 2),
    ]
    narrow = config.latent is not None and config.latent.query_rank is not None
    if narrow:
        found += [
            BlockTensor("self_attn.q_a_proj.weight", "attention/q_a", 1),
            BlockTensor("self_attn.q_a_layernorm.weight", "attention/q_a_norm"),
            BlockTensor("self_attn.q_b_proj.weight", "attention/q_b", 1),
        ]
    else:
        found.append(BlockTensor("self_attn.q_proj.weight", "attention/q", 1))
    if config.qkv_bias:
        found.append(BlockTensor("self_attn.kv_a_proj_with_mqa.bias", "attention/kv_a_bias"))
        found += [BlockTensor("self_attn.q_a_proj.bias", "attention/q_a_bias")] * narrow
    if config.output_bias:
        found.append(BlockTensor("self_attn.o_proj.bias", "attention/o_bias"))
    return found
