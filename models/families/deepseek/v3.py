"""DeepSeek-V3 (also R1, V3.1, Moonlight, Kimi K2): latent attention, experts ranked by sigmoid and bias within groups.

The released files are in FP8 (models/files/packed.py); an export has floats. `kimi_k25` is Kimi K2.5 and later, with
eyes: such a model inside its config and behind a prefix of its tensors, and of it that alone is read and exported.

Source: HF transformers `configuration_deepseek_v3`, `configuration_kimi_k25` and their modelling code.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family
from distillcache.models.families.reading.grouped import (
    check_sigmoid,
    dense_then_experts,
    sigmoid_moe_keys,
)
from distillcache.models.families.reading.latent import latent_keys, latent_layout, read_latent
from distillcache.models.families.reading.multimodal import AROUND, PREFIX, multimodal_layout, vision_language_family
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import Layout


def _read(values: Values) -> ModelConfig:
    return read_latent(values, dense_then_experts(values), "deepseek_v3")


def _write(config: ModelConfig) -> dict[str, Any]:
    check_sigmoid(config)
    return latent_keys(config) | sigmoid_moe_keys(config)


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
    layout=latent_layout,
    also=("kimi_k2",),
    # Sums of other keys, losses of training, and how experts were dealt out then.
    harmless=frozenset({"qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"}),
    neutral={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)


def _kimi_layout(config: ModelConfig) -> Layout:
    """Transformers 5.24 saves the blocks under another name than the published files have, and reads both."""
    found = multimodal_layout(latent_layout(config))
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
