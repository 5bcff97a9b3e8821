"""DeepSeek-V3 (also R1, V3.1, Moonlight, Kimi K2): latent attention, experts ranked by sigmoid and bias within groups.

The released files are in FP8 (models/files/packed.py); an export has floats. `kimi_k25` is Kimi K2.5 and later, with
eyes: such a model inside its config and behind a prefix of its tensors, and of it that alone is read and exported.

Source: HF transformers `configuration_deepseek_v3`, `configuration_kimi_k25` and their modelling code.
"""

import math
from dataclasses import replace
from typing import Any

from distillcache.models.config import LatentConfig, ModelConfig, RopeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    common_fields,
    dense_tensors,
    norm_tensors,
    not_exportable,
)
from distillcache.models.families.reading.grouped import (
    dense_then_experts,
    moe_tensors,
    mtp_prefixes,
    sigmoid_moe,
    sigmoid_moe_keys,
)
from distillcache.models.families.reading.multimodal import AROUND, PREFIX, multimodal_layout, vision_language_family
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout


def _read(values: Values) -> ModelConfig:
    if values["head_dim"] not in (None, values["qk_rope_head_dim"]):  # transformers rotates by it
        raise values.bad("head_dim", f"{values['qk_rope_head_dim']}, as qk_rope_head_dim")
    latent = latent_config(values)
    width = latent.plain_dim + latent.rope_dim
    rope = replace(values.rope(), interleaved=values.flag("rope_interleave"))
    bias, kinds = values.flag("attention_bias"), dense_then_experts(values)
    heads: dict[str, Any] = {"num_kv_heads": one_head_each(values), "head_dim": width}
    return ModelConfig(
        **common_fields(values, kinds) | heads,
        rope=rope,
        latent=latent,
        attention_scale=softmax_scale(width, rope),
        qkv_bias=bias,
        output_bias=bias,
        moe=sigmoid_moe(values, values.size("n_shared_experts")),
        mtp_layers=values.count("num_nextn_predict_layers"),
        family="deepseek_v3",
    )


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


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    if moe.scores != "sigmoid" or not moe.native_bias or not moe.shared_size or config.temperature is not None:
        raise not_exportable(
            f"scores {moe.scores}, a shared expert of {moe.shared_size}, growth of queries {config.temperature}",
            "sigmoid scores with a bias, a shared expert, no growth of queries",
            "use another family",
        )
    # head_dim as transformers has it: what is rotated.
    return latent_keys(config) | {"head_dim": config.rope_dim, **sigmoid_moe_keys(config)}


def _layout(config: ModelConfig) -> Layout:
    common = [*norm_tensors(), *latent_tensors(config)]
    moe = moe_tensors(config, "mlp.gate.e_score_correction_bias")
    return Layout(lambda kind: [*common, *(moe if kind.moe else dense_tensors(config))], foreign=mtp_prefixes(config))


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


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_nextn_predict_layers": 1,
    },
    read=_read,
    write=_write,
    layout=_layout,
    also=("kimi_k2",),
    # Sums of other keys, losses of training, and how experts were dealt out then.
    harmless=frozenset({"qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"}),
    neutral={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)


def _kimi_layout(config: ModelConfig) -> Layout:
    """Transformers 5.24 saves the blocks under another name than the published files have, and reads both."""
    found = multimodal_layout(_layout(config))
    saved = tuple((f"{prefix}blocks.", f"{PREFIX}layers.") for prefix in ("language_model.model.", PREFIX))
    return replace(found, spellings=(*saved, *found.spellings))


KIMI_K25 = vision_language_family(
    "kimi_k25",
    "KimiK25ForConditionalGeneration",
    DEEPSEEK_V3,
    layout=_kimi_layout,
    # Tokens that stand for pictures, and the projection of these.
    harmless=AROUND
    | frozenset(
        """ignore_index media_placeholder_token_id projection_hidden_size projection_layer_norm_eps
        use_unified_vision_chunk video_placeholder""".split()  # noqa: SIM905 - as in families/reading/keys.py
    ),
    neutral={"encoder_only": (False,), "language_only": (False,)},
)
