"""dots.llm1: Qwen3's attention, and DeepSeek-V3's experts behind dense blocks.

Source: HF transformers `configuration_dots1`, `modeling_dots1`.
"""

from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig, plan_layers
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import Family, common_fields, not_exportable
from distillcache.models.families.reading.grouped import (
    dense_then_experts,
    grouped_layout,
    sigmoid_moe,
    sigmoid_moe_keys,
)
from distillcache.models.families.reading.kinds import typed_window_keys, typed_windows
from distillcache.models.families.reading.values import Values


def _read(values: Values) -> ModelConfig:
    first = values.count("max_window_layers")
    windows = typed_windows(values, values.size_or_none("sliding_window"), lambda block: block >= first)
    blocks = zip(dense_then_experts(values), windows, strict=True)
    bias = values.flag("attention_bias")
    return ModelConfig(
        **common_fields(values, [replace(kind, window=window) for kind, window in blocks]),
        rope=values.rope(),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        moe=sigmoid_moe(values, values.size("n_shared_experts")),
        family="dots1",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.qkv_bias != config.output_bias or not config.moe_config.shared_size:
        raise not_exportable(
            "some biases of attention, or no shared expert", "all or none, and a shared expert", "use another family"
        )
    sighted = replace(config, layers=plan_layers([replace(kind, window=None) for kind in config.kinds]))
    return {
        "attention_bias": config.qkv_bias,
        **sigmoid_moe_keys(sighted),
        **typed_window_keys(config),
    }


DOTS1 = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "layer_types": None,
        "first_k_dense_replace": 0,
        "n_routed_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1408,
        "n_shared_experts": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    read=_read,
    write=_write,
    layout=grouped_layout,
    harmless=frozenset({"aux_loss_alpha", "seq_aux", "ep_size"}),
    neutral={
        "scoring_func": ("sigmoid", "noaux_tc"),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "num_nextn_predict_layers": (0,),
        "use_sliding_window": (False,),  # not read: windows are decided by the numbers above
    },
    aliases={"num_local_experts": "n_routed_experts"},
)
