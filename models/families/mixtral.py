"""Mixtral: softmax over all experts, the chosen weights renormalised; noise on the experts' input in training.

Source: HF transformers `configuration_mixtral`, `modeling_mixtral`.
"""

from typing import Any

from distillcache.models.config import BlockKind, ModelConfig, MoeConfig
from distillcache.models.families.llama import DENSE_DEFAULTS
from distillcache.models.families.reading.family import (
    Family,
    attention_tensors,
    common_fields,
    expert_tensors,
    norm_tensors,
    only_kind,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout


def _read(values: Values) -> ModelConfig:
    kind = BlockKind(values.size_or_none("sliding_window"), moe=True)
    return ModelConfig(
        **common_fields(values, [kind] * values.size("num_hidden_layers")),
        rope=values.rope(theta=1e6),
        moe=MoeConfig(
            num_experts=values.size("num_local_experts"),
            top_k=values.size("num_experts_per_tok"),
            expert_size=values.size("intermediate_size"),
            jitter=values.number_or_zero("router_jitter_noise"),
        ),
        family="mixtral",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe_config
    return {
        "intermediate_size": moe.expert_size,
        "sliding_window": only_kind(config).window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_jitter_noise": moe.jitter,
    }


def _layout(config: ModelConfig) -> Layout:
    router = BlockTensor("block_sparse_moe.gate.weight", "mlp/router", 1)
    experts = expert_tensors("block_sparse_moe.experts", ("w1", "w3", "w2"))
    return Layout(lambda kind: [*norm_tensors(), *attention_tensors(config), router, *experts])


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    defaults=DENSE_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
    },
    read=_read,
    write=_write,
    layout=_layout,
    neutral={"attention_bias": (False, None)},
    aliases={"num_experts": "num_local_experts"},
)
