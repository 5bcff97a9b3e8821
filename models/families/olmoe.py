"""OLMoE and FlexOlmo: every block has experts, weighed by their softmax as it is; queries and keys are normed over all
their heads. FlexOlmo norms the sublayers' outputs, as OLMo 2 does.

OLMoE's config has no `head_dim`: a head is as wide as the hidden size over the query heads.

Source: HF transformers `configuration_olmoe`, `configuration_flex_olmo` and their modelling code.
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
    not_exportable,
    only_kind,
    post_norm_tensors,
)
from distillcache.models.families.reading.values import Values
from distillcache.models.files.tensors import BlockTensor, Layout


def _read_olmoe(values: Values) -> ModelConfig:
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    if hidden % heads:
        raise values.bad("num_attention_heads", f"a divisor of hidden_size, which is {hidden}")
    if values["head_dim"] not in (None, hidden // heads):
        raise values.bad("head_dim", f"{hidden // heads}: hidden_size over num_attention_heads")
    clip = values.number_or_none("clip_qkv")
    return ModelConfig(**_fields(values), rope=values.rope(), clip_qkv=clip, family="olmoe")


def _read_flex(values: Values) -> ModelConfig:
    return ModelConfig(**_fields(values), rope=values.rope(theta=500_000.0), norms="post", family="flex_olmo")


def _fields(values: Values) -> dict[str, Any]:
    bias = values.flag("attention_bias")
    return common_fields(values, [BlockKind(moe=True)] * values.size("num_hidden_layers")) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "full",
        "moe": MoeConfig(
            num_experts=values.size("num_experts"),
            top_k=values.size("num_experts_per_tok"),
            expert_size=values.size("intermediate_size"),
            renormalise=values.flag("norm_topk_prob"),
        ),
    }


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    if config.num_heads * config.head_dim != config.hidden_size:
        raise not_exportable(
            f"{config.num_heads} query heads of {config.head_dim}, hidden size {config.hidden_size}",
            "heads that are together as wide as the hidden size",
            "keep all query heads",
        )
    return _write(config) | {"clip_qkv": config.clip_qkv}


def _write_flex(config: ModelConfig) -> dict[str, Any]:
    # What is assumed otherwise may lie beyond a small vocabulary.
    return _write(config) | {"pad_token_id": None}


def _write(config: ModelConfig) -> dict[str, Any]:
    if only_kind(config) != BlockKind(moe=True):
        raise not_exportable(str(only_kind(config)), "experts in all blocks, no window", "use another family")
    moe = config.moe_config
    return {
        "intermediate_size": moe.expert_size,
        "attention_bias": config.qkv_bias,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalise,
    }


def _layout(config: ModelConfig) -> Layout:
    norms = norm_tensors() if config.norms == "pre" else post_norm_tensors()
    router = BlockTensor("mlp.gate.weight", "mlp/router", 1)
    return Layout(lambda kind: [*norms, *attention_tensors(config), router, *expert_tensors()])


DEFAULTS = DENSE_DEFAULTS | {
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "norm_topk_prob": False,
}
OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "clip_qkv": None, "num_experts_per_tok": 8, "num_experts": 64},
    read=_read_olmoe,
    write=_write_olmoe,
    layout=_layout,
    aliases={"num_local_experts": "num_experts"},
)
FLEX_OLMO = Family(
    name="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    defaults=DEFAULTS | {"num_experts_per_tok": 5, "num_experts": 7},
    read=_read_flex,
    write=_write_flex,
    layout=_layout,
    aliases={"num_local_experts": "num_experts"},
)
