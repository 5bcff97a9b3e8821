"""Shared parts of families with multi-head latent attention: its sizes, its scale, its indexer, the names of tensors.

Source: HF transformers `configuration_deepseek_v3`, `configuration_deepseek_v32` and their modelling code.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distillcache.models.config import BlockKind, IndexConfig, LatentConfig, ModelConfig, RopeConfig
from distillcache.models.families.reading.family import common_fields, dense_tensors, norm_tensors, not_exportable
from distillcache.models.families.reading.grouped import (
    check_sigmoid,
    moe_tensors,
    mtp_prefixes,
    sigmoid_moe,
    typed_expert_keys,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout

INDEXED = ("indexed_attention", "deepseek_sparse_attention")  # blocks in `layer_types`, the second in older files
INDEX_TENSORS = (
    BlockTensor("self_attn.indexer.wq_b.weight", "attention/index_q", 1),
    BlockTensor("self_attn.indexer.wk.weight", "attention/index_k", 1),
    BlockTensor("self_attn.indexer.k_norm.weight", "attention/index_norm"),
    BlockTensor("self_attn.indexer.k_norm.bias", "attention/index_norm_bias"),
    BlockTensor("self_attn.indexer.weights_proj.weight", "attention/index_weight", 1),
)


def latent_fields(values: Values, *, interleaved: bool) -> dict[str, Any]:
    """The fields of `ModelConfig` that latent attention decides."""
    return fields_of_rope(values, replace(values.rope(), interleaved=interleaved))


def check_rotated(values: Values) -> None:
    """Raise `CheckpointError` where `head_dim`, by which transformers rotates in some families, is another."""
    if values["head_dim"] not in (None, values["qk_rope_head_dim"]):
        raise values.bad("head_dim", f"{values['qk_rope_head_dim']}, as qk_rope_head_dim")


def latent_decoder(values: Values, kinds: Sequence[BlockKind], attention: dict[str, Any], family: str) -> ModelConfig:
    """The decoder of these blocks and fields of attention, with experts by sigmoid and bias within groups."""
    return ModelConfig(
        **common_fields(values, kinds) | attention,
        moe=sigmoid_moe(values, values.size("n_shared_experts")),
        mtp_layers=values.count("num_nextn_predict_layers"),
        family=family,
    )


def read_latent(values: Values, kinds: Sequence[BlockKind], family: str) -> ModelConfig:
    """The same without an indexer, whose rotation the config chooses."""
    check_rotated(values)
    return latent_decoder(values, kinds, latent_fields(values, interleaved=values.flag("rope_interleave")), family)


def indexed_fields(values: Values, *, interleaved: bool) -> dict[str, Any]:
    """The fields of sparse attention, whose indexer rotates neighbours or halves. Its queries need narrow vectors."""
    index = IndexConfig(
        heads=values.size("index_n_heads"),
        head_dim=values.size("index_head_dim"),
        top_k=values.size("index_topk"),
        interleaved=interleaved,
    )
    found = latent_fields(values, interleaved=True)
    if index.head_dim < found["latent"].rope_dim:
        raise values.bad("index_head_dim", f"at least qk_rope_head_dim, which is {found['latent'].rope_dim}")
    if found["latent"].query_rank is None:
        raise values.bad("q_lora_rank", "a positive whole number")
    values.per_block("layer_types", INDEXED, values.size("num_hidden_layers"))
    return found | {"latent": replace(found["latent"], index=index)}


def indexed_keys(config: ModelConfig, *, interleaved: bool) -> dict[str, Any]:
    """Return the config keys that `indexed_fields` reads, and those of experts.

    Raises:
        CheckpointError: they cannot say this decoder.
    """
    check_sigmoid(config)
    index = None if config.latent is None else config.latent.index
    if index is None or index.interleaved != interleaved:
        raise not_exportable(f"{index}", "an indexer as the family has it", "use another family")
    return {
        **latent_keys(config),
        **typed_expert_keys(config),
        "index_n_heads": index.heads,
        "index_head_dim": index.head_dim,
        "index_topk": index.top_k,
        "indexer_rope_interleave": interleaved,
    }


def fields_of_rope(values: Values, rope: RopeConfig) -> dict[str, Any]:
    """The same for this rotation."""
    latent, bias = latent_config(values), values.flag("attention_bias")
    width = latent.plain_dim + latent.rope_dim
    return {
        "num_kv_heads": one_head_each(values),
        "head_dim": width,
        "rope": rope,
        "latent": latent,
        "attention_scale": softmax_scale(width, rope),
        "qkv_bias": bias,
        "output_bias": bias,
    }


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
    """Return the config keys that say this decoder's latent attention, but for its rotation; `head_dim` as DeepSeek and
    GLM have it, which is what is rotated.

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
        "head_dim": config.rope_dim,
        "rope_interleave": config.rope.interleaved,
        "attention_bias": config.qkv_bias,
    }


def latent_layout(config: ModelConfig) -> Layout:
    """The names in files of latent attention and experts, as DeepSeek and GLM have them."""
    common = [*norm_tensors(), *latent_tensors(config)]
    moe = moe_tensors(config, "mlp.gate.e_score_correction_bias")
    index = INDEX_TENSORS if config.latent is not None and config.latent.index is not None else ()

    def tensors(kind: BlockKind) -> list[BlockTensor]:
        own = () if kind.taken_choice else index
        return [*common, *own, *(moe if kind.moe else dense_tensors(config))]

    return Layout(tensors, foreign=mtp_prefixes(config))


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
