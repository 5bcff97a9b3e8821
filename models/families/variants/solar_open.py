"""Solar Open: GLM-4.5's mixture in every block, with whole heads rotated and no norms of queries and keys.

Source: HF transformers `configuration_solar_open`, `modeling_solar_open`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, not_exportable
from distillcache.models.families.reading.grouped import grouped_layout, sigmoid_moe, sigmoid_moe_keys
from distillcache.models.families.reading.values import Values


def _read(values: Values) -> ModelConfig:
    moe = sigmoid_moe(values, values.size("n_shared_experts"))
    fields = common_fields(values, [BlockKind(moe=True)] * values.size("num_hidden_layers"))
    fields["intermediate_size"] = moe.expert_size  # of no block
    return ModelConfig(
        **fields,
        rope=values.rope(theta=1_000_000.0),
        qkv_bias=values.flag("attention_bias"),
        moe=moe,
        family="solar_open",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    keys = sigmoid_moe_keys(config)
    if config.output_bias or keys["first_k_dense_replace"] or not config.moe_config.shared_size:
        raise not_exportable(
            "a bias of the output projection, dense blocks, or no shared expert",
            "no such bias, and experts with a shared one in all blocks",
            "use another family",
        )
    return {"attention_bias": config.qkv_bias, **keys}


SOLAR_OPEN = Family(
    name="solar_open",
    architecture="SolarOpenForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "intermediate_size": 1280,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "attention_bias": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1280,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    read=_read,
    write=_write,
    layout=grouped_layout,
    neutral={"first_k_dense_replace": (0,), "num_nextn_predict_layers": (0,)},
    aliases={"num_local_experts": "n_routed_experts"},
)
