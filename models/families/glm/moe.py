"""GLM-4.5 and later (`glm4_moe`): experts ranked by sigmoid and bias within the best groups, half of a head rotated.

Source: HF transformers `configuration_glm4_moe`, `modeling_glm4_moe`.
"""

from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, not_exportable
from distillcache.models.families.reading.grouped import (
    dense_then_experts,
    grouped_layout,
    sigmoid_moe,
    sigmoid_moe_keys,
)
from distillcache.models.families.reading.values import PARTIAL, Values


def _read(values: Values) -> ModelConfig:
    return ModelConfig(
        **common_fields(values, dense_then_experts(values)),
        rope=values.rope(fraction=0.5, partial=True),
        qkv_bias=values.flag("attention_bias"),
        qk_norm="head" if values.flag("use_qk_norm") else "none",
        moe=sigmoid_moe(values, values.count("n_shared_experts")),
        mtp_layers=values.count("num_nextn_predict_layers"),
        family="glm4_moe",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.output_bias:
        raise not_exportable("a bias of the output projection", "none", "use another family")
    return {
        PARTIAL: config.rope.fraction,  # for transformers 4, and stated where it is 1: half is assumed
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm == "head",
        **sigmoid_moe_keys(config),
    }


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        PARTIAL: None,
        "attention_bias": False,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    },
    read=_read,
    write=_write,
    layout=grouped_layout,
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)
