"""DeepSeek-V3 (also R1, V3.1, Moonlight, Kimi K2): latent attention, experts ranked by sigmoid and bias within groups.

The released files are in FP8 (models/files/packed.py); an export has floats. `kimi_k25` is Kimi K2.5 and later, with
eyes: such a model inside its config and behind a prefix of its tensors, and of it that alone is read and exported.

Source: HF transformers `configuration_deepseek_v3`, `configuration_kimi_k25` and their modelling code.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig
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
from distillcache.models.families.reading.latent import (
    latent_config,
    latent_keys,
    latent_tensors,
    one_head_each,
    softmax_scale,
)
from distillcache.models.families.reading.multimodal import AROUND, PREFIX, multimodal_layout, vision_language_family
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import Layout


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
